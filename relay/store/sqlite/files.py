"""Compares the open files of the database with the files at their paths.

A deleted file stays open and accepts every write, but everything written to it is lost after a restart.
"""

import os
from pathlib import Path

from relay.store.sqlite.wal import MAGIC, log_of, open_plain

_DATABASE = b"SQLite format 3\0"
_HEAD = 100  # bytes
_GONE = (FileNotFoundError, NotADirectoryError)
_LARGEST_PAGE = 65_536  # bytes; SQLite writes it as 1


class Files:
    """Watches a database and its log between `open` and `close`.

    Call `close` after all connections are closed: closing any descriptor of a file releases all locks of the
    process on it, also those of SQLite.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._known: dict[Path, tuple[int, int]] = {}
        self._changes = 0  # SQLite's change counter, which only grows
        self._size = 0  # bytes of the database at the latest check

    def open(self) -> None:
        """Start watching, after the connections are open and the log exists.

        Raises:
            OSError: a file no longer exists.
        """
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self._known, self._size = {self.path: _identity(status)}, status.st_size
        log = log_of(self.path)
        self._known[log] = _identity(log.stat())

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def moved(self) -> str | None:
        """Return an error if a path no longer leads to the open file; None if both paths do."""
        for path, known in self._known.items():
            try:
                status = path.stat()
            except _GONE:
                return f"{path} was deleted or moved away while it was in use"
            except OSError:
                continue  # the path cannot be read, which does not prove that the file moved
            if _identity(status) != known:
                return f"{path} was replaced by another file while it was in use"
        return None

    def overwritten(self) -> str | None:
        """Return an error if another program overwrote the file, else None. Call it between transactions."""
        assert self._descriptor is not None  # noqa: S101 - between `open` and `close`
        try:
            head = os.pread(self._descriptor, _HEAD, 0)
        except OSError:
            return None  # SQLite reports a failing disk
        if head[:16] != _DATABASE:
            return f"{self.path} was overwritten or truncated while it was in use"
        changes = int.from_bytes(head[24:28], "big")
        if changes < self._changes:
            return f"{self.path} was overwritten by an older database while it was in use"
        self._changes = changes
        return self.shortened() or self._log_cut_off()

    def shortened(self) -> str | None:
        """Return an error if another program truncated the file, else None. Call it often, before any write.

        SQLite itself shortens the file after moving the whole log into it; its head then has the new length.
        """
        assert self._descriptor is not None  # noqa: S101 - between `open` and `close`
        size = os.fstat(self._descriptor).st_size
        known, self._size = self._size, size
        if size >= known:
            return None
        head = os.pread(self._descriptor, _HEAD, 0)
        page = int.from_bytes(head[16:18], "big")
        needed = int.from_bytes(head[28:32], "big") * (_LARGEST_PAGE if page == 1 else page)
        if len(head) == _HEAD and size >= needed:
            return None
        return f"{self.path} was truncated while it was in use"

    def _log_cut_off(self) -> str | None:
        """Return an error if the log lacks a valid head, because the next start would drop it; else None."""
        log = log_of(self.path)
        try:
            with open_plain(log) as file:  # SQLite has no locks on the log that closing it could release
                head = file.read(4)
        except OSError:
            return None  # it does not exist: `moved` reports that
        if head and int.from_bytes(head, "big") not in MAGIC:
            return f"{log} was overwritten or truncated while it was in use"
        return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
