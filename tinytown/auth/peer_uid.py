"""Whose process is at the other end of a socket on this machine."""

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
    """The user whose process has connected `sock`; None if that can't be said.

    Asks the kernel for the one socket that is the other end (sock_diag(7)). One that its process has closed already is
    nobody's: the kernel may show root as its owner.
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
    its, its_port = _address(sock.getpeername())
    ours, our_port = _address(sock.getsockname())
    family = socket.AF_INET if len(its) == 4 else socket.AF_INET6
    wanted = _ID.pack(its_port, our_port, its, ours, 0, _ANY_COOKIE)
    answer = _exchange(_REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + wanted)
    return _owner(answer, wanted)


_kernels = threading.local()  # a socket to the kernel for each thread of each process


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
        _kernels.__dict__.clear()  # or a late answer would be taken for that of the next question
        kernel.close()
        raise


def _address(found: tuple[str, int]) -> tuple[bytes, int]:
    """An address as the kernel has it, and the port. One of IPv4 in the form of IPv6 is one of IPv4."""
    host = found[0].partition('%')[0]
    if ':' not in host:
        return socket.inet_pton(socket.AF_INET, host), found[1]
    packed = socket.inet_pton(socket.AF_INET6, host)
    return packed[12:] if packed.startswith(_MAPPED) else packed, found[1]


def _owner(answer: bytes, wanted: bytes) -> int | None:
    """The owner in an answer, if that is of the very socket: it may be of a listener on the same port."""
    _, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY:
        return None  # an error: there is no such socket any more
    at = _HEADER.size
    _, state, *_ = _ANSWER.unpack_from(answer, at)
    at += _ANSWER.size
    ends = 2 + 2 + 16 + 16  # of both sides, port and address
    if state == _LISTEN or answer[at : at + ends] != wanted[:ends]:
        return None
    *_, uid, inode = _REST.unpack_from(answer, at + _ID.size)
    return uid if inode else None


def own_uids() -> frozenset[int]:
    """The users who may do here whatever this process may: its own, and root."""
    return frozenset({os.geteuid(), 0})
