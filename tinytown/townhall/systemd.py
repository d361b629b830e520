"""`townhall service`: installs, removes and shows the systemd units of a town, for the machine or for one user.

Start with `service_parser`, then `_install`. `systemd_units` renders the units from the `Plan` that `_plan` makes.
"""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .. import config as configuration
from ..cli.parser import Parser, meant_root
from ..clis import registry
from ..errors import TownError, UsageError
from ..files import write_atomically
from ..host import managed_redis
from ..host.processes import python_path
from ..http.listener import UNIX
from ..settings import Config
from ..trust import owner_for_root
from . import systemd_units
from .systemd_units import Plan

_SYSTEM: Final = Path('/etc/systemd/system')
_INACTIVE: Final = 3  # exit status of `townhall service status` for a stopped unit, as of `systemctl status`


def service_parser() -> Parser:
    """The parser of `townhall service`'s command line."""
    top = Parser(prog='townhall service', description='Run a town under systemd: its townhall, its agents, its Redis.')
    commands = top.add_subparsers(metavar='COMMAND', required=True, parser_class=Parser)
    install = _command(commands, 'install', 'Write the units of a town; start it now and at boot', _install)
    install.add_argument(
        '--path', metavar='PATH', help='PATH on which the units find coding CLIs (default: your $PATH)'
    )
    install.add_argument(
        '--socket', action='store_true', help='let systemd hold the port, so that no client is refused during a restart'
    )
    install.add_argument(
        '--credential', metavar='SETTING=FILE', action='append', default=[],
        help='load a secret setting, or a variable of a coding CLI, from a file that only root needs to read',
    )  # fmt: skip
    install.add_argument('--no-start', action='store_true', help='only write the units')
    install.add_argument('--to', metavar='DIR', help='only write the units, into this directory')
    uninstall = _command(commands, 'uninstall', 'Stop the town, and remove its units', _uninstall)
    for command in (install, uninstall):
        command.add_argument('--force', action='store_true', help='replace or remove units that were changed by hand')
    _command(commands, 'status', 'Show which units are installed and whether they run', _status)
    return top


def _command(commands: argparse._SubParsersAction[Parser], name: str, summary: str, run: Callable[..., int]) -> Parser:
    command: Parser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(run=run, to=None)
    command.add_argument(
        '--town', metavar='DIR', help='directory of the town (default: the nearest one upwards that holds a town)'
    )
    command.add_argument('--name', metavar='NAME', help='name of the units: tinytown-NAME (default: name of the town)')
    command.add_argument('--user', action='store_true', help="use your own service manager, not the machine's")
    return command


def run(words: list[str]) -> int:
    """Runs `townhall service` with these arguments. Returns the exit status. Raises UsageError, TownError."""
    try:
        arguments = service_parser().parse_args(words)
    except SystemExit:
        return 0  # argparse answered --help
    status: int = arguments.run(arguments)
    return status


# --------------------------------------------------------------------------------------------------------- commands


def _install(arguments: argparse.Namespace) -> int:
    root, config = _load(arguments)
    directory, plan = _directory(arguments), _plan(arguments, root, config)
    _refuse_unreachable(plan)
    texts = systemd_units.render_units(plan)
    socket = directory / plan.socket_unit
    if not arguments.force:
        _refuse_foreign(directory, texts)
        _refuse_changed(socket)
    drops_socket = not plan.listen and socket.exists()
    if drops_socket and _starts(arguments):
        _run(arguments, 'stop', socket.name)  # this also stops townhall, which requires the socket
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically((directory / name).resolve(), text)
        print(f'wrote {directory / name}')
    if drops_socket:
        socket.unlink()
        print(f'removed {socket}')
    for warning in _warnings(arguments, plan, config):
        print(f'note: {warning}')
    if _starts(arguments):
        _start(arguments, plan)
    elif arguments.to is None:
        ctl = _systemctl(arguments)
        first = f'{ctl} stop {plan.socket_unit} && ' if drops_socket else ''
        print(f'Start it:  {first}{ctl} daemon-reload && {ctl} enable --now {plan.town_unit}')
    return 0


def _starts(arguments: argparse.Namespace) -> bool:
    return arguments.to is None and not arguments.no_start


def _start(arguments: argparse.Namespace, plan: Plan) -> None:
    ctl = _systemctl(arguments)
    _run(arguments, 'daemon-reload')
    if plan.listen and _ask(arguments, 'is-active', plan.socket_unit) != 'active':
        _run(arguments, 'stop', plan.townhall_unit)  # a running townhall holds the port that the socket needs
    _run(arguments, 'enable', '--now', plan.town_unit)
    _run(arguments, 'start', plan.townhall_unit)  # the town's unit started it already; this waits until it serves
    print(f'{plan.town_unit} and {plan.townhall_unit} run. If they ran before, restart them to apply the new units:')
    print(f'{ctl} restart {plan.townhall_unit}')
    print(f'{ctl} restart {plan.town_unit}  (needed for a new PATH or new keys of agents; interrupts their work)')


def _uninstall(arguments: argparse.Namespace) -> int:
    directory, name = _directory(arguments), _name(arguments)
    files = [file for file in _files(directory, name) if file.exists()]
    if not files:
        raise TownError(f'{directory} has no units of {name}; see  townhall service status')
    for file in files if not arguments.force else ():
        _refuse_changed(file)
    _run(arguments, 'disable', '--now', f'tinytown-{name}.service')
    _run(arguments, 'stop', *(file.name for file in files))  # townhall and its socket can run without the town's unit
    for file in files:
        file.unlink()
        print(f'removed {file}')
    _run(arguments, 'daemon-reload')
    return 0


def _status(arguments: argparse.Namespace) -> int:
    directory, name = _directory(arguments), _name(arguments)
    runs = True
    for file in _files(directory, name):
        is_socket = file.suffix == '.socket'
        if not file.exists():
            if not is_socket:
                print(f'{file.name}: not installed')
                runs = False
            continue
        state = _ask(arguments, 'is-active', file.name) or 'unknown'
        written = 'as written' if systemd_units.is_ours(file.read_text()) else 'changed by hand'
        print(f'{file.name}: {state}, {written} ({file})')
        runs = runs and state == 'active'
    if arguments.user and (note := _linger_note()):
        print(f'note: {note}')
    return 0 if runs else _INACTIVE


# ------------------------------------------------------------------------------------------------------------ the plan


def _load(arguments: argparse.Namespace) -> tuple[Path, Config]:
    """The town's directory, and its configuration as the services will see it. Raises UsageError.

    That is with the home directory of the services' user, and without the settings in this process's environment.
    """
    root = meant_root(arguments)
    home = configuration.home() if arguments.user or os.geteuid() else Path(_owner(root).pw_dir)
    return root, configuration.load(root, environ={'HOME': str(home)} if home else {}, uid=owner_for_root(root))


def _owner(root: Path) -> pwd.struct_passwd:
    """The user that the services of a town run as. Raises UsageError."""
    uid = root.stat().st_uid
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise UsageError(
            f'the town in {root} belongs to uid {uid}, which has no name on this machine; give it to a user:  '
            f'chown -R USER {shlex.quote(str(root))}'
        ) from None


def _plan(arguments: argparse.Namespace, root: Path, config: Config) -> Plan:
    """The plan for the units of a town. Raises UsageError if a unit can't hold it."""
    settings = config.townhall
    user = '' if arguments.user else _owner(root).pw_name
    credentials, paths = _credentials(arguments.credential)
    writable, runtime = _places(arguments, root, config, user)
    if managed_redis.is_redis_elsewhere(root) and not config.redis.url:
        writable.append('/tmp')  # noqa: S108  Redis' socket directory is there, and is created again if /tmp is cleaned
    return Plan(
        name=_name(arguments),
        root=_fit_for_unit(root, 'the town'),
        python=str(_fit_for_unit(Path(sys.executable), 'the interpreter')),
        python_path=_fit_text(python_path(), 'PYTHONPATH'),
        path=_fit_text(_absolute(arguments.path or os.environ.get('PATH', os.defpath)), '--path'),
        drain_secs=settings.limits.drain_secs,
        user=user,
        writable=tuple(writable),
        runtime=runtime,
        credentials=credentials,
        credential_paths=paths,
        listen=_listen_stream(settings.bind, settings.rest_port) if arguments.socket else '',
        has_private_tmp=not any(map(_is_temporary, (str(root), *writable, sys.executable, *python_path().split(':')))),
    )


def _places(arguments: argparse.Namespace, root: Path, config: Config, user: str) -> tuple[list[str], str]:
    """The directories outside of the town that townhall writes to; and one below /run that systemd creates, or ''.

    Raises UsageError for a directory that does not exist.
    """
    bind = config.townhall.bind
    places = {'townhall.audit.path': (root / config.townhall.audit.path).parent}
    if bind.startswith(UNIX) and not arguments.socket:
        places['townhall.bind'] = Path(bind.removeprefix(UNIX)).parent
    writable, runtime = [], ''
    for setting, place in places.items():
        if place.is_relative_to(root):
            continue
        if setting == 'townhall.bind' and user and _is_own_runtime(place, user):
            runtime = place.name
            continue
        if not place.is_dir():
            make = f'sudo install -d -o {user}' if user else 'mkdir -p'
            raise UsageError(f'{setting} is in {place}, which is missing; make it:  {make} {shlex.quote(str(place))}')
        writable.append(str(place))
    return writable, runtime


def _is_own_runtime(place: Path, user: str) -> bool:
    """Whether a directory is directly below /run (so it is gone after a boot), and does not belong to another user."""
    if place.parent != Path('/run') or not re.fullmatch(r'[\w.-]+', place.name):
        return False
    return not place.exists() or place.owner() == user


def _is_temporary(path: str) -> bool:
    """Whether a path is below /tmp or /var/tmp, which PrivateTmp= would hide."""
    return 'tmp' in Path(path).parts[1:3]


def _name(arguments: argparse.Namespace) -> str:
    name: str = arguments.name or _load(arguments)[1].name
    configuration.find_setting('name', '--name').check(name, '--name')
    return name


def _fit_for_unit(path: Path, what: str) -> Path:
    _fit_text(str(path), what)
    return path


def _fit_text(text: str, what: str) -> str:
    if not text.isprintable():
        raise UsageError(f'{what} is {text!r}; a unit can hold printable characters only')
    return text


def _absolute(path: str) -> str:
    """A PATH without relative directories and duplicates."""
    return os.pathsep.join(dict.fromkeys(part for part in path.split(os.pathsep) if part.startswith('/')))


def _listen_stream(bind: str, port: int) -> str:
    """ListenStream= for `townhall.bind` and `townhall.rest_port`. Raises UsageError."""
    if bind.startswith(UNIX):
        return bind.removeprefix(UNIX)
    if port == 0:
        raise UsageError(
            'townhall.rest_port is 0, which means any free port; --socket needs a fixed one:  '
            'tt config townhall.rest_port 8787'
        )
    host = '127.0.0.1' if bind == 'localhost' else bind
    return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


def _credentials(given: list[str]) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """`Plan.credentials` and `Plan.credential_paths` for each SETTING=FILE of --credential. Raises UsageError.

    A setting that is itself a path gets the path of the loaded file. Any other gets the content of the file.
    """
    loaded, paths = [], []
    for option in given:
        name, _, file = option.partition('=')
        if not file.startswith('/') or not Path(file).exists():
            raise UsageError(f'--credential {option}: give SETTING=FILE with the absolute path of an existing file')
        if re.fullmatch(r'[A-Z][A-Z0-9_]*', name):
            loaded.append((name, file))
            continue
        setting = configuration.find_setting(name, '--credential')
        if setting.path.endswith(('_path', '_file')):
            credential = setting.path.replace('.', '-')
            loaded.append((credential, file))
            paths.append((setting.env, credential))
        else:
            loaded.append((setting.env, file))
    return tuple(loaded), tuple(paths)


# ------------------------------------------------------------------------------------------------------------- checks


def _refuse_changed(file: Path) -> None:
    """Refuses to replace or remove a unit that was changed by hand. Raises TownError."""
    if file.exists() and not systemd_units.is_ours(file.read_text()):
        raise TownError(
            f'{file} was changed by hand; replace or remove it with  --force  (put changes of your own into  '
            f'systemctl edit {file.name}, which are kept)'
        )


def _refuse_foreign(directory: Path, texts: dict[str, str]) -> None:
    """Refuses to overwrite a unit that was changed by hand, or that belongs to another town. Raises TownError."""
    for name, text in texts.items():
        file = directory / name
        _refuse_changed(file)
        before = file.read_text() if file.exists() else text
        if _place(before) != _place(text):
            raise TownError(f'{file} is for the town in {_place(before)}; give  --name  another name, or  --force')


def _refuse_unreachable(plan: Plan) -> None:
    """Refuses a plan that the town's user can't run, for example because Python is below /root. Raises UsageError."""
    if os.geteuid() or plan.user in ('', 'root'):
        return
    user = _owner(plan.root)
    groups = os.getgrouplist(user.pw_name, user.pw_gid)
    code = 'import os, sys; os.chdir(sys.argv[1]); import tinytown.townhall'
    argv = [plan.python, '-B', '-P', '-c', code, str(plan.root)]
    try:
        done = subprocess.run(
            argv, user=user.pw_uid, group=user.pw_gid, extra_groups=groups, env={'PYTHONPATH': plan.python_path},
            cwd='/', stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
        failure = done.stderr.strip().rpartition('\n')[2] if done.returncode else ''
    except OSError as e:
        failure = str(e)
    if not failure:
        return
    needed = [plan.root, Path(plan.python), Path(plan.python).resolve(), *map(Path, plan.python_path.split(os.pathsep))]
    closed = next(filter(None, (_closed(path, user.pw_uid, groups) for path in needed)), None)
    raise UsageError(
        f"{user.pw_name}, the town's owner, can't run it: {f'{closed} is closed to that user' if closed else failure}; "
        'Python, Townhall and the town must be where that user may read them; to unpack the one-file program elsewhere:'
        '  sudo XDG_CACHE_HOME=/opt townhall service install …'
    )


def _closed(path: Path, uid: int, groups: list[int]) -> Path | None:
    """The first directory on the way to `path`, or `path` itself, that a user may not enter, judged by mode bits."""
    for part in (*reversed(path.parents), path):
        status = part.stat()
        shift = 6 if status.st_uid == uid else 3 if status.st_gid in groups else 0
        if not status.st_mode >> shift & 1:
            return part
    return None


def _place(text: str) -> str:
    """The town's directory in the text of a service unit, '' in that of a socket."""
    match = re.search(r'^WorkingDirectory=(.*)$', text, re.M)
    return match[1] if match else ''


def _warnings(arguments: argparse.Namespace, plan: Plan, config: Config) -> list[str]:
    warnings = []
    if plan.user == 'root':
        warnings.append(f'the town in {plan.root} belongs to root, so its agents run as root; chown -R it to a user')
    cli = registry.known_clis(config).get(config.default_cli)
    if cli and not shutil.which(cli.argv[0], path=plan.path):
        warnings.append(
            f"'{cli.argv[0]}' (default_cli) is not on the PATH of the units ({plan.path}); "
            'give yours:  --path "$PATH"'
        )
    if arguments.user and (note := _linger_note()):
        warnings.append(note)
    return warnings


def _linger_note() -> str:
    """A warning that this user's services end at logout, and what to do; '' if they keep running (lingering)."""
    user = pwd.getpwuid(os.getuid()).pw_name
    try:
        linger = _output(['loginctl', 'show-user', user, '--property=Linger', '--value']).strip()
    except (TownError, FileNotFoundError):
        linger = 'yes' if Path('/var/lib/systemd/linger', user).exists() else 'no'
    if linger == 'yes':
        return ''
    return f'the town ends when {user} logs out, and does not start at boot; mend that:  loginctl enable-linger {user}'


# ------------------------------------------------------------------------------------------------------------ systemd


def _directory(arguments: argparse.Namespace) -> Path:
    if arguments.to is not None:
        return Path(arguments.to).expanduser().resolve()
    if arguments.user:
        home = os.environ.get('XDG_CONFIG_HOME') or Path('~/.config').expanduser()
        return Path(home) / 'systemd' / 'user'
    if os.geteuid() and arguments.run is not _status:
        raise UsageError('this needs root; use  sudo, or --user to use your own service manager')
    return _SYSTEM


def _files(directory: Path, name: str) -> list[Path]:
    return [directory / unit for unit in (f'tinytown-{name}.service', f'townhall-{name}.service',
                                          f'townhall-{name}.socket')]  # fmt: skip


def _systemctl(arguments: argparse.Namespace) -> str:
    return 'systemctl --user' if arguments.user else 'systemctl'


def _run(arguments: argparse.Namespace, *words: str) -> None:
    """Runs systemctl. Raises TownError with its output if it fails."""
    try:
        _output([*_systemctl(arguments).split(), *words])
    except FileNotFoundError:
        raise TownError(
            'there is no systemctl here, so systemd does not run this machine; use --no-start to only write the units, '
            'or tt start to run the town without systemd'
        ) from None


def _ask(arguments: argparse.Namespace, *words: str) -> str:
    """The output of systemctl, whatever its exit status; '' if it can't be run."""
    try:
        argv = [*_systemctl(arguments).split(), *words]
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=_environ()).stdout.strip()
    except OSError:
        return ''


def _environ() -> dict[str, str]:
    """Our environment with XDG_RUNTIME_DIR, where the user's manager listens: `sudo -u` and `su` leave it out."""
    return {'XDG_RUNTIME_DIR': f'/run/user/{os.getuid()}'} | os.environ


def _output(argv: list[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=_environ())
    if done.returncode:
        reason = ' '.join((done.stderr or done.stdout).split())
        raise TownError(f'{" ".join(argv)} failed: {reason or f"status {done.returncode}"}')
    return done.stdout
