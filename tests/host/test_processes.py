"""Processes: their identity, whether one is alive, and that stopping a tree ends all of it and nothing else."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tinytown.host import processes
from tinytown.host.processes import (
    INSTANCE_VARIABLE,
    identify,
    marked,
    stop_one,
    stop_tree,
    this_boot,
    this_machine,
    tree,
    verdict,
)
from tinytown.model import CONDUCTOR_ID, new_id

from ..support import PATIENCE, environment, until

SAYS = 'sh -c "echo \\$\\$; read w <&3; :"'  # prints its pid, and ends when the input of its starter is closed
Start = Callable[..., 'subprocess.Popen[bytes]']


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a shell script, which prints a line when it is ready. It is killed when the test ends."""
    running: list[subprocess.Popen[bytes]] = []

    def run(script: str, **env: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            ['sh', '-c', script],
            env={'PATH': os.environ['PATH']} | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        running.append(child)
        return child

    yield run
    for child in running:
        child.kill()
        child.wait()
        assert child.stdin
        assert child.stdout
        child.stdin.close()
        child.stdout.close()


def next_line(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout
    assert select.select([child.stdout], [], [], PATIENCE)[0], 'the script printed nothing'
    return child.stdout.readline().decode().strip()


def descriptors(pid: int) -> dict[str, str]:
    """The open files of a process, by descriptor."""
    files = {}
    for file in Path(f'/proc/{pid}/fd').iterdir():
        with suppress(FileNotFoundError):
            files[file.name] = str(file.readlink())
    return files


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends a script that reads its input, and leaves it a zombie."""
    assert child.stdin
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture(params=[True, False], ids=['proc', 'ps'])
def _either_source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with both sources of information: /proc, and ps for systems without /proc."""
    monkeypatch.setattr(processes, 'HAS_PROC', request.param)


@pytest.mark.usefixtures('_either_source')
def test_a_process_is_identified_by_host_boot_pid_and_start_time(start: Start) -> None:
    child = start('echo ready; read word')
    next_line(child)
    found = identify(child.pid)
    assert verdict(found) == 'alive'
    assert verdict(replace(found, start='1')) == 'dead', 'its pid was reused'
    assert verdict(replace(found, boot='another')) == 'dead'
    assert verdict(replace(found, boot=f'another@{this_machine()}')) == 'dead'
    assert verdict(replace(found, boot='another@another')) == 'unknown', 'two machines may have the same name'
    for parts in (1, 2):
        shorter = '@'.join(this_boot().split('@')[:parts])
        assert verdict(replace(found, boot=shorter)) == 'alive', 'the form that earlier versions wrote'
    assert verdict(replace(found, start='1', boot=f'{this_boot()}1')) == 'unknown', 'a pid of another container'
    assert verdict(replace(found, host='another')) == 'unknown'
    assert verdict(replace(found, host='another', boot='another')) == 'unknown'
    assert verdict(replace(found, pid=0)) == 'unknown'
    assert verdict(replace(found, start='')) == 'unknown'
    end(child)
    assert verdict(found) == 'dead', 'a zombie is dead'
    child.wait()
    assert verdict(found) == 'dead'
    assert identify(child.pid).start == ''


def test_the_start_time_from_ps_is_the_same_in_every_time_zone_and_locale(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, 'HAS_PROC', False)
    child = start('echo ready; read word')
    next_line(child)
    found = identify(child.pid)
    monkeypatch.setenv('TZ', 'Asia/Tokyo')
    monkeypatch.setenv('LC_ALL', 'de_DE.UTF-8')
    assert verdict(found) == 'alive'


@pytest.mark.usefixtures('_either_source')
def test_a_tree_includes_all_descendants_of_a_process(start: Start) -> None:
    mine = new_id()
    child = start(
        f'exec 3<&0; {SAYS} & env -i PATH=$PATH setsid {SAYS} & (({SAYS}); :) & read w', **{INSTANCE_VARIABLE: mine}
    )
    below = {int(next_line(child)) for _ in range(3)}
    found = set(tree(identify(child.pid), mine))
    assert below < found
    assert os.getpid() not in tree(identify(os.getpid()), mine)


def test_a_process_with_another_mark_belongs_to_another_tree(start: Start) -> None:
    mine, other = new_id(), new_id()
    child = start(
        f'exec 3<&0; {SAYS} & '
        f'{INSTANCE_VARIABLE}={other} '
        'sh -c "echo \\$\\$; env -i PATH=$PATH sh -c \'echo \\$\\$; read w <&3; :\'; :" & read w',
        **{INSTANCE_VARIABLE: mine},
    )
    below = {int(next_line(child)) for _ in range(3)}
    its = set(tree(None, other))
    assert len(its & below) == 2, 'with its descendants'
    assert set(tree(identify(child.pid), mine)) == set(tree(None, mine)) == below - its | {child.pid}


@pytest.mark.parametrize('mark', ['', 'x', '*', '0', CONDUCTOR_ID[:-1], CONDUCTOR_ID + 'X'])
def test_a_mark_that_is_not_a_uuid_matches_no_process(start: Start, mark: str) -> None:
    next_line(start('echo ready; read word', **{INSTANCE_VARIABLE: mark}))
    assert marked(mark) == []
    assert tree(None, mark) == {}


def test_a_mark_is_found_in_any_session_and_must_match_exactly(start: Start) -> None:
    instance = new_id()
    bearer = start('echo ready; read word', **{INSTANCE_VARIABLE: instance})
    namesake = start(
        'echo ready; read word', **{f'X{INSTANCE_VARIABLE}': instance, 'Y': f'{INSTANCE_VARIABLE}={instance}'}
    )
    next_line(bearer)
    next_line(namesake)
    assert marked(instance) == [bearer.pid]


def test_stop_tree_sends_sigterm_and_after_the_grace_period_sigkill(start: Start) -> None:
    polite = start('trap "echo bye; exit 0" TERM; echo ready; while :; do read word; done')
    next_line(polite)
    assert stop_tree(identify(polite.pid), new_id(), PATIENCE) == []
    assert next_line(polite) == 'bye'
    assert polite.wait() == 0
    stubborn = start('trap "" TERM; echo ready; while :; do read word; done')
    next_line(stubborn)
    assert stop_tree(identify(stubborn.pid), new_id(), 0.1) == []
    assert stubborn.wait() == -signal.SIGKILL


def test_stop_tree_ends_a_process_that_is_stopped_by_a_signal(start: Start) -> None:
    child = start('echo ready; read word')
    next_line(child)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)  # otherwise SIGTERM could arrive before the pending SIGSTOP
    assert stop_tree(identify(child.pid), new_id(), 0.1) == []
    assert child.wait() == -signal.SIGKILL


def test_a_reused_pid_is_left_alone(start: Start) -> None:
    child = start('echo ready; read word')
    next_line(child)
    found = identify(child.pid)
    for stale in (replace(found, start='1'), replace(found, boot='another'), replace(found, start='')):
        assert stop_tree(stale, new_id(), 0) == []
        assert stop_one(stale, 0) == []
    assert tree(None, new_id(), {child.pid: '1'}) == {}, 'an earlier member whose pid was reused'
    assert verdict(found) == 'alive'


def test_stop_one_spares_the_children_of_the_process(start: Start) -> None:
    parent = start(f'exec 3<&0; {SAYS} & read word')
    child = identify(int(next_line(parent)))
    assert stop_one(identify(parent.pid), 0) == []
    assert parent.wait() == -signal.SIGKILL
    assert verdict(child) == 'alive'


def test_a_detached_process_outlives_its_starter_and_inherits_no_descriptors(directory: Path) -> None:
    os.mkfifo(directory / 'gate')
    gate = os.open(directory / 'gate', os.O_RDWR)
    script = (
        'import os, sys; from pathlib import Path; from tinytown.host.processes import start_detached\n'
        'held = os.open("/", os.O_RDONLY); os.set_inheritable(held, True); before = os.listdir("/proc/self/fd")\n'
        'here = Path(sys.argv[1])\n'
        'print(start_detached(["sh", "-c", "exec cat gate"], here, {"PATH": os.environ["PATH"]}, here / "log"))\n'
        'assert len(os.listdir("/proc/self/fd")) == len(before)\n'
    )
    starter = subprocess.run(  # returns when no process holds the pipes open any more
        [sys.executable, '-c', script, str(directory)],
        env=environment(),
        stdin=subprocess.PIPE,
        capture_output=True,
        check=True,
        timeout=PATIENCE,
    )
    detached = int(starter.stdout)
    try:
        gated = str(directory / 'gate')
        until(lambda: gated in descriptors(detached).values())  # by then it has closed what it opens at its start
        held = descriptors(detached)
        assert {held.pop(n) for n in ('0', '1', '2')} == {'/dev/null', str(directory / 'log')}
        assert set(held.values()) == {gated}
        assert os.getsid(detached) == detached
    finally:
        os.kill(detached, signal.SIGKILL)
        os.close(gate)


def test_reap_orphans_collects_orphans_but_not_the_child_that_a_caller_waits_for() -> None:
    script = (
        'import os, subprocess; from tinytown.host.processes import *\n'
        'become_subreaper()\n'
        'child = subprocess.Popen(["sh", "-c", "exec 3<&0; (read x <&3; exit 1) & echo $!; read x"],\n'
        '    stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n'
        'orphan = int(child.stdout.readline()); fd = os.pidfd_open(orphan)\n'
        'child.kill(); os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)\n'
        'reap_orphans(but=(child.pid,)); assert child.wait() == -9\n'
        'child.stdin.close(); import select; select.select([fd], [], [])\n'
        'assert os.path.exists(f"/proc/{orphan}"); reap_orphans(); assert not os.path.exists(f"/proc/{orphan}")\n'
    )
    subprocess.run([sys.executable, '-c', script], env=environment(), check=True, timeout=PATIENCE)
