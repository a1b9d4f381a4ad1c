"""Operators: the senders of requests to the admin API, and how their names are proved."""

import os
import pwd
import socket
import struct
from functools import lru_cache
from typing import Literal

import msgspec
from aiohttp import web

from relay.config.schema import Scope

NAME_HEADER = "X-Relay-Operator"
"""The user behind `sudo`, from the `relay` command. Only root and the relay's own user may send it."""

_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED, unix(7): pid, uid, gid
_NOBODY = 65_534
"""The kernel's number for users of another user namespace; see user_namespaces(7)."""

LONGEST_NAME = 128


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """The sender of a request."""

    name: str
    scope: Scope
    access: Literal["socket", "token", "login", "proxy", "none"]  # how the name is proved
    label: str  # for the log
    remote: str = ""  # address of the client; "" on the socket

    def __str__(self) -> str:
        """Return the operator for the log."""
        return f"{self.label}, {self.remote}" if self.remote else self.label


OPERATOR = web.RequestKey("operator", Operator)
"""Of a request whose operator is known."""

SUSPECT = web.RequestKey("suspect", Operator)
"""The unknown sender of a refused request that the audit trail records."""


class Peer(msgspec.Struct, frozen=True):
    """The process at the other end of a unix socket, from the kernel."""

    pid: int
    uid: int

    @property
    def user(self) -> str:
        """The name of its user; "uid 1000" if this machine has no name for it."""
        return _user(self.uid)


def peer_of(request: web.Request) -> Peer | None:
    """Return the process that sent a request; None on TCP."""
    sock = None if request.transport is None else request.transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return Peer(pid, uid)


def operator_at_socket(request: web.Request, peer: Peer) -> Operator:
    """Return the operator who sent a request over the unix socket: the user of the process.

    Root, this process's own user and users that the kernel cannot name may give the name of a person.
    """
    name, given = peer.user, request.headers.get(NAME_HEADER, "")
    user = name if name == f"uid {peer.uid}" else f"{name} (uid {peer.uid})"
    if peer.uid in (0, os.geteuid(), _NOBODY) and is_name(given) and given != name:
        name, user = f"{given} (as {name})", f"{given} as {user}"
    return Operator(name=name, scope="admin", access="socket", label=f"{user}, pid {peer.pid}")


def is_name(text: str) -> bool:
    """Return whether a header's value can be the name of an operator."""
    return 0 < len(text) <= LONGEST_NAME and text.isprintable() and text == text.strip()


@lru_cache
def _user(uid: int) -> str:
    try:
        return f"uid {uid}" if uid == _NOBODY else pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
