"""nginx and HAProxy in front of townhalls: each started by the test, as any user, in a directory of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template

from ..support import PATIENCE, Hall, Service, free_port

NGINX = Template("""
daemon off;
$user
worker_processes 1;
pid $directory/pid;
error_log $directory/log warn;
events { worker_connections 1024; }
http {
    access_log off;
    client_body_temp_path $directory/body;
    proxy_temp_path $directory/proxy;
    fastcgi_temp_path $directory/fastcgi;
    uwsgi_temp_path $directory/uwsgi;
    scgi_temp_path $directory/scgi;
    upstream halls {
        $servers
        keepalive 32;
    }
    server {
        listen 127.0.0.1:$port backlog=1024;
        client_max_body_size 0;
        client_header_timeout 2s;
        client_body_timeout 2s;
        keepalive_timeout 60s;
        location / {
            proxy_pass http://halls;
            proxy_http_version 1.1;
            proxy_request_buffering $buffering;
            proxy_set_header Connection "";
            proxy_set_header Host $$http_host;
        }
    }
}
""")

HAPROXY = Template("""
global
    maxconn 2000
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout http-request 2s
    timeout http-keep-alive 60s
    timeout server 30s
    timeout queue 30s
    retries 0
    option http-keep-alive
    http-reuse always
frontend clients
    bind 127.0.0.1:$port
    default_backend halls
backend halls
    $servers
""")


class Proxy(Service):
    """A proxy that passes requests on to townhalls over connections that it keeps."""

    def __init__(self, argv: Sequence[str], port: int, log: Path) -> None:
        self.address, self.port = '127.0.0.1', port
        self._log = log
        with log.open('ab') as output:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        deadline = time.monotonic() + PATIENCE
        while not self._is_open():
            assert self.process.poll() is None, f'{argv[0]} ended: {log.read_text()}'
            assert time.monotonic() < deadline, f'{argv[0]} does not listen: {log.read_text()}'

    def _is_open(self) -> bool:
        try:
            self.connect().close()
        except ConnectionRefusedError:
            return False
        return True

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def nginx(directory: Path, *halls: Hall, streams: bool = False) -> Proxy:
    """An nginx. With `streams` it passes a body on as it comes, otherwise once it has all of it."""
    port = free_port()
    servers = '\n'.join(f'server 127.0.0.1:{hall.port} max_fails=0;' for hall in halls)
    named = {'directory': directory, 'port': port, 'servers': servers, 'buffering': 'off' if streams else 'on'}
    user = (
        f'user {pwd.getpwuid(0).pw_name};' if os.geteuid() == 0 else ''
    )  # else it changes to one that can't read here
    configuration = directory / 'nginx.conf'
    configuration.write_text(NGINX.substitute(named, user=user))
    log = directory / 'log'
    return Proxy([program('nginx'), '-p', str(directory), '-e', str(log), '-c', str(configuration)], port, log)


def haproxy(directory: Path, *halls: Hall, most: int = 1) -> Proxy:
    """A HAProxy. All its clients share `most` connections to each townhall."""
    port = free_port()
    lines = [f'server hall{hall.port} 127.0.0.1:{hall.port} maxconn {most}' for hall in halls]
    configuration = directory / 'haproxy.cfg'
    configuration.write_text(HAPROXY.substitute(port=port, servers='\n    '.join(lines)))
    return Proxy([program('haproxy'), '-db', '-f', str(configuration)], port, directory / 'log')


def upstream(hall: Hall) -> set[str]:
    """The connections that a townhall on this machine has, by the client's address."""
    rows = [line.split() for line in Path('/proc/net/tcp').read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[2].endswith(f':{hall.port:04X}') and row[3] == '01'}


def program(name: str) -> str:
    found = shutil.which(name, path=f'{os.environ.get("PATH", "")}:/usr/sbin:/usr/local/sbin')
    assert found, f'{name} is not installed, and make test-system is about it: apt-get install {name}'
    return found
