"""What the documents show and a plain machine can't run: configurations of proxies, and of Prometheus."""

from __future__ import annotations

import json
import os
import pwd
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from http.client import HTTPSConnection
from pathlib import Path
from typing import Final

import pytest

from ..certificates import SERVER, Authority, Pair
from ..support import PATIENCE, REPOSITORY, Hall, Place, free_port
from . import proxies

NAME: Final = 'town.example'
AROUND: Final = """
daemon off;
{user}
worker_processes 1;
pid {directory}/pid;
error_log {directory}/log warn;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    {shown}
}}
"""


class Shown:
    """A configuration of the documents with the ports and paths of this machine in it."""

    def __init__(self, language: str, hall: Hall, pair: Pair) -> None:
        text = (REPOSITORY / 'docs' / 'security.md').read_text()
        [block] = re.findall(rf'^```{language}\n(.*?)^```', text, re.M | re.S)
        both = pair.cert.with_suffix('.both.pem')
        both.write_bytes(pair.cert.read_bytes() + pair.key.read_bytes())
        self.port = free_port()
        here = {
            '127.0.0.1:8787': f'127.0.0.1:{hall.port}',
            f'/etc/ssl/{NAME}.both.pem': str(both),
            f'/etc/ssl/{NAME}.pem': str(pair.cert),
            f'/etc/ssl/{NAME}.key': str(pair.key),
            'listen 443': f'listen 127.0.0.1:{self.port}',
            'bind :443': f'bind 127.0.0.1:{self.port}',
        }
        used = 0
        for there, mine in here.items():
            used += there in block
            block = block.replace(there, mine)
        assert used >= 3
        self.text = block


def nginx(directory: Path, shown: Shown) -> proxies.Proxy:
    user = f'user {pwd.getpwuid(0).pw_name};' if os.geteuid() == 0 else ''
    file, log = directory / 'nginx.conf', directory / 'log'
    file.write_text(AROUND.format(user=user, directory=directory, shown=shown.text))
    argv = [proxies.program('nginx'), '-p', str(directory), '-e', str(log), '-c', str(file)]
    return proxies.Proxy(argv, shown.port, log)


def haproxy(directory: Path, shown: Shown) -> proxies.Proxy:
    file = directory / 'haproxy.cfg'
    file.write_text(shown.text)
    return proxies.Proxy([proxies.program('haproxy'), '-db', '-f', str(file)], shown.port, directory / 'log')


class Client(HTTPSConnection):
    """A client that finds the proxy under the name of the documents."""

    def __init__(self, port: int, authority: Authority) -> None:
        super().__init__(NAME, port, timeout=PATIENCE)
        self._trust = authority.client()

    def connect(self) -> None:
        plain = socket.create_connection(('127.0.0.1', self.port), PATIENCE)
        self.sock = self._trust.wrap_socket(plain, server_hostname=NAME)


@pytest.fixture(params=[nginx, haproxy])
def front(
    request: pytest.FixtureRequest, place: Place, tmp_path: Path
) -> Iterator[tuple[Callable[[], Client], str, Place]]:
    """Clients of a proxy in front of a townhall that asks for keys, and a key."""
    authority = Authority(tmp_path)
    place.tt('config', 'townhall.allowed_hosts', NAME)
    key = json.loads(place.tt('generate-api-key', '--write', '--json').stdout)['key']
    shown = Shown(request.param.__name__, place.hall(), authority.sign(NAME, SERVER, alternative=NAME))
    proxy = request.param(tmp_path, shown)
    yield lambda: Client(proxy.port, authority), key, place
    proxy.close()


def test_the_proxies_of_the_documents_serve_over_tls_who_has_a_key(
    front: tuple[Callable[[], Client], str, Place],
) -> None:
    client, key, _ = front
    for headers, status in (({}, 401), ({'Authorization': f'Bearer {key}'}, 200)):
        connection = client()
        connection.request('GET', '/v1/town', headers=headers)
        answer = connection.getresponse()
        assert answer.status == status, answer.read()
        connection.close()


def test_prometheus_takes_the_configuration_of_the_documents(tmp_path: Path) -> None:
    text = (REPOSITORY / 'docs' / 'monitoring.md').read_text()
    [block] = re.findall(r'^```yaml\n(.*?)^```', text, re.M | re.S)
    (tmp_path / 'townhall.key').touch()
    (tmp_path / 'alerts.yml').write_text((REPOSITORY / 'deploy' / 'alerts.yml').read_text())
    (tmp_path / 'prometheus.yml').write_text(block.replace('/etc/prometheus/', f'{tmp_path}/'))
    argv = [proxies.program('promtool'), 'check', 'config', str(tmp_path / 'prometheus.yml')]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '1 rule files found' in done.stdout


def test_events_pass_the_proxies_of_the_documents_as_they_happen(
    front: tuple[Callable[[], Client], str, Place],
) -> None:
    client, key, place = front
    connection = client()
    headers = {'Authorization': f'Bearer {key}', 'Accept': 'text/event-stream'}
    connection.request('GET', '/v1/events?after=$', headers=headers)
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.readline() == b'retry: 1000\n'
    place.do('backlog.add', description='seen at once')
    while not (line := answer.readline()).startswith(b'data: '):
        assert line
    assert json.loads(line[6:])['type'] == 'task.created'
    connection.close()
