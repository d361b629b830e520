"""The `tt` command. What is an operation comes from the table; the rest are the commands that act on this machine."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from . import __version__, agents, local
from .client import Backend, Local, Remote
from .errors import TownError, UsageError
from .model import ALL_SCOPES, Principal
from .operations import BY_NAME, TABLE, Op
from .render import clean, render
from .schema import Parameter, validate
from .town import Call, open_town
from .usage import Parser, town_root

_WAIT_STEP: Final = 25  # seconds that one call of agent.wait may take


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 usage or configuration error, 124 `wait` timed out. Never a traceback."""
    try:
        arguments = build_parser().parse_args(argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except UsageError as e:
        return _complain(str(e), 2)
    except TownError as e:
        return _complain(e.detail, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as e:
        return _complain(str(e), 1)


def _complain(what: str, status: int) -> int:
    print(f'tt: {clean(what)}', file=sys.stderr)
    return status


# -------------------------------------------------------------------------------------------------------- arguments


def build_parser() -> Parser:
    """The whole command line. Global options are taken before and after the command."""
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument(
        '--town', metavar='DIR', help='the town (default: the nearest directory upwards that holds one)'
    )
    shared.add_argument('--json', action='store_true', help='answer in JSON')
    shared.add_argument('--url', help='act on the townhall at this URL')
    shared.add_argument('--api-key-file', metavar='F', help='file that holds the key for --url')
    shared.add_argument('--verbose', action='store_true', help='say more')
    top = Parser(prog='tt', parents=[shared], description='Runs a town of AI coding agents.')
    top.add_argument('--version', action='version', version=f'tt {__version__}')
    commands = top.add_subparsers(metavar='COMMAND', required=True, parser_class=Parser)
    groups: dict[str, Any] = {'': commands}

    def add(words: str, summary: str, run: Callable[[argparse.Namespace], int]) -> Parser:
        group, _, word = words.rpartition(' ')
        if group not in groups:
            parent = commands.add_parser(group, help=f'{group} …')
            groups[group] = parent.add_subparsers(metavar='COMMAND', required=True, parser_class=Parser)
        command: Parser = groups[group].add_parser(word, parents=[shared], help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    local.add_commands(add)
    for op in TABLE:
        command = add(op.cli, op.summary, partial(_operate, op=op))
        for parameter in op.parameters.values():
            _add_argument(command, op, parameter)
    _extend(add, groups)
    return top


def _add_argument(command: Parser, op: Op, parameter: Parameter) -> None:
    """One parameter of an operation: required ones by position, the rest as flags."""
    text = parameter.schema.get('description', '')
    if parameter.required:
        optional = _from_environment(op, parameter.name) is not None
        command.add_argument(
            parameter.name,
            metavar=parameter.name.removesuffix('_id').upper(),
            help=text,
            nargs='?' if optional else None,
        )
        return
    if 'enum' in parameter.schema and parameter.name in ('kind', 'action'):
        choice = command.add_mutually_exclusive_group()
        for value in parameter.schema['enum']:
            flag = f'--{value.replace("_", "-")}'
            choice.add_argument(
                flag, dest=parameter.name, action='store_const', const=value, help=f'{parameter.name}: {value}'
            )
        return
    flag = '--' + re.sub(r'(_agent)?_id$', '', parameter.name).replace('_', '-')
    if parameter.schema['type'] == 'boolean':
        command.add_argument(flag, dest=parameter.name, action='store_true', default=None, help=text)
    else:
        name = flag.removeprefix('--').upper().replace('-', '_')
        command.add_argument(flag, dest=parameter.name, metavar=name, help=text)


def _extend(add: Callable[..., Parser], groups: dict[str, Any]) -> None:
    """What some commands can do beyond their row."""
    choices = groups[''].choices
    choices['spawn'].add_argument('--foreground', action='store_true', help='run the worker here, until it stops')
    choices['spawn'].set_defaults(run=_spawn)
    choices['inbox'].add_argument('--all', action='store_true', help='the mailboxes of all agents and the conductor')
    choices['inbox'].set_defaults(run=_inbox)
    choices['wait'].set_defaults(run=_wait)
    reclaim = choices['reclaim']
    reclaim.add_argument('--orphan-tasks', action='store_true', help='unfinished tasks whose agent is gone: list, or …')
    what = reclaim.add_mutually_exclusive_group()
    what.add_argument('--cancel', action='store_const', dest='action', const='cancel', help='… cancel them')
    what.add_argument('--delete', action='store_const', dest='action', const='delete', help='… delete them')
    reclaim.set_defaults(run=_reclaim)
    current = add('task current', 'Show the task that an agent works on', _current_task)
    current.add_argument('agent', metavar='AGENT', nargs='?', help='the agent (default: the one that asks)')


def _from_environment(op: Op, name: str) -> str | None:
    """What stands for a required argument that is left out: inside an agent's run, its own task; the own mailbox."""
    if name == 'task_id' and op.cli.startswith('task '):
        return os.environ.get('TINYTOWN_TASK_ID', '')
    if name == 'agent' and op.cli in ('inbox', 'ack'):
        return os.environ.get('TINYTOWN_AGENT_NAME', 'conductor')
    return None


def collect(arguments: argparse.Namespace, op: Op) -> dict[str, Any]:
    """The arguments of an operation from the command line. Raises UsageError."""
    found: dict[str, Any] = {}
    for name, parameter in op.parameters.items():
        value = getattr(arguments, name, None)
        if value is None and parameter.required:
            value = _from_environment(op, name) or None
            if value is None:
                raise UsageError(f'{name} is missing (see tt {op.cli} --help)')
        if value is not None:
            found[name] = parameter.read(value) if isinstance(value, str) else value
    if 'attempt' in op.parameters and 'attempt' not in found and found['task_id'] == os.environ.get('TINYTOWN_TASK_ID'):
        found['attempt'] = int(os.environ['TINYTOWN_ATTEMPT'])
    return found


# -------------------------------------------------------------------------------------------------------- operations


def backend(arguments: argparse.Namespace) -> Backend:
    """The town that the command line means."""
    if url := getattr(arguments, 'url', None):
        return Remote(url, getattr(arguments, 'api_key_file', None))
    return Local(open_town(town_root(arguments)), caller())


def caller() -> Principal:
    """Who runs `tt`: inside an agent's run that agent, else a person."""
    agent_id, name = os.environ.get('TINYTOWN_AGENT_ID', ''), os.environ.get('TINYTOWN_AGENT_NAME', '')
    return Principal(name or 'tt', ALL_SCOPES, agent_id, name)


def show(arguments: argparse.Namespace, op: Op, answer: dict[str, Any]) -> int:
    colour = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
    return local.say(arguments, answer, '' if local.wants_json(arguments) else render(op.name, answer, colour))


def _operate(arguments: argparse.Namespace, op: Op) -> int:
    return show(arguments, op, backend(arguments).run(op, collect(arguments, op)))


def _spawn(arguments: argparse.Namespace) -> int:
    op = BY_NAME['agent.spawn']
    if not arguments.foreground:
        return _operate(arguments, op)
    given = validate(op.parameters, collect(arguments, op))
    town = open_town(town_root(arguments))
    call = Call(town, caller())
    return local.run_here(
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
    """Waits without end, or for --timeout seconds."""
    op = BY_NAME['agent.wait']
    given = collect(arguments, op)
    limit = given.pop('timeout', None)
    if isinstance(limit, str) or (limit is not None and limit < 0):
        raise UsageError(f'--timeout {limit}: give a number of seconds')
    deadline = time.monotonic() + limit if limit is not None else float('inf')
    town = backend(arguments)
    while True:
        left = max(deadline - time.monotonic(), 0)
        answer = town.run(op, given | {'timeout': int(min(left, _WAIT_STEP)) if left < _WAIT_STEP else _WAIT_STEP})
        if answer['done'] or time.monotonic() >= deadline:
            show(arguments, op, answer)
            return 0 if answer['done'] else 124


def _inbox(arguments: argparse.Namespace) -> int:
    op, town = BY_NAME['agent.inbox'], backend(arguments)
    if not arguments.all:
        return show(arguments, op, town.run(op, collect(arguments, op)))
    names = [agent['name'] for agent in town.run(BY_NAME['agent.list'], {})['agents']]
    boxes = [town.run(op, {'agent': name}) for name in (*names, 'conductor')]
    return local.say(arguments, {'inboxes': boxes}, '\n\n'.join(render(op.name, box, False) for box in boxes))


def _reclaim(arguments: argparse.Namespace) -> int:
    if not arguments.orphan_tasks:
        if arguments.action:
            raise UsageError(f'--{arguments.action} goes with --orphan-tasks')
        return _operate(arguments, BY_NAME['recovery.reclaim_tasks'])
    op = BY_NAME['recovery.orphan_tasks']
    action = 'to_backlog' if arguments.to_backlog else arguments.action or 'list'
    return show(arguments, op, backend(arguments).run(op, {'action': action}))


def _current_task(arguments: argparse.Namespace) -> int:
    name = arguments.agent or os.environ.get('TINYTOWN_AGENT_NAME')
    if not name:
        raise UsageError('which agent? give its name:  tt task current AGENT')
    town = backend(arguments)
    task_id = town.run(BY_NAME['agent.get'], {'agent': name})['current_task']
    if task_id is None:
        raise TownError(f"Agent '{name}' works on no task")
    return show(arguments, BY_NAME['task.get'], town.run(BY_NAME['task.get'], {'task_id': task_id}))


if __name__ == '__main__':
    sys.exit(main())
