"""The native protocol of systemd-journald (systemd.io/JOURNAL_NATIVE_PROTOCOL): entries with fields.

Own code, because the protocol is one datagram per entry. `journalctl DESTINATION=crm` finds such entries.
"""

import array
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import TextIO

SOCKET = "/run/systemd/journal/socket"

_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}", re.ASCII)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_TOO_LARGE = (errno.EMSGSIZE, errno.ENOBUFS)


def is_behind(stream: TextIO) -> bool:
    """Return whether systemd connected a stream of this process to the journal (systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def encode(fields: Mapping[str, str]) -> bytes:
    r"""Return an entry. Names that the journal does not permit are left out.

    >>> encode({"MESSAGE": "hello", "EVENT_ID": "evt_1", "_PID": "1"})
    b'MESSAGE=hello\nEVENT_ID=evt_1\n'
    >>> encode({"MESSAGE": "a\nb"})
    b'MESSAGE\n\x03\x00\x00\x00\x00\x00\x00\x00a\nb\n'
    """
    return b"".join(_encoded(fields))


def _encoded(fields: Mapping[str, str]) -> Iterator[bytes]:
    for name, text in fields.items():
        if not _NAME.fullmatch(name):
            continue
        value = text.encode(errors="backslashreplace")
        if b"\n" in value:
            yield name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
        else:
            yield name.encode() + b"=" + value + b"\n"


class Journal:
    """Sends entries to journald. Its address is looked up for each entry, so journald may restart."""

    def __init__(self, path: str | None = None) -> None:
        """Check that journald listens.

        Raises:
            OSError: it does not, or this process may not connect.
        """
        self._path = path or SOCKET
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as attempt:
            attempt.connect(self._path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send(self, entry: bytes, *, wait: bool = False) -> None:
        """Send an entry; `wait` for room in journald's queue.

        Raises:
            BlockingIOError: there is no room, and `wait` is False.
            OSError: journald does not listen.
        """
        flags = 0 if wait else socket.MSG_DONTWAIT
        try:
            self._socket.sendto(entry, flags, self._path)
        except OSError as error:
            if error.errno not in _TOO_LARGE:
                raise
            self._send_in_memory(entry, flags)

    def _send_in_memory(self, entry: bytes, flags: int) -> None:
        """Send an entry that is too large for a datagram, as a sealed file in memory."""
        file = os.memfd_create("relay-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            rest = memoryview(entry)
            while rest:
                rest = rest[os.write(file, rest) :]
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file]))
            self._socket.sendmsg([], [rights], flags, self._path)
        finally:
            os.close(file)
