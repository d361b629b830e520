"""The units by which systemd runs a town: their text, made from a plan of what is to be run.

`tinytown-NAME.service` is the town: the keeper, below which its workers and its Redis live. `townhall-NAME.service` is
the control plane, which comes and goes with the town and can be started again without it. `townhall-NAME.socket`, if it
is wanted, holds the port meanwhile.

Two sandboxes. The townhall's is tight: it serves, and starts nothing itself. The town's leaves agents what they need:
they edit and build, use the network and the user's files, and make sandboxes of their own. So there is no filter there
that forbids namespaces, mounts, writable code (JIT compilers) or debuggers, and nothing is laid over /proc, under which
a namespace could not mount its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from ..config import EXPECTED

WATCHDOG_SECS: Final = 90  # fed at least every half of it: a Redis that is away for 30 s ends nothing
_MARK: Final = '# Written by  townhall service install  and replaced by it; change it by  systemctl edit. sha256:'
_TOWN_STOP_SECS: Final = 120  # workers get 5 s each to end their programs, and Redis its time to write


@dataclass(frozen=True)
class Plan:
    """What is to be run: the town `name` in `root`, by `python` with these paths, as `user` ('' for a user's manager).

    `writable` are the places beside the town's that townhall writes to, `runtime` one that is made below /run for it,
    `drain_secs` what a stop gives requests.
    `credentials` are (name, file) for LoadCredential=, and `credential_paths` the variables that hold where one of them
    is then (variable, name); `listen` is the address of a socket that systemd is to hold.
    """

    name: str
    root: Path
    python: str
    python_path: str
    path: str
    drain_secs: int
    user: str = ''
    writable: tuple[str, ...] = ()
    runtime: str = ''
    credentials: tuple[tuple[str, str], ...] = ()
    credential_paths: tuple[tuple[str, str], ...] = ()
    listen: str = ''
    has_private_tmp: bool = True

    @property
    def town_unit(self) -> str:
        return f'tinytown-{self.name}.service'

    @property
    def hall_unit(self) -> str:
        return f'townhall-{self.name}.service'

    @property
    def socket_unit(self) -> str:
        return f'townhall-{self.name}.socket'


def render_units(plan: Plan) -> dict[str, str]:
    """The text of each unit, by its file name."""
    texts = {plan.town_unit: _town(plan), plan.hall_unit: _hall(plan)}
    if plan.listen:
        texts[plan.socket_unit] = _socket(plan)
    return {name: sign(text) for name, text in texts.items()}


def sign(text: str) -> str:
    """A unit with a first line that tells whether it was changed since."""
    return f'{_MARK}{sha256(text.encode()).hexdigest()}\n{text}'


def is_ours(text: str) -> bool:
    """Whether a unit is as it was written."""
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


def _hall(plan: Plan) -> str:
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
        *_HALL_SANDBOX,
        *(_hall_sandbox_of_system(plan) if plan.user else ()),
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
    return [plan.hall_unit, *([plan.socket_unit] if plan.listen else [])]


def _network(plan: Plan) -> list[str]:
    """What a user's manager does not have."""
    return ['Wants=network-online.target', 'After=network-online.target'] if plan.user else []


def _process(plan: Plan) -> list[str]:
    """What the processes of both services see."""
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


# No sudo and no setuid programs for an agent: what it starts has the rights of its user and no more.
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
_HALL_SANDBOX: Final = (
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


def _hall_sandbox_of_system(plan: Plan) -> list[str]:
    """What only the system's manager can do. It needs to see /proc: who calls, and whether workers live."""
    return [
        'CapabilityBoundingSet=',
        'AmbientCapabilities=',
        'ProtectSystem=strict',
        'ProtectHome=read-only',
        f'ReadWritePaths={_word(str(plan.root), dollars=False)}',
        *(f'ReadWritePaths={_word(f"-{each}", dollars=False)}' for each in plan.writable),
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
    """A command line that runs a module of ours, as `processes.python` does."""
    return f'{_word(plan.python)} -P -m tinytown.{module}'


def _word(text: str, dollars: bool = True) -> str:
    """A word as systemd reads it back in a list or, with `dollars`, in a command line (systemd.syntax(7))."""
    text = _escaped(text).replace('\\', '\\\\').replace('"', '\\"')
    text = text.replace('$', '$$') if dollars else text
    return f'"{text}"' if any(c in ' \t\'"\\;' for c in text) else text


def _escaped(text: str) -> str:
    return text.replace('%', '%%')


def _ini(**sections: list[str]) -> str:
    return '\n'.join(f'[{name}]\n' + ''.join(f'{line}\n' for line in lines) for name, lines in sections.items())
