"""Agent tokens: each worker process of an agent gets its own, in .tt/agents/<id>.token with mode 0600.

A token contains the agent's id, its instance, and a MAC (RFC 2104) over both; the key of the MAC is a file of the
town's directory. A forged token fails its MAC, so it is refused without asking Redis. The agent's record in Redis
names the current instance, so a token becomes invalid when its process is replaced or ends.

All agents run as one user. Tokens therefore prevent mistakes and mix-ups; they can't stop a hostile process of that
user, which can read every agent's file.
"""

from __future__ import annotations

import hmac
import json
import os
import re
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Final

from ..core import agents
from ..core.town import Call, Town
from ..errors import Conflict, NotFound, Unauthorized
from ..files import write_atomically, write_once
from ..host.town_dir import TownDir
from ..model import READ, UUID_PATTERN, WRITE, Principal, Scope
from ..settings import Config
from ..state.store import Step

TOKEN_PREFIX: Final = 'tta_'
_TOKEN: Final = re.compile(rf'{TOKEN_PREFIX}({UUID_PATTERN})_({UUID_PATTERN})_[A-Za-z0-9_-]{{43}}')


def issue(root: Path, agent_id: str, instance: str) -> None:
    """Writes the token of a new instance; it replaces the previous token."""
    write_atomically(TownDir(root).token(agent_id), _token(key_of(root), agent_id, instance) + '\n', 0o600)


def key_of(root: Path) -> bytes:
    """The town's key for agent tokens. The first call generates and stores it."""
    return write_once(TownDir(root).create().token_key, os.urandom(32).hex()).encode()


def _token(key: bytes, agent_id: str, instance: str) -> str:
    body = f'{TOKEN_PREFIX}{agent_id}_{instance}'
    mac = urlsafe_b64encode(hmac.digest(key, body.encode(), 'sha256')).rstrip(b'=')
    return f'{body}_{mac.decode()}'


def read_token(key: bytes, token: str) -> tuple[str, str]:
    """(agent id, instance) of a token. Raises Unauthorized if its MAC is not one of `key`."""
    match = _TOKEN.fullmatch(token)
    if not match or not hmac.compare_digest(token, _token(key, *match.groups())):
        raise _unknown()
    return match[1], match[2]


def principal(call: Call, agent_id: str, instance: str) -> Step[Principal]:
    """The principal of an agent. Raises Unauthorized unless `instance` is the agent's current one."""
    try:
        agent = yield from agents.look_up(call, agent_id)
    except (NotFound, Conflict):
        raise _unknown() from None
    if agent.instance != instance:
        raise _unknown()
    scopes = scopes_of(call.config, json.loads(agent.json)['role_id'])
    return Principal(f'agent:{agent.name}:{agent.id}', scopes, agent.id, agent.name, verified=True)


def acting_principal(town: Town, person: Principal) -> Principal:
    """The principal for which this process acts: the agent if an agent's run started it, else `person`."""
    agent_id, name = os.environ.get('TINYTOWN_AGENT_ID', ''), os.environ.get('TINYTOWN_AGENT_NAME', '')
    if not (agent_id and name):
        return person
    try:
        role = json.loads(town.store.run(agents.look_up(Call(town, person), agent_id)).json)['role_id']
    except NotFound:
        role = None
    return Principal(name, scopes_of(town.config, role), agent_id, name)


def scopes_of(config: Config, role: str | None) -> frozenset[Scope]:
    """The scopes of an agent with this role (None: no role)."""
    return frozenset({READ, WRITE, *config.agent.role_scopes.get(role or 'default', [])})


def _unknown() -> Unauthorized:
    return Unauthorized('the token does not belong to a running agent', code='invalid-token')
