"""The documents are true: generated parts are up to date, and every command in them runs.

One bash with `set -e` runs the ```sh blocks of a page in order, with a directory, a home and ports of its own (8787 is
replaced by a free port). It starts in a new town, `town`, that is served, or in an empty directory if the page contains
`<!-- begins: in an empty directory -->`. Commands in a block below `<!-- goes on -->` run until Ctrl-C; here they must
run for a second. A ```json block directly below a ```sh block must have the shape of its last output. A block below
`<!-- needs: NAME -->` needs more than a plain machine: it is only parsed here, and the tests named in PROOF run it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest

from tinytown import config
from tinytown.cli import main as cli
from tinytown.core.operations import BY_NAME, OPERATIONS
from tinytown.mcp import content
from tinytown.model import ALL_SCOPES

from . import docs
from .support import REPOSITORY, Place, environment, free_port

FENCE: Final = r'^(?:<!-- needs: ([\w-]+) -->\n)?(<!-- goes on -->\n)?```(\w*)\n(.*?)^```$'
EMPTY: Final = '<!-- begins: in an empty directory -->'
MARK: Final = '==== block'
LONGEST: Final = 240  # seconds that a page may take

# What a block may need → the file that runs such blocks.
PROOF: Final = {
    'checkout': '.ci/run',
    'bundle': 'tests/system/test_dist.py',
    'systemd': 'tests/system/test_systemd.py',
    'containers': 'tests/townhall/test_containers.py',
    'sentinel': 'tests/system/test_own_redis.py',
    'cluster': 'tests/system/test_own_redis.py',
    'tls-redis': 'tests/system/test_own_redis.py',
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. `answers` means that it shows the output of the block before it."""

    language: str
    text: str
    needs: str
    goes_on: bool
    answers: bool

    @property
    def script(self) -> str:
        """The script to run. Commands that run until Ctrl-C run for one second."""
        if not self.goes_on:
            return self.text.rstrip()
        lines = [line.partition('  #')[0].strip() for line in self.text.splitlines()]
        begun = [f'( timeout 1 {line} || test $? = 124 ) & begun="$begun $!"' for line in lines]
        return '\n'.join(['begun=', *begun, 'for each in $begun; do wait $each; done'])


def blocks(page: Path) -> list[Block]:
    found, end, last = [], 0, ''
    text = page.read_text()
    for match in re.finditer(FENCE, text, re.M | re.S):
        answers = match[3] == 'json' and last == 'sh' and not text[end : match.start()].strip()
        found.append(Block(match[3], match[4], match[1] or '', bool(match[2]), answers))
        end, last = match.end(), match[3]
    return found


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == 'sh' and not block.needs]


PAGES: Final = docs.pages()
RUN: Final = [page for page in PAGES if runnable(page)]


def name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


# ---------------------------------------------------------------------------------------------- every command runs


class Reader:
    """Runs the commands of a page, with a home directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.home = directory / 'home'
        self.town = directory / 'town'
        programs = directory / 'bin'
        for each in (self.home / '.tt', self.town, programs):
            each.mkdir(parents=True)
        for command, module in (('tt', 'cli'), ('townhall', 'townhall')):
            _program(programs / command, f'exec {sys.executable} -m tinytown.{module} "$@"')
        _program(programs / 'claude', 'cat >/dev/null; echo "I did it."')  # pages use it
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ['PATH']])
        self.env = environment(HOME=str(self.home), PATH=path, USER=os.environ.get('USER', 'root'))
        self.ports: dict[str, str] = {}

    def do(self, script: str) -> tuple[int, str, str]:
        """Runs a script. Returns its status, stdout and stderr. Kills its background processes."""
        script = re.sub(r'(?<=[:= ])(?:8[0-9]{3}|6379|26379|7000)\b', self._port, script)
        settings = f'[townhall]\nrest_port = {self.ports.get("8787", 0)}\nmcp_port = {self.ports.get("8788", 0)}\n'
        (self.home / '.tt' / 'config.toml').write_text(settings)
        out, err = self.home / 'out', self.home / 'err'
        with out.open('wb') as stdout, err.open('wb') as stderr:
            shell = subprocess.Popen(
                ['bash', '-c', script],
                cwd=self.town,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                status = shell.wait(LONGEST)
            except subprocess.TimeoutExpired:
                status = -1
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(shell.pid, signal.SIGKILL)
                shell.wait()
        return status, out.read_text(), err.read_text()

    def _port(self, match: re.Match[str]) -> str:
        while match[0] not in self.ports:
            if (port := str(free_port(range(20000, 32000)))) not in self.ports.values():
                self.ports[match[0]] = port
        return self.ports[match[0]]

    def leave(self) -> None:
        """Stops every town that was created. The first town comes last, because others may use its Redis."""
        found = self.directory.rglob(config.FILE)
        for file in sorted(found, key=lambda file: file.parent == self.town):
            script = f'cd {file.parent} && tt stop --redis'
            status, _, err = self.do(script)
            assert status == 0, err


def _program(file: Path, line: str) -> None:
    file.write_text(f'#!/bin/sh\n{line}\n')
    file.chmod(0o755)


@pytest.fixture
def reader(directory: Path) -> Iterator[Reader]:
    reader = Reader(directory)
    yield reader
    reader.leave()
    shutil.rmtree(directory)


def shape(value: Any) -> Any:
    """The shape of a JSON value: names and types, without values."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def documents(text: str) -> list[Any]:
    """The JSON documents in a text, ignoring everything in between."""
    found, at = [], 0
    decoder = json.JSONDecoder()
    while (at := text.find('{', at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            at += 1
        else:
            found.append(value)
    return found


@pytest.mark.parametrize('page', RUN, ids=name)
def test_the_commands_on_a_page_work_as_written_and_print_what_the_page_shows(page: Path, reader: Reader) -> None:
    script = ['set -e']
    if EMPTY not in page.read_text():
        script.append('tt init --name town --cli demo >/dev/null; tt start >/dev/null')
    sheets = runnable(page)
    for number, block in enumerate(sheets):
        script += [f"printf '\\n{MARK} {number}\\n' | tee /dev/stderr", block.script]
    status, out, err = reader.do('\n'.join(script) + '\n')
    last = re.findall(rf'{MARK} (\d+)', err)
    assert status == 0, f'{sheets[int(last[-1])].text if last else "it did not begin"}\n{out[-2000:]}\n{err[-2000:]}'
    printed = re.split(rf'\n{MARK} \d+\n', out)[1:]
    below = dict(zip(sheets, printed, strict=True))
    everything = blocks(page)
    for above, block in pairwise(everything):
        if block.answers and above in below:
            shown = documents(block.text)
            answers = documents(below[above])[-len(shown) :]
            assert shape(answers) == shape(shown), f'{below[above]}\nis not like\n{block.text}'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_blocks_with_special_needs_are_parsed_here_and_run_elsewhere(page: Path) -> None:
    for block in blocks(page):
        assert block.language, f'{name(page)}: a block without a language:\n{block.text}'
        if block.language == 'sh':
            done = subprocess.run(['bash', '-n'], input=block.text, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f'{block.text}\n{done.stderr}'
        if block.needs:
            assert (REPOSITORY / PROOF[block.needs]).exists(), (
                f'{PROOF[block.needs]} is missing; it runs blocks that need {block.needs}'
            )


# ----------------------------------------------------------------------------- generated from, or checked against, code


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert text == docs.written(text), f'{name(page)}: run  make docs'


def test_every_generated_part_is_on_some_page() -> None:
    found = {part for page in PAGES for _, part, _ in docs.PART.findall(page.read_text())}
    assert found == set(docs.PARTS)


def test_every_error_code_is_documented_with_its_status_and_a_remedy() -> None:
    text = (REPOSITORY / 'docs' / 'troubleshooting.md').read_text()
    documented = {code: int(status) for code, status in re.findall(r'^\| `([a-z-]+)` \| (\d{3}) \| \S', text, re.M)}
    assert documented == docs.codes()


def slug(heading: str) -> str:
    """The anchor of a heading in rendered Markdown."""
    return re.sub(r'[^\w\- ]', '', re.sub(r'[`*]', '', heading).strip().lower()).replace(' ', '-')


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_every_link_has_a_target(page: Path) -> None:
    for target, anchor in re.findall(r'\]\((?!https?:)([^)#\s]*)(?:#([^)]*))?\)', page.read_text()):
        file = (page.parent / target) if target else page
        assert file.exists(), f'{name(page)}: {target} does not exist'
        if anchor:
            assert anchor in {slug(each) for each in re.findall(r'^#+ (.+)$', file.read_text(), re.M)}, anchor


def test_every_page_is_in_the_index() -> None:
    index = (REPOSITORY / 'docs' / 'README.md').read_text()
    missing = [page.name for page in PAGES if page.parent.name == 'docs' and f']({page.name})' not in index]
    assert missing == ['README.md']


PATHS: Final = (
    {*config.settings(), *config.sections(), *BY_NAME, *docs.event_types(), *ALL_SCOPES, 'townhall.py'}
    | {prompt['name'] for prompt in content.PROMPTS}
)  # fmt: skip
OWNED: Final = r'`\[{0,2}((?:townhall|agent|redis|retention)\.[\w.]+)\]{0,2}(?: = [^`]+| [\w, ]+)?`'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_settings_commands_and_routes_that_a_page_mentions_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(OWNED, text):
        assert path in PATHS, f'{name(page)}: `{path}` is not a setting'
    words = cli.build_parser().description or ''
    for command in re.findall(r'`tt ([a-z-]+)', text):
        assert re.search(rf'^  {command}\b', words, re.M), f'{name(page)}: there is no  tt {command}'
    patterns = [re.sub(r'\\\{\w+\\\}', '[^/]+', re.escape(op.path)) for op in OPERATIONS]
    for path in re.findall(r'`(?:GET |POST |DELETE )?(/v1/[^`?\s]*)`', text):
        assert any(re.fullmatch(pattern, path) for pattern in patterns), f'{name(page)}: there is no {path}'


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_files_and_make_targets_that_a_page_mentions_exist(page: Path) -> None:
    text = page.read_text()
    for file in re.findall(r'`((?:tests|deploy|bench|tinytown)/[\w./]*)`', text):
        assert (REPOSITORY / file).exists(), f'{name(page)}: {file} does not exist'
    targets = re.findall(r'^([\w -]+):', (REPOSITORY / 'Makefile').read_text(), re.M)
    assert set(re.findall(r'`make ([a-z-]+)', text)) <= set(' '.join(targets).split())


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_every_configuration_example_is_valid(page: Path) -> None:
    for block in blocks(page):
        if block.language == 'toml' and 'mcp_servers' not in block.text:
            assert config.parse(block.text.encode(), name(page))


def commands_in(value: Any) -> list[list[str]]:
    """The command lines of servers in an MCP client's configuration."""
    if not isinstance(value, dict):
        return []
    own = [[value['command'], *value['args']]] if 'command' in value else []
    return own + [line for each in value.values() for line in commands_in(each)]


def client_configurations() -> list[list[str]]:
    found = []
    for block in blocks(REPOSITORY / 'docs' / 'mcp.md'):
        if block.language in ('json', 'toml'):
            found += commands_in(json.loads(block.text) if block.language == 'json' else tomllib.loads(block.text))
    return found


def test_every_mcp_client_configuration_starts_a_server_as_pasted(ground: Place) -> None:
    lines = client_configurations()
    assert len(lines) > 3
    request = b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"town_get"}}\n'
    for command, *arguments in {tuple(line) for line in lines}:
        assert command == 'townhall'
        here = [str(ground.root) if each.startswith('/') else each for each in arguments]
        argv = [sys.executable, str(REPOSITORY / 'townhall.py'), *here]
        done = subprocess.run(argv, input=request, env=environment(), capture_output=True, timeout=30, check=True)
        assert json.loads(done.stdout)['result']['structuredContent']['name'] == 'test'
