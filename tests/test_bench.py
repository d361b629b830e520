"""The benchmark measures what it claims, and rejects servers that did not do the work. Speed itself is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.load import Load, Wrong, percentile
from bench.report import ratio_row, table
from bench.rows import ASSIGN, CONNECTIONS, INBOX, check, measure
from bench.servers import OURS, Server
from bench.stage import MESSAGES, Stage

from .support import REPOSITORY, environment


@pytest.fixture(scope='module')
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        stage.reset()
        yield stage


@pytest.fixture(scope='module')
def server(stage: Stage) -> Iterator[Server]:
    with Server(OURS, stage) as started:
        yield started


class Liar(BaseHTTPRequestHandler):
    """Sends a fixed answer and does nothing."""

    answer: Any = None

    def do_GET(self) -> None:
        self._reply(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers['Content-Length']))
        self._reply(201)

    def _reply(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(self.answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def liar() -> Iterator[int]:
    with ThreadingHTTPServer(('127.0.0.1', 0), Liar) as served:
        threading.Thread(target=served.serve_forever, args=(0.01,)).start()
        yield served.server_port
        served.shutdown()


def test_the_short_form_measures_and_writes_a_table_and_json(tmp_path: Path) -> None:
    out = tmp_path / 'results.json'
    kinds = [word for kind in ('idle', 'pickup', 'starts', 'commands') for word in ('--rows', kind)]
    done = subprocess.run(
        [sys.executable, '-m', 'bench', '--short', '--only', 'townhall', *kinds, '--out', str(out)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results['cores'] == os.cpu_count()
    assert {'townhall', 'python', 'redis-server'} <= results['versions'].keys()
    names = [row['what'] for row in results['rows']]
    assert len(names) == 6, names
    for row in results['rows']:
        assert row['what'] in done.stdout
        assert row['ours'], row
        assert row['target'], row


def test_a_townhall_gives_the_answers_that_the_benchmark_expects(stage: Stage, server: Server) -> None:
    for ask in (INBOX, ASSIGN):
        assert check(stage, ask, {OURS: server.port}) > 50


def test_a_server_with_a_different_answer_is_not_measured(stage: Stage, server: Server, liar: int) -> None:
    Liar.answer = json.loads(INBOX.send(server.port))
    Liar.answer['messages'][MESSAGES - 1]['summary'] = 'something else'
    with pytest.raises(Wrong, match='liar answers'):
        check(stage, INBOX, {OURS: server.port, 'liar': liar})


def test_a_server_that_only_claims_to_assign_is_not_measured(stage: Stage, server: Server, liar: int) -> None:
    Liar.answer = json.loads(ASSIGN.send(server.port)) | {'task_id': '0b7f7b5e-0000-4000-8000-000000000000'}
    with pytest.raises(Wrong, match='liar answers'):
        check(stage, ASSIGN, {OURS: server.port, 'liar': liar})


@pytest.mark.parametrize(
    ('ask', 'counts'), [(ASSIGN, {'requests': 5, 'bytes': 5000}), (INBOX, {'requests': 5, 'bytes': 100})]
)
def test_a_run_with_short_answers_or_missing_tasks_is_rejected(
    stage: Stage, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Any, counts: dict[str, int]
) -> None:
    result = json.dumps({'seconds': 1.0, 'p50': 1.0, 'p99': 1.0, 'refused': 0, 'lost': 0} | counts)
    program = tmp_path / 'wrk'
    program.write_text(f"#!/bin/sh\necho '{result}'\n")
    program.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    with pytest.raises(Wrong, match='5'):
        measure(stage, server, ask, CONNECTIONS, 1, 100)


def test_the_median_of_the_ratios_of_all_rounds_decides() -> None:
    row = ratio_row('inbox', [30.0, 20.0, 90.0], 'peer', [10.0, 20.0, 30.0], 3)
    assert row.ratio is not None
    assert (row.ratio.least, row.ratio.median, row.ratio.most, row.met) == (1.0, 3.0, 3.0, True)
    assert ratio_row('inbox', [2.0], 'peer', [1.0], 3).met is False
    heading, line = table([row]).splitlines()
    assert heading.index('target') == line.index('≥ 3 ×')


def test_refused_requests_do_not_count_as_served() -> None:
    load = Load(requests=100, seconds=2, bytes=0, p50=1, p99=2, refused=40, lost=0)
    assert (load.served, load.rate) == (60, 30)


def test_a_percentile_is_one_of_the_values() -> None:
    assert [percentile([1, 2, 3, 4], part) for part in (0, 0.5, 0.99, 1)] == [1, 3, 4, 4]
