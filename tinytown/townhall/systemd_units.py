"""Renders the systemd units of a town from a `Plan`. `systemd` makes the plan, and writes the units.

- `tinytown-NAME.service` is the town. Its main process is the spawner, the parent of all workers and of Redis.
- `townhall-NAME.service` is the control plane. It starts and stops with the town, and can be restarted alone.
- `townhall-NAME.socket` is optional. It holds the port while townhall restarts.

The two services have different sandboxes. That of townhall is tight, because townhall only serves and starts no
programs. That of the town leaves agents what they need: they edit and build, use the network and the user's files, and
create sandboxes of their own. So it does not filter namespaces, mounts, writable code (JIT compilers) or debuggers. It
also mounts nothing over /proc, because a namespace could not mount its own /proc then.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from ..config import EXPECTED

WATCHDOG_SECS: Final = 90  # long enough that townhall survives a Redis failover of 30 s
_MARK: Final = '# Written by  townhall service install  and replaced by it; change it by  systemctl edit. sha256:'
_TOWN_STOP_SECS: Final = 120  # each worker has a grace period of 5 s, and Redis needs time to write its data


@dataclass(frozen=True)
class Plan:
    """All that the units of a town depend on."""

    name: str  # NAME in the names of the units
    root: Path  # directory of the town
    python: str  # path of the interpreter
    python_path: str  # PYTHONPATH
    path: str  # PATH
    drain_secs: int  # how long a stop waits for running requests
    user: str = ''  # whom the services run as; '' for units of a user's service manager
    writable: tuple[str, ...] = ()  # directories outside of `root` that townhall writes to
    runtime: str = ''  # name of a directory below /run that systemd creates for townhall
    credentials: tuple[tuple[str, str], ...] = ()  # (name, file) for LoadCredential=
    credential_paths: tuple[tuple[str, str], ...] = ()  # (variable, name): the variable gets the credential's path
    listen: str = ''  # ListenStream= of the socket unit; '' for none
    has_private_tmp: bool = True  # False if townhall needs files below /tmp or /var/tmp

    @property
    def town_unit(self) -> str:
        return f'tinytown-{self.name}.service'

    @property
    def townhall_unit(self) -> str:
        return f'townhall-{self.name}.service'

    @property
    def socket_unit(self) -> str:
        return f'townhall-{self.name}.socket'


def render_units(plan: Plan) -> dict[str, str]:
    """The signed text of each unit, by file name."""
    texts = {plan.town_unit: _town(plan), plan.townhall_unit: _townhall(plan)}
    if plan.listen:
        texts[plan.socket_unit] = _socket(plan)
    return {name: sign(text) for name, text in texts.items()}


def sign(text: str) -> str:
    """Prepends a line with a checksum, by which `is_ours` finds whether the unit was changed later."""
    return f'{_MARK}{sha256(text.encode()).hexdigest()}\n{text}'


def is_ours(text: str) -> bool:
    """Whether `sign` wrote this unit and nobody changed it since."""
    first, _, rest = text.partition('\n')
    return first == f'{_MARK}{sha256(rest.encode()).hexdigest()}'


def _town(plan: Plan) -> str:
    unit = [
        f'Description=The town {plan.name}: its agents and its Redis',
        f'Wants={" ".join(_parts(plan))}',
        *_network(plan),
        'StartLimitIntervalSec=0',
    ]
    service = [
        'Type=notify',
        f'ExecStart={_command(plan, "keeper")} {_word(str(plan.root))}',
        '# The keeper ends the town. Whatever is left then, is killed.',
        'KillMode=mixed',
        f'TimeoutStopSec={_TOWN_STOP_SECS}',
        'Restart=on-failure',
        'RestartSec=2',
        '# One agent that takes too much memory ends, and not the town.',
        'OOMPolicy=continue',
        *_process(plan),
        *_TOWN_SANDBOX,
        *(_TOWN_SANDBOX_OF_SYSTEM if plan.user else ()),
    ]
    return _ini(Unit=unit, Service=service, Install=[f'WantedBy={"multi-user" if plan.user else "default"}.target'])


def _townhall(plan: Plan) -> str:
    unit = [
        f'Description=Townhall of {plan.name}, the control plane of its agents',
        f'BindsTo={plan.town_unit}',
        f'After={plan.town_unit}' + (f' {plan.socket_unit}' if plan.listen else ''),
        *([f'Requires={plan.socket_unit}'] if plan.listen else ()),
        'StartLimitIntervalSec=0',
    ]
    service = [
        'Type=notify',
        'NotifyAccess=main',
        f'ExecStart={_command(plan, "townhall")} rest --town {_word(str(plan.root))}',
        'ExecReload=/bin/kill -HUP $MAINPID',
        f'WatchdogSec={WATCHDOG_SECS}',
        '# It waits for a Redis that is away, and is started again until there is one.',
        'TimeoutStartSec=60',
        'Restart=on-failure',
        'RestartSec=2',
        '# A configuration that is wrong does not mend itself.',
        'RestartPreventExitStatus=2',
        'KillMode=mixed',
        f'TimeoutStopSec={plan.drain_secs + 10}',
        *_process(plan),
        *_TOWNHALL_SANDBOX,
        *(_townhall_sandbox_of_system(plan) if plan.user else ()),
    ]
    return _ini(Unit=unit, Service=service)


def _socket(plan: Plan) -> str:
    unit = [f'Description=The port of townhall of {plan.name}', f'PartOf={plan.town_unit}']
    socket = [
        f'ListenStream={_escaped(plan.listen)}',
        'FileDescriptorName=rest',
        *(['FreeBind=yes'] if plan.user and not plan.listen.startswith('/') else ()),
        *(['SocketMode=0600'] if plan.listen.startswith('/') else ()),
        *([f'SocketUser={plan.user}'] if plan.user and plan.listen.startswith('/') else ()),
    ]
    return _ini(Unit=unit, Socket=socket)


def _parts(plan: Plan) -> list[str]:
    return [plan.townhall_unit, *([plan.socket_unit] if plan.listen else [])]


def _network(plan: Plan) -> list[str]:
    """Ordering after network-online.target, which only the machine's service manager has."""
    return ['Wants=network-online.target', 'After=network-online.target'] if plan.user else []


def _process(plan: Plan) -> list[str]:
    """User, directory, environment and credentials, the same for both services."""
    names = ' '.join(name for name, _ in plan.credentials)
    return [
        *([f'User={plan.user}'] if plan.user else ()),
        f'WorkingDirectory={_escaped(str(plan.root))}',
        f'Environment={_word(f"PATH={plan.path}", dollars=False)}',
        f'Environment={_word(f"PYTHONPATH={plan.python_path}", dollars=False)}',
        *(f'LoadCredential={_escaped(name)}:{_escaped(file)}' for name, file in plan.credentials),
        *(f'Environment={variable}=%d/{name}' for variable, name in plan.credential_paths),
        *([f'Environment={_word(f"{EXPECTED}={names}", dollars=False)}'] if names else []),
        'SyslogIdentifier=%p',
    ]


# NoNewPrivileges= disables sudo and setuid programs, so that all that an agent starts has only the rights of its user.
_TOWN_SANDBOX: Final = (
    'NoNewPrivileges=yes',
    'RestrictRealtime=yes',
    'SystemCallArchitectures=native',
    'SystemCallFilter=~@clock @cpu-emulation @module @obsolete @raw-io @reboot @swap',
    'SystemCallErrorNumber=EPERM',
)
_TOWN_SANDBOX_OF_SYSTEM: Final = (
    'CapabilityBoundingSet=',
    'AmbientCapabilities=',
    'ProtectSystem=full',
    'ProtectClock=yes',
    'ProtectHostname=yes',
)
_TOWNHALL_SANDBOX: Final = (
    'NoNewPrivileges=yes',
    'LockPersonality=yes',
    'MemoryDenyWriteExecute=yes',
    'RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK',
    'RestrictNamespaces=yes',
    'RestrictRealtime=yes',
    'RestrictSUIDSGID=yes',
    'SystemCallArchitectures=native',
    'SystemCallFilter=@system-service',
    'SystemCallFilter=~@privileged @resources',
    'SystemCallFilter=prlimit64 setrlimit',
    'SystemCallErrorNumber=EPERM',
    'UMask=0077',
)


def _townhall_sandbox_of_system(plan: Plan) -> list[str]:
    """Settings that only the machine's service manager supports.

    ProtectProc=invisible hides only other users' processes: townhall looks up callers and workers in /proc.
    """
    return [
        'CapabilityBoundingSet=',
        'AmbientCapabilities=',
        'ProtectSystem=strict',
        'ProtectHome=read-only',
        f'ReadWritePaths={_word(str(plan.root), dollars=False)}',
        *(f'ReadWritePaths={_word(f"-{path}", dollars=False)}' for path in plan.writable),
        *([f'RuntimeDirectory={plan.runtime}', 'RuntimeDirectoryPreserve=yes'] if plan.runtime else []),
        *(['PrivateTmp=yes'] if plan.has_private_tmp else []),
        'PrivateDevices=yes',
        'DevicePolicy=closed',
        'ProtectClock=yes',
        'ProtectControlGroups=yes',
        'ProtectHostname=yes',
        'ProtectKernelLogs=yes',
        'ProtectKernelModules=yes',
        'ProtectKernelTunables=yes',
        'ProtectProc=invisible',
    ]


# ------------------------------------------------------------------------------------------------------------ spelling


def _command(plan: Plan, module: str) -> str:
    """The command line that runs a module of tinytown, like `host.processes.python`."""
    return f'{_word(plan.python)} -P -m tinytown.{module}'


def _word(text: str, dollars: bool = True) -> str:
    """Quotes a word for a list or, with `dollars`, for a command line, as systemd.syntax(7) requires."""
    text = _escaped(text).replace('\\', '\\\\').replace('"', '\\"')
    text = text.replace('$', '$$') if dollars else text
    return f'"{text}"' if any(c in ' \t\'"\\;' for c in text) else text


def _escaped(text: str) -> str:
    return text.replace('%', '%%')


def _ini(**sections: list[str]) -> str:
    return '\n'.join(f'[{name}]\n' + ''.join(f'{line}\n' for line in lines) for name, lines in sections.items())
