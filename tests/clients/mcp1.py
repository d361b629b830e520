"""A round with the official Python SDK, version 1: stdio TOWN | http URL | sse URL. As `mcp2.py`."""

import asyncio
import json
import sys

from mcp import ClientSession, StdioServerParameters
from mcp.client.sse import sse_client
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamablehttp_client
from pydantic import AnyUrl


def target(kind, where, command):
    if kind == 'stdio':
        return stdio_client(
            StdioServerParameters(command=command[0], args=[*command[1:], 'mcp-stdio', '--town', where])
        )
    return sse_client(where) if kind == 'sse' else streamablehttp_client(where)


async def round_with(session, updated):
    begun = await session.initialize()
    tools = (await session.list_tools()).tools
    await session.subscribe_resource(AnyUrl('tinytown://agents'))
    spawned = await session.call_tool('agent_spawn', {'name': 'backend'})
    assert not spawned.isError, spawned
    assigned = await session.call_tool('task_assign', {'agent': 'backend', 'task': 'write a haiku'})
    task = assigned.structuredContent['task_id']
    state = ''
    while state != 'completed':
        await session.call_tool('agent_wait', {'agent': 'backend', 'timeout': 1})
        state = (await session.call_tool('task_get', {'task_id': task})).structuredContent['state']
    read = await session.read_resource(AnyUrl('tinytown://agents/backend'))
    prompt = await session.get_prompt('agent.role_hint', {'agent_name': 'backend'})
    refused = await session.call_tool('agent_get', {'agent': 'worker-99'})
    killed = await session.call_tool('agent_kill', {'agent': 'backend'})
    return {
        'revision': begun.protocolVersion,
        'tools': len(tools),
        'state': state,
        'agent': json.loads(read.contents[0].text)['name'],
        'prompt': prompt.messages[0].content.text,
        'refused': refused.content[0].text,
        'updated': len(updated),
        'killed': killed.structuredContent['status'],
    }


async def main(kind, where, *command):
    updated = []

    async def hear(message):
        if 'ResourceUpdated' in type(getattr(message, 'root', message)).__name__:
            updated.append(message)

    async with (
        target(kind, where, command) as streams,
        ClientSession(streams[0], streams[1], message_handler=hear) as session,
    ):
        print(json.dumps(await round_with(session, updated)))


asyncio.run(main(*sys.argv[1:]))
