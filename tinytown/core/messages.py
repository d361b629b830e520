"""Operations on messages, to an agent or to the people who run the town (the conductor's mailbox)."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from ..errors import Forbidden, Invalid
from ..model import AgentRef, Everything, InboxCursor, Kind, Limit, MessageIds, MessageText, Urgent, new_id, to_json
from ..state.store import Page, Step, text
from .town import Call

# The `type` of a message in an inbox, by the `kind` that the sender gave. Both are published.
TYPES = {'task': 'task', 'query': 'query', 'info': 'info', 'ack': 'confirmation'}


# One entry of an inbox. `from` is the sender's id; `verified` is true if the sender presented its agent token.
# `summary` is the text of a message, or the start of a queued task's description.
Message = TypedDict(
    'Message',
    {
        'id': str,
        'from': str,
        'type': Literal['task_assign', 'task', 'query', 'info', 'confirmation'],
        'summary': str,
        'verified': NotRequired[bool],
    },
)


class Inbox(TypedDict):
    agent: str
    total: int
    urgent: int
    messages: list[Message]
    next_cursor: NotRequired[str]


class Sent(TypedDict):
    message_id: str
    to_agent: str
    urgent: bool


class Acknowledged(TypedDict):
    agent: str
    removed: int


def send(
    call: Call,
    *,
    to: AgentRef,
    message: MessageText,
    from_: AgentRef | None = None,
    kind: Kind = 'task',
    urgent: Urgent = False,
) -> Step[Sent]:
    """Send a message to an agent, or to `conductor`, the mailbox of the people who run the town.

    A message of kind task or query starts a round of the agent. One of kind info or ack waits for the next round and is
    read there. Urgent messages come first. To have work tracked until it is finished, assign a task instead.
    """
    proof = ',"verified":true' if call.by.verified else ''
    rest = f'","type":"{TYPES[kind]}","summary":{to_json(message)}{proof}}}'
    sender = _own(call, from_, 'speak for') if from_ else call.by.agent_id
    reply = yield call.store.send(to, sender, 'u' if urgent else 'n', new_id(), rest, kind)
    return {'message_id': text(reply[0]), 'to_agent': text(reply[1]), 'urgent': urgent}


def _own(call: Call, agent: str, verb: str) -> str:
    """Returns `agent`. Raises Forbidden if the caller is a different agent: an agent acts only for itself."""
    by = call.by
    mine = agent.lower() in (by.agent_name.lower(), by.agent_id) or (len(agent) >= 4 and by.agent_id.startswith(agent))
    if by.agent_id and not mine:
        raise Forbidden(f"Agent '{by.agent_name}' can't {verb} '{agent}'", code='not-yourself')
    return agent


def inbox(call: Call, *, agent: AgentRef, limit: Limit = 500, cursor: InboxCursor = '') -> Step[Page[Inbox]]:
    """Show what waits in an agent's inbox: urgent messages, other messages, queued tasks. Reading changes nothing."""
    reply = yield call.store.inbox(agent, limit, cursor)
    name, normal, urgent, following, messages = reply
    after = b',"next_cursor":"%b"' % following if following else b''
    head = b'{"agent":"%b","total":%d,"urgent":%d,"messages":[' % (name, normal, urgent)
    return Page(b'%b%b]%b}' % (head, messages, after))


def acknowledge(
    call: Call, *, agent: AgentRef, ids: MessageIds | None = None, all: Everything = False
) -> Step[Acknowledged]:
    """Remove messages from a mailbox: those with the given ids, or all of them. Queued tasks stay.

    People use it to empty the conductor's mailbox. The messages of an agent are removed by its rounds.
    """
    if all == bool(ids):
        raise Invalid(
            'give ids, or all: exactly one of the two', errors=[{'pointer': '/ids', 'detail': 'give ids, or all: true'}]
        )
    reply = yield call.store.ack(_own(call, agent, 'clear the mailbox of'), ids or ())
    return {'agent': text(reply[0]), 'removed': reply[1]}
