"""Relays that are broken on a full disk, each in one way that the first argument names."""

import sys
from collections.abc import Callable

from relay.cli import main
from relay.errors import StorageError, StorageUnavailableError
from relay.store.sqlite.disk import Disk
from relay.store.sqlite.store import SqliteStore


def gives_up() -> None:
    """Treat a disk that is full at the start as a permanent fault."""
    open_ = SqliteStore.open

    async def open_once(self: SqliteStore) -> None:
        try:
            await open_(self)
        except StorageUnavailableError as error:
            raise StorageError(error.message) from None

    SqliteStore.open = open_once  # type: ignore[method-assign]


def stays_full() -> None:
    """Report the lowest free space ever measured, even if the disk has more."""
    free, least = Disk.free, [sys.maxsize]

    def least_ever(self: Disk) -> int:
        least[0] = min(least[0], free(self))
        return least[0]

    Disk.free = least_ever  # type: ignore[method-assign]


def no_floor() -> None:
    """Check the free space only once a second, and not before a write."""
    Disk.admits = lambda _self, _size, _promised: True  # type: ignore[method-assign]


BROKEN: dict[str, Callable[[], None]] = {"gives-up": gives_up, "stays-full": stays_full, "no-floor": no_floor}

if __name__ == "__main__":
    BROKEN[sys.argv.pop(1)]()
    main()
