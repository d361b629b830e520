"""The vocabulary of a town: states and legal transitions, ids, times, principals, argument types, answers, JSON.

Every room imports it. `schema.py` turns the argument types and the shapes of answers into JSON Schema.
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

LIVE: Final = ('Starting', 'Idle', 'Working', 'Paused', 'Draining')  # a process runs, or will soon
ACCEPTING: Final = ('Starting', 'Idle', 'Working', 'Paused')  # may get tasks
AT_REST: Final = ('Stopped', 'Cold', 'Error')  # no process


# Upper bounds of the histogram buckets for the waiting and running times of tasks, in seconds.
TASK_BOUNDS: Final = (0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)


class Steering(TypedDict):
    """The effect of a verb on an agent: the new state, and the states in which the verb is legal."""

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


_random: Final[list[str]] = []  # unused random ids, in hexadecimal
os.register_at_fork(after_in_child=_random.clear)


def new_id() -> str:
    """A random UUID (version 4, RFC 9562), twenty times cheaper than uuid4()."""
    try:
        h = _random.pop()
    except IndexError:  # two threads may both get here: each adds ids of its own
        more = os.urandom(4096).hex()
        h, *rest = (more[i : i + 32] for i in range(0, len(more), 32))
        _random.extend(rest)
    return f'{h[:8]}-{h[8:12]}-4{h[13:16]}-{"89ab"[int(h[16], 16) & 3]}{h[17:20]}-{h[20:]}'


def is_uuid(text: str) -> bool:
    """Whether a text is an id, in upper or lower case."""
    return re.fullmatch(UUID_PATTERN, text.lower()) is not None


def rfc3339(epoch_seconds: float) -> str:
    """A time as RFC 3339 text, in UTC, with milliseconds."""
    second, millisecond = divmod(round(epoch_seconds * 1e6) // 1000, 1000)
    return f'{_second(second)}.{millisecond:03d}Z'


@lru_cache(maxsize=4)
def _second(epoch_seconds: int) -> str:
    """The time down to the second. Cached, because many times within one second are formatted."""
    return datetime.fromtimestamp(epoch_seconds, UTC).strftime('%Y-%m-%dT%H:%M:%S')


def brief(text: str, limit: int = 160) -> str:
    """The first line of a text, ignoring blank lines, cut to `limit` characters."""
    lines = text.strip().splitlines()
    line = lines[0].strip() if lines else ''
    return line if len(line) <= limit else line[: limit - 1] + '…'


# ------------------------------------------------------------------------------------------------------- callers

Scope = Literal['town.read', 'town.write', 'agent.manage', 'admin']
READ: Final[Scope] = 'town.read'
WRITE: Final[Scope] = 'town.write'
MANAGE: Final[Scope] = 'agent.manage'
ADMIN: Final[Scope] = 'admin'
LOCAL: Final = 'local'  # the name of every caller where authentication is off
ALL_SCOPES: Final = frozenset[Scope]({READ, WRITE, MANAGE, ADMIN})


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: a name for the records, its scopes, and the id and name of the agent it acts as, if any.

    `verified` means that the caller proved with a token that it is this agent; otherwise it only claims so.
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
    """The constraints of an argument type. Lengths are in characters; `pattern` must match the whole text."""

    description: str
    pattern: str = ''
    hint: str = ''  # the pattern in words
    max_length: int = 0
    minimum: int | None = None
    maximum: int | None = None
    max_items: int = 0


# Text for people: no control characters except tab, LF and CR. The classes are written out, because regular
# expressions in other languages disagree on what \s means, and our JSON Schemas are read there.
_CONTROLS: Final = r'\x00-\x08\x0b\x0c\x0e-\x1f\x7f'
_SPACES: Final = r'\t\n\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'
_NOT_BLANK: Final = rf'[{_SPACES}]*[^{_SPACES}{_CONTROLS}][^{_CONTROLS}]*'
AGENT_NAME_PATTERN: Final = r'[A-Za-z0-9][A-Za-z0-9_-]{0,62}'
HOST_PATTERN: Final = r'[A-Za-z0-9][A-Za-z0-9._-]{0,252}'
NAME_HINT: Final = 'a letter or digit, then letters, digits, - or _, at most 63'

NewAgentName = Annotated[
    str, Field('Name of the new agent; unique in the town, ignoring case', AGENT_NAME_PATTERN, NAME_HINT)
]
AgentRef = Annotated[
    str,
    Field(
        'An agent: its name, its id, or a unique prefix of the id (4 characters or more)', AGENT_NAME_PATTERN, NAME_HINT
    ),
]
TaskId = Annotated[str, Field('Id of a task', UUID_PATTERN, 'a UUID in lower case')]
CliName = Annotated[
    str,
    Field(
        'The coding CLI that the agent runs; default: default_cli of the town',
        r'[A-Za-z0-9][A-Za-z0-9._-]{0,62}',
        'a letter or digit, then letters, digits, ., - or _, at most 63',
    ),
]
RoleId = Annotated[
    str,
    Field(
        'Role of the agent: default, worker, reviewer, researcher, runner, or a word of your own',
        r'[a-z0-9][a-z0-9_-]{0,62}',
        'lower-case letters, digits, - or _, at most 63',
    ),
]
Nickname = Annotated[
    str,
    Field('Display name of the agent', r'[^\x00-\x1f\x7f-\x9f]{1,63}', '1 to 63 characters without control characters'),
]
HostName = Annotated[
    str,
    Field(
        'Name of the host whose townhall starts the agent, as in the list of hosts',
        HOST_PATTERN,
        'letters, digits, ., - or _, at most 253',
    ),
]
TaskText = Annotated[
    str,
    Field('The work to do, in plain words', pattern=_NOT_BLANK, hint='text that is not blank', max_length=65536),
]
MessageText = Annotated[
    str, Field('Text of the message', pattern=_NOT_BLANK, hint='text that is not blank', max_length=65536)
]
Outcome = Annotated[
    str,
    Field('The outcome, for people to read', rf'[^{_CONTROLS}]*', 'text without control characters', max_length=65536),
]
Tag = Annotated[
    str,
    Field(
        'A word to find and route tasks by',
        r'[^\x00-\x1f\x7f-\x9f,]{1,63}',
        '1 to 63 characters without commas or control characters',
    ),
]
Tags = Annotated[list[Tag], Field('Words to find and route tasks by', max_items=32)]
MessageId = Annotated[str, Field('Id of a message', UUID_PATTERN, 'a UUID in lower case')]
MessageIds = Annotated[list[MessageId], Field('Ids of the messages to clear', max_items=500)]
MessageKind = Literal['task', 'query', 'info', 'ack']
Kind = Annotated[
    MessageKind,
    Field('Kind of message: task and query are work and start a round; info and ack wait for the next round'),
]
InState = Annotated[TaskState, Field('Only tasks in this state')]
Attempt = Annotated[
    int,
    Field(
        'Number of the attempt that the caller holds; without it, the caller overrides as an operator',
        minimum=1,
        maximum=1_000_000_000,
    ),
]
Rounds = Annotated[int, Field('The worker stops after this many rounds; 0: no limit', minimum=0, maximum=1_000_000)]
Limit = Annotated[int, Field('Maximum number of items to return', minimum=1, maximum=500)]
Cursor = Annotated[
    str,
    Field(
        'Where to continue: next_cursor of the previous page',
        rf'[0-9]{{1,16}}_{UUID_PATTERN}',
        'a value of next_cursor',
    ),
]
InboxCursor = Annotated[
    str,
    Field(
        'Where to continue: next_cursor of the previous page',
        r'[unt]-[0-9]{1,15}-[0-9]{1,15}',
        'a value of next_cursor',
    ),
]
Force = Annotated[bool, Field('End running processes at once, without a grace period')]
Urgent = Annotated[bool, Field('Deliver before all messages that are not urgent')]
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
    trouble: NotRequired[str]  # why it is in Error, or has paused itself
    resumes_at: NotRequired[str]  # when a pause of its own ends


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
    """The constants that the Redis scripts share with Python, as Lua: sets of states, histogram bounds in ms."""

    def table(names: tuple[str, ...]) -> str:
        return '{' + ', '.join(f'{name} = true' for name in names) + '}'

    bounds = ', '.join(f'{round(bound * 1000)}' for bound in TASK_BOUNDS)
    sets = f'local LIVE = {table(LIVE)}\nlocal ACCEPTING = {table(ACCEPTING)}\n'
    return f"{sets}local CONDUCTOR = '{CONDUCTOR_ID}'\nlocal BOUNDS = {{{bounds}}}\n"


Json = dict[str, Any]
_quote: Final = json.encoder.encode_basestring
_encoder: Final = json.JSONEncoder(ensure_ascii=False, separators=(',', ':'))


def to_json(value: Any) -> str:
    """A value as compact JSON."""
    if type(value) is str:
        return _quote(value)
    if type(value) is dict and all(type(item) is str for item in value.values()):
        return '{' + ','.join([f'{_quote(name)}:{_quote(item)}' for name, item in value.items()]) + '}'
    return _encoder.encode(value)  # ten times slower, because it makes a new encoder for each call
