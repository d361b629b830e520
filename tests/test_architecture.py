"""The code has the structure that ARCHITECTURE.md describes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .docs import FLOORS
from .support import REPOSITORY

PACKAGE = REPOSITORY / 'tinytown'
PAGE = (REPOSITORY / 'ARCHITECTURE.md').read_text()
FLOOR = {'': 0} | {room: floor for floor, rooms in enumerate(FLOORS, 1) for room in rooms}
# Module names of 0.1.0 that its units and running processes still start. Each only forwards to a room.
OLD_NAMES = {'demo', 'keeper', 'standstill'}


def room_of(file: Path) -> str:
    folder = file.relative_to(PACKAGE).parent
    return '' if folder == Path() else folder.parts[0]


def imported(file: Path) -> Iterator[str]:
    """The rooms that a module imports from, including late imports and imports for types."""
    package = ('tinytown', *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module.split('.') if node.module else ()))
            for alias in node.names:
                room = (*base, alias.name)[1]
                yield room if room in FLOOR else ''


MODULES = [file for file in sorted(PACKAGE.rglob('*.py')) if room_of(file) or file.stem not in OLD_NAMES]


@pytest.mark.parametrize('file', MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_room_and_from_rooms_below(file: Path) -> None:
    ours = room_of(file)
    assert not [room for room in imported(file) if room != ours and FLOOR[room] >= FLOOR[ours]]


def test_every_folder_of_the_package_is_a_room() -> None:
    assert {room_of(file) for file in MODULES} == set(FLOOR)


def test_every_invariant_names_tests_that_exist() -> None:
    named = re.findall(r'`(test_\w+)`', PAGE.split('## Invariants')[1])
    there = {
        name
        for file in (REPOSITORY / 'tests').rglob('*.py')
        for name in re.findall(r'def (test_\w+)', file.read_text())
    }
    assert len(named) > 10
    assert set(named) <= there


def test_every_file_that_the_architecture_names_exists() -> None:
    for path in re.findall(r'`((?:\w+/)*\w+\.(?:py|lua))`', PAGE):
        assert (REPOSITORY / path).exists() or (PACKAGE / path).exists(), path


def modules_imported(file: Path) -> set[Path]:
    """The modules of the package that a module imports, including late imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = file.parents[node.level - 1].joinpath(*(node.module or '').split('.'))
            named = [package / alias.name for alias in node.names]
            found |= {each.with_suffix('.py') for each in (package, *named) if each.with_suffix('.py').exists()}
    return found


@pytest.mark.parametrize(
    'start',
    [
        'townhall/main.py',
        'townhall/process.py',
        'townhall/shutdown.py',
        'townhall/systemd.py',
        'host/spawner.py',
        'mcp/stdio.py',
        'worker/main.py',
    ],
)
def test_servers_and_workers_import_only_the_parser_from_the_room_of_tt(start: str) -> None:
    found: set[Path] = set()
    queue = {PACKAGE / start}
    while queue:
        file = queue.pop()
        found.add(file)
        queue |= modules_imported(file) - found
    assert len(found) > 10
    assert {file.stem for file in found if room_of(file) == 'cli'} <= {'parser'}


def test_one_module_spells_the_paths_in_a_town_directory() -> None:
    spelled = {
        file.stem
        for folder in ('tinytown', 'deploy')
        for file in (REPOSITORY / folder).rglob('*.py')
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r'\.tt(/\S*)?', str(node.value))
    }
    assert spelled == {'trust', 'settings'}, (
        'trust: the directory, and the file in the home directory; settings: the audit file'
    )
