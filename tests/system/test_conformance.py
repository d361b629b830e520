"""The official conformance suite of MCP: all that a revision requires, and what the product must pass as it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..support import REPOSITORY, Place, environment, make_town
from . import tools

VERSION = '0.2.0-alpha.12'
REQUIRED = {'2025-11-25': 30, '2026-07-28': 37}
# What asks for no tool, resource or prompt by name.
GENERIC = {
    '2025-11-25': (
        'server-initialize logging-set-level ping tools-list resources-list prompts-list server-sse-multiple-streams '
        'dns-rebinding-protection server-session-lifecycle'
    ),
    '2026-07-28': (
        'tools-list resources-list prompts-list server-sse-multiple-streams dns-rebinding-protection caching '
        'sep-2164-resource-not-found http-header-validation input-required-result-unsupported-methods'
    ),
}


def run_suite(port: int, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    suite = tools.npm('@modelcontextprotocol/conformance', VERSION) / 'dist' / 'index.js'
    url = f'http://localhost:{port}/mcp'
    command = [str(tools.node()), str(suite), 'server', '--url', url, '-o', str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def outcomes(out: Path) -> dict[str, Counter[str]]:
    """How often each scenario's checks had which outcome."""
    found = {}
    for file in out.glob('*/checks.json'):
        match = re.fullmatch(r'server-(.*)-\d{4}-\d\d-\d\dT.*', file.parent.name)
        assert match
        found[match[1]] = Counter(check['status'] for check in json.loads(file.read_text()))
    return found


@pytest.fixture(scope='module')
def fixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that is our protocol code with the suite's catalogue."""
    place = make_town(tmp_path_factory.mktemp('c'))
    with served(place) as port:
        yield port
    place.close()


@contextmanager
def served(place: Place) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, '-m', 'tests.mcp_fixture', str(place.root)],
        cwd=REPOSITORY,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr
    said = b''
    while not (match := re.search(rb'is open on http://127.0.0.1:(\d+)', said)):
        line = process.stderr.readline()
        assert line, said.decode()
        said += line
    drain = subprocess.Popen(['cat'], stdin=process.stderr, stdout=subprocess.DEVNULL)
    process.stderr.close()
    try:
        yield int(match[1])
    finally:
        process.terminate()
        assert process.wait(20) == 0
        drain.wait()


@pytest.mark.parametrize('revision', REQUIRED)
def test_all_that_a_revision_requires_passes(
    fixture: int, tmp_path: Path, revision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_suite(fixture, tmp_path, '--requirements', revision)
    summary = done.stdout.partition('=== SUMMARY')[2]
    unscored = set(re.findall(r'^  [✓✗] (\S+) \(', summary, re.M))
    required = {name: count for name, count in outcomes(tmp_path).items() if name not in unscored}
    total: Counter[str] = sum(required.values(), Counter())
    with capsys.disabled():
        passed, failed = total['SUCCESS'], total['FAILURE']
        print(f'\nMCP {revision}: {len(required)} required scenarios, {passed} checks passed, {failed} failed')
    assert done.returncode == 0, summary
    assert len(required) == REQUIRED[revision]
    assert not total['FAILURE'] + total['WARNING'], summary


@pytest.mark.parametrize(
    ('revision', 'scenario'), [(revision, name) for revision, names in GENERIC.items() for name in names.split()]
)
def test_the_product_passes_what_any_server_must(product: int, tmp_path: Path, revision: str, scenario: str) -> None:
    done = run_suite(product, tmp_path, '--scenario', scenario, '--spec-version', revision)
    assert done.returncode == 0, done.stdout + done.stderr
    [counts] = outcomes(tmp_path).values()
    assert counts['SUCCESS']
    assert not counts['FAILURE'] + counts['WARNING']


@pytest.fixture(scope='module')
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a townhall as shipped."""
    place = make_town(tmp_path_factory.mktemp('p'))
    yield place.hall('mcp-http').port
    place.close()
