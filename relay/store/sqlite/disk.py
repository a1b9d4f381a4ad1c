"""The database's disk: its free space, the floor that senders must leave free, and a reserve.

On a full disk even a deletion fails, because it first makes the log longer. So a ballast file is kept beside
the database. When the disk is full, the file is deleted: delivery outcomes and retention use its space, and
senders are refused until it can be written again.
"""

import os
from contextlib import suppress
from pathlib import Path

LEAST_BALLAST = 64 * 2**10
"""Bytes of the smallest ballast file; a disk without room for it gets none."""

FULL = 2**20
"""Bytes: with more of them free, a disk is not full, whatever SQLite reports."""

COPIES = 2
"""Each byte is written twice: to the log, and from there to the file."""

OVERHEAD = 16 * 2**10
"""Bytes that a request needs in addition to its body: rows, indexes and partly filled pages."""

NEAR = 32 * 2**20
"""With fewer bytes than this above the floor, the log is moved into the file after each transaction.

The log then starts again at its beginning, and the free space is exact.
"""


class Disk:
    """Decides how much senders may write. `ballast` is the size of the reserve in bytes; 0: no reserve."""

    copies, overhead = COPIES, OVERHEAD

    def __init__(self, database: Path, *, floor: int = 0, ballast: int = 0) -> None:
        self.floor = floor  # bytes that senders leave free
        self.released = 0  # bytes of the deleted ballast file, until it is written again
        self.is_near_floor = False  # whether less than `NEAR` was left at the latest measurement
        self.ballast = database.with_name(f"{database.name}.ballast")
        self._folder = database.parent
        self._handle: int | None = None  # descriptor of the folder
        self._size = ballast
        self.room: float = 0  # bytes that may be reserved before the next measurement
        self.lacking = 0  # bytes that the latest refused request needs, until they fit

    def free(self) -> int:
        """Return the free bytes for this user, also after the folder was moved."""
        status = os.statvfs(self._folder if self._handle is None else self._handle)
        return status.f_bavail * status.f_frsize

    def measure(self, promised: int = 0) -> int:
        """Read the free space and return it; `promised` bytes are reserved and not written yet."""
        free = self.free()
        self.room = free - self.floor - COPIES * promised
        self.is_near_floor = self.room < NEAR
        if self.lacking <= self.room:
            self.lacking = 0
        return free

    @property
    def scarce(self) -> bool:
        """Whether all requests or only large ones are refused; reads the free space."""
        return self.measure() < self.floor or self.released > 0 or self.lacking > 0

    def admits(self, size: int, promised: int) -> bool:
        """Return whether a request of `size` bytes leaves the floor free; if so, reserve its space."""
        if self.released:
            return False
        needed = COPIES * size + OVERHEAD
        if needed > self.room:
            self.measure(promised)
            if needed > self.room:
                self.lacking = needed
                return False
        self.room -= needed
        return True

    def prepare(self) -> None:
        """Write the ballast file if it is missing and there is room; blocks for several milliseconds."""
        with suppress(OSError):  # without the file, only retention on a full disk gets harder
            if self._handle is None:
                self._handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if self._size and (not self.ballast.exists() or self.ballast.stat().st_size < LEAST_BALLAST):
                self._write(min(self._size, (self.free() - self.floor) // 4))

    def close(self) -> None:
        """Close the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def release_reserve(self, enough: int = FULL) -> bool:
        """Delete the ballast file if fewer than `enough` bytes are free; returns whether that freed space."""
        if self.free() >= enough:
            return False
        try:
            size = self.ballast.stat().st_size
            self.ballast.unlink()
        except OSError:
            return False
        self.released = max(size, 1)
        return True

    def restore_reserve(self) -> None:
        """Write the ballast file again once there is room for twice its size; blocks for a moment."""
        if self.released and self.free() >= 2 * self.released:
            with suppress(OSError):
                self._write(self.released)
                self.released = 0

    def _write(self, size: int) -> None:
        """Write random bytes, because no file system can compress them; removes the file on failure."""
        if size < LEAST_BALLAST and not self.released:
            return
        handle = os.open(self.ballast, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(os.urandom(size))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self.ballast.unlink(missing_ok=True)
            raise
