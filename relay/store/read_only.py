"""Long work on the database file beside the daemon, which may run or not: in a thread, only reading."""

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_LOOK_EVERY = 10_000  # steps of SQLite's machine between two looks at whether to go on


class Stop(threading.Event):
    """Set when nobody waits for the work any more."""


def read_only(path: Path) -> str:
    """Return the address that opens a database for reading, leaving no file behind.

    Without a log everything stands in the file itself, and opening it as immutable spares SQLite the
    shared memory file, which would belong to whoever typed the command.

    Raises:
        sqlite3.OperationalError: it is a pipe, on which opening would wait for ever, or no file at all.
    """
    if path.exists() and not path.is_file():
        raise sqlite3.OperationalError(f"{path} is not a file")
    mode = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "mode=ro&immutable=1"
    return f"{path.absolute().as_uri()}?{mode}"


@contextmanager
def opened(path: Path, stop: Stop) -> Iterator[sqlite3.Connection]:
    """Open a database for reading; what it is asked fails once `stop` is set."""
    connection = sqlite3.connect(read_only(path), uri=True, isolation_level=None)
    try:
        connection.set_progress_handler(stop.is_set, _LOOK_EVERY)
        yield connection
    finally:
        connection.close()


async def apart(work: Callable[[Stop], T]) -> T:
    """Do something in a thread of its own; when the caller is cancelled, it is told to stop."""
    stop = Stop()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        with suppress(Exception):  # what was cut short failed, and nobody asks how
            await task
        raise
