"""Open streams end with the credential of their reader: an API key, a token of an issuer or of an agent."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tinytown import api_key_table
from tinytown.auth.api_keys import ApiKey, generate_key
from tinytown.config import FILE
from tinytown.files import write_atomically

from ..mcp_client import Http
from ..streams import Listener, await_streams, happen
from ..support import Hall, Place, make_town
from ..tokens import Signer, issuing

SOON = 10.0  # seconds within which a stream must end, even on a busy machine; without revocation it never does
PATHS = ['/v1/events', '/v1/agents/a/logs', '/sse']
Keyed = tuple[Place, Hall, Callable[..., ApiKey]]


@pytest.fixture
def keyed(directory: Path) -> Iterator[Keyed]:
    """(town, townhall with API keys, a function that adds a key)."""
    place = make_town(directory, townhall__auth={'mode': 'api_key'})
    file = directory / FILE

    def add(**more: Any) -> ApiKey:
        made = generate_key()
        entry = {'id': made.id, 'hash': made.hash, 'scopes': ['town.read']} | more
        write_atomically(file, api_key_table.added(file.read_text(), entry))
        return made

    add()
    place.do('agent.spawn', name='a')
    yield place, place.hall(), add
    place.close()


def field(key: str) -> str:
    return f'Authorization: Bearer {key}'


def is_ended(listener: Listener) -> bool:
    """Reads the stream to its end. Returns whether it ended properly, with a last chunk."""
    with contextlib.suppress(ConnectionError):
        while True:
            listener._more()
    return listener._is_over


Open = Callable[[Hall, str, str], Listener]


@pytest.fixture
def reader() -> Iterator[Open]:
    """A function that opens a stream with a key."""
    opened: list[Listener] = []

    def start(hall: Hall, path: str, key: str) -> Listener:
        opened.append(Listener(hall, path, field(key)))
        assert opened[-1].status == 200
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_streams_and_long_polls_end_when_their_key_is_revoked_and_others_stay_open(keyed: Keyed, reader: Open) -> None:
    place, hall, add = keyed
    bad, good = add(), add()
    readers, kept = [reader(hall, path, bad.key) for path in PATHS], reader(hall, '/v1/events', good.key)
    client = Http(hall, Authorization=f'Bearer {bad.key}')
    with client.stream('subscriptions/listen', {'notifications': {}}, id='s') as subscription, hall.connect() as poll:
        assert subscription.message()['method'] == 'notifications/subscriptions/acknowledged'
        last = place.history()[-1]['id']
        poll.sendall(
            f'GET /v1/events?wait=20&after={last} HTTP/1.1\r\nHost: localhost\r\n{field(bad.key)}\r\n\r\n'.encode()
        )
        await_streams(hall, len(PATHS) + 3)
        place.tt('key', 'revoke', bad.id)
        began = time.monotonic()
        assert all(is_ended(each) for each in readers)
        assert subscription.next() is None
        assert poll.recv(65536).startswith(b'HTTP/1.1 401 ')
        assert time.monotonic() - began < SOON
    place.do('backlog.add', description='x')
    while kept.event().type != 'task.created':
        pass
    denied = [json.loads(line) for line in (place.root / '.tt' / 'audit.denied.jsonl').read_text().splitlines()]
    assert [line['outcome'] for line in denied] == ['invalid-token'] * (len(PATHS) + 2)


def test_a_stream_ends_when_its_key_expires_or_its_scopes_change(keyed: Keyed, reader: Open) -> None:
    place, hall, add = keyed
    file, later = place.root / FILE, moment(time.time() + 3600)
    expiring, changing = add(expires=later), add(scopes=['town.read', 'admin'])
    first, second = reader(hall, '/v1/events', expiring.key), reader(hall, '/v1/events', changing.key)
    ends = int(time.time()) + 3
    write_atomically(file, file.read_text().replace(later, moment(ends)))
    assert is_ended(first)
    assert ends <= time.time() < ends + SOON
    write_atomically(file, file.read_text().replace('["town.read", "admin"]', '["town.read"]'))
    began = time.monotonic()
    assert is_ended(second)
    assert time.monotonic() - began < SOON


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds), UTC).isoformat()


@pytest.mark.parametrize('command', ['revoke', 'rotate'])
def test_revoking_reports_a_townhall_that_still_accepts_the_key(keyed: Keyed, tmp_path: Path, command: str) -> None:
    place, _, add = keyed
    made = add()
    hall = place.hall(HOME=str(tmp_path / 'other'))
    assert 'keys' not in hall.get('/ready').json
    (tmp_path / 'other' / '.tt').mkdir(parents=True)
    (tmp_path / 'other' / '.tt' / 'config.toml').write_text('of its own user, and wrong')
    done = place.tt('key', command, made.id, check=False)
    assert (done.returncode, done.stdout == '') == (1, command == 'revoke')
    assert f'the townhall on http://127.0.0.1:{hall.port} STILL LETS' in done.stderr
    assert hall.get('/v1/town', X_API_Key=made.key).status == 200
    ready = hall.get('/ready')
    assert (ready.status, ready.json['keys']) == (200, 'old')
    (tmp_path / 'other' / '.tt' / 'config.toml').unlink()
    assert 'keys' not in hall.get('/ready').json
    assert hall.get('/v1/town', X_API_Key=made.key).status == 401


def test_the_stream_of_a_slow_reader_is_cut_off_too(keyed: Keyed, reader: Open) -> None:
    place, hall, add = keyed
    made, good = add(), add()
    listener, quick = reader(hall, '/v1/events', made.key), reader(hall, '/v1/events', good.key)
    happen(place, 300, 30_000)  # far more than the socket buffers can take
    for _ in range(300):  # then as many have been sent to the slow reader
        while quick.event().type != 'task.created':
            pass
    place.tt('key', 'revoke', made.id)
    await_streams(hall, 1)
    assert not is_ended(listener)


def test_a_stream_ends_with_the_token_of_an_issuer_and_with_that_of_an_agent(directory: Path, reader: Open) -> None:
    signer = Signer.ec('one')
    with issuing(signer) as issuer:
        auth = {'mode': 'oidc', 'issuer': issuer.url, 'audience': 'town', 'clock_skew_seconds': 0}
        place = make_town(directory, townhall__auth=auth)
        agent_id = place.do('agent.spawn', name='a')['agent_id']
        place.await_event('agent.started', agent_name='a')
        token = (directory / '.tt' / 'agents' / f'{agent_id}.token').read_text().strip()
        hall = place.hall()
        of_agent = reader(hall, '/v1/events', token)
        ends = int(time.time()) + 4
        of_issuer = reader(hall, '/v1/events', signer.token(issuer.claims(exp=ends)))
        assert is_ended(of_issuer)
        assert ends <= time.time() < ends + SOON
        place.do('agent.kill', agent='a')
        place.await_event('agent.stopped', agent_name='a')
        began = time.monotonic()
        assert is_ended(of_agent)
        assert time.monotonic() - began < SOON
        place.close()
