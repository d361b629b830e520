"""The commands that run until Ctrl-C: what they print as it happens, how they end, and what they do to a terminal."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tinytown.cli.backends import sent_events
from tinytown.cli.follow import since
from tinytown.cli.format import cut, event_line
from tinytown.cli.top import top
from tinytown.errors import UsageError

from ..ground import Puppet, enlist
from ..streams import await_streams, happen, ids
from ..support import PATIENCE, Hall, Place, environment


class Running:
    """A running `tt` command, whose output is read as it comes."""

    def __init__(self, place: Place, *words: str, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tinytown.cli', *words],
            cwd=place.root,
            env=environment(PYTHONUNBUFFERED='1', **env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout
        self._out = self.process.stdout
        self._decoder = codecs.getincrementaldecoder('utf-8')()
        self.output = ''

    def until(self, pattern: str) -> re.Match[str]:
        """Reads until the output matches a pattern."""
        deadline = time.monotonic() + PATIENCE
        while not (match := re.search(pattern, self.output)):
            left = deadline - time.monotonic()
            assert left > 0, f'no {pattern} in {self.output!r}'
            assert select.select([self._out], [], [], left)[0], f'no {pattern} in {self.output!r}'
            part = os.read(self._out.fileno(), 65536)
            assert part, f'it ended: {self.output!r} {self.process.stderr.read()!r}'  # type: ignore[union-attr]
            self.output += self._decoder.decode(part)
        return match

    def lines(self, count: int) -> None:
        """Reads until there are `count` lines in all."""
        self.until(rf'\A(?:[^\n]*\n){{{count}}}')

    def has_more(self, seconds: float) -> bool:
        """Whether it prints more within `seconds`."""
        return bool(select.select([self._out], [], [], seconds)[0])

    def end(self, by: int = signal.SIGINT) -> tuple[int, str]:
        """Ends it by a signal. Returns its exit status and its stderr."""
        self.process.send_signal(by)
        out, err = self.process.communicate(timeout=PATIENCE)
        self.output += self._decoder.decode(out)
        return self.process.returncode, err.decode()


Run = Callable[..., Running]


@pytest.fixture
def run() -> Iterator[Run]:
    """Starts commands, and kills those that still run at the end of the test."""
    with ExitStack() as stack:

        def start(place: Place, *words: str, **env: str) -> Running:
            started = Running(place, *words, **env)
            stack.callback(started.process.communicate)
            stack.callback(started.process.kill)
            return started

        yield start


@pytest.fixture(scope='module')
def open_hall(soil: Place) -> Iterator[Hall]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HOME', str(soil.root))
        made = soil.hall()
        yield made
        made.kill()


@pytest.fixture(params=['here', 'through a townhall'])
def way(request: pytest.FixtureRequest, ground: Place, open_hall: Hall) -> list[str]:
    """Global options: none, or the URL of a townhall."""
    assert ground
    return [] if request.param == 'here' else ['--url', f'http://{open_hall.address}:{open_hall.port}']


# ------------------------------------------------------------------------------------------------------------- events


def test_events_are_printed_a_line_each_as_they_happen_until_ctrl_c(ground: Place, way: list[str], run: Run) -> None:
    happen(ground, 1)
    command = run(ground, 'events', '-f', '--after', '0-0', *way)
    command.until(r'task\.created .*\n')
    agent = enlist(ground, 'backend')
    task = ground.do('task.assign', agent='backend', task='x')['task_id']
    command.until(rf'Z  task\.assigned +backend +{task}\n')
    agent.depart()
    command.until(r'agent\.stopped +backend +-  by test\n|agent\.stopped +backend.*\n')
    assert command.end() == (130, '')
    assert len(command.output.splitlines()) == len(ids(ground))


def test_without_a_start_only_new_events_are_printed(ground: Place, way: list[str], run: Run) -> None:
    happen(ground, 3)
    command = run(ground, 'events', '-f', '--json', '--type', 'agent', '--verbose', *way)
    while not command.output:
        enlist(ground, f'a{len(ids(ground))}')
        if command.has_more(0.2):
            command.until(r'\n')
    first = json.loads(command.output.splitlines()[0])
    assert first['type'].startswith('agent.')
    assert command.end()[0] == 130


def test_count_limits_the_number_of_events(ground: Place, way: list[str]) -> None:
    happen(ground, 5)
    done = ground.tt('events', '-f', '--since', '1h', '--count', '3', '--json', *way)
    assert [json.loads(line)['id'] for line in done.stdout.splitlines()] == ids(ground)[:3]
    shown = ground.tt('events', '--count', '2', *way).stdout
    assert shown.splitlines()[-1] == f'There is more; add  --after {ids(ground)[1]}'
    assert len(ground.tt('events', '--since', '1970-01-01T00:00:01Z', *way).stdout.splitlines()) == 6


def test_a_filter_finds_rare_events_among_thousands(ground: Place, way: list[str]) -> None:
    happen(ground, 2100)
    enlist(ground, 'rare')
    happen(ground, 1)
    assert [event['type'] for event in ground.tt_json('events', '--agent', 'rare', *way)['events']] == [
        'agent.registered',
        'agent.started',
    ]


def test_several_event_types_may_be_given_one_by_one_or_separated_by_commas(ground: Place, way: list[str]) -> None:
    happen(ground, 1)
    enlist(ground, 'a')
    shown = [
        [event['type'] for event in ground.tt_json('events', *way, *types)['events']]
        for types in (('--type', 'task', '--type', 'agent.started'), ('--type', 'task,agent.started'))
    ]
    assert shown == [['task.created', 'agent.started']] * 2


def test_history_shows_the_latest_events(ground: Place, way: list[str]) -> None:
    happen(ground, 5)
    enlist(ground, 'a')
    shown = ground.tt('history', '-n', '2', *way).stdout
    assert re.findall(r'agent\.\w+', shown) == ['agent.registered', 'agent.started']
    assert 'task.created' not in ground.tt('history', '--agent', 'a', *way).stdout


def test_a_gap_between_events_is_shown(ground: Place, way: list[str], run: Run) -> None:
    happen(ground, 3)
    command = run(ground, 'events', '-f', '--after', '0-0', *way)
    command.lines(3)
    ground.do('town.reset', force=True)
    command.until(r'--- some events are no longer kept ---\n.*town\.reset')


def test_following_events_goes_on_after_a_townhall_is_killed_and_restarted(place: Place, run: Run) -> None:
    hall = place.hall()
    happen(place, 10)
    command = run(place, 'events', '-f', '--after', '0-0', '--json', '--url', f'http://127.0.0.1:{hall.port}')
    command.lines(10)
    hall.kill()
    happen(place, 10)
    hall = place.hall('--port', str(hall.port))
    happen(place, 10)
    command.lines(30)
    hall.process.send_signal(signal.SIGTERM)
    hall.process.wait()
    hall = place.hall('--port', str(hall.port))
    happen(place, 10)
    command.lines(40)
    status, stderr = command.end()
    assert [json.loads(line)['id'] for line in command.output.splitlines()] == ids(place)
    assert status == 130
    assert '; trying again' in stderr
    assert 'Traceback' not in stderr


@pytest.mark.parametrize(
    ('words', 'status', 'says'),
    [
        (['events', '-f', '--since', 'yesterday'], 2, '--since yesterday'),
        (['events', '--since', '1h', '--after', '1-0'], 2, 'not both'),
        (['events', '-f', '--type', '*'], 2, '--type'),
        (['events', '-f', '--count', '0'], 2, '--limit'),
        (['events', '-f', '--url', 'http://127.0.0.1:1'], 1, "can't be reached"),
        (['logs', '-f', 'nobody'], 1, "Agent 'nobody' not found"),
        (['top', '--url', 'http://127.0.0.1:1'], 1, "can't be reached"),
    ],
)
def test_a_follow_that_can_not_start_says_why_in_one_line(
    ground: Place, words: list[str], status: int, says: str
) -> None:
    done = ground.tt(*words, check=False)
    assert (done.returncode, done.stdout) == (status, '')
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_error_of_the_townhall_ends_a_follow(ground: Place, open_hall: Hall) -> None:
    url = f'http://{open_hall.address}:{open_hall.port}'
    done = ground.tt('logs', '-f', 'nobody', '--url', url, check=False)
    assert (done.returncode, done.stderr) == (1, "tt: Agent 'nobody' not found\n")
    await_streams(open_hall, 0)


def test_since_converts_ages_and_times_to_event_ids() -> None:
    assert since('10m', 1000) == '400000-0'
    assert since('2h', 100) == '0-0'
    assert since('1970-01-01T00:00:01.5Z', 0) == '1500-0'
    for wrong in ('', '10', 'm', '1w', '-5m', '99999999999999h', 'now'):
        with pytest.raises(UsageError):
            since(wrong, 0)


def test_server_sent_events_are_parsed_as_in_the_html_standard() -> None:
    lines = b': hi\n\nid: 1\nevent: a\ndata: x\ndata:  y\n\nretry: 5\ndata\r\n\r\nid: 2\n\ndata: lost'.splitlines(
        keepends=True
    )
    events = [tuple(event) for event in sent_events(lines, '0')]
    assert events == [('message', '0', ''), ('a', '1', 'x\n y'), ('message', '1', ''), ('message', '2', '')]


# --------------------------------------------------------------------------------------------------------------- logs


def test_a_followed_log_starts_with_its_last_lines_and_goes_on_as_it_grows(
    ground: Place, way: list[str], run: Run
) -> None:
    enlist(ground, 'a')
    file = ground.root / '.tt' / 'logs' / 'a.log'
    for suffix in ('.1', '.at'):
        file.with_name(f'a.log{suffix}').unlink(missing_ok=True)
    file.write_text('one\ntwo\nthree\n')
    command = run(ground, 'logs', 'a', '-f', '-n', '2', *way)
    command.until('two\nthree\n')
    with file.open('a') as out:
        out.write('four \x1b[2J\n')
    command.until('four \ufffd\\[2J\n')
    file.write_text('anew\n')
    command.until('anew\n')
    status, stderr = command.end()
    assert (status, command.output) == (130, 'two\nthree\nfour \ufffd[2J\nanew\n')
    assert stderr == 'tt: the log starts again\n'


def test_logs_prints_the_text_of_the_log_unchanged(ground: Place, way: list[str]) -> None:
    enlist(ground, 'a')
    (ground.root / '.tt' / 'logs' / 'a.log').write_text('one\n  two\n')
    assert ground.tt('logs', 'a', *way).stdout == 'one\n  two\n'
    assert ground.tt('logs', 'a', '-n', '1', *way).stdout == '  two\n'
    assert ground.tt_json('logs', 'a', '--offset', '4', *way)['text'] == '  two\n'


# ----------------------------------------------------------------------------------------------------------- terminal


class Terminal:
    """A command that runs on a pseudoterminal, and what its screen shows."""

    def __init__(self, place: Place, *words: str, columns: int = 80, lines: int = 24, **env: str) -> None:
        self._master, self._slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self._slave)
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tinytown.cli', *words],
            cwd=place.root,
            env=environment(TERM='xterm', **env),
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        self.raw = ''
        self._decoder = codecs.getincrementaldecoder('utf-8')()

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack('HHHH', lines, columns, 0, 0))

    def screen(self) -> list[str]:
        """The lines on the screen now."""
        drawn = self.raw.rpartition('\x1b[H')[2].partition('\x1b[J')[0]
        return [re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', line) for line in drawn.split('\r\n')]

    def until(self, pattern: str) -> list[str]:
        """Reads until the screen matches a pattern. Returns the screen."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, '\n'.join(self.screen())):
            left = deadline - time.monotonic()
            assert left > 0, f'no {pattern} in {self.screen()}'
            self._read(left)
        return self.screen()

    def _read(self, seconds: float) -> None:
        if select.select([self._master], [], [], seconds)[0]:
            self.raw += self._decoder.decode(os.read(self._master, 65536))

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def end(self) -> int:
        """Waits until the command ends, and checks that it restored the terminal. Returns the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None or select.select([self._master], [], [], 0)[0]:
            assert time.monotonic() < deadline, self.screen()
            self._read(0.1)
        assert termios.tcgetattr(self._slave) == self.before
        assert self.raw.count('\x1b[?1049h') == self.raw.count('\x1b[?1049l')
        assert self.raw.count('\x1b[?25l') == self.raw.count('\x1b[?25h')
        assert self.raw.rindex('\x1b[?1049l') > self.raw.rindex('\x1b[H')
        assert 'Traceback' not in self.raw
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)


Open = Callable[..., Terminal]


@pytest.fixture
def terminal() -> Iterator[Open]:
    with ExitStack() as stack:

        def make(*given: Any, **named: Any) -> Terminal:
            made = Terminal(*given, **named)
            stack.callback(made.close)
            return made

        yield make


def test_top_shows_agents_as_they_start_and_work_until_q_is_pressed(
    ground: Place, way: list[str], terminal: Open
) -> None:
    shown = terminal(ground, 'top', *way)
    shown.until('test: 0 agents, 0 working; tasks: none\n')
    agent = enlist(ground, 'backend')
    shown.until(r'backend +Idle +demo')
    ground.do('task.assign', agent='backend', task='Make the tests pass, all of them, wherever they are, and be quick')
    shown.until('tasks: 1 assigned')
    task, attempt = agent.take()
    lines = shown.until('backend +Working +demo +0 +[01] +[0-9]s +Make the tests pass.*…')
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24
    agent.finish(task, attempt)
    agent.round_done()
    shown.until(r'backend +Idle +demo +1 ')
    shown.until(r'task\.completed +backend')
    assert '\x1b[32mIdle' in shown.raw
    shown.press(b'q')
    assert shown.end() == 0


def test_status_watch_refreshes_the_screen_at_an_event(ground: Place, way: list[str], terminal: Open) -> None:
    shown = terminal(ground, 'status', '--watch', '--deep', *way)
    shown.until('No agents')
    enlist(ground, 'a')
    shown.until(r'a +Idle')
    shown.press(b'\x03')
    assert shown.end() == 130


@pytest.mark.parametrize(('by', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_terminal_is_restored_after_every_signal(ground: Place, terminal: Open, by: int, status: int) -> None:
    shown = terminal(ground, 'top')
    shown.until('No agents')
    shown.process.send_signal(by)
    assert shown.end() == status


def test_top_redraws_when_the_terminal_is_resized(ground: Place, terminal: Open) -> None:
    for i in range(12):
        enlist(ground, f'agent-{i}')
    shown = terminal(ground, 'top', columns=120, lines=40)
    shown.until('agent-11')
    shown.resize(40, 8)
    lines = shown.until('… [0-9]+ more agents')
    assert max(map(len, lines)) <= 40
    assert len(lines) <= 8
    shown.press(b'q')
    assert shown.end() == 0


def test_no_color_removes_the_colours_of_top(ground: Place, terminal: Open) -> None:
    enlist(ground, 'a')
    shown = terminal(ground, 'top', NO_COLOR='1')
    shown.until(r'a +Idle')
    shown.press(b'x')  # another key does nothing
    shown.press(b'q')
    assert shown.end() == 0
    assert not re.search(r'\x1b\[[0-9;]*m', shown.raw)


def test_the_screen_shows_that_the_town_can_not_be_reached_and_recovers(place: Place, terminal: Open) -> None:
    hall = place.hall()
    puppet: Puppet = enlist(place, 'a')
    shown = terminal(place, 'top', '--url', f'http://127.0.0.1:{hall.port}', columns=200)
    shown.until(r'a +Idle')
    hall.kill()
    lines = shown.until('trying again')
    assert any('Idle' in line for line in lines)  # the last known status stays on the screen
    place.hall('--port', str(hall.port))
    puppet.depart()
    shown.until(r'a +Stopped')
    assert not any('trying again' in line for line in shown.until(r'agent\.stopped'))
    shown.press(b'q')
    assert shown.end() == 0


@pytest.mark.parametrize('words', [['top'], ['status', '--watch']])
def test_without_a_terminal_the_status_is_shown_once(ground: Place, words: list[str]) -> None:
    enlist(ground, 'a')
    done = ground.tt(*words)
    assert 'Idle' in done.stdout
    assert '\x1b' not in done.stdout
    assert done.stderr == 'tt: stdout is not a terminal, so this is shown only once\n'
    assert json.loads(ground.tt(*words, '--json').stdout)['agents'][0]['name'] == 'a'


# --------------------------------------------------------------------------------------------------------------- pure

AGENT = {
    'name': 'x' * 63, 'state': 'Working', 'cli': 'codex-mini', 'tasks_completed': 12345, 'inbox_len': 500,
    'urgent_len': 12, 'current_scope': '日本' * 60, 'last_heartbeat': '2026-11-21T10:00:00.000Z',
}  # fmt: skip
EVENT = {
    'type': 'task.requeued',
    'at': '2026-11-21T10:00:00.000Z',
    'agent_name': 'a',
    'task_id': 't',
    'why': '\x1bw\ny',
}


def deep(agents: int) -> dict[str, Any]:
    return {
        'name': 'test', 'agent_count': agents, 'agents': [AGENT] * agents, 'tasks': {'running': 1, 'failed': 0},
        'recent_events': [EVENT] * 20,
    }  # fmt: skip


@pytest.mark.parametrize('columns', [20, 80, 200])
@pytest.mark.parametrize(('agents', 'lines'), [(0, 24), (1, 24), (100, 24), (5, 5)])
def test_top_fits_any_terminal(columns: int, agents: int, lines: int) -> None:
    drawn = top(deep(agents), 1795255265.0, columns, lines)
    assert len(drawn) <= lines
    for line in drawn:
        plain = re.sub(r'\x1b\[\d*m', '', line)
        assert sum(2 if character in '日本' else 1 for character in plain) <= columns
        assert '\x1b' not in plain
        assert line.count('\x1b[0m') >= bool('\x1b' in line)
    if agents > lines:
        assert drawn[-1] == '… 80 more agents'[:columns]


@pytest.mark.parametrize(
    ('seconds', 'shown'), [(-5, '0s'), (0, '0s'), (99.9, '99s'), (100, '1m'), (5999, '99m'), (6000, '1h')]
)
def test_top_shows_the_age_of_the_last_heartbeat(seconds: float, shown: str) -> None:
    moment = 1795255200.0  # the last heartbeat of AGENT
    [_, _, _, row, *_] = top(deep(1), moment + seconds, 200, 24)
    assert re.search(rf'500\+12 +{shown} ', row)


def test_cutting_a_line_keeps_its_colours_balanced() -> None:
    assert cut('\x1b[32mIdle\x1b[0m', 4) == '\x1b[32mIdle\x1b[0m'
    assert cut('\x1b[32mIdling\x1b[0m', 4) == '\x1b[32mIdl\x1b[0m…'
    assert cut('日本日本', 6, pad=True) == '日本… '
    assert cut('ab', 4, pad=True) == 'ab  '


def test_an_event_is_shown_as_one_line_without_control_characters() -> None:
    assert event_line(EVENT) == '2026-11-21T10:00:00.000Z  task.requeued         a                 t  \ufffdw y'
