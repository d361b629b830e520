"""The official SDK against a townhall, unmodified. `tests/system/test_mcp_clients.py` tests more clients."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ..support import REPOSITORY, Place, environment


@pytest.mark.parametrize('transport', ['stdio', 'http'])
def test_the_official_sdk_works_with_the_demo_agent(place: Place, transport: str) -> None:
    server = (sys.executable, str(REPOSITORY / 'townhall.py'))
    where = str(place.root) if transport == 'stdio' else f'http://127.0.0.1:{place.hall().port}/mcp'
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / 'tests' / 'clients' / 'mcp2.py'), transport, where, 'auto', *server],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report['revision'], report['state'], report['agent']) == ('2026-07-28', 'completed', 'backend')
    assert report['changed'] == 'ResourceUpdated'
    assert report['progress']
