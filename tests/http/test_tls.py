"""TLS: which settings stop the start, which clients are accepted, and the non-blocking socket."""

from __future__ import annotations

import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from tinytown import config
from tinytown.errors import UsageError
from tinytown.http.tls import TlsSocket, server_context, subject
from tinytown.settings import MtlsSettings, TlsSettings, TownhallSettings
from tinytown.toml_edit import to_toml

from ..certificates import CLIENT, SERVER, Authority, Pair
from ..support import PATIENCE, read_all, status_of

IN, OUT = select.POLLIN, select.POLLOUT


@pytest.fixture(scope='module')
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp('tls'))


@pytest.fixture(scope='module')
def other(authority: Authority) -> Authority:
    """Another authority with the same name."""
    return Authority(authority.directory / 'other')


@pytest.fixture(scope='module')
def server(authority: Authority) -> Pair:
    return authority.sign('localhost', SERVER)


def files(pair: Pair) -> TlsSettings:
    return TlsSettings(enabled=True, cert_path=str(pair.cert), key_path=str(pair.key))


def refusal(tls: TlsSettings, mtls: MtlsSettings = MtlsSettings(), root: Path = Path('/')) -> str:
    with pytest.raises(UsageError) as raised:
        server_context(tls, mtls, root)
    assert '\n' not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------------- settings


def settings(directory: Path, text: str) -> TownhallSettings:
    (directory / config.FILE).write_text(f'name = "x"\n{text}\n')
    return config.load(directory, environ={}).townhall


def test_a_table_of_settings_turns_its_feature_on_unless_it_says_otherwise(directory: Path) -> None:
    found = settings(directory, '[townhall.tls]\ncert_path = "c"\nkey_path = "k"\n[townhall.mtls]\nrequired = true')
    assert (found.tls.enabled, found.mtls.enabled) == (True, True)
    found = settings(directory, '[townhall.tls]\nenabled = false\ncert_path = "c"')
    assert (found.tls.enabled, found.mtls.enabled) == (False, False)


def test_both_spellings_of_a_path_are_accepted_but_not_together(directory: Path) -> None:
    text = 'townhall.tls.cert_file = "c"\ntownhall.tls.key_file = "k"\ntownhall.mtls.ca_file = "a"'
    found = settings(directory, text)
    assert (found.tls.cert_path, found.tls.key_path, found.mtls.ca_path) == ('c', 'k', 'a')
    again = 'townhall.tls.cert_path = "c"'
    for both in (f'{text}\n{again}', f'{again}\n{text}'):
        with pytest.raises(
            UsageError, match=r'tls\.cert_path is given twice, once as townhall\.tls\.cert_file; remove one'
        ):
            settings(directory, both)


def test_subjects_map_to_lists_of_scopes(directory: Path) -> None:
    mtls = settings(directory, '[townhall.mtls]\nsubjects = { ann = ["town.read"], "b c" = ["admin"] }').mtls
    assert mtls.subjects == {'ann': ['town.read'], 'b c': ['admin']}
    assert to_toml(mtls.subjects) == '{ann = ["town.read"], "b c" = ["admin"]}'
    for wrong in (
        '{ ann = "admin" }',
        '{ ann = ["root"] }',
        '{ ann = [] }',
        '{ "" = ["admin"] }',
        '"admin"',
        '[]',
        '{ ann = true }',
    ):
        with pytest.raises(UsageError, match=r'townhall\.mtls\.subjects.*give a table of "name" = \[scopes\]'):
            settings(directory, f'[townhall.mtls]\nsubjects = {wrong}')


# ----------------------------------------------------------------------------------- settings that stop the start


def test_an_error_names_a_missing_certificate_file(authority: Authority, server: Pair) -> None:
    for name, tls in (
        ('cert_path', files(server).but(cert_path='gone.pem')),
        ('key_path', files(server).but(key_path='gone.pem')),
    ):
        said = refusal(tls, root=authority.directory)
        assert said == (
            f"townhall.tls.{name} = 'gone.pem': {authority.directory}/gone.pem: No such file or directory; "
            'give the path of a PEM file'
        )
    assert 'Is a directory' in refusal(files(server).but(cert_path='/'))
    assert refusal(TlsSettings(enabled=True)) == 'townhall.tls.cert_path is missing; give the path of a PEM file'
    assert 'key_path is missing' in refusal(files(server).but(key_path=''))


def test_a_relative_path_starts_at_the_town(authority: Authority, server: Pair) -> None:
    assert server_context(
        TlsSettings(enabled=True, cert_path=server.cert.name, key_path=server.key.name),
        MtlsSettings(),
        authority.directory,
    )


@pytest.mark.parametrize(
    ('make', 'says'),
    [
        (lambda a: a.sign('localhost', days=(-10, -1)), 'clients would refuse it: certificate has expired'),
        (lambda a: a.sign('localhost', days=(1, 10)), 'clients would refuse it: certificate is not yet valid'),
        (lambda a: a.sign('localhost', CLIENT), 'clients would refuse it: unsuitable certificate purpose'),
        (lambda a: a.sign('localhost', password=b'secret'), 'the key is encrypted; decrypt it:  openssl pkey -in'),
        (
            lambda a: a.sign('localhost', key=rsa.generate_private_key(65537, 1024)),  # noqa: S505
            'has a key that is too short to be safe',
        ),
        (
            lambda a: replace(a.sign('localhost'), key=a.sign('localhost').key),
            'is not the key of the certificate {cert}; give a certificate and its own key',
        ),
        (lambda a: replace(a.sign('localhost'), cert=a.sign('x').key), '{cert} does not contain a certificate'),
        (lambda a: replace(a.sign('localhost'), key=private(a.sign('x').cert)), '{key} does not contain a private key'),
        (lambda a: damaged(a, 'key'), '{key} cannot be used'),
        (lambda a: damaged(a, 'cert'), '{cert}'),
    ],
)
def test_a_certificate_that_clients_would_refuse_stops_the_start(
    authority: Authority, make: Callable[[Authority], Pair], says: str
) -> None:
    pair = make(authority)
    assert says.format(cert=pair.cert, key=pair.key) in refusal(files(pair))


def private(file: Path) -> Path:
    file.chmod(0o600)
    return file


def damaged(authority: Authority, which: str) -> Pair:
    """A pair with garbage inside the PEM of one file."""
    pair = authority.sign('localhost')
    file: Path = getattr(pair, which)
    lines = file.read_text().splitlines()
    file.write_text('\n'.join([lines[0], 'AAAA' + lines[1][4:], *lines[2:]]) + '\n')
    return pair


def test_a_key_that_everyone_may_read_stops_the_start(authority: Authority) -> None:
    pair = authority.sign('localhost')
    for mode, good in ((0o600, True), (0o640, True), (0o400, True), (0o644, False), (0o602, False)):
        pair.key.chmod(mode)
        if good:
            assert server_context(files(pair), MtlsSettings(), Path('/'))
        else:
            assert refusal(files(pair)).endswith(f'run  chmod o-rwx {pair.key}')


def test_a_certificate_chain_is_accepted(authority: Authority) -> None:
    pair = authority.sign('localhost', SERVER)
    pair.cert.write_bytes(pair.cert.read_bytes() + authority.path.read_bytes())
    with serving(files(pair)) as (_, connect):
        assert connect(authority.client()) == b'hello'


def test_unusable_authorities_and_revocation_lists_stop_the_start(
    authority: Authority, server: Pair, directory: Path
) -> None:
    empty, old = directory / 'empty.pem', Authority(directory, 'old', (-20, -1))
    empty.write_text('')
    tls, good = files(server), MtlsSettings(enabled=True, required=True, ca_path=str(authority.path))
    assert refusal(tls, MtlsSettings(enabled=True)) == 'townhall.mtls.ca_path is missing; give the path of a PEM file'
    assert "townhall.mtls.ca_path = '/gone'" in refusal(tls, MtlsSettings(enabled=True, required=True, ca_path='/gone'))
    assert f'{empty} contains no certificate of an authority' in refusal(
        tls, MtlsSettings(enabled=True, required=True, ca_path=str(empty))
    )
    assert 'contains no certificate of an authority; give' in refusal(
        tls, MtlsSettings(enabled=True, required=True, ca_path=str(server.cert))
    )
    assert 'every authority in it has expired' in refusal(
        tls, MtlsSettings(enabled=True, required=True, ca_path=str(old.path))
    )
    assert "townhall.mtls.crl_path = '/gone'" in refusal(tls, good.but(crl_path='/gone'))
    assert 'contains no certificate revocation list' in refusal(tls, good.but(crl_path=str(empty)))
    assert 'contains no certificate revocation list' in refusal(tls, good.but(crl_path=str(authority.path)))


# ------------------------------------------------------------------------------------- which clients are accepted


def drive(sock: TlsSocket, work: Callable[[], int]) -> None:
    """Acts as the event loop: calls `work` until it returns 0, and waits for the event that it returns otherwise."""
    poll = select.poll()
    while wanted := work():
        poll.register(sock.fileno(), wanted)
        assert poll.poll(PATIENCE * 1000), 'the other side did nothing'


def answer(sock: TlsSocket) -> str:
    """Greets a client. Returns the name in its certificate."""
    drive(sock, sock.handshake)
    named = sock.subject()
    assert sock.send(b'hello') == 5
    sock.shutdown(socket.SHUT_WR)
    return named


@contextmanager
def serving(tls: TlsSettings, mtls: MtlsSettings = MtlsSettings()) -> Iterator[tuple[list[str], Callable[..., bytes]]]:
    """A server. Yields (names or errors of its clients, a function that connects a client and reads the greeting)."""
    context, seen = server_context(tls, mtls, Path('/')), list[str]()

    def serve(raw: socket.socket) -> None:
        sock = TlsSocket(raw, context)
        try:
            seen.append(answer(sock))
        except OSError as e:
            seen.append(sock.reason(e))
        sock.close()

    def connect(client: ssl.SSLContext) -> bytes:
        ours, its = socket.socketpair()
        ours.settimeout(PATIENCE)
        thread = threading.Thread(target=serve, args=(its,))
        thread.start()
        try:
            with client.wrap_socket(ours, server_hostname='localhost') as sock:
                return read_all(sock)
        finally:
            thread.join()

    yield seen, connect


@pytest.mark.parametrize('version', [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_valid_client_certificate_identifies_its_client(
    authority: Authority, server: Pair, version: ssl.TLSVersion
) -> None:
    client = authority.client(authority.sign('ann', CLIENT), version)
    for required in (True, False):
        with serving(files(server), MtlsSettings(enabled=True, required=required, ca_path=str(authority.path))) as (
            seen,
            connect,
        ):
            assert connect(client) == b'hello'
        assert seen == ['ann']


def test_a_certificate_without_key_usage_is_accepted(authority: Authority, server: Pair) -> None:
    with serving(files(server), MtlsSettings(enabled=True, required=True, ca_path=str(authority.path))) as (
        seen,
        connect,
    ):
        assert connect(authority.client(authority.sign('ann'))) == b'hello'
    assert seen == ['ann']


@pytest.mark.parametrize('version', [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize('required', [True, False])
@pytest.mark.parametrize(
    ('bad', 'says'),
    [
        ('other authority', 'client certificate: certificate signature failure'),
        ('signed by itself', 'client certificate: '),
        ('expired', 'client certificate: certificate has expired'),
        ('not yet valid', 'client certificate: certificate is not yet valid'),
        ('serverAuth only', 'client certificate: unsuitable certificate purpose'),
        ('revoked', 'client certificate: certificate revoked'),
    ],
)
def test_an_invalid_client_certificate_ends_the_handshake_even_if_none_is_required(
    authority: Authority, other: Authority, server: Pair, version: ssl.TLSVersion, required: bool, bad: str, says: str
) -> None:
    revoked = authority.sign('ann', CLIENT)
    pair = {
        'other authority': lambda: other.sign('ann', CLIENT),
        'signed by itself': lambda: Authority(authority.directory / 'self', 'ann').sign('ann', CLIENT),
        'expired': lambda: authority.sign('ann', CLIENT, (-10, -1)),
        'not yet valid': lambda: authority.sign('ann', CLIENT, (1, 10)),
        'serverAuth only': lambda: authority.sign('ann', SERVER),
        'revoked': lambda: revoked,
    }[bad]()
    mtls = MtlsSettings(
        enabled=True, required=required, ca_path=str(authority.path), crl_path=str(authority.revoke(revoked))
    )
    with serving(files(server), mtls) as (seen, connect):
        said = outcome(lambda: connect(authority.client(pair, version)))
        with_good = connect(authority.client(authority.sign('bob', CLIENT), version))
    assert says in seen[0]
    assert said != b'hello'
    assert with_good == b'hello'


def outcome(work: Callable[[], bytes]) -> bytes | OSError:
    """The bytes read, or the error: a TLS alert may reach a client in its handshake or when it reads."""
    try:
        return work()
    except OSError as e:
        return e


def test_a_client_without_a_certificate_is_accepted_only_if_none_is_required(
    authority: Authority, server: Pair
) -> None:
    with serving(files(server), MtlsSettings(enabled=True, required=False, ca_path=str(authority.path))) as (
        seen,
        connect,
    ):
        assert connect(authority.client()) == b'hello'
    assert seen == ['']
    with serving(files(server), MtlsSettings(enabled=True, required=True, ca_path=str(authority.path))) as (
        seen,
        connect,
    ):
        with pytest.raises(ssl.SSLError, match='CERTIFICATE_REQUIRED'):
            connect(authority.client())
        assert seen == ['peer did not return a certificate']


def test_an_expired_revocation_list_accepts_nobody(authority: Authority, server: Pair) -> None:
    mtls = MtlsSettings(
        enabled=True, required=True, ca_path=str(authority.path), crl_path=str(authority.revoke(days=-1))
    )
    with serving(files(server), mtls) as (seen, connect):
        assert outcome(lambda: connect(authority.client(authority.sign('ann', CLIENT)))) != b'hello'
    assert seen == ['client certificate: CRL has expired']


@pytest.mark.parametrize('version', [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_session_is_not_resumed_after_its_certificate_has_expired(
    authority: Authority, server: Pair, version: ssl.TLSVersion
) -> None:
    client = authority.client(authority.sign('ann', CLIENT, (-1, 1)), version)
    context = server_context(
        files(server), MtlsSettings(enabled=True, required=True, ca_path=str(authority.path)), Path('/')
    )
    session = None
    for reused in (False, True):
        with pair_of(context, client, session) as (ours, theirs):
            ours.send(b'hello')
            assert theirs.recv(5) == b'hello'
            assert theirs.session_reused is reused
            assert ours.subject() == 'ann'
            session = theirs.session
    with pytest.raises(PermissionError, match='it has expired since'), pair_of(context, client, session, a_week_later):
        pass
    renewed = server_context(
        files(server), MtlsSettings(enabled=True, required=True, ca_path=str(authority.path)), Path('/')
    )
    with pair_of(renewed, client, session) as (_, theirs):
        assert not theirs.session_reused  # so a new revocation list is checked


def a_week_later() -> float:
    return time.time() + 7 * 86400


def test_only_tls_1_2_or_later_and_http_1_1_are_negotiated(authority: Authority, server: Pair) -> None:
    with serving(files(server)) as (seen, connect):
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            with pytest.raises(ssl.SSLError), pytest.warns(DeprecationWarning, match='TLSv1'):
                connect(authority.client(version=version))
        assert seen == ['unsupported protocol'] * 2
    context = server_context(files(server), MtlsSettings(), Path('/'))
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        client = authority.client(version=version)
        client.set_alpn_protocols(['h2', 'http/1.1'])
        with pair_of(context, client) as (_, theirs):
            assert theirs.selected_alpn_protocol() == 'http/1.1'
            assert theirs.compression() is None


@pytest.mark.parametrize(
    ('certificate', 'named'),
    [
        ({'subject': ((('countryName', 'XX'),), (('commonName', 'ann'),))}, 'ann'),
        ({'subject': ((('commonName', 'ann'),), (('commonName', 'root'),))}, ''),
        ({'subject': ((('commonName', 'ann'), ('commonName', 'root')),)}, ''),
        ({'subject': (), 'subjectAltName': (('DNS', 'a.example'), ('DNS', 'b.example'))}, 'a.example'),
        ({'subject': ((('commonName', 'ann'),),), 'subjectAltName': (('DNS', 'root'),)}, 'ann'),
        ({'subject': ((('commonName', 'ann\nroot'),),)}, ''),
        ({'subject': ((('commonName', 'ann\0.root'),),)}, ''),
        ({'subject': ((('commonName', 'a' * 256),),)}, ''),
        ({'subject': ()}, ''),
        ({}, ''),
        (None, ''),
    ],
)
def test_a_certificate_names_its_only_common_name_or_its_first_alternative_name(
    certificate: dict[str, Any] | None, named: str
) -> None:
    assert subject(certificate) == named


def test_names_are_read_from_real_certificates(authority: Authority, server: Pair) -> None:
    with serving(files(server), MtlsSettings(enabled=True, required=True, ca_path=str(authority.path))) as (
        seen,
        connect,
    ):
        for title in ('ann|root', 'ann', ''):
            assert connect(authority.client(authority.sign(title, CLIENT, alternative='a.example'))) == b'hello'
    assert seen == ['', 'ann', 'a.example']


# ----------------------------------------------------------------------------------------- the non-blocking socket


@contextmanager
def pair_of(
    context: ssl.SSLContext,
    client: ssl.SSLContext,
    session: ssl.SSLSession | None = None,
    clock: Callable[[], float] = time.time,
) -> Iterator[tuple[TlsSocket, ssl.SSLSocket]]:
    """A connection after its handshake: our side, and a client's blocking side."""
    raw, its = socket.socketpair()
    its.settimeout(PATIENCE)
    ours = TlsSocket(raw, context, clock)
    theirs = client.wrap_socket(its, server_hostname='localhost', do_handshake_on_connect=False, session=session)
    with ThreadPoolExecutor(1) as thread, theirs:
        shaking = thread.submit(theirs.do_handshake)
        try:
            drive(ours, ours.handshake)
            shaking.result()
            yield ours, theirs
        finally:
            ours.close()


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=['1.2', '1.3'])
def connection(
    request: pytest.FixtureRequest, authority: Authority, server: Pair
) -> Iterator[tuple[TlsSocket, ssl.SSLSocket]]:
    context = server_context(files(server), MtlsSettings(), Path('/'))
    with pair_of(context, authority.client(version=request.param)) as made:
        yield made


Connected = tuple[TlsSocket, ssl.SSLSocket]


def wait_for(sock: TlsSocket, mask: int) -> None:
    poll = select.poll()
    poll.register(sock.fileno(), mask)
    assert poll.poll(PATIENCE * 1000)


def receive(sock: TlsSocket) -> bytes:
    """Waits for bytes and returns them."""
    while True:
        try:
            return sock.recv(65536)
        except BlockingIOError:
            wait_for(sock, IN)


def fill(sock: TlsSocket | socket.socket) -> int:
    """Sends until the socket takes no more. Returns the number of bytes."""
    size = 0
    while True:
        try:
            size += sock.send(b'x' * 100)
        except BlockingIOError:
            return size


def test_receiving_without_data_raises_blocking_io_error(connection: Connected) -> None:
    ours, theirs = connection
    with pytest.raises(BlockingIOError):
        ours.recv(65536)
    theirs.sendall(b'abc')
    assert receive(ours) == b'abc'
    with pytest.raises(BlockingIOError):
        ours.recv(65536)


def test_polling_reports_all_data_that_was_not_received(connection: Connected) -> None:
    ours, theirs = connection
    data = os.urandom(300_000)
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(theirs.sendall, data)
        got = b''
        while len(got) < len(data):
            wait_for(ours, IN)  # would wait for ever if the rest were already in memory
            try:
                got += ours.recv(16384)
            except BlockingIOError:
                pass
            assert ours.pending() == 0
        sending.result()
    assert got == data


def test_a_small_receive_leaves_the_rest_pending(connection: Connected) -> None:
    ours, theirs = connection
    theirs.sendall(b'0123456789')
    wait_for(ours, IN)
    assert ours.recv(4) == b'0123'
    assert ours.pending() == 6
    assert ours.recv(100) == b'456789'


def test_a_large_answer_is_sent_in_pieces_to_a_slow_reader(connection: Connected) -> None:
    ours, theirs = connection
    data = memoryview(os.urandom(3_000_000))
    left, got, blocked = data, b'', 0
    while left:
        try:
            left = left[ours.send(left) :]
        except BlockingIOError:
            blocked += 1
            got += theirs.recv(65536)
    while len(got) < len(data):
        got += theirs.recv(65536)
    assert got == data
    assert blocked


def test_a_refused_send_may_be_repeated_with_more_bytes_appended(connection: Connected) -> None:
    ours, theirs = connection
    size = fill(ours)
    data = b'x' * 100 + b'more' * 9000
    left, got = data, theirs.recv(65536)
    while left:
        try:
            left = left[ours.send(left) :]
        except BlockingIOError:
            got += theirs.recv(65536)
    while len(got) < size + len(data):
        got += theirs.recv(65536)
    assert got == b'x' * size + data


def test_shutdown_sends_close_notify_and_the_end_of_the_client_is_noticed(connection: Connected) -> None:
    ours, theirs = connection
    vars(theirs)['suppress_ragged_eofs'] = False  # then an end without close_notify is an error
    theirs.sendall(b'a question')
    assert receive(ours) == b'a question'
    theirs.sendall(b'more that nobody reads')
    ours.send(b'an answer')
    ours.shutdown(socket.SHUT_WR)
    assert theirs.recv(100) == b'an answer'
    assert theirs.recv(100) == b''
    theirs.sendall(b'and more')
    assert b'more' not in receive(ours)
    theirs.shutdown(socket.SHUT_RDWR)
    assert receive(ours) == b''
    ours.close()
    assert ours.fileno() == -1


def test_a_close_notify_of_the_client_is_the_end(connection: Connected) -> None:
    ours, theirs = connection
    with ThreadPoolExecutor(1) as thread:
        leaving = thread.submit(theirs.unwrap)
        wait_for(ours, IN)
        assert receive(ours) == b''
        ours.close()
        leaving.result()


def test_closing_sends_close_notify_too(connection: Connected) -> None:
    ours, theirs = connection
    vars(theirs)['suppress_ragged_eofs'] = False
    ours.close()
    assert theirs.recv(100) == b''
    ours.close()


def test_a_vanished_client_is_an_os_error_or_the_end(connection: Connected) -> None:
    ours, theirs = connection
    theirs.close()
    assert isinstance(last := outcome(lambda: receive(ours)), ConnectionResetError) or last == b''
    with pytest.raises((BrokenPipeError, ConnectionResetError, ssl.SSLError)):
        fill(ours)


def test_bytes_that_are_not_tls_end_the_connection(connection: Connected) -> None:
    ours, theirs = connection
    socket.socket.sendall(theirs, b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n')
    with pytest.raises(OSError):
        receive(ours)
    ours.close()


def test_a_handshake_returns_the_event_to_wait_for_and_never_blocks(authority: Authority, server: Pair) -> None:
    raw, its = socket.socketpair()
    ours = TlsSocket(raw, server_context(files(server), MtlsSettings(), Path('/')))
    client = authority.client()
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(to_client, to_server, server_hostname='localhost')
    with pytest.raises(ssl.SSLWantReadError):
        theirs.do_handshake()
    hello = to_server.read()
    began = time.monotonic()
    for i in range(len(hello)):
        assert ours.handshake() == IN
        its.sendall(hello[i : i + 1])
    assert ours.handshake() == IN
    assert time.monotonic() - began < len(hello) * 0.02, 'it blocked each time'
    assert its.recv(65536)
    ours.close()
    its.close()


def test_a_handshake_that_can_not_write_asks_to_wait_for_writing(authority: Authority, server: Pair) -> None:
    raw, its = socket.socketpair()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    raw.setblocking(False)
    filler = fill(raw)
    ours = TlsSocket(raw, server_context(files(server), MtlsSettings(), Path('/')))
    its.settimeout(PATIENCE)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = authority.client().wrap_bio(to_client, to_server, server_hostname='localhost')
    with pytest.raises(ssl.SSLWantReadError):
        theirs.do_handshake()
    its.sendall(to_server.read())
    assert ours.handshake() == OUT
    while filler:
        filler -= len(its.recv(filler))
    while ours.handshake() == OUT:
        to_client.write(its.recv(65536))
    its.close()
    ours.close()


def test_a_plain_request_gets_an_answer_that_the_port_speaks_https(server: Pair) -> None:
    context = server_context(files(server), MtlsSettings(), Path('/'))
    for size in (0, 100, 100_000):
        raw, its = socket.socketpair()
        its.settimeout(PATIENCE)
        its.sendall(b'POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b' % (size, b'x' * size))
        ours = TlsSocket(raw, context)
        with pytest.raises(OSError) as raised:
            ours.handshake()
        assert TlsSocket.reason(raised.value) == 'http request'
        ours.close()
        said = read_all(its)
        its.close()
        assert status_of(said) == 400
        assert b'this port speaks HTTPS' in said
        assert b'"code": "tls-required"' in said


@pytest.mark.parametrize(
    'garbage', [b'', b'\0', b'SSH-2.0-x\r\n', b'\x80\x2e\x01\x00\x02', b'\x16\x03\x01\xff\xff' * 20]
)
def test_garbage_ends_a_handshake(server: Pair, garbage: bytes) -> None:
    raw, its = socket.socketpair()
    its.sendall(garbage)
    its.close()
    ours = TlsSocket(raw, server_context(files(server), MtlsSettings(), Path('/')))
    with pytest.raises(OSError) as raised:
        drive(ours, ours.handshake)
    assert TlsSocket.reason(raised.value)
    ours.close()
