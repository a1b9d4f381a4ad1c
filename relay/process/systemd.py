"""The protocol between a service and systemd: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

Own code, because the protocol is one datagram and three environment variables. Does nothing without systemd.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping

from relay.errors import RelayError

log = logging.getLogger("relay.systemd")

FIRST_FD = 3  # SD_LISTEN_FDS_START
_SEND_TIMEOUT = 0.25  # seconds that a datagram may wait for room in the manager's queue


SOCKET_UNITS = {"public": "relay.socket", "admin": "relay-admin.socket"}
"""The units of the listeners, by the name of the socket."""

SOCKET_ADVICE = {
    name: f"change ListenStream= with `systemctl edit {unit}`, then run"
    f" `systemctl stop {unit} relay.service && systemctl start {unit} relay.service`"
    for name, unit in SOCKET_UNITS.items()
}
"""How to change an address, by the name of the socket.

systemd does not start a socket unit while its service runs.
"""


class Notifier:
    """Sends the daemon's state to the service manager; does nothing without `$NOTIFY_SOCKET`."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{name[1:]}" if name.startswith("@") else name
        self.watchdog = _watchdog(environment)
        """Longest permitted time between two calls of `alive`, in seconds; None: no watchdog."""

    def ready(self, status: str) -> None:
        """Report that the start-up or a reload is complete."""
        self._send("READY=1", _status(status))

    def reloading(self) -> None:
        """Report the start of a reload; `ready` reports its end."""
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}", "STATUS=reloading")

    def stopping(self, status: str) -> None:
        """Report the start of the shutdown."""
        self._send("STOPPING=1", _status(status))

    def status(self, status: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._send(_status(status))

    def alive(self) -> None:
        """Send a keep-alive to the watchdog."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Request this much time, from now, before a start, reload or stop counts as hung."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.settimeout(_SEND_TIMEOUT)
                sock.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning("cannot notify systemd of %s: %s", lines[0], error)


class Inherited:
    """The listening sockets that `.socket` units opened for this process, by `FileDescriptorName`."""

    def __init__(self, environment: Mapping[str, str] = os.environ, first: int = FIRST_FD) -> None:
        self._sockets: dict[str, socket.socket] = {}
        count = sockets_given(environment)
        names = environment.get("LISTEN_FDNAMES", "").split(":")
        for index in range(count):
            name = names[index] if index < len(names) else ""
            os.set_inheritable(first + index, False)  # noqa: FBT003 - the function's name explains the value
            if name in self._sockets:
                self.close()
                raise RelayError(
                    f"two sockets are called {name!r}",
                    hint="set FileDescriptorName=public or =admin once each in the .socket units",
                )
            self._sockets[name] = socket.socket(fileno=first + index)

    @property
    def names(self) -> set[str]:
        """Names of the sockets that have not been taken yet."""
        return set(self._sockets)

    def take(self, name: str) -> socket.socket | None:
        """Return the TCP socket with a name; None: systemd did not open it, so the daemon must bind.

        Raises:
            RelayError: the socket is not a listening TCP socket.
        """
        sock = self._sockets.pop(name, None)
        if sock is None:
            return None
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or not listening:
            sock.close()
            raise RelayError(
                f"the socket {name!r} from systemd is not a listening TCP socket",
                hint="write ListenStream=host:port and Accept=no in its .socket unit",
            )
        sock.settimeout(0)
        return sock

    def lend(self) -> dict[str, socket.socket]:
        """Return duplicates of all sockets, by name; the sockets themselves stay open for a later start."""
        lent = {}
        while self._sockets:
            name, sock = self._sockets.popitem()
            lent[name] = sock.dup()
            lent[name].settimeout(0)
            sock.detach()
        return lent

    def close(self) -> None:
        """Close the sockets that were not taken."""
        while self._sockets:
            self._sockets.popitem()[1].close()


def is_same_address(one: str, other: str) -> bool:
    """Return whether two addresses, each `host:port` or a port, mean the same; all wildcards are alike.

    >>> is_same_address("127.0.0.1:80", "localhost:80"), is_same_address("0.0.0.0:80", "80")
    (True, True)
    >>> is_same_address("127.0.0.1:80", "0.0.0.0:80"), is_same_address("[::1]:80", "[::1]:81")
    (False, False)
    """
    (host, _, port), (other_host, _, other_port) = one.rpartition(":"), other.rpartition(":")
    return port == other_port and _SAME.get(host, host) == _SAME.get(other_host, other_host)


_SAME = {"": "*", "0.0.0.0": "*", "[::]": "*", "localhost": "127.0.0.1"}  # noqa: S104 - compared, not bound


def sockets_given(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of sockets that systemd opened for this process, not for its parent."""
    count = environment.get("LISTEN_FDS", "")
    return int(count) if environment.get("LISTEN_PID") == str(os.getpid()) and count.isdecimal() else 0


def _watchdog(environment: Mapping[str, str]) -> float | None:
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    micros = environment.get("WATCHDOG_USEC", "")
    return int(micros) / 1_000_000 if micros.isdigit() and int(micros) else None


def _status(text: str) -> str:
    return "STATUS=" + text.replace("\n", " ")
