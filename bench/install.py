"""Installs the peers' dependencies into a virtual environment and a node_modules, in a directory that git ignores."""

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
    """Installs the dependencies of the Python peers, once. Returns why that failed, or ''."""
    return _once('python', [sys.executable, '-m', 'venv', '.'], _pip('install', '--quiet', *PYTHON_PACKAGES))


def node_peer() -> str:
    """Installs the dependencies of the Node peer, once. Returns why that failed, or ''."""
    if not (shutil.which('node') and shutil.which('npm')):
        return 'node and npm are not installed'
    quiet = ('--silent', '--no-audit', '--no-fund')
    return _once('node', ['npm', 'install', *quiet, '--prefix', '.', *NODE_PACKAGES])


def versions() -> dict[str, str]:
    """The versions of the installed packages, by name."""
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
    """Runs commands in a directory of the cache, unless they ran there before. Returns the error, or ''."""
    place = CACHE / name
    ready = place / 'ready'
    wanted = repr(commands[-1])
    if ready.exists() and ready.read_text() == wanted:
        return ''
    place.mkdir(parents=True, exist_ok=True)
    for command in commands:
        done = subprocess.run(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            errors = done.stderr.strip().splitlines()
            return f'{command[0]} failed: {errors[-1] if errors else done.returncode}'
    ready.write_text(wanted)
    return ''
