"""Other people's tools judge what we publish: promtool our metrics and alerts, Schemathesis our OpenAPI document.

It is told where to find `st` by ST (else in .venv/tools, where `make test-system` installs it).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tinytown.auth import api_keys

from ..support import REPOSITORY, Hall, Place, make_town

HERE = Path(__file__).parent
ST = os.environ.get('ST', str(REPOSITORY / '.venv' / 'tools' / 'bin' / 'st'))


def promtool(*words: str, said: bytes = b'') -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(['promtool', *words], input=said, capture_output=True, timeout=60, check=False)


def test_promtool_has_no_complaint_but_of_the_inherited_name(place: Place, hall: Hall) -> None:
    hall.post('/v1/agents', {'name': 'a'})
    place.await_end(hall.post('/v1/tasks/assign', {'agent': 'a', 'task': 'x'}).json['task_id'])
    checked = promtool('check', 'metrics', said=hall.get('/metrics').body)
    assert checked.stderr.decode().splitlines() == [
        'tinytown_agents_total non-counter metrics should not have "_total" suffix'
    ]


def test_promtool_accepts_the_alerts_and_each_fires_when_it_should() -> None:
    for words in (('check', 'rules', 'deploy/alerts.yml'), ('test', 'rules', 'tests/system/alerts_test.yml')):
        done = promtool(words[0], words[1], str(REPOSITORY / words[2]))
        assert done.returncode == 0, done.stdout + done.stderr


def schemathesis(hall: Hall, work: Path, flags: Iterable[str]) -> None:
    """Has Schemathesis try everything that the document of a townhall says, and whatever it does not allow."""
    command = [
        ST,
        '--config-file',
        str(HERE / 'schemathesis.toml'),
        'run',
        f'http://127.0.0.1:{hall.port}/openapi.json',
    ]
    command += ['--no-color', '--seed', '1', '--request-timeout', '60', '--exclude-path', '/mcp', *flags]
    env = os.environ | {'SCHEMATHESIS_HOOKS': str(HERE / 'schemathesis_hooks.py')}
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Traceback' not in hall.log_file.read_text()


def test_schemathesis_finds_nothing(directory: Path, tmp_path: Path) -> None:
    place = make_town(directory, max_agents=4)
    try:
        schemathesis(place.hall(), tmp_path, ['--max-examples', '20'])
    finally:
        place.close()


@pytest.mark.parametrize('scope', ['admin', 'town.read'])
def test_schemathesis_finds_nothing_where_a_key_is_asked_for(directory: Path, tmp_path: Path, scope: str) -> None:
    key = api_keys.generate_key()
    settings: dict[str, Any] = {'mode': 'api_key', 'keys': [{'id': key.id, 'hash': key.hash, 'scopes': [scope]}]}
    place = make_town(directory, max_agents=2, townhall__auth=settings, townhall__metrics={'scope': 'town.read'})
    try:
        flags = ['--header', f'Authorization: Bearer {key.key}', '--phases', 'coverage']
        schemathesis(place.hall(), tmp_path, flags)
    finally:
        place.close()
