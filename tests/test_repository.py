"""The repository as a whole contains nothing that it should not."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from .support import REPOSITORY


def tracked_files() -> list[Path]:
    listed = subprocess.run(['git', 'ls-files'], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return [REPOSITORY / name for name in listed.splitlines() if (REPOSITORY / name).exists()]


def test_no_file_contains_a_machine_path_or_a_package_registry_host() -> None:
    unwanted = re.compile(r'/(?:work|root|home)/\w|pypi\.org|pythonhosted|npmjs|crates\.io|deb\.debian', re.I)
    here = Path(__file__)
    found = {
        f'{file.relative_to(REPOSITORY)}: {match.group()}'
        for file in tracked_files()
        if file != here
        for match in unwanted.finditer(file.read_text('utf-8', 'replace'))
    }
    assert not found
