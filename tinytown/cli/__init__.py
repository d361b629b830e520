"""The `tt` command. Start with `main`."""
