"""The `townhall` command: it puts a server process together, runs several of them, and talks to systemd.

Start with `main`, then `process`.
"""
