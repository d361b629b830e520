"""An agent's worker process, and the supervisor that watches over it.

Start with `main`, the worker's loop. `supervisor` notices dead workers and frees what they held.
"""
