"""The repository as a whole: the README tells the truth, and nothing is in it that should not be."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tinytown.operations import TABLE

from .support import REPOSITORY, Hall, Place, environment

README = (REPOSITORY / 'README.md').read_text()
FIVE_MINUTES = README.split('## The first five minutes')[1].split('\n## ')[0]


def operations_table() -> str:
    """The README's table of operations, made from the rows."""
    lines = ['| operation | REST | `tt` | scope | what it does |', '|---|---|---|---|---|']
    for op in TABLE:
        methods = f'{op.method}, {op.also}' if op.also else op.method
        first = re.split(r'(?<=[.;:])\s', op.summary)[0].rstrip('.;:')
        lines.append(f'| `{op.name}` | {methods} `{op.path}` | `{op.cli}` | `{op.scope}` | {first} |')
    return '\n'.join(lines)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)


def shape(value: Any) -> Any:
    """A JSON value without its particulars: names and types."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def test_the_readme_lists_every_operation_as_the_table_has_it() -> None:
    assert operations_table() in README


def test_the_first_five_minutes_of_the_readme_work_as_written(place: Place, hall: Hall) -> None:
    script = 'set -e\n'
    for language, block in re.findall(r'^```(sh|json)\n(.*?)^```', FIVE_MINUTES, re.M | re.S):
        script += block if language == 'sh' else 'printf "\\n=====\\n"\n'
    done = subprocess.run(
        ['bash', '-c', script.replace('127.0.0.1:8787', f'127.0.0.1:{hall.port}')],
        env=environment(),
        cwd=place.root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split('\n=====\n')[:-1]
    shown = blocks(FIVE_MINUTES, 'json')
    assert len(answers) == len(shown)
    for answer, sample in zip(answers, shown, strict=True):
        last = re.split(r'(?<=\})\s*(?=\{)', answer.strip())[-1]
        assert shape(json.loads(last)) == shape(json.loads(sample)), f'{last}\nis not like\n{sample}'


@pytest.mark.parametrize('path', re.findall(r'`([\w./]+\.(?:py|lua))`', README.split('## Map')[1]))
def test_every_file_on_the_readme_s_map_exists(path: str) -> None:
    assert (REPOSITORY / path).exists() or (REPOSITORY / 'tinytown' / path).exists()


def test_every_module_is_on_the_readme_s_map() -> None:
    named = set(re.findall(r'(\w+\.(?:py|lua))`', README.split('## Map')[1]))
    modules = {file.name for file in (REPOSITORY / 'tinytown').iterdir() if file.suffix in ('.py', '.lua')}
    assert modules - {'__init__.py'} <= named


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
                'errors say model tomledit keytable settings config',
                'schema wire store processes redis_server clis redact peer',
                'town messages tasks backlog deadletter reports agents agent_tokens recovery caretaker '
                'feed timeline logs events census',
                'shared ratelimit audit auth oidc operations',
                'http1 router tls stream connection listen prefork web access event_stream log_stream metrics '
                'openapi probes dashboard rest client '
                'mcp_messages mcp mcp_content mcp_catalogue mcp_headers mcp_sessions mcp_http mcp_stdio',
                'briefing job worker demo',
                'usage render doctor local keys screen watch cli hall townhall',
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
