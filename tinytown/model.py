"""The nouns of a town: states and their legal transitions, ids, times, callers; and how they are told.

That is the vocabulary of argument types, the shapes of answers, and JSON.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, NotRequired, TypedDict

# ---------------------------------------------------------------------------------------------------------- states

AgentState = Literal['Cold', 'Starting', 'Idle', 'Working', 'Paused', 'Draining', 'Stopped', 'Error']
TaskState = Literal['pending', 'assigned', 'running', 'completed', 'failed', 'cancelled']

LIVE: Final = ('Starting', 'Idle', 'Working', 'Paused', 'Draining')  # a process runs, or is about to
ACCEPTING: Final = ('Starting', 'Idle', 'Working', 'Paused')  # may be given tasks
AT_REST: Final = ('Stopped', 'Cold', 'Error')  # no process


# Upper bounds of the histograms of how long tasks wait and run, in seconds.
TASK_BOUNDS: Final = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)


class Steering(TypedDict):
    """What a verb does to an agent: the state it leads to, and the states from which it is legal."""

    to: AgentState
    legal: tuple[AgentState, ...]


STEERING: Final[dict[str, Steering]] = {
    'interrupt': {'to': 'Paused', 'legal': ('Starting', 'Idle', 'Working')},
    'resume': {'to': 'Idle', 'legal': ('Paused',)},
    'close': {'to': 'Draining', 'legal': ('Starting', 'Idle', 'Working', 'Paused')},
}

# ------------------------------------------------------------------------------------------------------ identities

CONDUCTOR_ID: Final = '00000000-0000-0000-0000-000000000001'
CONDUCTOR_NAMES: Final = frozenset({'supervisor', 'conductor', CONDUCTOR_ID})

UUID_PATTERN: Final = r'[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}'


_random: Final[list[str]] = []  # what the system's generator gave, in hexadecimal, and nobody has used
os.register_at_fork(after_in_child=_random.clear)


def new_id() -> str:
    """A random UUID (version 4, RFC 9562), twenty times cheaper than uuid4()."""
    try:
        h = _random.pop()
    except IndexError:  # of two threads that come here each brings its own
        more = os.urandom(4096).hex()
        h, *rest = (more[i : i + 32] for i in range(0, len(more), 32))
        _random.extend(rest)
    return f'{h[:8]}-{h[8:12]}-4{h[13:16]}-{"89ab"[int(h[16], 16) & 3]}{h[17:20]}-{h[20:]}'


def is_uuid(text: str) -> bool:
    """Whether a text reads as an id, in any case."""
    return re.fullmatch(UUID_PATTERN, text.lower()) is not None


def rfc3339(epoch_seconds: float) -> str:
    """A moment as RFC 3339 in UTC with milliseconds."""
    second, millisecond = divmod(round(epoch_seconds * 1e6) // 1000, 1000)
    return f'{_second(second)}.{millisecond:03d}Z'


@lru_cache(maxsize=4)
def _second(epoch_seconds: int) -> str:
    """The part of a moment that stays the same for a second, in which many are told."""
    return datetime.fromtimestamp(epoch_seconds, UTC).strftime('%Y-%m-%dT%H:%M:%S')


def brief(text: str, limit: int = 160) -> str:
    """The first line of a text that says something, cut to `limit` characters."""
    lines = text.strip().splitlines()
    line = lines[0].strip() if lines else ''
    return line if len(line) <= limit else line[: limit - 1] + '…'


# ------------------------------------------------------------------------------------------------------- callers

Scope = Literal['town.read', 'town.write', 'agent.manage', 'admin']
READ: Final[Scope] = 'town.read'
WRITE: Final[Scope] = 'town.write'
MANAGE: Final[Scope] = 'agent.manage'
ADMIN: Final[Scope] = 'admin'
LOCAL: Final = 'local'  # the name of whoever calls where nobody is asked who they are
ALL_SCOPES: Final = frozenset[Scope]({READ, WRITE, MANAGE, ADMIN})


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls: a name for the records, scopes, and the agent as which it acts, if any (id and name).

    `verified` says that this agent has shown its token; without that it is what the caller says.
    """

    name: str
    scopes: frozenset[Scope]
    agent_id: str = ''
    agent_name: str = ''
    verified: bool = False

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or ADMIN in self.scopes


# ------------------------------------------------------------------------------------------- vocabulary of arguments


@dataclass(frozen=True, slots=True)
class Field:
    """What an argument type adds to its Python type. Lengths are in characters, pattern matches the whole text."""

    description: str
    pattern: str = ''
    hint: str = ''  # the pattern in words
    max_length: int = 0
    minimum: int | None = None
    maximum: int | None = None
    max_items: int = 0


# Text that people read: control characters but tab, LF and CR are refused. Written out, so that every reader of our
# JSON Schemas means the same characters.
_CONTROLS: Final = r'\x00-\x08\x0b\x0c\x0e-\x1f\x7f'
_SPACES: Final = r'\t\n\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'
_SAID: Final = rf'[{_SPACES}]*[^{_SPACES}{_CONTROLS}][^{_CONTROLS}]*'
AGENT_NAME_PATTERN: Final = r'[A-Za-z0-9][A-Za-z0-9_-]{0,62}'
HOST_PATTERN: Final = r'[A-Za-z0-9][A-Za-z0-9._-]{0,252}'
NAME_HINT: Final = 'a letter or digit, then letters, digits, - or _, at most 63'

NewAgentName = Annotated[
    str, Field('Name of the new agent, unique in the town without regard to case', AGENT_NAME_PATTERN, NAME_HINT)
]
AgentRef = Annotated[
    str,
    Field(
        'An agent: its name, its id, or a unique start of the id (4 characters or more)', AGENT_NAME_PATTERN, NAME_HINT
    ),
]
TaskId = Annotated[str, Field('Id of a task', UUID_PATTERN, 'a UUID in lower case')]
CliName = Annotated[
    str,
    Field(
        'Which coding CLI the agent runs; absent: default_cli of the town',
        r'[A-Za-z0-9][A-Za-z0-9._-]{0,62}',
        'a letter or digit, then letters, digits, ., - or _, at most 63',
    ),
]
RoleId = Annotated[
    str,
    Field(
        'What the agent is for: default, worker, reviewer, researcher, runner, or a word of yours',
        r'[a-z0-9][a-z0-9_-]{0,62}',
        'lower-case letters, digits, - or _, at most 63',
    ),
]
Nickname = Annotated[
    str,
    Field('A name for people to see', r'[^\x00-\x1f\x7f-\x9f]{1,63}', '1 to 63 characters without control characters'),
]
HostName = Annotated[
    str,
    Field(
        'The host whose townhall starts it, by its name in the list of hosts',
        HOST_PATTERN,
        'letters, digits, ., - or _, at most 253',
    ),
]
TaskText = Annotated[
    str,
    Field('What is to be done, in plain words', pattern=_SAID, hint='it is not blank', max_length=65536),
]
MessageText = Annotated[str, Field('What the message says', pattern=_SAID, hint='it is not blank', max_length=65536)]
Outcome = Annotated[
    str,
    Field(
        'What came of it, for people to read', rf'[^{_CONTROLS}]*', 'it holds no control characters', max_length=65536
    ),
]
Tag = Annotated[
    str,
    Field(
        'A word for finding and routing',
        r'[^\x00-\x1f\x7f-\x9f,]{1,63}',
        '1 to 63 characters without commas or control characters',
    ),
]
Tags = Annotated[list[Tag], Field('Words for finding and routing', max_items=32)]
MessageId = Annotated[str, Field('Id of a message', UUID_PATTERN, 'a UUID in lower case')]
MessageIds = Annotated[list[MessageId], Field('Which messages to clear', max_items=500)]
MessageKind = Literal['task', 'query', 'info', 'ack']
Kind = Annotated[
    MessageKind, Field('What it is: task or query is work for the next round; info or ack is read when there is one')
]
InState = Annotated[TaskState, Field('Only tasks in this state')]
Attempt = Annotated[
    int,
    Field(
        'The attempt that the caller holds; without it, an override by an operator', minimum=1, maximum=1_000_000_000
    ),
]
Rounds = Annotated[int, Field('Rounds after which the worker stops; 0: no limit', minimum=0, maximum=1_000_000)]
Limit = Annotated[int, Field('Most items to return', minimum=1, maximum=500)]
Cursor = Annotated[
    str,
    Field('Where to go on: next_cursor of the page before', rf'[0-9]{{1,16}}_{UUID_PATTERN}', 'what next_cursor gave'),
]
InboxCursor = Annotated[
    str,
    Field('Where to go on: next_cursor of the page before', r'[unt]-[0-9]{1,15}-[0-9]{1,15}', 'what next_cursor gave'),
]
Force = Annotated[bool, Field('At once, without a grace period for what runs')]
Urgent = Annotated[bool, Field('Before all messages that are not urgent')]
Everything = Annotated[bool, Field('All of them')]
WaitSeconds = Annotated[int, Field('How long to wait, in seconds', minimum=0, maximum=25)]

# ------------------------------------------------------------------------------------------------ shapes of answers


class Agent(TypedDict):
    """An agent as every front end shows it. `last_heartbeat` is RFC 3339."""

    id: str
    name: str
    nickname: str | None
    role_id: str | None
    parent_agent_id: str | None
    spawn_mode: Literal['fresh', 'forkedcontext', 'resumed']
    cli: str
    state: AgentState
    rounds_completed: int
    tasks_completed: int
    inbox_len: int
    urgent_len: int
    current_scope: str | None
    current_task: str | None
    host: str | None
    pid: int | None
    last_heartbeat: str | None
    restarts: int


class AgentPage(TypedDict):
    agents: list[Agent]
    count: int
    next_cursor: NotRequired[str]


class Task(TypedDict):
    """A task as every front end shows it. Times are RFC 3339."""

    task_id: str
    description: str
    tags: list[str]
    state: TaskState
    agent_id: str | None
    agent_name: str | None
    attempt: int
    result: str | None
    error: str | None
    dead_letter: bool
    created_at: str
    started_at: str | None
    ended_at: str | None


class TaskPage(TypedDict):
    tasks: list[Task]
    count: int
    next_cursor: NotRequired[str]


class Assigned(TypedDict):
    task_id: str
    agent_id: str
    agent_name: str


def lua_sets() -> str:
    """What the Redis scripts share with us (sets of states, bounds in ms), as Lua, so that it is written down once."""

    def table(names: tuple[str, ...]) -> str:
        return '{' + ', '.join(f'{name} = true' for name in names) + '}'

    bounds = ', '.join(f'{round(bound * 1000)}' for bound in TASK_BOUNDS)
    sets = f'local LIVE = {table(LIVE)}\nlocal ACCEPTING = {table(ACCEPTING)}\n'
    return f"{sets}local CONDUCTOR = '{CONDUCTOR_ID}'\nlocal BOUNDS = {{{bounds}}}\n"


Json = dict[str, Any]
_quote: Final = json.encoder.encode_basestring
_encoder: Final = json.JSONEncoder(ensure_ascii=False, separators=(',', ':'))


def to_json(value: Any) -> str:
    """A value as JSON, with nothing between its parts."""
    if type(value) is str:
        return _quote(value)
    if type(value) is dict and all(type(each) is str for each in value.values()):
        return '{' + ','.join([f'{_quote(name)}:{_quote(each)}' for name, each in value.items()]) + '}'
    return _encoder.encode(value)  # which makes a new encoder for each, and is ten times as dear
