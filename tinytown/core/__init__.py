"""What a town can do, one concern a file. Nothing here knows HTTP, MCP or the command line.

Start with `operations`, whose table lists everything that a client can ask for, then read `dispatch.call`.
"""
