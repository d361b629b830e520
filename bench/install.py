"""What the peers need: a virtual environment and a node_modules of their own, below a directory that git ignores."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from tests.support import REPOSITORY

CACHE = REPOSITORY / '.bench'
PYTHON = CACHE / 'python' / 'bin' / 'python'
NODE_MODULES = CACHE / 'node' / 'node_modules'
PYTHON_PACKAGES = (
    'fastapi >= 0.130, < 1',
    'starlette >= 1, < 2',
    'uvicorn[standard] < 1',
    'aiohttp >= 3.13, < 4',
    'redis[hiredis] >= 8.1, < 9',
)
NODE_PACKAGES = ('fastify@5', 'ioredis@6')


def python_peers() -> str:
    """Installs what the Python peers import, once. What stands in the way, or ''."""
    return _once('python', [sys.executable, '-m', 'venv', '.'], _pip('install', '--quiet', *PYTHON_PACKAGES))


def node_peer() -> str:
    """Installs what the Node peer requires, once. What stands in the way, or ''."""
    if not (shutil.which('node') and shutil.which('npm')):
        return 'node and npm are not there'
    quiet = ('--silent', '--no-audit', '--no-fund')
    return _once('node', ['npm', 'install', *quiet, '--prefix', '.', *NODE_PACKAGES])


def versions() -> dict[str, str]:
    """The versions of what was installed, by package."""
    found: dict[str, str] = {}
    if PYTHON.exists():
        listed = subprocess.run(_pip('list', '--format=json'), cwd=CACHE, capture_output=True, check=True).stdout
        wanted = ('fastapi', 'starlette', 'uvicorn', 'uvloop', 'httptools', 'aiohttp', 'redis', 'hiredis')
        found |= {row['name']: row['version'] for row in json.loads(listed) if row['name'] in wanted}
    for manifest in sorted(NODE_MODULES.glob('*/package.json')):
        if manifest.parent.name in ('fastify', 'ioredis'):
            found[manifest.parent.name] = json.loads(manifest.read_text())['version']
    return found


def _pip(*words: str) -> list[str]:
    return [str(PYTHON), '-m', 'pip', '--disable-pip-version-check', *words]


def _once(name: str, *commands: list[str]) -> str:
    """Runs commands in a directory of the cache unless they were run there already."""
    place = CACHE / name
    ready = place / 'ready'
    wanted = repr(commands[-1])
    if ready.exists() and ready.read_text() == wanted:
        return ''
    place.mkdir(parents=True, exist_ok=True)
    for command in commands:
        done = subprocess.run(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            return f'{command[0]} failed: {said[-1] if said else done.returncode}'
    ready.write_text(wanted)
    return ''
