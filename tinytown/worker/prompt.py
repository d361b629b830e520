"""The prompt of a round, as plain text. Pure: takes what the round holds, gives what the coding CLI reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

MOST_BACKLOG: Final = 8
MOST_INFORMATION: Final = 20

_ROLES: Final = {
    'worker': 'You carry tasks out: change the code, run the tests, report what you did.',
    'reviewer': 'You review: read the change, run it, say what is wrong and how to mend it. You change nothing.',
    'researcher': 'You find things out: read, compare, and report with your sources. You change nothing.',
    'runner': 'You run things: builds, tests, scripts; report what happened, with the output that matters.',
}


@dataclass(frozen=True, slots=True)
class Letter:
    """One message of a round. `sender` is a name or id, `kind` task, query, info or ack."""

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
    letters: Sequence[Letter],
    backlog: Sequence[dict[str, Any]],
) -> str:
    """The prompt of one round: the task, the messages, what waits in the backlog, and how to report."""
    parts = [f'You are {name}, an agent of the town {town}.' + (f' {_ROLES[role]}' if role in _ROLES else '')]
    if work:
        tags = f'Tags: {", ".join(work.tags)}.' if work.tags else ''
        parts.append(f'## Task\n\n{work.description}')
        parts.append(f'## About the task\n\nTask {work.id}, attempt {work.attempt}. {tags}'.rstrip())
    parts += _messages(letters)
    parts += _backlog(role, backlog)
    parts.append(_reporting(work))
    return '\n\n'.join(parts) + '\n'


def _messages(letters: Sequence[Letter]) -> list[str]:
    ordered = sorted(letters, key=lambda letter: not letter.urgent)
    asked = [letter for letter in ordered if letter.kind in ('task', 'query')]
    told = [letter for letter in ordered if letter.kind == 'info']
    confirmed = sum(letter.kind == 'ack' for letter in ordered)
    parts = []
    if asked:
        lines = [f'- {_kind(letter)} from {letter.sender}: {letter.text}' for letter in asked]
        parts.append('## Messages to act on\n\n' + '\n'.join(lines))
    if told:
        lines = [f'- from {letter.sender}: {_short(letter.text)}' for letter in told[:MOST_INFORMATION]]
        if len(told) > MOST_INFORMATION:
            lines.append(f'- and {len(told) - MOST_INFORMATION} more')
        parts.append('## For your information\n\n' + '\n'.join(lines))
    if confirmed:
        parts.append(f'## Confirmations\n\n{confirmed} received.')
    return parts


def _kind(letter: Letter) -> str:
    said = 'a question' if letter.kind == 'query' else 'a request'
    return f'urgent: {said}' if letter.urgent else said


def _short(text: str) -> str:
    line = ' '.join(text.split())
    return line if len(line) <= 300 else line[:299] + '…'


def _backlog(role: str | None, backlog: Sequence[dict[str, Any]]) -> list[str]:
    fitting = [task for task in backlog if fits_role(role, task['tags'])][:MOST_BACKLOG]
    if not fitting:
        return []
    lines = [f'- {task["task_id"]}: {_short(task["description"])}' for task in fitting]
    return ['## Backlog that fits your role (not yours to do; claim with tt backlog claim)\n\n' + '\n'.join(lines)]


def fits_role(role: str | None, tags: Sequence[str]) -> bool:
    """Whether a task of the backlog fits a role: it is tagged with the role, or with none."""
    named = {tag.lower() for tag in tags} & {*_ROLES, role}
    return not named or role in named


def _reporting(work: Work | None) -> str:
    lines = ['## How to report', '']
    if work:
        lines += [
            'When you are done, end. Your exit status counts: 0 completes the task with the end of your output as its',
            'result, anything else fails it. To say it yourself, run one of these before you end:',
            '',
            '    tt task complete --result "what was done"',
            '    tt task fail --error "what is in the way"',
            '',
        ]
    lines.append('To ask or tell someone:  tt send NAME "text" --query  (NAME may be conductor, the people in charge).')
    return '\n'.join(lines)
