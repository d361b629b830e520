"""A round with the official Python SDK, version 2: stdio TOWN | http URL | sse URL, then the mode of the client.

Lists tools, spawns the demo agent, gives it a task, sees the task done, reads a resource, gets a prompt. Prints what it
found as JSON.
"""

import asyncio
import json
import sys

from mcp import Client, StdioServerParameters
from mcp.client.sse import sse_client
from mcp.client.stdio import stdio_client


def target(kind, where, command):
    if kind == 'stdio':
        return stdio_client(
            StdioServerParameters(command=command[0], args=[*command[1:], 'mcp-stdio', '--town', where])
        )
    return sse_client(where) if kind == 'sse' else where


async def round_with(client):
    tools = (await client.list_tools()).tools
    spawned = await client.call_tool('agent_spawn', {'name': 'backend'})
    assert not spawned.is_error, spawned
    progress = []

    async def tell(done, total, message):
        progress.append((done, total, message))

    assigned = await client.call_tool('task.assign', {'agent': 'backend', 'task': 'write a haiku'})
    task = assigned.structured_content['task_id']
    state = ''
    while state != 'completed':
        await client.call_tool('agent_wait', {'agent': 'backend', 'timeout': 2}, progress_callback=tell)
        state = (await client.call_tool('task_get', {'task_id': task})).structured_content['state']
    read = await client.read_resource('tinytown://agents/backend')
    prompt = await client.get_prompt('agent.role_hint', {'agent_name': 'backend'})
    refused = await client.call_tool('agent_get', {'agent': 'worker-99'})
    killed = await client.call_tool('agent_kill', {'agent': 'backend'})
    return {
        'revision': client.protocol_version,
        'tools': len(tools),
        'state': state,
        'agent': json.loads(read.contents[0].text)['name'],
        'prompt': prompt.messages[0].content.text,
        'refused': refused.content[0].text,
        'progress': len(progress),
        'killed': killed.structured_content['status'],
    }


async def main(kind, where, mode, *command):
    async with Client(target(kind, where, command), mode=mode) as client:
        found = await round_with(client)
        if client.protocol_version == '2026-07-28':
            async with client.listen(resource_subscriptions=['tinytown://backlog']) as changes:
                await client.call_tool('backlog_add', {'description': 'tidy up'})
                async for change in changes:
                    found['changed'] = type(change).__name__
                    break
    print(json.dumps(found))


asyncio.run(main(*sys.argv[1:]))
