"""Who calls, what they may do, how often, and the record of it. Start with `access`."""
