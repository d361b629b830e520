"""Townhall and a worker as process 1 of a container, as a user with no rights, on a root that can't be written to.

No container engine is needed: `unshare` makes the namespaces that one would make.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import PATIENCE, REPOSITORY, Place, make_town
from tinytown.host.processes import python_path

# Makes what a container has: a name, a root that can't be written to (nor can /tmp), the volume; and then drops every
# right. /proc is mounted anew, for the processes of this container alone.
BOX = """
set -e
hostname "$1"; shift
mount --rbind "$1" /mnt; shift
mount -o remount,bind,ro /
exec unshare --user --map-user=10001 --map-group=10001 -- "$@"
"""


@contextmanager
def container(name: str, volume: Path, *words: str, **more: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A container, and the pid of its process 1 as it is seen from outside."""
    spaces = ['--user', '--map-root-user', '--mount', '--uts', '--pid', '--mount-proc', '--fork', '--kill-child']
    argv = ['unshare', *spaces, 'sh', '-c', BOX, 'box', name, str(volume)]
    env = {'PYTHONPATH': python_path(), 'TINYTOWN_TOWN': '/mnt', 'PATH': os.environ['PATH'], 'HOME': '/mnt'} | more
    env |= {'PYTHONDONTWRITEBYTECODE': '1'}
    script = [sys.executable, str(REPOSITORY / 'deploy' / 'entrypoint.py'), *words]
    with (
        open(volume / 'said', 'ab') as said,
        subprocess.Popen([*argv, *script], env=env, cwd='/', stderr=said) as process,
    ):
        try:
            yield process, first_of(process)
        finally:
            process.kill()


def first_of(process: subprocess.Popen[bytes]) -> int:
    """The child of unshare, which is process 1 of the container."""
    listed = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    deadline = time.monotonic() + PATIENCE
    while not (found := listed.read_text().split()):
        assert time.monotonic() < deadline
    return int(found[0])


def said(volume: Path, pattern: str) -> str:
    """All that was said in the container, once a pattern is in it."""
    deadline = time.monotonic() + PATIENCE
    while not re.search(pattern, text := (volume / 'said').read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)
    return text


def inside(first: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs something in a container, as `exec` of an engine does."""
    argv = ['nsenter', '--target', str(first), '--user', '--mount', '--uts', '--pid', '--preserve-credentials', '--']
    env = {'PYTHONPATH': python_path(), 'TINYTOWN_TOWN': '/mnt', 'PATH': os.environ['PATH'], 'HOME': '/mnt'}
    return subprocess.run([*argv, *words], env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)


TT = (sys.executable, '-P', '-m', 'tinytown.cli')


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    made = tmp_path / 'volume'
    made.mkdir()
    return made


def zombies(first: int) -> list[str]:
    """The processes of a container that have ended and that nobody has collected."""
    listed = inside(first, 'sh', '-c', 'cat /proc/[0-9]*/stat').stdout.splitlines()
    return [line for line in listed if line.rpartition(')')[2].split()[0] == 'Z']


@pytest.mark.parametrize('name', ['Containerfile', 'Containerfile.worker'])
def test_what_an_image_s_build_copies_is_all_that_its_installation_needs(tmp_path: Path, name: str) -> None:
    """Installs it with what is here, from a directory with nothing but that; and asks what was installed."""
    source, target = tmp_path / 'src', tmp_path / 'installed'
    source.mkdir()
    copied = re.findall(r'^COPY (?!--)(.+) (\S+)$', (REPOSITORY / 'deploy' / name).read_text(), re.M)
    for words, to in copied[:2]:
        for word in words.split():
            path = REPOSITORY / word
            if path.is_dir():
                shutil.copytree(path, source / to, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(path, source)
    pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-build-isolation', '--target']
    subprocess.run([*pip, str(target), '.'], cwd=source, check=True)
    entry = REPOSITORY / 'deploy' / 'entrypoint.py'
    argv = [
        sys.executable,
        str(entry),
        sys.executable,
        '-c',
        'import tinytown.state.store as s; print(s.__file__, s.scripts())',
    ]
    env = {'PYTHONPATH': str(target), 'TINYTOWN_TOWN': str(tmp_path)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, cwd='/')
    assert done.stdout.startswith(f'{target}/tinytown/state/store.py')
    assert {file.name for file in (target / 'tinytown').iterdir()} >= {file.name for file in copied_files(source)}


def copied_files(source: Path) -> list[Path]:
    return [file for file in (source / 'tinytown').iterdir() if file.is_file()]


@pytest.mark.parametrize('workers', ['1', '2'])
def test_townhall_as_process_1_collects_orphans_and_ends_by_sigterm(volume: Path, workers: str) -> None:
    given = {'TINYTOWN_TOWNHALL_BIND': '0.0.0.0', 'TINYTOWN_TOWNHALL_REST_PORT': '0'}  # noqa: S104
    with container('hall', volume, 'townhall', '--workers', workers, **given) as (process, first):
        said(volume, 'is open on')
        status = Path(f'/proc/{first}/status').read_text()
        assert re.search(r'NSpid:\t\d+\t1\n', status)
        assert re.search(r'CapEff:\t0+\n', status)
        assert inside(first, 'touch', '/etc/x').stderr.count('Read-only file system') == 1
        pinged = inside(first, *TT, 'ping')
        assert (pinged.returncode, pinged.stdout.split()[1:]) == (0, ['is', 'ready'])
        inside(first, 'sh', '-c', '(sleep 0.2 & exec sleep 0.1) & exit')  # leaves two behind
        spawned = inside(first, *TT, 'spawn', 'a', '--cli', 'demo')
        assert spawned.returncode == 0, spawned.stderr
        inside(first, 'sh', '-c', 'kill -9 $(pgrep -f tinytown.worker)')
        assert inside(first, *TT, 'wait', 'a', '--timeout', '10').returncode == 0
        deadline = time.monotonic() + PATIENCE
        while zombies(first):
            assert time.monotonic() < deadline, zombies(first)
        began = time.monotonic()
        os.kill(first, signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 10, 'no one is waited for (townhall.limits.drain_secs)'


def test_sigterm_is_heard_while_townhall_still_waits_for_its_redis(volume: Path) -> None:
    """A process 1 is not ended by a signal that it has no handler for."""
    make_town(volume)
    (volume / '.tt').mkdir(mode=0o700)
    with container('hall', volume, 'townhall', TINYTOWN_REDIS_URL='redis://192.0.2.1:1') as (process, first):
        deadline = time.monotonic() + PATIENCE
        handled = 1 << (signal.SIGTERM - 1)
        while not int(re.findall(r'SigCgt:\t(\w+)', Path(f'/proc/{first}/status').read_text())[0], 16) & handled:
            assert time.monotonic() < deadline
        os.kill(first, signal.SIGTERM)
        assert process.wait(PATIENCE) in (0, 1, 143)


GIVEN = {'TINYTOWN_NAME': 'test', 'TINYTOWN_REDIS_URL': 'unix:///mnt/redis.sock', 'TINYTOWN_AGENT_LEASE_SECS': '6'}


@pytest.fixture
def town(volume: Path, tmp_path: Path) -> Iterator[Place]:
    """A town whose Redis is in the volume, and in another one beside that."""
    place = make_town(tmp_path / 'town', agent={'lease_secs': 6})
    mounted = [volume / 'redis.sock', tmp_path / 'other' / 'redis.sock']
    (tmp_path / 'other').mkdir()
    for file in mounted:
        file.touch()
        subprocess.run(['mount', '--bind', place.town.redis_url.removeprefix('unix://'), str(file)], check=True)
    yield place
    for file in mounted:
        subprocess.run(['umount', str(file)], check=True)
    Place(place.root).close()


@pytest.mark.parametrize('following', ['volume', 'other'])
def test_a_worker_that_was_killed_with_its_container_works_on_in_the_next_one(
    volume: Path, town: Place, following: str
) -> None:
    with container('worker-1', volume, 'worker', 'w', '--cli', 'demo', **GIVEN) as (process, first):
        town.await_event('agent.started', agent_name='w')
        os.kill(first, signal.SIGKILL)
        process.wait(PATIENCE)  # until nothing of it is left
    with container('worker-1', volume.parent / following, 'worker', 'w', **GIVEN) as (process, first):
        town.await_event('agent.restarting', agent_name='w')
        task = town.do('task.assign', agent='w', task='haiku')['task_id']
        assert town.await_end(task)['result'] == 'demo: done: haiku'
        os.kill(first, signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert town.do('agent.get', agent='w')['state'] == 'Stopped'


@pytest.mark.parametrize('second', ['volume', 'other'])
def test_a_second_container_of_the_same_name_leaves_the_worker_of_the_first_alone(
    volume: Path, town: Place, second: str
) -> None:
    with container('dup', volume, 'worker', 'w', '--cli', 'demo', **GIVEN) as (_, first):
        town.await_event('agent.started', agent_name='w')
        task = town.do('task.assign', agent='w', task='sleep 15')['task_id']
        town.await_event('task.started', task_id=task)
        with container('dup', volume.parent / second, 'worker', 'w', **GIVEN) as (process, _):
            assert process.wait(PATIENCE) == 1
            said(volume.parent / second, r"Agent 'w' is Working; kill it first")
        with container('dup', volume, *TT, 'kill', 'w', **GIVEN) as (process, _):
            assert process.wait(PATIENCE) == 1
            said(volume, r"'w' runs in another container \(pid namespace\) of host 'dup'")
        with container('dup', volume, *TT, 'recover', **GIVEN) as (process, _):
            assert process.wait(PATIENCE) == 0
        assert town.await_end(task)['attempt'] == 1
        os.kill(first, signal.SIGTERM)
