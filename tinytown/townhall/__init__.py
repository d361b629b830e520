"""The `townhall` command: builds a server process, runs several of them, and integrates with systemd.

Start with `main`, then `process`.
"""
