"""The `tt` command: builds the command line, and runs one command.

Most commands are rows of the table of operations (`core.operations`). `lifecycle`, `keys` and `ping` add the others.
`backends` runs an operation, `format` renders its answer, `follow` holds the commands that run until Ctrl-C. Start with
`_commands`, then `_operate`.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from .. import __version__
from ..auth import agent_tokens
from ..console import complain, end_streams, ready_streams
from ..core import agents
from ..core.operations import BY_NAME, OPERATIONS, Op
from ..core.town import Call, Town
from ..errors import Invalid, TownError, UsageError
from ..host.town_dir import TownDir
from ..model import ALL_SCOPES, Principal
from ..schema import Parameter, validate
from . import keys, lifecycle, ping
from .backends import Backend, Local, Remote
from .format import format_answer
from .parser import CommandSpec, Parser, argument, note, open_meant

_WAIT_STEP: Final = 25  # seconds that one call of agent.wait takes at most

# The headings of `tt --help`. An operation is listed under the first part of its name.
_TOPICS: Final = {
    'town': 'The town',
    'agent': 'Agents',
    'task': 'Tasks',
    'backlog': 'Backlog',
    'message': 'Messages',
    'deadletter': 'Dead letters',
    'recovery': 'Recovery',
    'events': 'Watching',
    'access': 'Access',
}


def main(argv: list[str] | None = None) -> int:
    """Runs `tt`. Never prints a traceback.

    Exit status: 0 done, 1 failed, 2 usage or configuration error, 124 `wait` timed out, 130 interrupted.
    """
    ready_streams()
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1  # the reader closed the pipe, as `head` does
    except Exception as e:
        return complain('tt', e)
    finally:
        end_streams()


def _run(argv: list[str] | None) -> int:
    try:
        arguments = build_parser(_select(argv)).parse_args(argv)
    except SystemExit:
        return 0  # argparse answered --help or --version; errors raise UsageError instead
    status: int = arguments.run(arguments)
    return status


# -------------------------------------------------------------------------------------------------------- arguments


def _select(argv: list[str] | None) -> list[CommandSpec]:
    """The command that `argv` names, so that only its parser is built, because building all is slow.

    All commands if it names none, for the help and for error messages.
    """
    commands = list(_commands())
    try:
        words = _shared().parse_known_args(argv)[1]
    except UsageError:
        return commands
    return [each for each in commands if words[: each.words.count(' ') + 1] == each.words.split()] or commands


def build_parser(commands: Iterable[CommandSpec] | None = None) -> Parser:
    """The parser of these commands, by default of all. It takes the shared options before and after the command."""
    commands = list(_commands() if commands is None else commands)
    top = Parser(
        prog='tt',
        usage='tt [OPTION …] COMMAND …',
        parents=[_shared()],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_overview(commands),
        epilog='tt COMMAND --help explains a command. Options may stand before or after it.',
    )
    top.add_argument('--version', action='version', version=f'tt {__version__}', help='show the version and exit')
    groups: dict[str, Any] = {
        '': top.add_subparsers(metavar='COMMAND', required=True, parser_class=Parser, prog='tt', help=argparse.SUPPRESS)
    }
    for command in commands:
        group, _, word = command.words.rpartition(' ')
        if group not in groups:
            parent = groups[''].add_parser(group, parents=[_shared()])
            groups[group] = parent.add_subparsers(
                metavar='COMMAND', required=True, parser_class=Parser, prog=f'tt {group}', title='commands'
            )
        summary = command.summary
        parser = groups[group].add_parser(word, parents=[_shared()], help=_clipped(summary), description=summary)
        parser.set_defaults(run=command.run)
        for add in command.takes:
            add(parser)
    return top


@cache
def _shared() -> Parser:
    """The options of every command."""
    shared = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument(
        '--town', metavar='DIR', help='directory of the town (default: the nearest one upwards that holds a town)'
    )
    shared.add_argument('--json', action='store_true', help='answer in JSON')
    shared.add_argument('--url', help='act on the townhall at this URL')
    shared.add_argument('--api-key-file', metavar='F', help='file that holds the key for --url')
    shared.add_argument('--verbose', action='store_true', help='show which town the command acts on')
    return shared


def _commands() -> Iterator[CommandSpec]:
    """All commands."""
    yield from lifecycle.town_commands()
    extras = _extras()
    for op in OPERATIONS:
        run, *more = extras.get(op.cli, (None,))
        takes = (partial(_add_parameters, op=op), *more)
        yield CommandSpec(op.name.partition('.')[0], op.cli, op.summary, run or partial(_operate, op=op), takes)
    yield CommandSpec('events', 'top', 'Show the agents and what they do, as it happens', _top)
    agent = argument('agent', metavar='AGENT', nargs='?', help='the agent (default: the one in whose run tt is called)')
    yield CommandSpec('task', 'task current', 'Show the task that an agent works on', _current_task, (agent,))
    yield lifecycle.worker_command()
    yield from keys.key_commands()
    yield ping.ping_command()


def _clipped(summary: str) -> str:
    """The first clause of a summary, short enough for one line in the list of commands."""
    line = re.split(r'[.:;](?= |$)', summary)[0]
    if len(line) > 58:
        line = re.split(r',| \(', line)[0]
    return line if len(line) <= 58 else line[:57].rpartition(' ')[0] + ' …'


def _overview(commands: list[CommandSpec]) -> str:
    """The description in `tt --help`: all commands with their summaries, by topic."""
    parts = ['Runs a town of AI coding agents.']
    for topic, title in _TOPICS.items():
        lines = [f'  {command.words:19} {_clipped(command.summary)}' for command in commands if command.topic == topic]
        parts.append('\n'.join([f'{title}:', *lines]))
    return '\n\n'.join(parts)


def _add_parameters(command: Parser, op: Op) -> None:
    for parameter in op.parameters.values():
        _add_argument(command, op, parameter)


def _add_argument(command: Parser, op: Op, parameter: Parameter) -> None:
    """Adds a parameter of an operation: required ones by position, the others as flags."""
    schema, spelling = parameter.schema, _spelling(parameter)
    text = _explanation(schema).replace('%', '%%')
    if parameter.required:
        optional = _from_environment(op, parameter.name) is not None
        command.add_argument(parameter.name, metavar=spelling, help=text, nargs='?' if optional else None)
    elif _is_choice(parameter):
        choice = command.add_mutually_exclusive_group()
        for value in schema['enum']:
            flag, text = f'--{value.replace("_", "-")}', f'{parameter.name}: {value}'
            text += ' (the default)' if value == schema.get('default') else ''
            choice.add_argument(flag, dest=parameter.name, action='store_const', const=value, help=text)
    elif schema['type'] == 'boolean':
        command.add_argument(spelling, dest=parameter.name, action='store_true', default=None, help=text)
    else:
        name = spelling.removeprefix('--').upper().replace('-', '_')
        action = _Join if schema['type'] == 'array' else 'store'
        command.add_argument(spelling, dest=parameter.name, metavar=name, help=text, action=action)


class _Join(argparse.Action):
    """A list option: its items are separated by commas, and the option may be repeated."""

    def __call__(self, _parser: Any, arguments: argparse.Namespace, text: Any, _flag: str | None = None) -> None:
        before = getattr(arguments, self.dest)
        setattr(arguments, self.dest, f'{before},{text}' if before else text)


def _is_choice(parameter: Parameter) -> bool:
    """Whether the values of a parameter are flags themselves, like --query and --info."""
    return 'enum' in parameter.schema and parameter.name in ('kind', 'action')


def _spelling(parameter: Parameter) -> str:
    """The name of a parameter on the command line: TASK, --max-rounds."""
    if parameter.required:
        return parameter.name.removesuffix('_id').upper()
    return '--' + re.sub(r'(_agent)?_id$', '', parameter.name).replace('_', '-')


def _explanation(schema: dict[str, Any]) -> str:
    """The help text of a parameter."""
    if description := schema.get('description', ''):
        return str(description)
    return f'one of {", ".join(schema["enum"])}' if 'enum' in schema else ''


def _extras() -> dict[str, tuple[Any, ...]]:
    """What some commands add to their row: the function that runs them (None: `_operate`), and further arguments."""
    return {
        'spawn': (_spawn, argument('--foreground', action='store_true', help='run the worker here, until it stops')),
        'inbox': (
            _inbox,
            argument('--all', action='store_true', help='show the mailboxes of all agents and the conductor'),
        ),
        'wait': (_wait,),
        'reclaim': (_reclaim, _add_orphan_flags),
        'events': (
            _events,
            argument('-f', '--follow', action='store_true', help='go on with new events as they happen, until Ctrl-C'),
            argument('--since', metavar='WHEN', help='only events since then: an age (10m, 2h) or a time'),
            argument('--count', dest='limit', metavar='N', help='show at most N events'),
        ),
        'history': (None, argument('-n', dest='limit', metavar='N', help='number of events (default: 50)')),
        'logs': (
            _logs,
            argument('-n', dest='tail', metavar='N', help='show the last N lines (default: 100)'),
            argument('-f', '--follow', action='store_true', help='go on as the log grows, until Ctrl-C'),
        ),
        'status': (
            _status,
            argument('--watch', action='store_true', help='refresh the status at each event, until Ctrl-C'),
        ),
    }


def _add_orphan_flags(reclaim: Parser) -> None:
    reclaim.add_argument(
        '--orphan-tasks',
        action='store_true',
        help='list unfinished tasks whose agent is gone or does not run; with --to-backlog, return them',
    )
    action = reclaim.add_mutually_exclusive_group()
    action.add_argument(
        '--cancel', action='store_const', dest='action', const='cancel', help='with --orphan-tasks: cancel them'
    )
    action.add_argument(
        '--delete', action='store_const', dest='action', const='delete', help='with --orphan-tasks: delete them'
    )


def _from_environment(op: Op, name: str) -> str | None:
    """The default of a required argument, None if it has none.

    In an agent's run these are the task of the run, and the mailbox of the agent; elsewhere the conductor's mailbox.
    """
    if name == 'task_id' and op.cli.startswith('task '):
        return os.environ.get('TINYTOWN_TASK_ID', '')
    if name == 'agent' and op.cli in ('inbox', 'ack'):
        return os.environ.get('TINYTOWN_AGENT_NAME', 'conductor')
    return None


def collect(arguments: argparse.Namespace, op: Op) -> dict[str, Any]:
    """The valid arguments of an operation from the command line. Raises UsageError."""
    values: dict[str, Any] = {}
    for name, parameter in op.parameters.items():
        value = getattr(arguments, name, None)
        if value is None and parameter.required:
            value = _from_environment(op, name) or None
            if value is None:
                raise UsageError(f'{_spelling(parameter)} is missing (see tt {op.cli} --help)')
        if value is not None:
            values[name] = parameter.read(value) if isinstance(value, str) else value
    own_task = os.environ.get('TINYTOWN_TASK_ID')
    if 'attempt' in op.parameters and 'attempt' not in values and values['task_id'] == own_task:
        values['attempt'] = op.parameters['attempt'].read(os.environ.get('TINYTOWN_ATTEMPT', ''))
    try:
        validate(op.parameters, values)
    except Invalid as e:
        error = (e.errors or [{'pointer': '/', 'detail': e.detail}])[0]
        parameter = op.parameters[error['pointer'].split('/')[1]]
        raise UsageError(f'{_spelling(parameter)}: {error["detail"]} (see tt {op.cli} --help)') from None
    return values


# -------------------------------------------------------------------------------------------------------- operations


def backend(arguments: argparse.Namespace) -> Backend:
    """The town that the command line names: a `Remote` with --url, else a `Local`. Raises UsageError, TownError."""
    url, key_file = getattr(arguments, 'url', None), getattr(arguments, 'api_key_file', None)
    if url is None:
        if key_file:
            raise UsageError('--api-key-file goes with --url')
        town = open_meant(arguments)
        return Local(town, local_principal(town))
    if getattr(arguments, 'town', None):
        raise UsageError('give either --town or --url, not both')
    note(arguments, f'townhall at {url}')
    return Remote(url, key_file or _own_token())


def local_principal(town: Town) -> Principal:
    """The principal for which `tt` acts: the agent in whose run it is called, else a person with all scopes."""
    return agent_tokens.acting_principal(town, Principal('tt', ALL_SCOPES))


def _own_token() -> str | None:
    """The token file of the agent in whose run `tt` is called; None outside of a run."""
    root, agent_id = os.environ.get('TINYTOWN_TOWN', ''), os.environ.get('TINYTOWN_AGENT_ID', '')
    file = TownDir(Path(root)).token(agent_id)
    return str(file) if root and agent_id and file.exists() else None


def print_answer(arguments: argparse.Namespace, op: Op, answer: dict[str, Any]) -> int:
    """Prints the answer of an operation, as text or JSON. Returns exit status 0."""
    colour = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
    return lifecycle.report(
        arguments, answer, '' if lifecycle.wants_json(arguments) else format_answer(op.name, answer, colour)
    )


def _operate(arguments: argparse.Namespace, op: Op) -> int:
    return print_answer(arguments, op, backend(arguments).run(op, collect(arguments, op)))


# `follow` is imported late: it imports the modules for terminals, which most commands do not need.


def _events(arguments: argparse.Namespace) -> int:
    from . import follow

    op = BY_NAME['events.list']
    if arguments.since is not None:
        if arguments.after is not None:
            raise UsageError('give --since or --after, not both')
        arguments.after = follow.since(arguments.since, time.time())
    filters = collect(arguments, op)
    if not arguments.follow:
        return print_answer(arguments, op, follow.read_events(backend(arguments), filters))
    return follow.follow_events(arguments, backend(arguments), filters)


def _logs(arguments: argparse.Namespace) -> int:
    op = BY_NAME['agent.logs']
    if not arguments.follow:
        return _operate(arguments, op)
    from . import follow

    return follow.follow_log(arguments, backend(arguments), collect(arguments, op))


def _status(arguments: argparse.Namespace) -> int:
    op = BY_NAME['town.get_status']
    if not arguments.watch:
        return _operate(arguments, op)
    from . import follow

    return follow.watch_status(arguments, backend(arguments), collect(arguments, op))


def _top(arguments: argparse.Namespace) -> int:
    from . import follow

    return follow.watch_top(arguments, backend(arguments))


def _spawn(arguments: argparse.Namespace) -> int:
    op = BY_NAME['agent.spawn']
    if not arguments.foreground:
        return _operate(arguments, op)
    given = validate(op.parameters, collect(arguments, op))
    if given.get('host'):
        raise UsageError('--foreground runs the worker here; leave --host out')
    town = open_meant(arguments)
    call = Call(town, local_principal(town))
    return lifecycle.run_here(
        town,
        lambda start: agents.enlist(
            call,
            given['name'],
            given.get('cli'),
            given.get('role_id'),
            given.get('nickname'),
            given.get('parent_agent_id'),
            given.get('max_rounds'),
            start,
        ),
    )


def _wait(arguments: argparse.Namespace) -> int:
    """Waits without a limit, or for --timeout seconds, in calls of at most _WAIT_STEP seconds."""
    op = BY_NAME['agent.wait']
    limit, arguments.timeout = arguments.timeout, None
    if limit is not None and not re.fullmatch(r'[0-9]{1,9}', limit):
        raise UsageError(f'--timeout {limit}: give a whole number of seconds')
    given, town = collect(arguments, op), backend(arguments)
    deadline = time.monotonic() + int(limit) if limit is not None else math.inf
    while True:
        left = max(deadline - time.monotonic(), 0)
        answer = town.run(op, given | {'timeout': math.ceil(min(left, _WAIT_STEP))})
        if answer['done'] or time.monotonic() >= deadline:
            print_answer(arguments, op, answer)
            return 0 if answer['done'] else 124


def _inbox(arguments: argparse.Namespace) -> int:
    op = BY_NAME['agent.inbox']
    if not arguments.all:
        return _operate(arguments, op)
    if arguments.agent or arguments.limit or arguments.cursor:
        raise UsageError('--all shows every mailbox; give it without an agent, --limit and --cursor')
    town = backend(arguments)
    boxes = [town.run(op, {'agent': name}) for name in (*_all_agents(town), 'conductor')]
    return lifecycle.report(
        arguments, {'inboxes': boxes}, '\n\n'.join(format_answer(op.name, box, False) for box in boxes)
    )


def _all_agents(town: Backend) -> list[str]:
    """The names of all agents, page by page."""
    names: list[str] = []
    cursor: dict[str, Any] = {}
    while True:
        page = town.run(BY_NAME['agent.list'], cursor)
        names += [agent['name'] for agent in page['agents']]
        if not page.get('next_cursor'):
            return names
        cursor = {'cursor': page['next_cursor']}


def _reclaim(arguments: argparse.Namespace) -> int:
    if not arguments.orphan_tasks:
        if arguments.action:
            raise UsageError(f'--{arguments.action} goes with --orphan-tasks')
        return _operate(arguments, BY_NAME['recovery.reclaim_tasks'])
    if arguments.to or getattr(arguments, 'from') or (arguments.to_backlog and arguments.action):
        raise UsageError('--orphan-tasks goes with one of --to-backlog, --cancel and --delete, and nothing else')
    op = BY_NAME['recovery.orphan_tasks']
    action = 'to_backlog' if arguments.to_backlog else arguments.action or 'list'
    return print_answer(arguments, op, backend(arguments).run(op, {'action': action}))


def _current_task(arguments: argparse.Namespace) -> int:
    name = arguments.agent or os.environ.get('TINYTOWN_AGENT_NAME')
    if not name:
        raise UsageError('which agent? give its name:  tt task current AGENT')
    town = backend(arguments)
    task_id = town.run(BY_NAME['agent.get'], {'agent': name})['current_task']
    if task_id is None:
        raise TownError(f"Agent '{name}' works on no task")
    return print_answer(arguments, BY_NAME['task.get'], town.run(BY_NAME['task.get'], {'task_id': task_id}))


if __name__ == '__main__':
    sys.exit(main())
