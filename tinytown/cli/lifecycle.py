"""The commands of `tt` that act on this machine: make, start, stop, check and configure a town, and run a worker.

Start with `town_commands`. `main` registers the commands; the other modules of `cli` print answers with `report`.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from .. import config as configuration
from .. import trust
from ..clis import registry
from ..console import clean
from ..core import agents
from ..core.hosts import claim_host
from ..core.town import Call, Town, join, open_town
from ..errors import TownError, UsageError
from ..files import open_own, write_atomically
from ..host import managed_redis, report_spool
from ..host.processes import (
    GRACE_SECS,
    INSTANCE_VARIABLE,
    identify,
    name_host,
    python,
    python_path,
    reap,
    start_detached,
    stop_tree,
    this_host,
    verdict,
)
from ..host.town_dir import TownDir
from ..host.townhalls import reload_townhalls, running_townhalls, stop_townhalls
from ..model import ALL_SCOPES, Principal
from ..redaction import masked
from ..settings import Config
from ..state.endpoints import read_url
from ..state.store import Step
from ..toml_edit import change, to_toml
from .format import as_json, counted
from .parser import CommandSpec, acts_here, argument, open_meant, town_root

TOWNHALL_START_SECS: Final = 10.0
# Settings that have a flag of `tt init`, with the flag.
_INIT_FLAGS: Final = {'default_cli': 'cli', 'redis.url': 'redis_url', 'host': 'host'}
# Variables of an agent's run. `tt start` removes them, so that a townhall started in a run does not act as that agent.
_AGENTS_OWN: Final = frozenset({'TINYTOWN_AGENT_ID', 'TINYTOWN_AGENT_NAME', 'TINYTOWN_TASK_ID', 'TINYTOWN_ATTEMPT'})


def town_commands() -> Iterator[CommandSpec]:
    """The commands that make, start, stop, check and configure a town."""
    flags = (
        argument('--name', help='name of the town (default: that of the directory)'),
        argument('--cli', metavar='NAME', help='default_cli: the coding CLI of agents that are spawned without --cli'),
        argument('--redis-url', metavar='URL', help='redis.url: a Redis of your own, which several hosts may share'),
        argument('--host', metavar='NAME', help="host: name of this host (default: the system's host name)"),
        argument('--join', action='store_true', help='make this directory a further host of the town in that Redis'),
    )
    yield CommandSpec('town', 'init', 'Make a town in this directory', _init, flags)
    yield CommandSpec('town', 'start', 'Start Redis and townhall in the background', _start)
    redis = argument('--redis', action='store_true', help='also stop the managed Redis')
    yield CommandSpec('town', 'stop', 'Stop townhall and the workers', _stop, (redis,))
    fix = argument('--fix', action='store_true', help='mend what is found')
    yield CommandSpec('town', 'doctor', 'Find processes, records and tasks that do not fit together', _doctor, (fix,))
    key = argument('key', nargs='?', help='a setting, such as townhall.rest_port')
    value = argument('value', nargs='?', help='its new value')
    yield CommandSpec('town', 'config', 'Show the configuration, or show or change one setting', _config, (key, value))


def worker_command() -> CommandSpec:
    """The command `tt worker`."""
    name = argument('name', metavar='NAME', help='an agent that has no process')
    return CommandSpec('agent', 'worker', 'Run the worker of an agent here, in the foreground', _worker, (name,))


def wants_json(arguments: argparse.Namespace) -> bool:
    return bool(getattr(arguments, 'json', False))


def report(arguments: argparse.Namespace, answer: dict[str, Any], sentence: str) -> int:
    """Prints the result of a command: `answer` as JSON with --json, else `sentence`. Returns exit status 0."""
    unicode = sys.stdout.encoding.lower() in ('utf-8', 'utf8')
    print(as_json(answer, not unicode) if wants_json(arguments) else sentence)
    return 0


# ----------------------------------------------------------------------------------------------------------- town


def _init(arguments: argparse.Namespace) -> int:
    acts_here(arguments)
    given_root = getattr(arguments, 'town', None)
    root = Path(given_root or Path.cwd()).expanduser().resolve()
    file = root / configuration.FILE
    given = {path: getattr(arguments, flag) for path, flag in _INIT_FLAGS.items()}
    given = {path: value for path, value in given.items() if value is not None}
    if os.path.lexists(file):
        if arguments.join and not given and arguments.name is None:
            return _join(arguments, root)
        raise UsageError(f'{root} holds a town already; see  tt status --town {root}')
    name = configuration.derive_name(root) if arguments.name is None else arguments.name
    configuration.find_setting('name', '--name').check(name, '--name')
    for path, value in given.items():
        flag = f'--{_INIT_FLAGS[path].replace("_", "-")}'
        _check_url(path, configuration.find_setting(path, flag).check(value, flag))
    narrowed = _make_root(root)
    mode = 0o600 if 'redis.url' in given else 0o644  # redis.url may hold a password
    write_atomically(file, configuration.template(name, given), mode)
    write_atomically(TownDir(root).create().gitignore, '*\n')
    for remark in (narrowed, _warn_above(root)):
        if remark:
            print(clean(f'tt: {remark}'), file=sys.stderr)
    if arguments.join:
        try:
            return _join(arguments, root)
        except BaseException:
            file.unlink()
            raise
    start = f'tt start --town {given_root}' if given_root else 'tt start'
    return report(arguments, {'name': name, 'root': str(root)}, f'Made the town {name} in {root}. Start it:  {start}')


def _make_root(root: Path) -> str:
    """Makes the directory of a new town, or makes sure that an existing one may hold a town. Raises UsageError.

    Only its owner may write to it, whatever the umask is, unless the user trusts it as it is. Returns a remark if an
    existing directory was narrowed to that, else ''.
    """
    mask = os.umask(0o077)
    os.umask(mask | 0o022)
    try:
        root.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(mask)
    uid, status = trust.owner_for_root(root), root.stat()
    if trust.is_trusted(root, uid, os.environ):
        return ''
    is_narrowed = status.st_uid == uid and trust.shared_mode(root) and not status.st_mode & stat.S_ISVTX
    if is_narrowed:
        root.chmod(stat.S_IMODE(status.st_mode) & ~0o022)
    trust.check_town(root, uid)
    return f'others could change {root}; did  chmod go-w {root}' if is_narrowed else ''


def _warn_above(root: Path) -> str:
    """A remark if every user may write to a directory above a new town; '' if none can, or if the town is trusted."""
    if trust.is_trusted(root, trust.owner_for_root(root), os.environ):
        return ''
    for above in root.parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH:
            can = 'add files' if mode & stat.S_ISVTX else 'move this town away'
            return f'note: every user of this machine may write to {above}, above this town, and {can} there'
    return ''


def _join(arguments: argparse.Namespace, root: Path) -> int:
    town = join(root, lambda town: town.store.call(claim_host(town.store, root)))
    sentence = (
        f'{root} belongs to the town {town.name} now, as its host {this_host()}. Start it:  tt start --town {root}'
    )
    return report(arguments, {'name': town.name, 'root': str(root), 'host': this_host()}, sentence)


def _start(arguments: argparse.Namespace) -> int:
    town = open_meant(arguments)
    root = town.root
    for _, process, url in running_townhalls(root):
        if verdict(process) == 'alive':
            answer = {'url': url, 'started': False, 'pid': process.pid}
            return report(arguments, answer, f'{town.name} is open already on {url}')
    log = TownDir(root).townhall_log
    offset = log.stat().st_size if log.exists() else 0
    env = {name: value for name, value in os.environ.items() if name not in _AGENTS_OWN}
    argv = python('tinytown.townhall', 'rest', '--town', str(root))
    pid = start_detached(argv, root, env | {'PYTHONPATH': python_path()}, log)
    url = _await_townhall(root, pid, log, offset)
    return report(
        arguments, {'url': url, 'started': True, 'pid': pid}, f'{town.name} is open on {url}. Try:  tt status'
    )


def _await_townhall(root: Path, pid: int, log: Path, offset: int) -> str:
    """Waits until townhall process `pid` listens, and returns its URL.

    Raises TownError if it ends, or takes too long; the message is the last line of its log, which begins at `offset`.
    """
    deadline = time.monotonic() + TOWNHALL_START_SECS
    while time.monotonic() < deadline:
        for _, process, url in running_townhalls(root):
            if process.pid == pid:
                return url
        reap()
        if verdict(identify(pid)) != 'alive' or not identify(pid).start:
            break
        select.select([], [], [], 0.02)
    with os.fdopen(open_own(log, os.O_RDONLY), encoding='utf-8', errors='replace') as lines:
        lines.seek(offset)
        logged = lines.read().strip().splitlines()
    raise TownError(_message(logged[-1]) if logged else f'townhall did not start; see {log}')


def _message(line: str) -> str:
    """The message in a line of the log, in either format."""
    try:
        return str(json.loads(line)['message'])
    except (ValueError, LookupError, TypeError):
        return line.removeprefix('townhall: ')


def _stop(arguments: argparse.Namespace) -> int:
    root = town_root(arguments)
    config = configuration.load(root)
    name_host(config.host)
    townhalls, left = stop_townhalls(root, config)
    stopped, others, failed = _stop_workers(root, config)
    left += failed
    redis = arguments.redis and managed_redis.stop_redis(root)
    answer = {'townhalls': townhalls, 'agents': stopped, 'left': left, 'redis': redis}
    answer |= {'others': others} if others else {}
    parts = [counted(townhalls, 'townhall'), counted(len(stopped), 'worker'), *(['Redis'] if redis else [])]
    parts[2:2] = [f'{counted(others, "worker")} without a record in Redis'] if others else []
    sentence = f'Stopped {", ".join(parts[:-1])} and {parts[-1]}.'
    report(arguments, answer, '\n'.join([sentence, *left]))
    return 1 if left else 0


def _stop_workers(root: Path, config: Config) -> tuple[list[str], int, list[str]]:
    """Stops the workers of this directory.

    Returns the names of stopped agents that Redis has records of, the number of other stopped workers, and a message
    for each failure.
    """
    names: list[str] = []
    left: list[str] = []
    try:
        if config.redis.url or managed_redis.socket_path(root).exists():
            names, left = _stop_recorded(root)
    except (TownError, UsageError) as e:
        left = [f'{e}']
    others = 0
    for instance, process in report_spool.workers(root).items():
        if instance != os.environ.get(INSTANCE_VARIABLE):
            pids = stop_tree(process, instance)
            left += [f'Processes {pids} could not be ended; they may belong to another user'] if pids else []
            others += not pids
    return names, others, left


def _stop_recorded(root: Path) -> tuple[list[str], list[str]]:
    """Stops the workers of this directory that Redis has records of, even if this host had another name before.

    Returns the names of stopped agents, and a message for each failure.
    """
    town = open_town(root)
    call = Call(town, Principal('tt', ALL_SCOPES))

    def stop_all() -> Step[tuple[list[str], list[str]]]:
        names, left = [], []
        for agent in (yield from agents.of_this_directory(call)):
            try:
                yield from agents.stop_process(call, agent, 'the town was stopped', GRACE_SECS)
                names.append(agent.name)
            except TownError as e:
                left.append(e.detail)
        return names, left

    return town.store.run(stop_all())


def _doctor(arguments: argparse.Namespace) -> int:
    from . import doctor  # late: other commands do not need it

    town = open_meant(arguments)
    call = Call(town, Principal('tt', ALL_SCOPES))
    findings = doctor.examine(call, bool(running_townhalls(town.root)))
    if arguments.fix:
        findings = [doctor.mend(finding) for finding in findings]
    answer = {'findings': [finding.to_json() for finding in findings]}
    lines = [f'{finding.kind}: {finding.what}. {finding.advice}' for finding in findings]
    report(arguments, answer, '\n'.join(lines) or 'Processes, records and tasks fit together.')
    return 1 if any(not finding.mended for finding in findings) else 0


def _config(arguments: argparse.Namespace) -> int:
    root = town_root(arguments)
    if arguments.key is None:
        config = configuration.load(root)
        values = {path: _shown(path, configuration.get(config, path)) for path in configuration.settings()}
        return report(arguments, values, '\n'.join(_config_lines(values)))
    setting, key = _setting(arguments.key)
    if arguments.value is None:
        value = configuration.get(configuration.load(root), setting.path)
        if key and key not in value:
            raise TownError(f'{arguments.key} is not set')
        value = value[key] if key else _without_password(setting.path, value)
        return report(arguments, {arguments.key: value}, value if isinstance(value, str) else _as_toml(value))
    file = root / configuration.FILE
    new = _change(file, setting, key, arguments.value)
    new = _without_password(setting.path, new)
    note = '; the running townhall reloads its configuration; if this setting must wait for a restart, its log says so'
    if setting.path == 'redis.url':
        note = (
            '; the running townhall and workers stay with the Redis that they started with, but tt uses this one now. '
            'To move them too, set this back, run  tt stop  , set it again, and run  tt start'
        )
    return report(
        arguments,
        {arguments.key: new},
        f'{arguments.key} = {to_toml(new)}  ({file}{note if reload_townhalls(root) else ""})',
    )


def _shown(path: str, value: Any) -> Any:
    """A setting as the list of all settings shows it: without secrets, because people paste that list elsewhere."""
    return '***' if path in configuration.SECRETS and value else _without_password(path, value)


def _without_password(path: str, value: Any) -> Any:
    """A setting as `tt config` shows it alone: without a password of Redis, which only the file shows."""
    return masked(value) if path == 'redis.url' else value


def _check_url(path: str, value: Any) -> None:
    """Raises UsageError if the setting at `path` is redis.url, and `value` is not a valid one."""
    if path == 'redis.url' and value:
        read_url(value)


def _config_lines(values: dict[str, Any]) -> list[str]:
    width = max(map(len, values))
    return [f'{path.ljust(width)}  {_as_toml(value)}' for path, value in values.items()]


def _as_toml(value: Any) -> str:
    """The value of a setting in TOML; a table on one line."""
    if isinstance(value, dict):
        return ', '.join(f'{name} = {to_toml(item)}' for name, item in value.items()) or '-'
    return to_toml(value)


def _change(file: Path, setting: configuration.Setting, key: str, given: str) -> Any:
    """Sets one setting (or the `key` of a table) in a configuration file, and returns its value. Raises UsageError.

    The file stays unchanged if its new text would not load, or would change anything else.
    """
    new: Any = given if key else setting.read(given, 'tt config')
    whole = setting.check({key: new} if key else new, 'tt config')
    _check_url(setting.path, new)
    before = configuration.read_settings(file)
    path = (setting.path, key) if key else tuple(setting.path.split('.'))
    changed = change(file.read_bytes().decode(), path, new)
    wanted = before | {setting.path: before.get(setting.path, {}) | whole if key else whole}
    # `enabled` of these tables follows from whether they are in the file, so it may change with the setting.
    same = {f'{table}.enabled': None for table in configuration.ENABLING_TABLES} | {setting.path: wanted[setting.path]}
    if configuration.parse(changed.encode(), str(file)) | same != wanted | same:
        raise UsageError(f"{file} was not changed: {setting.path} can't be changed in it safely; change it by hand")
    is_public = _shown(setting.path, new) == new
    write_atomically(file.resolve(), changed, 0o600, keep_mode=is_public)  # it may be a link into somebody's dotfiles
    return new


def _setting(path: str) -> tuple[configuration.Setting, str]:
    """A setting by its path, and the key within it if it is a table, else ''. Raises UsageError."""
    table, _, key = path.partition('.')
    if table == 'agent_clis' and key:
        return configuration.find_setting('agent_clis', 'tt config'), key
    return configuration.find_setting(path, 'tt config'), ''


# ---------------------------------------------------------------------------------------------------------- workers


def run_here(town: Town, step: Callable[[Any], Step[Any]]) -> int:
    """Runs a worker in this process until a signal. Returns the exit status.

    `step(start)` must prepare the worker's agent, and call `start`, which opens the worker.
    """
    from ..worker.main import Worker, open_here

    opened: list[Worker] = []

    def start(town: Town, agent_id: str, name: str, instance: str) -> None:
        opened.append(open_here(town, agent_id, name, instance, echo=True))

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # without a handler, PID 1 in a container ignores it
    town.store.run(step(start))
    return opened[0].run()


def _worker(arguments: argparse.Namespace) -> int:
    town = open_meant(arguments)
    call = Call(town, Principal('tt', ALL_SCOPES))

    def revive(start: Any) -> Step[None]:
        agent = yield from agents.look_up(call, arguments.name)
        registry.find_cli(town.config, json.loads(agent.json)['cli'])
        yield from agents.revive(call, agent.id, agent.name, start)

    return run_here(town, revive)
