"""Fixtures: a town, a townhall that serves it, and the promise that a test leaves no process behind."""

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

# Where we run in the background of a shell, SIGINT is ignored, and so it would be by all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a path short enough for a unix socket."""
    return tmp_path_factory.mktemp(f't{next(_count)}')


@pytest.fixture(autouse=True)
def _no_steering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A test sees no Tinytown settings of the machine that it runs on."""
    for name in list(os.environ):
        if name.startswith('TINYTOWN_') and name != 'TINYTOWN_REDIS_SERVER':
            monkeypatch.delenv(name)
    monkeypatch.setenv('HOME', str(tmp_path))


@pytest.fixture(autouse=True)
def _log() -> Iterator[None]:
    """The log of a process that has just begun; the faults of threads stay pytest's to tell."""
    hook = threading.excepthook
    log.configure()
    threading.excepthook = hook
    yield
    threading.excepthook = hook


@pytest.fixture
def place(directory: Path) -> Iterator[Place]:
    """A town of its own, with its own Redis."""
    made = make_town(directory)
    yield made
    made.close()


@pytest.fixture
def hall(place: Place) -> Hall:
    """A townhall that serves `place`."""
    return place.hall()


@pytest.fixture(scope='module')
def soil(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One town for the tests of a module; take `ground`."""
    made = make_town(tmp_path_factory.mktemp(f's{next(_count)}'), max_agents=1000)
    yield made
    made.store.call(Command(None, ('FLUSHALL',)))  # its agents have no processes that could be stopped
    made.close()


@pytest.fixture
def ground(soil: Place) -> Place:
    """The module's town, empty: cheaper than `place` where no process and no fault of Redis is concerned."""
    store = soil.store
    store.call(Command(None, ('FLUSHALL',)))
    store.call(store.open((soil.root / '.tt' / 'town-id').read_text().strip()))
    return soil


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Makes clients of streams, and closes them at the end of a test."""
    with ExitStack() as stack:

        def make(*given: Any, **named: Any) -> Listener:
            made = Listener(*given, **named)
            stack.callback(made.close)
            return made

        yield make
