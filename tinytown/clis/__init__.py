"""The coding CLIs that an agent can run: one description each. Start with `registry`."""
