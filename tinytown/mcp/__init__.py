"""The MCP front end (Model Context Protocol): JSON-RPC over stdio and HTTP, with the table of operations as tools.

Start with `protocol`. `catalog` says what a town offers; `stdio` and `streamable_http` are the transports.
"""
