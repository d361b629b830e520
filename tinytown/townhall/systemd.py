"""`townhall service`: has systemd run a town, for the machine or for one user of it."""

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
from . import systemd_units
from .systemd_units import Plan

_SYSTEM: Final = Path('/etc/systemd/system')
_INACTIVE: Final = 3  # the exit status of `status` for what does not run, as systemctl has it


def service_parser() -> Parser:
    """The command line of `townhall service`."""
    top = Parser(prog='townhall service', description='Have systemd run a town: its townhall, its agents, its Redis.')
    commands = top.add_subparsers(metavar='COMMAND', required=True, parser_class=Parser)
    install = _command(commands, 'install', 'Write the units of a town, and start it now and at boot', _install)
    install.add_argument('--path', metavar='PATH', help='where coding CLIs are looked for (default: your $PATH)')
    install.add_argument('--socket', action='store_true', help='systemd holds the port: no client is ever refused')
    install.add_argument(
        '--credential', metavar='SETTING=FILE', action='append', default=[],
        help='a setting that is secret, or the variable of a coding CLI, from a file that only root need read',
    )  # fmt: skip
    install.add_argument('--no-start', action='store_true', help='only write them')
    install.add_argument('--to', metavar='DIR', help='only write them, into this directory')
    uninstall = _command(commands, 'uninstall', 'Stop the town, and remove its units', _uninstall)
    for each in (install, uninstall):
        each.add_argument('--force', action='store_true', help='even if a unit was changed by hand')
    _command(commands, 'status', 'Say what is installed, and whether it runs', _status)
    return top


def _command(commands: argparse._SubParsersAction[Parser], name: str, does: str, run: Callable[..., int]) -> Parser:
    made: Parser = commands.add_parser(name, help=does, description=does)
    made.set_defaults(run=run, to=None)
    made.add_argument('--town', metavar='DIR', help='the town (default: the nearest directory upwards that holds one)')
    made.add_argument('--name', metavar='NAME', help='name of the units: tinytown-NAME (default: that of the town)')
    made.add_argument('--user', action='store_true', help="your own service manager's, and not the machine's")
    return made


def run(words: list[str]) -> int:
    """The exit status. Raises UsageError, TownError."""
    try:
        arguments = service_parser().parse_args(words)
    except SystemExit:
        return 0  # --help was answered
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
    is_over = not plan.listen and socket.exists()
    if is_over and _starts(arguments):
        _run(arguments, 'stop', socket.name)  # and with it townhall, whose port it holds
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(directory / name, text)
        print(f'wrote {directory / name}')
    if is_over:
        socket.unlink()
        print(f'removed {socket}')
    for warning in _warnings(arguments, plan, config):
        print(f'note: {warning}')
    if _starts(arguments):
        _start(arguments, plan)
    elif arguments.to is None:
        ctl = _systemctl(arguments)
        first = f'{ctl} stop {plan.socket_unit} && ' if is_over else ''
        print(f'Start it:  {first}{ctl} daemon-reload && {ctl} enable --now {plan.town_unit}')
    return 0


def _starts(arguments: argparse.Namespace) -> bool:
    return arguments.to is None and not arguments.no_start


def _start(arguments: argparse.Namespace, plan: Plan) -> None:
    ctl = _systemctl(arguments)
    _run(arguments, 'daemon-reload')
    if plan.listen and _ask(arguments, 'is-active', plan.socket_unit) != 'active':
        _run(arguments, 'stop', plan.hall_unit)  # a townhall that runs holds the port that the socket is to have
    _run(arguments, 'enable', '--now', plan.town_unit)
    _run(arguments, 'start', plan.hall_unit)  # as the town has asked for already: this waits until it serves
    print(f'{plan.town_unit} and {plan.hall_unit} run. What ran before takes up the new units:')
    print(f'{ctl} restart {plan.hall_unit}')
    print(f'{ctl} restart {plan.town_unit}  (a new PATH or new keys of agents, too; it ends what they are doing)')


def _uninstall(arguments: argparse.Namespace) -> int:
    directory, name = _directory(arguments), _name(arguments)
    files = [file for file in _files(directory, name) if file.exists()]
    if not files:
        raise TownError(f'{directory} has no units of {name}; see  townhall service status')
    for file in files if not arguments.force else ():
        _refuse_changed(file)
    _run(arguments, 'disable', '--now', f'tinytown-{name}.service')
    _run(arguments, 'stop', *(file.name for file in files))  # what goes with the town may run without it
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
    """The town that is meant, and its configuration as its services see it: by the home of their user, and without
    the settings in our environment. Raises UsageError."""
    root = meant_root(arguments)
    home = configuration.home() if arguments.user or os.geteuid() else Path(_owner(root).pw_dir)
    return root, configuration.load(root, environ={'HOME': str(home)} if home else {})


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
    settings = config.townhall
    user = '' if arguments.user else _owner(root).pw_name
    credentials, paths = _credentials(arguments.credential)
    writable, runtime = _places(arguments, root, config, user)
    if managed_redis.is_redis_elsewhere(root) and not config.redis.url:
        writable.append('/tmp')  # noqa: S108  in which the directory of its socket is made, anew if that was emptied
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
    """The directories outside of the town that townhall writes to, and which of them systemd is to make below /run.

    Raises UsageError for one that is not there.
    """
    bind = config.townhall.bind
    places = {'townhall.audit.path': (root / config.townhall.audit.path).parent}
    if bind.startswith(UNIX) and not arguments.socket:
        places['townhall.bind'] = Path(bind.removeprefix(UNIX)).parent
    found, runtime = [], ''
    for setting, place in places.items():
        if place.is_relative_to(root):
            continue
        if setting == 'townhall.bind' and user and _is_own_runtime(place, user):
            runtime = place.name
            continue
        if not place.is_dir():
            make = f'sudo install -d -o {user}' if user else 'mkdir -p'
            raise UsageError(f'{setting} is in {place}, which is not there; make it:  {make} {shlex.quote(str(place))}')
        found.append(str(place))
    return found, runtime


def _is_own_runtime(place: Path, user: str) -> bool:
    """Whether a directory is one right below /run, which is empty after a boot, and is no other user's."""
    if place.parent != Path('/run') or not re.fullmatch(r'[\w.-]+', place.name):
        return False
    return not place.exists() or place.owner() == user


def _is_temporary(path: str) -> bool:
    """Whether a path is below /tmp or /var/tmp, of which a private one has nothing."""
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
    """The directories of a PATH that stand for the same wherever one is, each once."""
    return os.pathsep.join(dict.fromkeys(part for part in path.split(os.pathsep) if part.startswith('/')))


def _listen_stream(bind: str, port: int) -> str:
    if bind.startswith(UNIX):
        return bind.removeprefix(UNIX)
    if port == 0:
        raise UsageError(
            'townhall.rest_port is 0, a free one; give one for --socket:  tt config townhall.rest_port 8787'
        )
    host = '127.0.0.1' if bind == 'localhost' else bind
    return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


def _credentials(given: list[str]) -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """LoadCredential= for `SETTING=FILE`: of a setting that is a path, the file; of another, what stands in it."""
    loaded, paths = [], []
    for each in given:
        name, _, file = each.partition('=')
        if not file.startswith('/') or not Path(file).exists():
            raise UsageError(f'--credential {each}: give SETTING=FILE with the absolute path of a file that is there')
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
            f'{file} was changed by hand; replace or remove it with  --force  (what is yours belongs into  '
            f'systemctl edit {file.name}, which stays)'
        )


def _refuse_foreign(directory: Path, texts: dict[str, str]) -> None:
    """Refuses to write over a unit that was changed by hand, or that is another town's. Raises TownError."""
    for name, text in texts.items():
        file = directory / name
        _refuse_changed(file)
        before = file.read_text() if file.exists() else text
        if _place(before) != _place(text):
            raise TownError(f'{file} is for the town in {_place(before)}; give  --name  another name, or  --force')


def _refuse_unreachable(plan: Plan) -> None:
    """Refuses what the town's user can't run there: a Python, or this program, below /root, say. Raises UsageError."""
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
        said = done.stderr.strip().rpartition('\n')[2] if done.returncode else ''
    except OSError as e:
        said = str(e)
    if not said:
        return
    needed = [plan.root, Path(plan.python), Path(plan.python).resolve(), *map(Path, plan.python_path.split(os.pathsep))]
    closed = next(filter(None, (_closed(each, user.pw_uid, groups) for each in needed)), None)
    raise UsageError(
        f"{user.pw_name}, the town's owner, can't run it: {f'{closed} is closed to that user' if closed else said}; "
        'Python, Townhall and the town must lie where it may read them; the one-file program is unpacked elsewhere by  '
        'sudo XDG_CACHE_HOME=/opt townhall service install …'
    )


def _closed(path: Path, uid: int, groups: list[int]) -> Path | None:
    """The first directory on the way to a path that a user may not enter, as far as modes tell."""
    for each in (*reversed(path.parents), path):
        found = each.stat()
        shift = 6 if found.st_uid == uid else 3 if found.st_gid in groups else 0
        if not found.st_mode >> shift & 1:
            return each
    return None


def _place(text: str) -> str:
    found = re.search(r'^WorkingDirectory=(.*)$', text, re.M)
    return found[1] if found else ''


def _warnings(arguments: argparse.Namespace, plan: Plan, config: Config) -> list[str]:
    found = []
    if plan.user == 'root':
        found.append(f'the town in {plan.root} belongs to root, so its agents run as root; chown -R it to a user')
    cli = registry.known_clis(config).get(config.default_cli)
    if cli and not shutil.which(cli.argv[0], path=plan.path):
        found.append(
            f"'{cli.argv[0]}' (default_cli) is not on the PATH that the units have ({plan.path}); "
            'give yours:  --path "$PATH"'
        )
    if arguments.user and (note := _linger_note()):
        found.append(note)
    return found


def _linger_note() -> str:
    """What is to be done so that a user's services run while that user is not logged in; '' if they do."""
    user = pwd.getpwuid(os.getuid()).pw_name
    try:
        said = _output(['loginctl', 'show-user', user, '--property=Linger', '--value']).strip()
    except (TownError, FileNotFoundError):
        said = 'yes' if Path('/var/lib/systemd/linger', user).exists() else 'no'
    if said == 'yes':
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
        raise UsageError("this needs root; use  sudo, or --user for a service of your own service manager's")
    return _SYSTEM


def _files(directory: Path, name: str) -> list[Path]:
    return [directory / each for each in (f'tinytown-{name}.service', f'townhall-{name}.service',
                                          f'townhall-{name}.socket')]  # fmt: skip


def _systemctl(arguments: argparse.Namespace) -> str:
    return 'systemctl --user' if arguments.user else 'systemctl'


def _run(arguments: argparse.Namespace, *words: str) -> None:
    """Has systemctl do something. Raises TownError with what it said."""
    try:
        _output([*_systemctl(arguments).split(), *words])
    except FileNotFoundError:
        raise TownError(
            'there is no systemctl here, so systemd does not run this machine; --no-start only writes the units, and '
            'tt start runs a town without it'
        ) from None


def _ask(arguments: argparse.Namespace, *words: str) -> str:
    """What systemctl says, whatever its exit status."""
    try:
        argv = [*_systemctl(arguments).split(), *words]
        return subprocess.run(argv, capture_output=True, text=True, check=False, env=_environ()).stdout.strip()
    except OSError:
        return ''


def _environ() -> dict[str, str]:
    """Ours, with where a user's manager is reached: a `sudo -u` or `su` leaves that out."""
    return {'XDG_RUNTIME_DIR': f'/run/user/{os.getuid()}'} | os.environ


def _output(argv: list[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=_environ())
    if done.returncode:
        said = ' '.join((done.stderr or done.stdout).split())
        raise TownError(f'{" ".join(argv)} failed: {said or f"status {done.returncode}"}')
    return done.stdout
