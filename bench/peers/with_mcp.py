"""Two tools of a town over MCP with the official Python SDK: stdio TOWN | http TOWN PORT."""

import json
import sys
from pathlib import Path

from mcp.server.mcpserver import MCPServer

from tinytown.core.dispatch import call, encode_answer
from tinytown.core.operations import BY_NAME
from tinytown.core.town import open_town
from tinytown.model import ALL_SCOPES, Principal

server = MCPServer('sdk', log_level='ERROR')
town = open_town(Path(sys.argv[2]))
by = Principal('sdk', ALL_SCOPES)


def answer(name, **arguments):
    return json.loads(encode_answer(town.store.run(call(town, by, BY_NAME[name], arguments))))


@server.tool()
def town_get_status(deep: bool = False, limit: int = 500) -> dict[str, object]:
    """Show the town and its agents."""
    return answer('town.get_status', deep=deep, limit=limit)


@server.tool()
def backlog_add(description: str, tags: list[str] | None = None) -> dict[str, object]:
    """Add a task to the backlog."""
    return answer('backlog.add', description=description, tags=tags or [])


if sys.argv[1] == 'stdio':
    server.run('stdio')
else:
    server.run('streamable-http', host='127.0.0.1', port=int(sys.argv[3]), json_response=True, stateless_http=True)
