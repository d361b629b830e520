"""The tokens by which agents are known: each process of an agent has its own, in .tt/agents/<id>.token, mode 0600.

A token names the agent and its instance, and proves both with a MAC under a key that the town keeps in its directory.
Nothing of it is stored elsewhere: the record of the agent says which instance it has now, so a token ends with the
process that it was made for, and a forged one is refused before Redis is asked. All agents run as one user, so this
guards against mistakes and confusion, not against a hostile process of that user, who can read the files of all.
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
    """Writes the token of an agent's process down, in place of the one before."""
    write_atomically(TownDir(root).token(agent_id), _token(key_of(root), agent_id, instance) + '\n', 0o600)


def key_of(root: Path) -> bytes:
    """The key of a town, made when it is first asked for."""
    return write_once(TownDir(root).made().token_key, os.urandom(32).hex()).encode()


def _token(key: bytes, agent_id: str, instance: str) -> str:
    named = f'{TOKEN_PREFIX}{agent_id}_{instance}'
    mac = urlsafe_b64encode(hmac.digest(key, named.encode(), 'sha256')).rstrip(b'=')
    return f'{named}_{mac.decode()}'


def read_token(key: bytes, token: str) -> tuple[str, str]:
    """(agent id, instance) of a token that was made with a key. Raises Unauthorized."""
    match = _TOKEN.fullmatch(token)
    if not match or not hmac.compare_digest(token, _token(key, *match.groups())):
        raise _unknown()
    return match[1], match[2]


def principal(call: Call, agent_id: str, instance: str) -> Step[Principal]:
    """Whom the token of an instance stands for. Raises Unauthorized when the agent has another one now, or none."""
    try:
        found = yield from agents.look_up(call, agent_id)
    except (NotFound, Conflict):
        raise _unknown() from None
    if found.instance != instance:
        raise _unknown()
    scopes = scopes_of(call.config, json.loads(found.json)['role_id'])
    return Principal(f'agent:{found.name}:{found.id}', scopes, found.id, found.name, verified=True)


def acting_principal(town: Town, person: Principal) -> Principal:
    """Who runs this process: inside an agent's run that agent, with the scopes of its role; else a person."""
    agent_id, name = os.environ.get('TINYTOWN_AGENT_ID', ''), os.environ.get('TINYTOWN_AGENT_NAME', '')
    if not (agent_id and name):
        return person
    try:
        role = json.loads(town.store.run(agents.look_up(Call(town, person), agent_id)).json)['role_id']
    except NotFound:
        role = None
    return Principal(name, scopes_of(town.config, role), agent_id, name)


def scopes_of(config: Config, role: str | None) -> frozenset[Scope]:
    """What an agent of a role may do."""
    return frozenset({READ, WRITE, *config.agent.role_scopes.get(role or 'default', [])})


def _unknown() -> Unauthorized:
    return Unauthorized('the token is not that of an agent that runs', code='invalid-token')
