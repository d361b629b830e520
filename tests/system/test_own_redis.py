"""A Redis of one's own, the real thing on loopback: TLS, ACL users, sentinels, a Cluster; and their failovers.

What is acknowledged while a master is killed, demoted or moved is written down, and looked for afterwards. `-s` shows
the numbers, which docs/redis.md tells. Needs Debian's redis-server (or one newer, built with TLS) and redis-cli.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tinytown.errors import TownError, Unavailable
from tinytown.settings import RedisSettings
from tinytown.state.endpoints import Cluster as ClusterEndpoint
from tinytown.state.endpoints import Login, Tls, endpoint_of
from tinytown.state.store import text
from tinytown.worker.main import install_tt

from ..certificates import CLIENT, Authority
from ..ground import check
from ..redises import HOST, Cluster, Node, Nodes, Sentinels
from ..support import LONG, REPOSITORY, Hall, Place, environment, make_town, shell_cli, until

RUNS = shell_cli('cat >/dev/null; echo "$TINYTOWN_TASK_ID $TINYTOWN_ATTEMPT" >>runs')
DOCS = (REPOSITORY / 'docs' / 'redis.md').read_text()
SLOT = ClusterEndpoint([], Nodes(Path()).server, 'tt:{test}:town').slot


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is entered here ends in reverse: towns before their servers."""
    with ExitStack() as made:
        yield made


def settle(stack: ExitStack, directory: Path, **redis: Any) -> Place:
    """A town whose agents note their runs."""
    agent = {'retry_backoff_secs': [0], 'lease_secs': 6, 'max_attempts': 9}
    made = make_town(
        directory / 'town',
        redis=redis,
        agent=agent,
        townhall={'access_log': 'off'},
        default_cli='runs',
        agent_clis={'runs': RUNS},
    )
    stack.callback(made.close)
    return made


def works(place: Place) -> Hall:
    """A townhall, a worker and `tt` do what they are for."""
    hall = place.hall()
    assert hall.post('/v1/agents', {'name': 'able'}).status == 201
    task = hall.post('/v1/tasks/assign', {'agent': 'able', 'task': 'x' * 65_536}).json['task_id']
    assert place.await_end(task)['state'] == 'completed'
    assert len(hall.get(f'/v1/tasks/{task}').body) > 65_536
    assert place.tt_json('task', 'show', task)['state'] == 'completed'
    assert hall.get('/ready').json['durability'] == 'always'
    return hall


def follow(place: Place, needs: str, instead: dict[str, object]) -> str:
    """Does what the docs say, with other words in some places. What it printed."""
    script = '\n'.join(re.findall(rf'<!-- needs: {needs} -->\n```sh\n(.*?)^```', DOCS, re.M | re.S))
    words = re.compile('|'.join(re.escape(word) for word in sorted(instead, key=len, reverse=True)))
    assert set(words.findall(script)) == set(instead)
    script = words.sub(lambda found: str(instead[found[0]]), script)
    (place.root / '.tt').mkdir(mode=0o700, exist_ok=True)
    path = f'{install_tt(place.root)}:{os.environ["PATH"]}'
    done = subprocess.run(
        ['bash', '-ec', script], cwd=place.root, env=environment(PATH=path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f'{script}\n{done.stdout}\n{done.stderr}'
    return done.stdout


# ------------------------------------------------------------------------------------------------------------ TLS, ACL


@dataclass
class Papers:
    """Certificates of a server and its clients, as options of a server and as settings of a town."""

    options: list[str]
    settings: dict[str, Any]
    tls: Tls


@pytest.fixture(scope='module')
def papers(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    authority = Authority(tmp_path_factory.mktemp('papers'))
    server, client = authority.sign('redis'), authority.sign('townhall', CLIENT)
    options = [f'tls-cert-file {server.cert}', f'tls-key-file {server.key}', f'tls-ca-cert-file {authority.path}']
    files = {'tls_ca_path': authority.path, 'tls_cert_path': client.cert, 'tls_key_path': client.key}
    options += ['tls-replication yes', 'tls-auth-clients yes']
    return Papers(
        options, {name: str(file) for name, file in files.items()}, Tls(authority.path, client.cert, client.key, False)
    )


def test_a_town_lives_in_a_redis_behind_tls_that_wants_a_certificate(
    directory: Path, papers: Papers, stack: ExitStack
) -> None:
    nodes = stack.enter_context(Nodes(directory / 'redis', *papers.options, tls=papers.tls))
    node = nodes.add()
    place = settle(stack, directory, url=f'rediss://localhost:{node.port}', **papers.settings)
    hall = works(place)

    def send(number: int) -> None:
        body = {'description': '€' * 65_536}
        until(lambda: hall.post('/v1/backlog', body, Idempotency_Key=f'send-{number}').status == 201)

    sends = [threading.Thread(target=send, args=(i,)) for i in range(20)]
    for each in sends:
        each.start()
    for each in sends:
        each.join()
    assert place.do('backlog.list')['count'] == 20
    before = node.info('total_connections_received')
    for _ in range(20):
        place.do('town.get_status')
    assert int(node.info('total_connections_received')) == int(before) + 1, 'only our own look at it is new'


@pytest.mark.parametrize(
    ('host', 'changed', 'told'),
    [
        ('localhost', {'tls_ca_path': 'other'}, r'not trusted: .*; set redis\.tls_ca_path'),
        (HOST, {}, r'IP address mismatch.*set redis\.tls_check_hostname = false'),
        ('localhost', {'tls_cert_path': '', 'tls_key_path': ''}, 'set redis.tls_cert_path'),
        (HOST, {'tls_check_hostname': False}, ''),
    ],
)
def test_a_redis_or_a_client_without_the_right_certificate_is_refused(
    directory: Path, papers: Papers, stack: ExitStack, host: str, changed: dict[str, Any], told: str
) -> None:
    if changed.get('tls_ca_path'):
        changed = {'tls_ca_path': str(Authority(directory / 'other').path)}
    nodes = stack.enter_context(Nodes(directory / 'redis', *papers.options, tls=papers.tls))
    settings = RedisSettings(url=f'rediss://{host}:{nodes.add().port}', **(papers.settings | changed))
    endpoint = endpoint_of(settings, 'tt:{test}:town', directory)
    if not told:
        assert endpoint.open().ask('PING') == b'PONG'
        return
    with pytest.raises(Unavailable, match=told):
        endpoint.open()


ACL = re.search(r'^user townhall .*$', DOCS, re.M)


def acl(name: str = 'townhall') -> str:
    """The line of the docs, with a password."""
    assert ACL
    return ACL[0].replace('user townhall', f'user {name}').replace('PASSWORD', 'a-long-secret').replace('TOWN', 'test')


def test_a_user_with_the_rights_that_the_docs_name_is_enough(directory: Path, stack: ExitStack) -> None:
    nodes = stack.enter_context(Nodes(directory / 'redis', acl(), 'user default off', 'user root on >root ~* &* +@all'))
    nodes.server = replace(nodes.server, login=Login('root', 'root'))
    node = nodes.add()
    place = settle(stack, directory, url=f'redis://townhall:a-long-secret@{HOST}:{node.port}')
    hall = works(place)
    for path in ('/metrics', '/api/scaling', '/v1/status?deep=true', '/v1/tasks', '/v1/agents/able/inbox'):
        assert hall.get(path).status == 200, path
    for path in ('agents/able/restart', 'agents/able/kill', 'recover', 'reclaim', 'agents/prune'):
        assert hall.post(f'/v1/{path}').status == 200, path
    assert hall.post('/v1/town/reset', {'force': True}).status == 200
    assert node.ask('ACL', 'LOG') == []
    connection = replace(node.server, login=Login('townhall', 'a-long-secret')).open()
    with pytest.raises(TownError, match='NOPERM'):
        connection.ask('HGET', 'tt:{another}:town', 'id')


def test_what_the_docs_say_of_tls_works_as_written(directory: Path, papers: Papers, stack: ExitStack) -> None:
    (directory / 'password').write_text('a-long-secret\n')
    root = 'user root on >root ~* &* +@all', 'user default off'
    login = Login('root', 'root')
    node = stack.enter_context(
        Nodes(directory / 'redis', *papers.options, *root, acl(), login=login, tls=papers.tls)
    ).add()
    place = settle(stack, directory)
    instead: dict[str, object] = {
        'redis.example:6379': f'localhost:{node.port}',
        '/etc/townhall/redis-password': directory / 'password',
        '/etc/townhall/redis-ca.pem': papers.settings['tls_ca_path'],
        '/etc/townhall/redis-client.pem': papers.settings['tls_cert_path'],
        '/etc/townhall/redis-client.key': papers.settings['tls_key_path'],
    }
    assert f'rediss://townhall@localhost:{node.port}' in follow(place, 'tls-redis', instead)


def test_a_password_is_read_anew_from_its_file_for_each_connection(directory: Path, stack: ExitStack) -> None:
    secret = directory / 'password'
    secret.write_text('first-secret\n')
    secret.chmod(0o644)
    nodes = stack.enter_context(Nodes(directory / 'redis', 'requirepass first-secret', login=Login('', '', secret)))
    node = nodes.add()
    place = settle(stack, directory, url=f'redis://{HOST}:{node.port}/3', password_file=str(secret))
    hall = works(place)
    hall.said(f'{secret} holds a password that every user of this machine may read')
    node.ask('CONFIG', 'SET', 'requirepass', 'second-secret')
    secret.write_text('second-secret\n')
    node.ask('CLIENT', 'KILL', 'TYPE', 'normal', 'SKIPME', 'yes')
    until(lambda: hall.get('/ready').status == 200)
    assert place.tt('status').returncode == 0
    secret.write_text('wrong-secret')
    refused = place.tt('status', check=False)
    assert refused.returncode == 1
    assert 'WRONGPASS' in refused.stderr
    assert 'wrong-secret' not in refused.stderr
    secret.write_text('second-secret\n')
    said = (place.root / '.tt' / 'logs' / 'able.log').read_text() + hall.log_file.read_text()
    assert 'secret' not in said


def test_sentinels_and_servers_behind_tls_and_passwords_are_found(
    directory: Path, papers: Papers, stack: ExitStack
) -> None:
    secret = directory / 'sentinel-secret'
    secret.write_text('sentinel-secret')
    guarded = ['user default on >a-long-secret ~* &* +@all', 'masterauth a-long-secret']
    watch = ['sentinel auth-pass main a-long-secret', 'user default on nopass ~* &* +@all']
    login = Login('', 'a-long-secret')
    group = stack.enter_context(
        Sentinels(directory / 'redis', *papers.options, *guarded, login=login, tls=papers.tls, watch=watch)
    )
    for each in group.sentinels:
        each.ask(
            'ACL',
            'SETUSER',
            'reader',
            'on',
            '>sentinel-secret',
            '+@connection',
            '+sentinel|get-master-addr-by-name',
        )
    url = group.url.replace('redis+sentinel://', 'rediss+sentinel://:a-long-secret@')
    more = {'sentinel_user': 'reader', 'sentinel_password_file': str(secret), 'tls_check_hostname': False}
    place = settle(stack, directory, url=url, **papers.settings, **more)
    works(place)
    secret.write_text('another-secret')
    assert 'WRONGPASS' in (said := place.tt('status', check=False).stderr)
    assert 'set the right user and password in redis.sentinel_user and redis.sentinel_password_file' in said
    secret.write_text('sentinel-secret')


def test_a_redis_without_tls_is_told_from_one_that_is_away(directory: Path, stack: ExitStack) -> None:
    node = stack.enter_context(Nodes(directory / 'redis')).add()
    with pytest.raises(Unavailable, match='does not answer to TLS; if it speaks no TLS, write redis instead of rediss'):
        endpoint_of(RedisSettings(url=f'rediss://{node.place}'), 'tt:{test}:town', directory).open()


# ----------------------------------------------------------------------------------------------------------- failovers


@dataclass
class Load:
    """Three callers that add to the backlog and one that assigns, and what they were answered."""

    hall: Hall
    acknowledged: dict[str, float] = field(default_factory=dict)  # ids, and when
    answers: Counter[str] = field(default_factory=Counter)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        calls: list[tuple[str, dict[str, str]]] = [('/v1/backlog', {'description': 'load'})] * 3
        calls += [('/v1/tasks/assign', {'agent': 'able', 'task': 'load'})]
        self._threads = [threading.Thread(target=self._call, args=(i, *call)) for i, call in enumerate(calls)]
        for each in self._threads:
            each.start()
        try:
            self.await_answers(50, time.monotonic())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for each in self._threads:
            each.join()

    def _call(self, caller: int, path: str, body: dict[str, str]) -> None:
        number = 0
        while not self._over.wait(0.004 if path == '/v1/backlog' else 0.2):
            answer = self.hall.post(path, body, Idempotency_Key=f'{caller}-{number}')
            if answer.status in (200, 201):
                self.acknowledged[answer.json.get('task_id') or answer.json['id']] = time.monotonic()
                number += 1
            else:
                unknown = 'not known' in answer.json['detail']
                self.answers[f'{answer.status} {"unknown" if unknown else "nothing changed"}'] += 1

    def await_answers(self, count: int, since: float) -> None:
        """Until there were that many acknowledgements after a moment."""
        deadline = time.monotonic() + LONG
        while sum(at > since for at in list(self.acknowledged.values())) < count:
            assert time.monotonic() < deadline, self.answers
            self._over.wait(0.01)

    def gap(self, since: float = 0) -> float:
        """The longest time without an acknowledgement, after a moment."""
        at = sorted([at for at in self.acknowledged.values() if at > since] + [since] * (since > 0))
        return max(later - earlier for earlier, later in pairwise(at))


def present(place: Place) -> set[str]:
    """The tasks that there are."""
    reply = place.store.run(_all_tasks(place))
    return {text(each) for each in reply}


def _all_tasks(place: Place) -> Any:
    from tinytown.state.store import Command

    return (yield Command(None, ('ZRANGE', place.store.prefix + b'tasks', 0, -1)))


def finish(place: Place, load: Load) -> tuple[list[str], Counter[str]]:
    """Has all that was assigned done, and looks whether all of the state agrees.

    Gives what was acknowledged and is gone, and how often each (task, attempt) ran.
    """
    there = present(place)
    for task in load.hall.get('/v1/tasks?limit=500&state=assigned').json['tasks']:
        place.await_end(task['task_id'])
    until(lambda: load.hall.get('/v1/agents/able').json['state'] == 'Idle', LONG)
    check(place)
    runs = Counter((place.root / 'runs').read_text().splitlines())
    return [task for task in load.acknowledged if task not in there], runs


def began(place: Place) -> Hall:
    hall = place.hall()
    assert hall.post('/v1/agents', {'name': 'able'}).status == 201
    return hall


def tell(what: str, load: Load, gap: float, lost: list[str], runs: Counter[str]) -> None:
    twice = sum(count > 1 for count in runs.values())
    print(
        f'\n{what}: {gap:.2f} s without an acknowledgement, {len(lost)} of {len(load.acknowledged)} lost, '
        f'{len(runs)} runs, {twice} twice, {dict(load.answers)}'
    )


@pytest.mark.parametrize(('replicas', 'lag'), [(0, 0), (0, 3), (1, 3)])
def test_a_town_goes_on_with_the_new_master_when_the_old_one_is_killed(
    directory: Path, stack: ExitStack, replicas: int, lag: int
) -> None:
    options = [f'min-replicas-to-write {replicas}', 'min-replicas-max-lag 2']
    group = stack.enter_context(Sentinels(directory / 'redis', *options))
    place = settle(stack, directory, url=group.url)
    with Load(began(place)) as load:
        old = group.master()
        since = time.monotonic()
        if lag:
            for node in group.data[1:]:
                node.stop()
            old.ask('CLIENT', 'KILL', 'TYPE', 'replica')  # nothing more is in their sockets
        threading.Event().wait(lag)
        killed = time.monotonic()
        old.kill()
        for node in group.data[1:]:
            node.process.send_signal(signal.SIGCONT)
        until(lambda: group.named() != old.port, LONG)
        named = time.monotonic()
        load.await_answers(100, named + 1)
        assert group.master() is not old
        if not lag:
            old.start()
            until(lambda: old.ask('ROLE')[0] == b'slave', LONG)
            load.await_answers(100, time.monotonic())
    lost, runs = finish(place, load)
    gap = load.gap(killed)
    tell(f'sentinel, kill -9, min-replicas {replicas}, replicas stopped for {lag} s', load, gap, lost, runs)
    assert gap > 0.3, 'a master is given up when it was silent for a second, and others agree'
    assert gap < named - killed + 8, 'the new one is not found, though the sentinels name it'
    at = [load.acknowledged[task] for task in lost]
    if replicas:
        assert all(since - 0.5 < each < since + 2 for each in at), 'a master without replicas acknowledges nothing'
    else:
        assert all(since - 0.5 < each <= killed + 2 for each in at)
        assert lost or not lag, 'this is the loss that the docs tell of'
    assert place.tt('status').returncode == 0


@pytest.mark.parametrize('pause', [0, 10_000])  # ms; where all is slow a failover may take 5 s
def test_a_demoted_master_is_left_long_before_it_learns_of_that_itself(
    directory: Path, stack: ExitStack, pause: int
) -> None:
    group = stack.enter_context(Sentinels(directory / 'redis'))
    place = settle(stack, directory, url=group.url)
    with Load(began(place)) as load:
        old, asked = group.master(), time.monotonic()
        if pause:
            old.ask('CLIENT', 'PAUSE', pause, 'WRITE')
        group.sentinels[0].ask('SENTINEL', 'FAILOVER', 'main')
        until(lambda: group.named() != old.port, LONG)
        named = time.monotonic()
        load.await_answers(100, named + 2)
    lost, runs = finish(place, load)
    tell(f'SENTINEL FAILOVER, paused {pause} ms', load, load.gap(), lost, runs)
    at = [load.acknowledged[task] - asked for task in lost]
    print(f'lost were those of {max(at) - min(at):.2f} s' if at else '')
    assert all(-0.5 < each < named - asked + 4 for each in at), 'it believes for 8 s that it is the master'
    assert not (at and pause)


def test_what_the_docs_say_of_sentinels_works_as_written(directory: Path, stack: ExitStack) -> None:
    group = stack.enter_context(Sentinels(directory / 'redis'))
    place = settle(stack, directory)
    old = group.master()
    ports = {str(26379 + i): each.port for i, each in enumerate(group.sentinels)}
    follow(place, 'sentinel', {**ports, '6379': old.port})
    until(lambda: group.named() != old.port, LONG)
    assert place.do('town.get_status')['redis_url'] == group.url


@pytest.fixture
def cluster(directory: Path, stack: ExitStack) -> Cluster:
    made: Cluster = stack.enter_context(Cluster(directory / 'redis', SLOT))
    return made


def hand_over(master: Node, replica: Node) -> None:
    """Has a replica take over; once more, where the vote on it was not over in the five seconds that it has."""
    asked = 0.0

    def is_done() -> bool:
        nonlocal asked
        if time.monotonic() > asked + 7 and master.info('role') == 'master':
            replica.ask('CLUSTER', 'FAILOVER')
            asked = time.monotonic()
        return master.info('master_link_status') == 'up'

    until(is_done, LONG)


def test_a_cluster_s_master_hands_over_to_its_replica_and_nothing_is_lost(
    directory: Path, cluster: Cluster, stack: ExitStack
) -> None:
    place = settle(stack, directory, url=cluster.url)
    with Load(works(place)) as load:
        hand_over(cluster.home, cluster.replica)
        handed_over = time.monotonic()
        load.await_answers(100, handed_over)
        until(lambda: time.monotonic() > handed_over + 2.5)  # nobody votes for two servers within two node timeouts
        hand_over(cluster.replica, cluster.home)
        load.await_answers(100, time.monotonic())
    lost, runs = finish(place, load)
    tell('CLUSTER FAILOVER, twice', load, load.gap(), lost, runs)
    assert lost == []
    assert set(runs.values()) == {1}
    assert load.gap() < 8


def test_what_the_docs_say_of_a_cluster_works_as_written(directory: Path, cluster: Cluster, stack: ExitStack) -> None:
    place = settle(stack, directory)
    nodes = [*cluster.masters, cluster.replica]
    printed = follow(
        place, 'cluster', {str(7000 + i): node.port for i, node in enumerate(nodes)} | {'{town}': '{test}'}
    )
    assert f'{SLOT}\n' in printed
    until(lambda: cluster.home.info('role') == 'slave', LONG)
    assert place.do('town.get_status')['redis_url'] == cluster.url


def test_a_town_goes_on_with_the_replica_when_its_master_of_a_cluster_is_killed(
    directory: Path, cluster: Cluster, stack: ExitStack
) -> None:
    place = settle(stack, directory, url=cluster.url)
    with Load(works(place)) as load:
        killed = time.monotonic()
        cluster.home.kill()
        until(lambda: cluster.replica.info('role') == 'master', LONG)
        promoted = time.monotonic()
        load.await_answers(100, promoted + 1)
    lost, runs = finish(place, load)
    gap = load.gap(killed)
    tell('cluster, kill -9', load, gap, lost, runs)
    assert gap > 0.9, 'a master is not given up before it was silent for a second'
    assert gap < promoted - killed + 8, 'the new one is not found, though it is the master'
    assert all(killed - 0.5 < load.acknowledged[task] <= killed + 2 for task in lost)


def migrate(cluster: Cluster, source: Node, target: Node, batch: int = 100) -> float:
    """Moves the slot of the town, as `redis-cli --cluster reshard` does. Seconds."""
    began = time.monotonic()
    target.ask('CLUSTER', 'SETSLOT', SLOT, 'IMPORTING', cluster.id_of(source))
    source.ask('CLUSTER', 'SETSLOT', SLOT, 'MIGRATING', cluster.id_of(target))
    while keys := source.ask('CLUSTER', 'GETKEYSINSLOT', SLOT, batch):
        source.ask('MIGRATE', HOST, target.port, '', 0, 20_000, 'KEYS', *keys)
    for node in (target, source):
        node.ask('CLUSTER', 'SETSLOT', SLOT, 'NODE', cluster.id_of(target))
    return time.monotonic() - began


def test_a_town_stands_still_while_its_slot_moves_and_goes_on_where_it_is_then(
    directory: Path, cluster: Cluster, stack: ExitStack
) -> None:
    place = settle(stack, directory, url=cluster.url)
    target = next(node for node in cluster.masters if node is not cluster.home)
    with Load(works(place)) as load:
        took = migrate(cluster, cluster.home, target)
        load.await_answers(100, time.monotonic())
        migrate(cluster, target, cluster.home, batch=1)
        load.await_answers(100, time.monotonic())
    lost, runs = finish(place, load)
    tell(f'slot move ({took:.2f} s)', load, load.gap(), lost, runs)
    assert lost == []
    assert set(runs.values()) == {1}
    assert not [answer for answer in load.answers if 'unknown' in answer]
    assert json.loads(load.hall.get('/v1/status').body)['agent_count'] == 1
