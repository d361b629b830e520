"""What the two command lines share: one-line complaints, and which town is meant."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from .errors import UsageError
from .town import find


class Parser(argparse.ArgumentParser):
    """Complains in one line, by UsageError, and has the command exit with status 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (see {self.prog} --help)')


def town_root(arguments: argparse.Namespace) -> Path:
    """The town of --town, of TINYTOWN_TOWN, or of the nearest directory upwards. Raises UsageError."""
    return find(Path.cwd(), getattr(arguments, 'town', None) or os.environ.get('TINYTOWN_TOWN'))
