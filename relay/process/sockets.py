"""Listening sockets of the admin API: bind, listen, addresses."""

import os
import socket
from pathlib import Path

from relay.errors import RelayError

BACKLOG = 1024

ACCEPTS = 1
"""The backlog that asyncio gets, which is also the number of connections that it accepts in a row.

Without free file descriptors, asyncio logs a traceback and sets a timer for each of them: 1,024 a second.
"""

UNIX_PATH_LIMIT = 107  # bytes; Linux limits the path of a unix socket


def bind(listen: str, key: str) -> socket.socket:
    """Bind `host:port` without listening yet, so that the port is reserved and known.

    Raises:
        RelayError: the address is in use or not an address of this machine.
    """
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, int(port)))
    except OSError as error:
        sock.close()
        raise RelayError(
            f"cannot listen on {listen}: {error.strerror}", hint=f"change {key} in config.toml"
        ) from error
    sock.settimeout(0)
    return sock


def check_unix_path(path: Path) -> None:
    """Check the length of the path of a unix socket.

    Raises:
        RelayError: it is too long.
    """
    if (length := len(os.fsencode(path))) > UNIX_PATH_LIMIT:
        what = f"{path} is too long for a unix socket: {length} bytes, at most {UNIX_PATH_LIMIT}"
        raise RelayError(what, hint="set [admin] socket or state_dir in config.toml to a shorter path")


def bind_unix(path: Path) -> socket.socket:
    """Bind a unix socket with mode 0660. Replaces a stale one: the caller holds the state directory's lock.

    Raises:
        RelayError: the path is too long or cannot be written.
    """
    check_unix_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        before = os.umask(0o117)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        sock.close()
        raise RelayError(f"cannot listen on {path}: {error.strerror}", hint="check its folder") from error
    sock.settimeout(0)
    return sock


def address(sock: socket.socket) -> tuple[str, int]:
    """Return the (host, port) that a TCP socket is bound to."""
    name = sock.getsockname()
    return str(name[0]), int(name[1])


def url(sock: socket.socket) -> str:
    """Return the http URL of a bound TCP socket."""
    host, port = address(sock)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
