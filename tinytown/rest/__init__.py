"""The REST front end: routes over the table of operations, health, metrics, OpenAPI, event streams, the dashboard.

Start with `app`.
"""
