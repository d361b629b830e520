"""The prompt of a round, as plain text: `compose` turns the round's task and messages into what the coding CLI reads.

It does no input or output. `worker.main` calls it once a round. Models read these texts: change them with care.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

MAX_BACKLOG: Final = 8  # tasks of the backlog that a prompt lists
MAX_INFORMATION: Final = 20  # messages of kind info that a prompt lists

_ROLES: Final = {
    'worker': 'You carry out tasks: change the code, run the tests, report what you did.',
    'reviewer': 'You review: read the change, run it, say what is wrong and how to fix it. You change nothing.',
    'researcher': 'You research: read, compare, and report with your sources. You change nothing.',
    'runner': 'You run things: builds, tests, scripts. Report what happened, with the output that matters.',
}


@dataclass(frozen=True, slots=True)
class InboxMessage:
    """One message of a round. `sender` is a name or id; `kind` is task, query, info or ack."""

    kind: str
    sender: str
    text: str
    urgent: bool


@dataclass(frozen=True, slots=True)
class Work:
    """The task of a round."""

    id: str
    attempt: int
    description: str
    tags: Sequence[str]


def compose(
    town: str,
    name: str,
    role: str | None,
    work: Work | None,
    messages: Sequence[InboxMessage],
    backlog: Sequence[dict[str, Any]],
    calls_tt: bool = True,
) -> str:
    """Returns the prompt of one round: the task, the messages, fitting tasks of the backlog, and how to report.

    `town` and `name` are the names of the town and the agent; `role` is the agent's `role_id`. A CLI that runs no
    commands (`calls_tt` is False) is not asked to run any.
    """
    parts = [f'You are {name}, an agent of the town {town}.' + (f' {_ROLES[role]}' if role in _ROLES else '')]
    if work:
        tags = f'Tags: {", ".join(work.tags)}.' if work.tags else ''
        parts.append(f'## Task\n\n{work.description}')
        parts.append(f'## About the task\n\nTask {work.id}, attempt {work.attempt}. {tags}'.rstrip())
    parts += _messages(messages)
    if calls_tt:
        parts += _backlog(role, backlog)
        parts.append(_reporting(work))
    return '\n\n'.join(parts) + '\n'


def _messages(messages: Sequence[InboxMessage]) -> list[str]:
    ordered = sorted(messages, key=lambda message: not message.urgent)
    requests = [message for message in ordered if message.kind in ('task', 'query')]
    information = [message for message in ordered if message.kind == 'info']
    confirmations = sum(message.kind == 'ack' for message in ordered)
    parts = []
    if requests:
        lines = [f'- {_kind(message)} from {message.sender}: {message.text}' for message in requests]
        parts.append('## Messages to act on\n\n' + '\n'.join(lines))
    if information:
        lines = [f'- from {message.sender}: {_short(message.text)}' for message in information[:MAX_INFORMATION]]
        if len(information) > MAX_INFORMATION:
            lines.append(f'- and {len(information) - MAX_INFORMATION} more')
        parts.append('## For your information\n\n' + '\n'.join(lines))
    if confirmations:
        parts.append(f'## Confirmations\n\n{confirmations} received.')
    return parts


def _kind(message: InboxMessage) -> str:
    kind = 'a question' if message.kind == 'query' else 'a request'
    return f'urgent: {kind}' if message.urgent else kind


def _short(text: str) -> str:
    line = ' '.join(text.split())
    return line if len(line) <= 300 else line[:299] + '…'


def _backlog(role: str | None, backlog: Sequence[dict[str, Any]]) -> list[str]:
    fitting = [task for task in backlog if fits_role(role, task['tags'])][:MAX_BACKLOG]
    if not fitting:
        return []
    lines = [f'- {task["task_id"]}: {_short(task["description"])}' for task in fitting]
    return ['## Backlog that fits your role (not yours to do; claim with tt backlog claim)\n\n' + '\n'.join(lines)]


def fits_role(role: str | None, tags: Sequence[str]) -> bool:
    """Whether a task of the backlog fits a role: its tags include that role, or no role at all."""
    named = {tag.lower() for tag in tags} & {*_ROLES, role}
    return not named or role in named


def _reporting(work: Work | None) -> str:
    lines = ['## How to report', '']
    if work:
        lines += [
            'When you are done, exit. Your exit status counts: 0 completes the task with the end of your output as its',
            'result; anything else fails it. To report it yourself, run one of these before you exit:',
            '',
            '    tt task complete --result "what was done"',
            '    tt task fail --error "what is in the way"',
            '',
        ]
    lines.append('To ask or tell someone:  tt send NAME "text" --query  (NAME may be conductor, the people in charge).')
    return '\n'.join(lines)
