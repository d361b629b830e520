"""Endpoints: what a URL may contain, and what happens to a town whose server no longer accepts its writes."""

from __future__ import annotations

import os
import re
import select
import socketserver
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinytown.config import FILE, load
from tinytown.errors import TownError, Unavailable, UsageError
from tinytown.host.town_secrets import exposed, known_secrets
from tinytown.settings import RedisSettings
from tinytown.state import endpoints
from tinytown.state.client import RedisConnection
from tinytown.state.endpoints import Cluster, Login, RedisServer, Sentinels, Tls, endpoint_of

from ..certificates import Authority
from ..redises import HOST, Node, Nodes
from ..support import PATIENCE, Place, make_town, until

KEY = 'tt:{test}:town'


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what the test enters here in reverse order: towns before their servers."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def nodes(directory: Path, stack: ExitStack) -> Nodes:
    """Redis servers for this test alone."""
    nodes: Nodes = stack.enter_context(Nodes(directory / 'redis'))
    return nodes


def settle(stack: ExitStack, directory: Path, **redis: Any) -> Place:
    place = make_town(directory / 'town', redis=redis)
    stack.callback(place.close)
    return place


# --------------------------------------------------------------------------------------------------------- the URL

ANY_TLS = Tls(None, None, None, True)


@pytest.mark.parametrize(
    ('url', 'endpoint'),
    [
        ('redis://db', RedisServer(host='db')),
        ('redis://me:se%40cret@db:7000/3', RedisServer(host='db', port=7000, db=3, login=Login('me', 'se@cret'))),
        ('redis://:secret@[::1]:7000?db=2', RedisServer(host='::1', port=7000, db=2, login=Login('', 'secret'))),
        ('redis://[::ffff:127.0.0.1]', RedisServer(host='::ffff:127.0.0.1')),
        (f'redis://a_b.{"c" * 63}.:7', RedisServer(host=f'a_b.{"c" * 63}.', port=7)),
        ('rediss://db', RedisServer(host='db', tls=ANY_TLS)),
        ('unix:///run/redis@main.sock', RedisServer('/run/redis@main.sock')),
        ('unix://me:secret@/run/a%20b?db=1', RedisServer('/run/a b', db=1, login=Login('me', 'secret'))),
        ('unix:///run/a?username=me&password=secret', RedisServer('/run/a', login=Login('me', 'secret'))),
        (
            'redis+sentinel://:secret@a,b:7/main/1',
            Sentinels([('a', 26379), ('b', 7)], RedisServer(), 'main', RedisServer(db=1, login=Login('', 'secret'))),
        ),
        (
            'rediss+sentinel://a/main',
            Sentinels([('a', 26379)], RedisServer(tls=ANY_TLS), 'main', RedisServer(tls=ANY_TLS)),
        ),
        ('redis+cluster://a,b:7', Cluster([('a', 6379), ('b', 7)], RedisServer(), KEY)),
        ('rediss+cluster://a', Cluster([('a', 6379)], RedisServer(tls=ANY_TLS), KEY)),
    ],
)
def test_a_url_describes_a_server_sentinels_or_a_cluster(url: str, endpoint: Any) -> None:
    assert endpoint_of(RedisSettings(url=url), KEY, Path('/town')) == endpoint


@pytest.mark.parametrize(
    ('url', 'message'),
    [
        ('http://db', "can't be read"),
        ('redis://:secr#et@db', 'write %40 for @'),
        ('redis://:secr/et@db', 'write %40 for @'),
        ('redis://:secr?et@db', 'write %40 for @'),
        ('redis://', 'host 1 is missing'),
        ('redis+cluster://a,', 'host 2 is missing'),
        ('redis://me:secret', 'not a name with a port from 1 to 65535'),
        ('redis://db:65536', 'not a name with a port from 1 to 65535'),
        ('redis://a..b', 'host 1 is missing, or not a name'),
        ('redis://.', 'host 1 is missing, or not a name'),
        (f'redis+cluster://a,{"b" * 64}.c', 'host 2 is missing, or not a name'),
        ('redis://[a..b]', 'host 1 is missing, or not a name'),
        ('redis://db/secret', 'the database is not a number'),
        ('redis://db/1/2', 'too much after the host'),
        ('redis://a,b', 'several hosts'),
        ('redis://me@db', 'a user but no password'),
        ('redis://db?timeout=1', r'\?timeout= is not known'),
        ('redis+sentinel://a', 'name of the master is missing'),
        ('redis+cluster://a/1', 'only database 0'),
        ('unix://run/redis.sock', 'path of the socket is missing'),
    ],
)
def test_the_error_for_a_wrong_url_names_the_part_and_hides_the_password(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf'redis\.url: .*{message}') as caught:
        endpoint_of(RedisSettings(url=url), KEY, Path('/town'))
    assert 'secr' not in str(caught.value)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'url': 'redis://db', 'tls_ca_path': 'file'}, 'write rediss'),
        ({'url': 'rediss://db', 'tls_key_path': 'file'}, 'without redis.tls_cert_path'),
        ({'url': 'rediss://db', 'tls_ca_path': 'file'}, 'not certificates in PEM'),
        ({'url': 'rediss://db', 'tls_cert_path': 'none'}, 'redis.tls_cert_path: .*none: No such file'),
        ({'url': 'redis://:x@db', 'password_file': 'file'}, 'remove one of them'),
        ({'url': 'redis://db', 'password_file': 'none'}, 'redis.password_file: .*none: No such file'),
    ],
)
def test_settings_of_redis_that_contradict_each_other_are_refused(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    (tmp_path / 'file').write_text('something')
    with pytest.raises(UsageError, match=message):
        endpoint_of(RedisSettings(**settings), KEY, tmp_path)  # type: ignore[arg-type]


def test_a_password_file_that_is_not_regular_or_that_others_may_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('something')
    (tmp_path / 'file').chmod(0o620)
    os.mkfifo(tmp_path / 'pipe', 0o600)
    for name, message in (('file', 'run  chmod go-w .*file'), ('pipe', 'pipe is not a regular file')):
        with pytest.raises(UsageError, match=rf'redis\.password_file: .*{message}'):
            endpoint_of(RedisSettings(url='redis://db', password_file=name), KEY, tmp_path)
        with pytest.raises(Unavailable, match=r'chmod go-w|not a regular file'):
            Login(file=tmp_path / name).get_credentials()


def test_a_directory_in_place_of_the_password_file_is_reported_and_does_not_stay_open(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"password file .* can't be read: .*Is a directory"):
        Login(file=tmp_path).get_credentials()
    assert tmp_path.resolve() not in {link.resolve() for link in Path('/proc/self/fd').iterdir()}


def test_files_with_passwords_that_every_user_may_read_are_reported(tmp_path: Path) -> None:
    (tmp_path / 'secret').write_text('something')
    make_town(tmp_path, redis={'url': 'redis://:x@db', 'sentinel_password_file': 'secret'})
    warnings = exposed(tmp_path, load(tmp_path))
    assert [warning.partition(' ')[0] for warning in warnings] == [str(tmp_path / FILE), str(tmp_path / 'secret')]
    for file in (FILE, 'secret'):
        (tmp_path / file).chmod(0o640)
    assert exposed(tmp_path, load(tmp_path)) == []


@pytest.mark.parametrize(('key', 'slot'), [('tt:{123456789}:town', 12739), ('tt:{foo}:town', 12182)])
def test_the_slot_of_a_town_is_the_slot_of_its_name(key: str, slot: int) -> None:
    assert Cluster([], RedisServer(), key).slot == slot


# -------------------------------------------------------------------------------------------------------- the server


@pytest.mark.parametrize('place', [('a..b', 6379), (HOST, 65536)])
def test_a_server_whose_host_or_port_can_not_be_one_is_unavailable(place: tuple[str, int]) -> None:
    with pytest.raises(Unavailable, match=f'is not there: {place[0]}:{place[1]}: '):
        RedisServer().at(place).open()


def test_a_password_in_a_file_opens_a_town_and_is_shown_nowhere(
    directory: Path, nodes: Nodes, stack: ExitStack
) -> None:
    nodes.options += ['user default off', 'user me on >a-long-secret ~* &* +@all']
    (directory / 'secret').write_text('a-long-secret\n')
    nodes.server = replace(nodes.server, login=Login('me', '', directory / 'secret'))
    node = nodes.add()
    place = settle(stack, directory, url=f'redis://me@{HOST}:{node.port}/5', password_file='../secret')  # noqa: S106
    assert place.do('town.get')['redis_url'] == f'redis://me@{HOST}:{node.port}/5'
    assert b'db5:keys=' in node.ask('INFO', 'keyspace')
    assert known_secrets(place.root, load(place.root), {}).hide(b'say a-long-secret') == b'say [redacted]'
    (directory / 'secret').write_text('an-old-secret')
    status = place.tt('status', check=False)
    assert (status.returncode, status.stderr.count('WRONGPASS')) == (1, 1)
    (directory / 'secret').unlink()
    assert 'secret: No such file' in place.tt('status', check=False).stderr
    (directory / 'secret').write_text('a-long-secret')


def test_the_error_for_a_redis_that_refuses_us_names_the_server_our_user_and_the_mend(
    directory: Path, nodes: Nodes, stack: ExitStack
) -> None:
    nodes.options += ['user default on >root ~* &* +@all', 'user me on >secret ~tt:{other}:* +@all']
    nodes.server = replace(nodes.server, login=Login('', 'root'))
    node = nodes.add()
    place = settle(stack, directory)
    cases = {
        '': f'Redis at {node.place} refused us: NOAUTH .*in redis.url and redis.password_file',
        ':wrong@': f'Redis at {node.place} refused us: WRONGPASS .*in redis.url and redis.password_file',
        'me:secret@': f'Redis at me@{node.place} refused us: NOPERM .*keys ~tt:{{test}}:\\* .*docs/redis.md',
    }
    for login, message in cases.items():
        place.tt('config', 'redis.url', f'redis://{login}{node.place}')
        status = place.tt('status', check=False)
        assert re.search(message, status.stderr)
        assert (status.returncode, 'secret' in status.stderr) == (1, False)
    place.tt('config', 'redis.url', f'redis://:root@{node.place}')


@pytest.mark.parametrize('login', [Login('me', 'a-long-secret'), Login('', 'a-long-secret')])
def test_the_error_for_a_redis_without_the_command_auth_does_not_contain_the_password(
    nodes: Nodes, login: Login
) -> None:
    node = nodes.add('rename-command AUTH HIDDEN')
    with pytest.raises(TownError, match=r"answered: ERR unknown command 'AUTH'$"):
        replace(node.server, login=login).open(PATIENCE)


def test_a_redis_without_an_append_only_file_is_reported_as_not_durable(
    directory: Path, nodes: Nodes, stack: ExitStack
) -> None:
    place = settle(stack, directory, url=f'redis://{HOST}:{nodes.add("appendonly no").port}')
    hall = place.hall()
    assert hall.get('/ready').json['durability'] == 'none'
    assert 'may lose acknowledged changes' in hall.said('may lose')


def demote(node: Node, master: Node) -> None:
    node.ask('REPLICAOF', HOST, master.port)
    until(lambda: node.info('master_link_status') == 'up')


def test_a_server_that_became_a_replica_is_used_again_once_it_is_a_master(
    directory: Path, nodes: Nodes, stack: ExitStack
) -> None:
    node, other = nodes.add(), nodes.add()
    place = settle(stack, directory, url=f'redis://{HOST}:{node.port}')
    hall = place.hall()
    demote(node, other)
    for _ in range(3):
        refused = hall.post('/v1/backlog', {'description': 'x'})
        assert (refused.status, refused.headers['retry-after']) == (503, '1')
        assert 'othing was changed' in refused.json['detail']
    with pytest.raises(Unavailable, match='read-only replica'):
        place.do('backlog.add', description='x')
    node.ask('REPLICAOF', 'NO', 'ONE')
    until(lambda: hall.post('/v1/backlog', {'description': 'x'}).status == 201)
    assert place.do('backlog.list')['count'] in (0, 1)


def test_a_wait_for_events_ends_with_an_error_when_its_server_becomes_a_replica(
    directory: Path, nodes: Nodes, stack: ExitStack
) -> None:
    node, other = nodes.add(), nodes.add()
    place = settle(stack, directory, url=f'redis://{HOST}:{node.port}')
    store, errors = place.store, []

    def wait() -> None:
        try:
            store.call(store.next_event('$', 10_000))
        except TownError as e:
            errors.append(e.detail)
        finally:
            store.close()

    waiter = threading.Thread(target=wait)
    waiter.start()
    until(lambda: node.info('blocked_clients') == '1')
    demote(node, other)
    waiter.join(PATIENCE)
    node.ask('REPLICAOF', 'NO', 'ONE')
    assert errors == ['Nothing was changed: Redis became a replica']


@pytest.mark.parametrize('lost', ['ca', 'key'])
def test_the_error_for_a_certificate_that_vanished_while_a_town_is_open_names_its_file(
    directory: Path, lost: str
) -> None:
    authority = Authority(directory)
    pair = authority.sign('redis')
    files = {'ca': authority.path, 'cert': pair.cert, 'key': pair.key}
    server = RedisServer(host=HOST, tls=Tls(**files, check_hostname=True))
    files[lost].rename(directory / 'elsewhere')
    with pytest.raises(Unavailable, match=f"can't be used: the certificates .*No such file.*{files[lost]}"):
        server.open()


# ------------------------------------------------------------------------------------------- sentinels and a Cluster


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow sentinel is not skipped."""
    monkeypatch.setattr(endpoints, '_ASK_SECS', PATIENCE)


def port_of(connection: RedisConnection) -> int:
    assert connection.sock
    host, port = connection.sock.getpeername()
    assert host == HOST
    return int(port)


def watcher(directory: Path, stack: ExitStack, master: Node) -> Node:
    """A sentinel that watches `master` under the name `main`."""
    lines = [f'sentinel monitor main {HOST} {master.port} 1', 'sentinel down-after-milliseconds main 60000']
    sentinel = Node(directory / 'sentinels', lines, RedisServer(), ('--sentinel',))
    stack.callback(sentinel.kill)
    return sentinel


@pytest.mark.usefixtures('_patient')
def test_sentinels_that_are_dead_or_do_not_know_the_master_are_skipped(
    directory: Path, nodes: Nodes, stack: ExitStack
) -> None:
    master = nodes.add()
    knows = watcher(directory, stack, master)
    ignorant, dead = watcher(directory, stack, master), watcher(directory, stack, master)
    ignorant.ask('SENTINEL', 'REMOVE', 'main')
    dead.kill()
    url = f'redis+sentinel://{dead.place},{ignorant.place},{knows.place}'
    connection = endpoint_of(RedisSettings(url=f'{url}/main'), KEY, directory).open(PATIENCE)
    assert port_of(connection) == master.port
    with pytest.raises(Unavailable, match=rf'no master other .*{dead.port}.*refused.*{knows.port}.*is not known there'):
        endpoint_of(RedisSettings(url=f'{url}/other'), KEY, directory).open()


@pytest.mark.usefixtures('_patient')
def test_a_sentinel_that_still_names_a_dead_master_does_not_cut_connections_to_the_new_one(
    directory: Path, nodes: Nodes, stack: ExitStack
) -> None:
    former, master = nodes.add(), nodes.add()
    late, right = watcher(directory, stack, former), watcher(directory, stack, master)
    former.kill()
    connection = endpoint_of(
        RedisSettings(url=f'redis+sentinel://{late.place},{right.place}/main'), KEY, directory
    ).open(PATIENCE)
    assert port_of(connection) == master.port
    assert connection.sock
    assert select.select([connection.sock], [], [], 0.8)[0] == []


@pytest.mark.usefixtures('_patient')
def test_a_server_that_sentinels_name_must_confirm_that_it_is_a_master(
    directory: Path, nodes: Nodes, stack: ExitStack
) -> None:
    former, master = nodes.add(), nodes.add()
    sentinel = watcher(directory, stack, former)
    endpoint = endpoint_of(RedisSettings(url=f'redis+sentinel://{sentinel.place}/main'), KEY, directory)
    connection = endpoint.open(PATIENCE)
    demote(former, master)
    with pytest.raises(Unavailable, match='is named as the master, but says that it is not one'):
        endpoint.open(PATIENCE)
    sentinel.ask('SENTINEL', 'REMOVE', 'main')
    sentinel.ask('SENTINEL', 'MONITOR', 'main', HOST, master.port, 1)
    until(connection.is_stale)  # it is cut, although its server is alive
    assert port_of(endpoint.open(PATIENCE)) == master.port


class HandSentinel(socketserver.ThreadingTCPServer):
    """A sentinel that answers every command with the bytes in `reply`."""

    daemon_threads = True

    def __init__(self, stack: ExitStack) -> None:
        super().__init__((HOST, 0), HandSentinelHandler)
        self.reply, self.count = b'', 0
        thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        thread.start()
        stack.callback(thread.join)
        stack.enter_context(self)
        stack.callback(self.shutdown)
        self.endpoint = Sentinels([(HOST, self.server_address[1])], RedisServer(), 'main', RedisServer())

    def name(self, node: Node) -> None:
        """Names this node as the master."""
        self.reply = b'*2\r\n$9\r\n%b\r\n$5\r\n%d\r\n' % (HOST.encode(), node.port)


class HandSentinelHandler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, HandSentinel)
        with suppress(ConnectionError):
            while self.request.recv(1000):
                self.request.sendall(self.server.reply)
                self.server.count += 1


def watchers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == 'sentinels'}


@pytest.mark.usefixtures('_patient')
def test_sentinels_are_asked_while_there_are_connections_and_no_longer(nodes: Nodes, stack: ExitStack) -> None:
    former, master, sentinel = nodes.add(), nodes.add(), HandSentinel(stack)
    before = watchers()
    for _ in range(2):
        sentinel.name(former)
        first, second = sentinel.endpoint.open(PATIENCE), sentinel.endpoint.open(PATIENCE)
        first.close()
        sentinel.name(master)
        until(second.is_stale)
        second.close()
        until(lambda: watchers() <= before)


@pytest.mark.usefixtures('_patient')
@pytest.mark.parametrize(
    'reply', [b':1\r\n', b'*1\r\n$1\r\na\r\n', b'*2\r\n:1\r\n:2\r\n', b'*2\r\n$1\r\na\r\n$1\r\nb\r\n']
)
def test_a_sentinel_that_names_no_host_and_port_is_unavailable_and_is_asked_again(
    nodes: Nodes, stack: ExitStack, reply: bytes
) -> None:
    former, master, sentinel = nodes.add(), nodes.add(), HandSentinel(stack)
    sentinel.name(former)
    connection = sentinel.endpoint.open(PATIENCE)
    sentinel.reply, asked = reply, sentinel.count
    until(lambda: sentinel.count > asked + 1)
    with pytest.raises(Unavailable, match='master main has no host and port there'):
        sentinel.endpoint.open(PATIENCE)
    assert not connection.is_stale()
    sentinel.name(master)
    until(connection.is_stale)
    connection.close()


@pytest.mark.usefixtures('_patient')
@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_bug_does_not_end_the_watch_of_the_sentinels(
    nodes: Nodes, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    former, master, sentinel = nodes.add(), nodes.add(), HandSentinel(stack)
    sentinel.name(former)
    connection = sentinel.endpoint.open(PATIENCE)
    bugs, cut_all_but = [ValueError('bug')], Sentinels._cut_all_but

    def fail_once(endpoint: Sentinels, place: tuple[str, int]) -> None:
        if bugs and endpoint is sentinel.endpoint:
            raise bugs.pop()
        cut_all_but(endpoint, place)

    monkeypatch.setattr(Sentinels, '_cut_all_but', fail_once)
    until(lambda: not bugs)
    sentinel.name(master)
    until(connection.is_stale)
    connection.close()


def test_a_town_is_found_on_the_node_that_holds_its_slot_also_after_the_slot_has_moved(
    directory: Path, nodes: Nodes, stack: ExitStack
) -> None:
    nodes.options += ['cluster-enabled yes', 'cluster-config-file nodes']
    first, second = nodes.add(), nodes.add()
    slot = Cluster([], RedisServer(), KEY).slot
    first.ask('CLUSTER', 'ADDSLOTSRANGE', 0, 16383)
    first.ask('CLUSTER', 'MEET', HOST, second.port, second.bus)
    ids = [each.ask('CLUSTER', 'MYID') for each in (first, second)]
    until(lambda: all(name in each.ask('CLUSTER', 'NODES') for each in (first, second) for name in ids))
    endpoint = endpoint_of(RedisSettings(url=f'redis+cluster://{second.place}'), KEY, directory)
    connection = until(endpoint.open)
    assert port_of(connection) == first.port
    place = settle(stack, directory, url=f'redis+cluster://{second.place}')
    hall = place.hall()
    home = second.ask('CLUSTER', 'MYID')
    second.ask('CLUSTER', 'SETSLOT', slot, 'IMPORTING', first.ask('CLUSTER', 'MYID'))
    first.ask('CLUSTER', 'SETSLOT', slot, 'MIGRATING', home)
    moving = hall.post('/v1/backlog', {'description': 'x'})
    assert (moving.status, 'Nothing was changed: ' in moving.json['detail']) == (503, True)
    with pytest.raises(Unavailable, match='moving the town to another node'):
        place.do('backlog.add', description='x')
    keys = first.ask('CLUSTER', 'GETKEYSINSLOT', slot, 100)
    first.ask('MIGRATE', HOST, second.port, '', 0, 10_000, 'KEYS', *keys)
    for node in (second, first):
        node.ask('CLUSTER', 'SETSLOT', slot, 'NODE', home)
    assert hall.post('/v1/backlog', {'description': 'x'}).status == 201, 'the command was not sent to the new node'
    place.do('backlog.add', description='y')
    assert place.do('backlog.list')['count'] == 2
