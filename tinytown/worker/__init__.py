"""An agent's process, and what watches over it. Start with `main` for the worker's loop.

`supervisor` notices dead workers and frees what they held.
"""
