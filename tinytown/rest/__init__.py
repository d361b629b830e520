"""The REST front end: a route for every operation, health, metrics, OpenAPI, server-sent events, the dashboard.

Start with `app`.
"""
