"""The repository as a whole: the README tells the truth, and nothing is in it that should not be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from . import docs
from .support import REPOSITORY

README = (REPOSITORY / 'README.md').read_text()


def test_the_readme_lists_every_operation_as_the_table_has_it() -> None:
    assert docs.operations() in README


def tracked_files() -> list[Path]:
    listed = subprocess.run(['git', 'ls-files'], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [REPOSITORY / name for name in listed.splitlines() if (REPOSITORY / name).exists()]


def test_no_file_holds_a_path_of_a_machine_or_the_host_of_a_package_registry() -> None:
    unwanted = re.compile(r'/(?:work|root|home)/\w|pypi\.org|pythonhosted|npmjs|crates\.io|deb\.debian', re.I)
    here = Path(__file__)
    found = {
        f'{file.relative_to(REPOSITORY)}: {match.group()}'
        for file in tracked_files()
        if file != here
        for match in unwanted.finditer(file.read_text('utf-8', 'replace'))
    }
    assert not found


def test_modules_import_only_from_lower_layers() -> None:
    layers = {
        name: level
        for level, names in enumerate(
            (
                'errors native argon2id say model tomledit keytable settings config',
                'schema wire redis_tls whereabouts store processes notify keeper redis_server clis redact peer',
                'town messages tasks backlog deadletter reports agents agent_tokens recovery caretaker hosts steward '
                'feed timeline logs events census',
                'shared ratelimit audit auth oidc operations',
                'http1 router tls stream connection listen prefork vitals web access event_stream log_stream metrics '
                'openapi probes dashboard rest client '
                'mcp_messages mcp mcp_content mcp_catalogue mcp_headers mcp_sessions mcp_http mcp_stdio',
                'briefing job worker demo',
                'usage render doctor local keys ping screen watch cli hall service units standstill townhall',
            )
        )
        for name in names.split()
    }
    for file in (REPOSITORY / 'tinytown').glob('*.py'):
        if file.stem == '__init__':
            continue
        for line in re.findall(r'^from \.(\w*) import (.+)', file.read_text(), re.M):
            names = [line[0]] if line[0] else [name.split(' as ')[0].strip() for name in line[1].split(',')]
            for name in names:
                if name in layers:
                    assert layers[name] <= layers[file.stem], f'{file.stem} imports {name}, which is above it'
