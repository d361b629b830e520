"""What a town can do, one concern a file. Nothing here knows HTTP, MCP or the command line.

Start with `operations`: its table lists everything, and its `call` is the one dispatch.
"""
