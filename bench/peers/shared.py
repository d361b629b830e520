"""Shared by the Python peers: settings, and the two operations through the usual asynchronous Redis client."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

PORT = int(sys.argv[1])
SETTINGS: dict[str, Any] = json.loads(Path(sys.argv[2]).read_text())
CONTEXT = ('', '', 'local', SETTINGS['events'])  # the arguments that precede a script's own

Message = TypedDict('Message', {'id': str, 'from': str, 'type': str, 'summary': str})


class Inbox(TypedDict):
    agent: str
    total: int
    urgent: int
    messages: list[Message]


class Assigned(TypedDict):
    task_id: str
    agent_id: str
    agent_name: str


class Town:
    """The two operations. They raise LookupError if the script refuses."""

    def __init__(self) -> None:
        # Without max_connections the client refuses the 101st request at once.
        self.redis = Redis(unix_socket_path=SETTINGS['socket'], decode_responses=True, max_connections=1000)
        self._inbox = self.redis.register_script(SETTINGS['inbox'])
        self._assign = self.redis.register_script(SETTINGS['assign'])

    async def inbox(self, agent: str) -> Inbox:
        name, total, urgent, _, messages = await self._call(self._inbox, agent, 500, '')
        return {'agent': name, 'total': total, 'urgent': urgent, 'messages': json.loads(f'[{messages}]')}

    async def assign(self, agent: str, task: str) -> Assigned:
        task_id = str(uuid.uuid4())
        head = json.dumps({'task_id': task_id, 'description': task})[:-1]
        record = (task_id, head, json.dumps(task), '[]', SETTINGS['conductor'], 3)
        task_id, agent_id, agent_name = await self._call(self._assign, agent, *record)
        return {'task_id': task_id, 'agent_id': agent_id, 'agent_name': agent_name}

    async def _call(self, script: Any, *arguments: str | int) -> list[Any]:
        done, *reply = await script(keys=[SETTINGS['prefix']], args=[*CONTEXT, *arguments])
        if not done:
            raise LookupError(*reply)
        return reply
