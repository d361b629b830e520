"""The shared vocabulary: ids, times, short texts, event types."""

from __future__ import annotations

import os
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import get_args

import pytest

from tinytown.core.events import EventType
from tinytown.core.operations import BY_NAME
from tinytown.errors import Invalid
from tinytown.model import STEERING, UUID_PATTERN, brief, new_id, rfc3339
from tinytown.schema import validate

MANY = 1000  # more ids than are generated at once


def test_ids_are_unique_random_uuids() -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: new_id(), range(8 * MANY)))
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(UUID_PATTERN, each) for each in ids)
    assert {(uuid.UUID(each).version, uuid.UUID(each).variant) for each in ids} == {(4, uuid.RFC_4122)}


def test_forked_processes_make_different_ids() -> None:
    new_id()  # so that the parent has unused ids
    read, write = os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            os.write(write, ''.join(new_id() for _ in range(20)).encode())
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    os.close(write)
    with open(read) as pipe:
        theirs = re.findall(UUID_PATTERN, pipe.read())
    ours = [new_id() for _ in range(20)]
    assert len(theirs) == 40
    assert len({*theirs, *ours}) == 60


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [
        (0.0, '1970-01-01T00:00:00.000Z'),
        (-0.5, '1969-12-31T23:59:59.500Z'),
        (951782400.0, '2000-02-29T00:00:00.000Z'),
        (1795269600.25, '2026-11-21T14:00:00.250Z'),
        (1795269599.9996, '2026-11-21T13:59:59.999Z'),
    ],
)
def test_a_time_is_formatted_in_utc_with_milliseconds(seconds: float, text: str) -> None:
    assert rfc3339(seconds) == text


@pytest.mark.parametrize(
    ('text', 'line'),
    [
        ('one', 'one'),
        ('', ''),
        (' \n\t\n', ''),
        ('\n\n  first \r\nsecond', 'first'),
        ('a\u2028b', 'a'),
        ('\x85 a\x0bb', 'a'),
        ('x' * 160, 'x' * 160),
        ('x' * 161, 'x' * 159 + '…'),
    ],
)
def test_a_brief_text_is_the_first_line_that_is_not_blank(text: str, line: str) -> None:
    assert brief(text) == line


def test_the_event_types_are_those_that_the_scripts_write() -> None:
    script = files('tinytown.state').joinpath('scripts.lua').read_text()
    written = set(re.findall(r"event\('([a-z_]+\.[a-z_]+)'", script))
    assert set(re.findall(r"event\('([a-z_]+\.)' \.\.", script)) == {'agent.', 'task.'}  # followed by a state
    ended = ('Stopped', 'Error')
    written |= {f'agent.{state.lower()}' for state in (*ended, 'Working', *(each['to'] for each in STEERING.values()))}
    written |= {'task.completed', 'task.failed'}
    named = set(get_args(EventType))
    assert named == written | {each.partition('.')[0] for each in written}


def test_an_unknown_event_type_is_refused_with_a_list_of_all_types() -> None:
    with pytest.raises(Invalid) as caught:
        validate(BY_NAME['events.list'].parameters, {'type': ['task.complete']})
    [wrong] = caught.value.errors or []
    assert re.match(r"'task\.complete' is not one of agent, .*task\.completed", wrong['detail'])
