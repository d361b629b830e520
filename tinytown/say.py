"""Telling people what happens, on stderr, which is the log of whatever runs."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Writes to the log at once. One that can't be written (a full disk, a closed pipe) must not end the service."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        pass
