"""Authentication, rate limits and the audit log. Start with `access`."""
