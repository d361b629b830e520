"""The MCP front end: JSON-RPC over stdio and HTTP, with a catalog made from the table of operations.

Start with `protocol`.
"""
