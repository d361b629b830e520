"""A machine that systemd runs, within this one: process 1 of namespaces of its own, with its own control groups, /run
and /etc/systemd/system. The file system below is this machine's, so towns and their sockets are reached from outside.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from ..support import PATIENCE, environment

_TARGETS = {
    'sysinit': 'DefaultDependencies=no',
    'network-online': 'DefaultDependencies=no',
    'shutdown': 'DefaultDependencies=no',
    'sockets': 'DefaultDependencies=no',
    'basic': 'DefaultDependencies=no\nRequires=sysinit.target\nAfter=sysinit.target',
    'multi-user': 'Requires=basic.target\nAfter=basic.target',
}
_JOURNAL = ('systemd-journald.service', 'systemd-journald.socket')
_USER_MANAGER = """[Service]
Type=notify
Delegate=yes
Environment=XDG_RUNTIME_DIR=/run/user/0 HOME={home} SYSTEMD_UNIT_PATH={home}/.config/systemd/user:/usr/lib/systemd/user
ExecStart=/usr/lib/systemd/systemd --user
KillMode=mixed
"""
_BOOT = """set -e
mount --make-rprivate /
mount --make-rshared /  # as process 1 of a machine has it: credentials come by a mount
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
umount -l /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs /etc/systemd/system
mkdir -p /run/systemd/journald.conf.d /run/user/0
printf '[Journal]\\nStorage=volatile\\nReadKMsg=no\\nRateLimitIntervalSec=0\\n' > /run/systemd/journald.conf.d/lab.conf
cp -r "$1"/. /etc/systemd/system/
exec env -i container=lab PATH="$PATH" SYSTEMD_UNIT_PATH=/etc/systemd/system setsid /usr/lib/systemd/systemd \\
  --system --unit=multi-user.target --log-target=journal --log-level=info --show-status=0
"""


class Lab:
    """Booted when it is made. `home` holds the configuration of the user's manager."""

    def __init__(self, place: Path) -> None:
        units, self.home = place / 'units', place / 'home'
        units.mkdir()
        self.home.mkdir()
        for name, text in _TARGETS.items():
            (units / f'{name}.target').write_text(f'[Unit]\nDescription=lab\n{text}\n')
        for name in _JOURNAL:
            (units / name).write_text(Path('/usr/lib/systemd/system', name).read_text())
        (units / 'user-manager.service').write_text(_USER_MANAGER.format(home=self.home))
        self._group = _hierarchy() / f'tinytown-lab-{os.getpid()}'
        self._group.mkdir()
        join = f'echo $$ > {self._group}/cgroup.procs && exec "$@"'
        namespaces = ('unshare', '--pid', '--mount', '--uts', '--ipc', '--net', '--cgroup', '--fork', '--kill-child')
        self._boot = subprocess.Popen(
            ['sh', '-c', join, 'join', *namespaces, 'sh', '-c', _BOOT, 'boot', str(units)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._init = 0
        try:
            self._await_init()
        except BaseException:
            self.close()
            raise

    def _await_init(self) -> None:
        deadline = time.monotonic() + PATIENCE
        children = Path(f'/proc/{self._boot.pid}/task/{self._boot.pid}/children')
        while time.monotonic() < deadline:
            for child in children.read_text().split():
                self._init = int(child)
                run = Path('/proc', child, 'root', 'run/systemd')
                # the first is of this machine alone; where the second is there, it may not be listened on yet
                if all((run / name).exists() for name in ('journald.conf.d/lab.conf', 'private')):
                    if self.run('systemctl', 'show', '--property=Version', check=False).returncode:
                        continue
                    self.ctl('start', 'systemd-journald.service', 'multi-user.target')
                    return
            assert self._boot.poll() is None, 'the machine did not come up'
        raise AssertionError('systemd did not come up')

    def run(self, *argv: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the machine."""
        enter = ('nsenter', '--target', str(self._init), '--all', '--wd=/', '--')
        done = subprocess.run(
            [*enter, *argv], env=environment(HOME=str(self.home), XDG_RUNTIME_DIR='/run/user/0', **env),
            capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr, self.journal())
        return done

    def ctl(self, *words: str) -> str:
        return self.run('systemctl', *words).stdout.strip()

    def service(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`townhall service …` in the machine."""
        return self.run(sys.executable, '-m', 'tinytown.townhall', 'service', *words, check=check)

    def show(self, unit: str, what: str, *user: str) -> str:
        """A property of a unit."""
        return self.ctl(*user, 'show', '--value', f'--property={what}', unit)

    def await_value(self, unit: str, what: str, pattern: str) -> str:
        """A property of a unit, once it is as a pattern says."""
        deadline = time.monotonic() + PATIENCE
        while not re.fullmatch(pattern, value := self.show(unit, what)):
            assert time.monotonic() < deadline, (unit, what, value, self.journal())
        return value

    def members(self, unit: str, *user: str) -> dict[int, str]:
        """The processes of a unit's control group, by pid in the machine: their command lines."""
        group = self.show(unit, 'ControlGroup', *user)
        pids = self.run('sh', '-c', f'cat /sys/fs/cgroup{group}/cgroup.procs 2>/dev/null || true').stdout.split()
        script = 'for p; do printf "%s %s\\n" $p "$(tr "\\0" " " < /proc/$p/cmdline)"; done'
        lines = self.run('sh', '-c', script, 'sh', *pids).stdout.splitlines()
        return {int(pid): command for pid, _, command in (line.partition(' ') for line in lines)}

    def kill(self, number: signal.Signals, pid: int) -> None:
        """Signals a process of the machine, by its pid there."""
        self.run('kill', f'-{number.value}', str(pid))

    def journal(self, *words: str) -> str:
        """What was logged: by systemd, and by the units."""
        enter = ('nsenter', '--target', str(self._init), '--all', '--wd=/', '--')
        argv = [*enter, 'journalctl', '--no-pager', '--output=short', *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False).stdout

    def close(self) -> None:
        """Ends it with all that runs there."""
        with suppress(ProcessLookupError):
            os.kill(self._init or self._boot.pid, signal.SIGKILL)  # of which nothing in its namespace is left
        self._boot.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while self._group.exists():
            for directory, _, _ in os.walk(self._group, topdown=False):
                with suppress(OSError):
                    Path(directory).rmdir()
            assert time.monotonic() < deadline, f'{self._group} is not empty'


def _hierarchy() -> Path:
    """Where the unified control groups are."""
    mounts = (line.split() for line in Path('/proc/mounts').read_text().splitlines())
    return next(Path(where) for _, where, kind, *_ in mounts if kind == 'cgroup2')
