"""Finds the user whose process is at the other end of a local socket, for auth mode none (`access`)."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST: Final = 1
_MAPPED: Final = b'\0' * 10 + b'\xff\xff'
_ANY_COOKIE: Final = b'\xff' * 8
_LISTEN: Final = 10
_TIMEOUT: Final = 0.1  # seconds; the kernel answers in microseconds

_HEADER: Final = struct.Struct('=IHHII')  # nlmsghdr: length, type, flags, sequence, port
_REQUEST: Final = struct.Struct('=BBBBI')  # inet_diag_req_v2: family, protocol, extensions, padding, states
_ID: Final = struct.Struct('!HH16s16sI8s')  # inet_diag_sockid: ports, addresses, interface, cookie
_ANSWER: Final = struct.Struct('=BBBB')  # inet_diag_msg: family, state, timer, retransmissions; then the id
_REST: Final = struct.Struct('=IIIII')  # expires, queues, uid, inode

CAN_TELL: Final = sys.platform == 'linux'


def uid_of(sock: socket.socket) -> int | None:
    """The id of the user whose process connected `sock`; None if it is unknown.

    Asks the kernel for the socket at the other end (sock_diag(7)). If the process has already closed that socket, the
    answer is None, because the kernel may then name root as its owner.
    """
    try:
        if sock.family == socket.AF_UNIX:
            return _credentials(sock)
        return _ask(sock) if CAN_TELL else None
    except (OSError, ValueError, struct.error):
        return None


def _credentials(sock: socket.socket) -> int | None:
    if not hasattr(socket, 'SO_PEERCRED'):
        return None
    _, uid, _ = struct.unpack('3i', sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _ask(sock: socket.socket) -> int | None:
    peer, peer_port = _address(sock.getpeername())
    ours, our_port = _address(sock.getsockname())
    family = socket.AF_INET if len(peer) == 4 else socket.AF_INET6
    wanted = _ID.pack(peer_port, our_port, peer, ours, 0, _ANY_COOKIE)
    answer = _exchange(_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + wanted)
    return _owner(answer, wanted)


_kernels = threading.local()  # one netlink socket for each thread of each process


def _exchange(body: bytes) -> bytes:
    kernel: socket.socket | None = getattr(_kernels, str(os.getpid()), None)
    if kernel is None:
        kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
        kernel.settimeout(_TIMEOUT)
        _kernels.__dict__.clear()
        setattr(_kernels, str(os.getpid()), kernel)
    try:
        kernel.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
        return kernel.recv(8192)
    except OSError:
        _kernels.__dict__.clear()  # or a late answer would be read as the answer to the next request
        kernel.close()
        raise


def _address(address: tuple[str, int]) -> tuple[bytes, int]:
    """(packed address, port) as the kernel stores them. An IPv4-mapped IPv6 address becomes IPv4."""
    host = address[0].partition('%')[0]
    if ':' not in host:
        return socket.inet_pton(socket.AF_INET, host), address[1]
    packed = socket.inet_pton(socket.AF_INET6, host)
    return packed[12:] if packed.startswith(_MAPPED) else packed, address[1]


def _owner(answer: bytes, wanted: bytes) -> int | None:
    """The user id in an answer. None if the answer describes another socket, such as a listener on the same port."""
    _, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY:
        return None  # an error: the socket no longer exists
    at = _HEADER.size
    _, state, *_ = _ANSWER.unpack_from(answer, at)
    at += _ANSWER.size
    ends = 2 + 2 + 16 + 16  # bytes of both ports and both addresses
    if state == _LISTEN or answer[at : at + ends] != wanted[:ends]:
        return None
    *_, uid, inode = _REST.unpack_from(answer, at + _ID.size)
    return uid if inode else None  # inode 0: its process has closed it


def own_uids() -> frozenset[int]:
    """The users that have this process's powers anyway: its own user and root."""
    return frozenset({os.geteuid(), 0})
