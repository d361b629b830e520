"""Fixtures: towns, townhalls that serve them, and stream clients. All processes are ended after the test."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tinytown import log
from tinytown.state.store import Command

from .streams import Listen, Listener
from .support import Hall, Place, make_town

_count = itertools.count()

# A shell starts background jobs with SIGINT ignored, and our child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a path short enough for a unix socket."""
    return tmp_path_factory.mktemp(f't{next(_count)}')


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hides the Tinytown settings of this machine from the test."""
    for name in list(os.environ):
        if name.startswith('TINYTOWN_') and name != 'TINYTOWN_REDIS_SERVER':
            monkeypatch.delenv(name)
    monkeypatch.setenv('HOME', str(tmp_path))


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """Resets the log to that of a new process. pytest still reports exceptions in threads."""
    hook = threading.excepthook
    log.configure()
    threading.excepthook = hook
    yield
    threading.excepthook = hook


@pytest.fixture
def place(directory: Path) -> Iterator[Place]:
    """A town of its own, with its own Redis."""
    town = make_town(directory)
    yield town
    town.close()


@pytest.fixture
def hall(place: Place) -> Hall:
    """A townhall that serves `place`."""
    return place.hall()


@pytest.fixture(scope='module')
def soil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One town for all tests of a module. Tests use it through `ground`."""
    town = make_town(tmp_path_factory.mktemp(f's{next(_count)}'), max_agents=1000)
    yield town
    town.store.call(Command(None, ('FLUSHALL',)))  # its agents have no processes to stop
    town.close()


@pytest.fixture
def ground(soil: Place) -> Place:
    """The module's town, emptied. Cheaper than `place`, for tests that need no processes and do not break Redis."""
    store = soil.store
    store.call(Command(None, ('FLUSHALL',)))
    store.call(store.open((soil.root / '.tt' / 'town-id').read_text().strip()))
    return soil


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Creates stream clients, and closes them at the end of the test."""
    with ExitStack() as stack:

        def make(*args: Any, **kwargs: Any) -> Listener:
            listener = Listener(*args, **kwargs)
            stack.callback(listener.close)
            return listener

        yield make
