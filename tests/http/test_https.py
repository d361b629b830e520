"""A townhall with TLS: client certificates, tokens, and new certificates while it runs."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tinytown.auth.api_keys import generate_key

from ..certificates import CLIENT, SERVER, Authority, Pair
from ..support import PATIENCE, REPOSITORY, Hall, Place, environment, make_town, read_all, status_of
from ..tokens import Issuer, Signer, issuing

EC = Signer.ec('one')
SPAWN = {'name': 'a'}


@pytest.fixture(scope='module')
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp('https'))


@pytest.fixture
def tls(place: Place, authority: Authority) -> dict[str, str]:
    """The table [townhall.tls] of a town, and its files."""
    install(place.root, authority.sign('localhost', SERVER))
    return {'cert_path': 'server.pem', 'key_path': 'server.key'}


def install(root: Path, pair: Pair) -> None:
    """Copies a certificate and its key to the place where the town has them."""
    shutil.copy(pair.cert, root / 'server.pem')
    shutil.copy(pair.key, root / 'server.key')


def ask(
    hall: Hall, client: ssl.SSLContext, method: str = 'GET', path: str = '/v1/status', body: Any = None, **more: str
) -> tuple[int, Any, dict[str, str]]:
    """Sends one request on a new connection. Returns (status, JSON, header fields by lower-case name)."""
    connection = http.client.HTTPSConnection('localhost', hall.port, timeout=PATIENCE, context=client)
    try:
        return exchange(connection, method, path, body, **more)
    finally:
        connection.close()


def exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, **more: str
) -> tuple[int, Any, dict[str, str]]:
    fields = {'Content-Type': 'application/json'} | more
    connection.request(method, path, None if body is None else json.dumps(body), fields)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read()), {name.lower(): value for name, value in answer.getheaders()}


def served_serial(hall: Hall, client: ssl.SSLContext) -> int:
    """The serial number of the certificate that a new connection gets."""
    with hall.connect() as raw, client.wrap_socket(raw, server_hostname='localhost') as sock:
        shown = sock.getpeercert()
        assert shown
        return int(str(shown['serialNumber']), 16)


def reload(hall: Hall, says: str) -> None:
    """Makes a townhall reload its configuration, and waits until its log matches `says`."""
    start = hall.log_file.stat().st_size
    hall.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + PATIENCE
    while not re.search(says, hall.log_file.read_text()[start:]):
        assert time.monotonic() < deadline, hall.log_file.read_text()[start:]


# --------------------------------------------------------------------------------------------------------------- TLS


@pytest.mark.parametrize('workers', [1, 2])
def test_requests_are_answered_over_tls(place: Place, tls: dict[str, str], authority: Authority, workers: int) -> None:
    make_town(place.root, townhall__tls=tls, townhall={'workers': workers})
    hall, client = place.hall(), authority.client()
    connection = http.client.HTTPSConnection('localhost', hall.port, timeout=PATIENCE, context=client)
    long = os.urandom(30_000).hex()  # several TLS records
    made = [exchange(connection, 'POST', '/v1/backlog', {'description': long}) for _ in range(20)]
    assert {status for status, _, _ in made} == {201}
    status, listed, _ = exchange(connection, 'GET', '/v1/backlog?limit=100')
    assert (status, len(json.dumps(listed)) > 1_000_000) == (200, True)
    assert exchange(connection, 'GET', f'/v1/tasks/{made[0][1]["task_id"]}')[1]['description'] == long
    connection.close()


def test_many_pipelined_requests_are_all_answered(place: Place, tls: dict[str, str], authority: Authority) -> None:
    make_town(place.root, townhall__tls=tls)
    hall = place.hall()
    with hall.connect() as raw, authority.client().wrap_socket(raw, server_hostname='localhost') as sock:
        sock.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n' * 400)
        sock.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
        assert read_all(sock).count(b'HTTP/1.1 200 ') == 401


def test_plain_http_to_the_tls_port_gets_a_400_that_says_to_use_https(place: Place, tls: dict[str, str]) -> None:
    make_town(place.root, townhall__tls=tls)
    hall = place.hall()
    said = hall.talk(b'GET /v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n', finish=False)
    assert status_of(said) == 400
    assert b'this port speaks HTTPS' in said
    assert b'agent_count' not in said
    assert not hall.talk(b'\0\1\2\3 no protocol at all', finish=False).startswith(b'HTTP')
    assert hall.process.poll() is None


def test_clients_that_stall_in_the_handshake_delay_nobody_and_are_closed(
    place: Place, tls: dict[str, str], authority: Authority
) -> None:
    make_town(place.root, townhall__tls=tls, townhall__limits={'head_secs': 8})
    hall, client = place.hall(), authority.client()
    silent = [hall.connect() for _ in range(20)]
    for sock in silent[10:]:
        sock.sendall(b'\x16\x03\x01')  # the rest of the handshake never comes
    for _ in range(5):
        assert ask(hall, client)[0] == 200
    assert select.select(silent, [], [], 0)[0] == []  # they are still connected
    for sock in silent:
        assert read_all(sock) == b''
        sock.close()
    assert ask(hall, client)[0] == 200


def test_a_reload_uses_a_new_certificate_and_rejects_a_bad_one(
    place: Place, tls: dict[str, str], authority: Authority
) -> None:
    make_town(place.root, townhall__tls=tls)
    hall, client = place.hall(), authority.client()
    first = served_serial(hall, client)
    kept = http.client.HTTPSConnection('localhost', hall.port, timeout=PATIENCE, context=client)
    assert exchange(kept, 'GET', '/v1/status')[0] == 200
    for bad, says in (
        (authority.sign('localhost', SERVER, (-10, -1)), 'certificate has expired'),
        (authority.sign('localhost', CLIENT), 'unsuitable certificate purpose'),
    ):
        install(place.root, bad)
        reload(hall, f'the old one stays in force: .*server.pem: clients would refuse it: {says}')
        assert served_serial(hall, client) == first
    (place.root / 'server.key').unlink()
    reload(hall, r'the old one stays in force: townhall\.tls\.key_path')
    assert served_serial(hall, client) == first
    new = authority.sign('localhost', SERVER)
    install(place.root, new)
    reload(hall, 'the configuration was reloaded')
    assert served_serial(hall, client) == new.made.serial_number != first
    assert exchange(kept, 'GET', '/v1/status')[0] == 200
    kept.close()


@pytest.mark.parametrize(
    ('tables', 'says'),
    [
        (
            {'townhall__tls': {'cert_path': 'gone.pem', 'key_path': 'server.key'}},
            r"townhall.tls.cert_path = 'gone.pem'",
        ),
        ({'townhall__tls': {'cert_path': 'server.pem'}}, 'townhall.tls.key_path is missing'),
        ({'townhall__tls': {'enabled': True}}, 'townhall.tls.cert_path is missing'),
        ({'townhall__mtls': {'ca_path': 'ca.pem'}}, 'townhall.mtls is set, but townhall.tls is not'),
        (
            {
                'townhall__tls': {'cert_path': 'server.pem', 'key_path': 'server.key'},
                'townhall__mtls': {'ca_path': 'gone.pem'},
            },
            "townhall.mtls.ca_path = 'gone.pem'",
        ),
    ],
)
def test_tls_settings_that_can_not_work_stop_the_start(
    place: Place, authority: Authority, tables: dict[str, Any], says: str
) -> None:
    install(place.root, authority.sign('localhost', SERVER))
    make_town(place.root, **tables)
    argv = [sys.executable, str(REPOSITORY / 'townhall.py'), '--town', str(place.root), '--port', '0']
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert says in done.stderr.splitlines()[-1]


# ----------------------------------------------------------------------------------------------- client certificates


@pytest.fixture
def secured(place: Place, tls: dict[str, str], authority: Authority) -> tuple[Hall, str]:
    """(townhall, API key). The key and certificates of `reader` may read; certificates of `boss` may do everything."""
    made = generate_key()
    shutil.copy(authority.revoke(), place.root / 'crl.pem')
    make_town(
        place.root,
        townhall__tls=tls,
        townhall__auth={'mode': 'api_key', 'api_key_hash': made.hash, 'api_key_scopes': ['town.read']},
        townhall__mtls={
            'ca_path': str(authority.path),
            'crl_path': 'crl.pem',
            'subjects': {'reader': ['town.read'], 'boss': ['admin']},
        },
    )
    return place.hall(), made.key


def test_a_mapped_certificate_authenticates_and_any_other_only_encrypts(
    secured: tuple[Hall, str], authority: Authority
) -> None:
    hall, key = secured
    reader, boss, other = (authority.client(authority.sign(name, CLIENT)) for name in ('reader', 'boss', 'other'))
    nobody = authority.client()
    assert ask(hall, reader)[0] == 200
    assert ask(hall, reader, 'POST', '/v1/agents', SPAWN)[0] == 403
    assert ask(hall, boss, 'POST', '/v1/agents', SPAWN)[0] == 201
    for client in (other, nobody):
        status, problem, fields = ask(hall, client)
        assert (status, problem['status'], fields['www-authenticate'][:6]) == (401, 401, 'Bearer')
        assert ask(hall, client, Authorization=f'Bearer {key}')[0] == 200
        assert ask(hall, client, 'POST', '/v1/agents', SPAWN, Authorization=f'Bearer {key}')[0] == 403


def test_a_client_with_an_invalid_certificate_gets_no_answer(secured: tuple[Hall, str], authority: Authority) -> None:
    hall, key = secured
    strangers = Authority(authority.directory / 'strangers')
    for pair in (
        strangers.sign('boss', CLIENT),
        authority.sign('boss', CLIENT, (-10, -1)),
        authority.sign('boss', SERVER),
    ):
        with pytest.raises(OSError):
            ask(hall, authority.client(pair), Authorization=f'Bearer {key}')
    assert ask(hall, authority.client(authority.sign('boss', CLIENT)))[0] == 200
    for reason in ('certificate signature failure', 'certificate has expired', 'unsuitable certificate purpose'):
        assert hall.said(f' 127.0.0.1 TLS handshake failed: client certificate: {reason}\n')


def test_a_reload_closes_the_connection_of_a_revoked_certificate_and_refuses_new_ones(
    place: Place, secured: tuple[Hall, str], authority: Authority
) -> None:
    hall, _ = secured
    pair = authority.sign('boss', CLIENT)
    client = authority.client(pair)
    kept = http.client.HTTPSConnection('localhost', hall.port, timeout=PATIENCE, context=client)
    assert exchange(kept, 'GET', '/v1/status')[0] == 200
    assert kept.sock is not None
    shutil.copy(authority.revoke(pair), place.root / 'crl.pem')
    reload(hall, 'the configuration was reloaded')
    assert kept.sock.recv(1) == b''  # it has to connect again
    kept.close()
    with pytest.raises(OSError):
        ask(hall, client)
    assert ask(hall, authority.client(authority.sign('boss', CLIENT)))[0] == 200


def test_a_certificate_that_is_revoked_during_its_handshake_is_refused(
    place: Place, secured: tuple[Hall, str], authority: Authority
) -> None:
    hall, _ = secured
    pair = authority.sign('boss', CLIENT)
    come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = authority.client(pair).wrap_bio(come, go, server_hostname='localhost')
    with hall.connect() as sock:
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        sock.sendall(go.read())
        while go.pending == 0:  # the last part, which contains the certificate, is sent after the reload
            come.write(sock.recv(65536))
            with suppress(ssl.SSLWantReadError):
                client.do_handshake()
        shutil.copy(authority.revoke(pair), place.root / 'crl.pem')
        reload(hall, 'the configuration was reloaded')
        client.write(b'GET /v1/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n')
        sock.sendall(go.read())
        come.write(read_all(sock))
        said = b''
        with suppress(ssl.SSLError):
            said = client.read(65536)
        assert said == b''


def test_a_request_under_way_is_answered_before_its_client_must_reconnect(
    secured: tuple[Hall, str], authority: Authority
) -> None:
    hall, _ = secured
    client = authority.client(authority.sign('boss', CLIENT))
    assert ask(hall, client, 'POST', '/v1/agents', SPAWN)[0] == 201
    waiting = http.client.HTTPSConnection('localhost', hall.port, timeout=PATIENCE, context=client)
    assert exchange(waiting, 'GET', '/v1/status')[0] == 200
    waiting.request('POST', '/v1/agents/a/wait', '{"timeout": 25}', {'Content-Type': 'application/json'})
    reload(hall, 'the configuration was reloaded')
    assert ask(hall, client, 'POST', '/v1/agents/a/kill')[0] == 200
    answer = waiting.getresponse()
    assert answer.status == 200
    assert answer.getheader('connection') == 'close'
    waiting.close()


def test_a_client_without_a_required_certificate_is_refused(
    place: Place, tls: dict[str, str], authority: Authority
) -> None:
    make_town(place.root, townhall__tls=tls, townhall__mtls={'ca_path': str(authority.path), 'required': True})
    hall = place.hall()
    assert ask(hall, authority.client(authority.sign('anyone', CLIENT)))[0] == 200
    with pytest.raises(OSError):
        ask(hall, authority.client())


# ------------------------------------------------------------------------------------------------------------ tokens


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing(EC) as issuer:
        yield issuer


def bearer(issuer: Issuer, **claims: Any) -> dict[str, str]:
    return {'Authorization': f'Bearer {EC.token(issuer.claims(**claims))}'}


def test_tokens_of_the_issuer_give_their_scopes_and_others_nothing(place: Place, issuer: Issuer) -> None:
    make_town(place.root, townhall__auth={'mode': 'oidc', 'issuer': issuer.url, 'audience': 'town'})
    hall = place.hall()
    reading, managing = bearer(issuer), bearer(issuer, scope='agent.manage')
    assert hall.get('/v1/status', **reading).status == 200
    assert hall.post('/v1/agents', SPAWN, **reading).status == 403
    assert hall.get('/v1/status', **managing).status == 403
    assert hall.post('/v1/agents', SPAWN, **managing).status == 201
    new = Signer.ec('two')
    issuer.keys.append(new.jwk())
    forged = {'Authorization': f'Bearer {Signer.ec("one").token(issuer.claims(scope="admin"))}'}
    for bad in (forged, bearer(issuer, aud='other'), bearer(issuer, exp=1), {'Authorization': 'Bearer a.b.c'}):
        reply = hall.post('/v1/agents', SPAWN, **bad)
        assert (reply.status, reply.json['code']) == (401, 'invalid-token')
        assert reply.headers['www-authenticate'] == 'Bearer realm="tinytown", error="invalid_token"'
    reply = hall.get('/v1/status')
    assert (reply.status, reply.headers['www-authenticate']) == (401, 'Bearer realm="tinytown"')
    secrets = [fields['Authorization'].split('.')[-1] for fields in (reading, managing, forged)]
    recorded = hall.log_file.read_text() + ''.join(map(str, place.history()))
    assert not [secret for secret in secrets if secret in recorded]


def test_with_the_issuer_down_townhall_starts_and_answers_its_tokens_503(place: Place, issuer: Issuer) -> None:
    make_town(place.root, townhall__auth={'mode': 'oidc', 'issuer': issuer.url, 'audience': 'town'})
    issuer.status = 500
    hall = place.hall()
    reply = hall.get('/v1/status', **bearer(issuer))
    assert (reply.status, reply.json['code']) == (503, 'issuer-unreachable')
    assert int(reply.headers['retry-after']) >= 1
    assert hall.get('/health').status == 200


def test_while_the_issuer_hangs_other_requests_are_served(place: Place, issuer: Issuer) -> None:
    make_town(place.root, townhall__auth={'mode': 'oidc', 'issuer': issuer.url, 'audience': 'town'})
    hall = place.hall()
    assert hall.get('/v1/status', **bearer(issuer)).status == 200
    reload_with_no_keys(place, hall, issuer)
    issuer.gate.clear()
    waiting = hall.connect()
    token, asked = bearer(issuer)['Authorization'], len(issuer.calls)
    waiting.sendall(f'GET /v1/status HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\n\r\n'.encode())
    deadline = time.monotonic() + PATIENCE
    while len(issuer.calls) == asked:
        assert time.monotonic() < deadline
    for _ in range(5):  # well within the five seconds of FETCH_SECS
        assert hall.get('/health').status == 200
        assert hall.get('/v1/status').status == 401
    assert not select.select([waiting], [], [], 0)[0], 'it was not answered before them'
    issuer.gate.set()
    assert waiting.recv(12) == b'HTTP/1.1 200'
    waiting.close()


def reload_with_no_keys(place: Place, hall: Hall, issuer: Issuer) -> None:
    """Changes the settings, so that the verifier starts without keys and fetches them for the next token."""
    auth = {'mode': 'oidc', 'issuer': issuer.url, 'audience': 'town', 'clock_skew_seconds': 61}
    make_town(place.root, townhall__auth=auth)
    reload(hall, 'the configuration was reloaded')


def test_an_issuer_with_another_name_stops_the_start(place: Place, issuer: Issuer) -> None:
    issuer.discovery = {'issuer': 'https://another.example'}
    make_town(place.root, townhall__auth={'mode': 'oidc', 'issuer': issuer.url, 'audience': 'town'})
    argv = [sys.executable, str(REPOSITORY / 'townhall.py'), '--town', str(place.root), '--port', '0']
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert (
        "names the issuer 'https://another.example'; the two must be exactly the same" in done.stderr.splitlines()[-1]
    )
