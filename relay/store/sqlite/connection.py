"""Opens SQLite safely: one connection writes, all others only read.

SQLite 3.7.0 to 3.51.2 can corrupt a WAL database when two connections write or checkpoint (the WAL-reset
bug; fixed as well in 3.44.6 and 3.50.7). Therefore only the writer writes and checkpoints.
"""

import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiosqlite

from relay.base.units import render_size
from relay.errors import StorageError, StorageUnavailableError
from relay.store.sqlite.backup import sync
from relay.store.sqlite.schema import MIGRATIONS
from relay.store.sqlite.transaction import WriterConnection
from relay.store.sqlite.wal import open_plain

OLDEST = (3, 37, 0)
"""The oldest SQLite with STRICT tables; it also has RETURNING and UPDATE … FROM."""


OURS_SQL = """
    SELECT count(*) = 0 OR max(name IN ('meta', 'events', 'deliveries'))
      FROM sqlite_master WHERE type = 'table'
"""
"""Returns whether a database has the relay's tables or no tables yet."""

TEMPORARY = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EROFS}
"""System errors that may end by themselves: the start waits and retries."""

HEAD, VERSION_AT = 100, 60  # bytes of a file's header, and the position of the user version in it

LOCK_TIMEOUT = 1.0  # seconds that opening waits for another program's lock


def check_library() -> None:
    """Check that the linked SQLite is new enough.

    Raises:
        StorageError: the linked library is too old.
    """
    if sqlite3.sqlite_version_info < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise StorageError(
            f"this Python has SQLite {sqlite3.sqlite_version}, the relay needs {wanted} or newer",
            hint="use a Python that was built with a newer SQLite",
        )


def has_wal_reset_bug() -> bool:
    """Return whether the linked SQLite has the bug that makes a second writer dangerous."""
    version = sqlite3.sqlite_version_info
    fixed = ((3, 44, 6) <= version < (3, 45, 0)) or ((3, 50, 7) <= version < (3, 51, 0))
    return version < (3, 51, 3) and not fixed


async def open_writer(path: Path, *, full: bool) -> WriterConnection:
    """Open the writing connection; creates the file with mode 0600.

    Raises:
        StorageError: the file cannot be opened or is not a database.
    """
    _create(path)
    open_file = partial(
        sqlite3.connect, path, isolation_level=None, cached_statements=512, timeout=LOCK_TIMEOUT
    )
    connection = WriterConnection(open_file, iter_chunk_size=64)
    await connection
    try:
        fresh = await _scalar(connection, "PRAGMA page_count") == 0
        await _check_owner(connection, path)
        pragmas = (
            *(("auto_vacuum = INCREMENTAL",) if fresh else ()),
            "journal_mode = WAL",
            f"synchronous = {'FULL' if full else 'NORMAL'}",
            "busy_timeout = 5000",
            "foreign_keys = ON",
            "journal_size_limit = 67108864",
            "cell_size_check = ON",
            "trusted_schema = OFF",
            "secure_delete = ON",  # overwrites deleted data; the default depends on the build of SQLite
            "temp_store = MEMORY",
            "mmap_size = 0",
            "cache_size = -65536",
        )
        await connection.run([(f"PRAGMA {pragma}", ()) for pragma in pragmas])
    except BaseException:
        await connection.close()
        raise
    return connection


def _create(path: Path) -> None:
    """Create an empty file of mode 0600 if it is missing.

    Raises:
        StorageError: it cannot be created or written.
        StorageUnavailableError: there is no room for it at the moment.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except IsADirectoryError:
        raise StorageError(
            f"{path} is a directory", hint="move it away, or name another file in [storage] url"
        ) from None
    except OSError as error:
        if error.errno in TEMPORARY:
            raise StorageUnavailableError(f"{path}: {error.strerror}") from error
        hint = "create its folder, and let the relay's user write the file"
        raise StorageError(f"{path} cannot be opened: {error.strerror}", hint=hint) from error
    if not path.is_file():
        hint = "move it away, or name another file in [storage] url"
        raise StorageError(f"{path} is not a file", hint=hint)


def check_companions(database: Path) -> None:
    """Check that SQLite can create its files beside a database.

    Raises:
        StorageError: a directory, a pipe or another special file has the name of such a file.
    """
    for suffix in ("-wal", "-shm", "-journal"):
        path = Path(f"{os.path.realpath(database)}{suffix}")
        if path.exists() and not path.is_file():
            raise StorageError(f"{path} is not a file", hint="move it away: SQLite uses this name for a file")


async def _check_owner(connection: aiosqlite.Connection, path: Path) -> None:
    if not await _scalar(connection, OURS_SQL):
        raise StorageError(
            f"{path} is a database of another program: it has tables, but not the relay's",
            hint="move it away, or name another file in [storage] url",
        )


NoteError = Callable[[Exception], object]
"""Called with every error while reading, in the connection's thread."""


class _Reader(sqlite3.Connection):
    """Reports errors, because damage found by a reader must stop the writer as well."""

    note_error: NoteError

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        cursor = self.cursor(_Cursor)
        cursor.note_error = self.note_error
        return cursor.execute(sql, parameters)


class _Cursor(sqlite3.Cursor):
    note_error: NoteError

    def execute(self, sql: str, parameters: Any = (), /) -> "_Cursor":
        with self._noting_errors():
            super().execute(sql, parameters)
        return self

    def fetchall(self) -> list[Any]:
        with self._noting_errors():
            return super().fetchall()

    def fetchone(self) -> Any:
        with self._noting_errors():
            return super().fetchone()

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self.note_error(error)
            raise


async def open_reader(path: Path, note_error: NoteError = lambda _error: None) -> aiosqlite.Connection:
    """Open a connection that only reads and never checkpoints; `note_error` is called with its errors."""

    def make(*args: Any, **options: Any) -> _Reader:
        reader = _Reader(*args, **options)
        reader.note_error = note_error
        return reader

    connection = await aiosqlite.connect(
        f"{path.absolute().as_uri()}?mode=ro",  # noqa: ASYNC240 - once, before the daemon serves
        uri=True,
        isolation_level=None,
        factory=make,
    )
    # The last one opens the log as well, before it can vanish.
    await connection.executescript(
        "PRAGMA busy_timeout = 5000; PRAGMA query_only = ON; PRAGMA schema_version;"
    )
    return connection


async def migrate(connection: aiosqlite.Connection, path: Path) -> None:
    """Migrate the tables, after making a backup copy of existing data.

    Raises:
        StorageError: the file has a newer version than this program knows.
    """
    version = await _scalar(connection, "PRAGMA user_version")
    newest = len(MIGRATIONS)
    if version > newest:
        raise StorageError(
            f"{path} has schema version {version}, this program knows {newest}",
            hint="run the newer hookferry that wrote it, or restore the copy made before the upgrade",
        )
    copy = path.with_name(f"{path.name}.before-v{newest}")
    # After an interrupted migration, the previous program can still use the first copy, but not this file.
    if 0 < version < newest and not 0 < _version_in(copy) < version:
        await _keep_copy(connection, path, copy)
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        await connection.executescript(f"BEGIN IMMEDIATE;{script}PRAGMA user_version = {number};COMMIT;")


def _version_in(path: Path) -> int:
    """Return the schema version in the header of a database file; 0 if there is no such file."""
    try:
        with open_plain(path) as file:
            return int.from_bytes(file.read(HEAD)[VERSION_AT : VERSION_AT + 4], "big")
    except OSError:
        return 0


async def _keep_copy(connection: aiosqlite.Connection, path: Path, copy: Path) -> None:
    """Copy the database to a file of mode 0600.

    Raises:
        StorageUnavailableError: there is no room for it at the moment.
    """
    needed = await _scalar(connection, "PRAGMA page_count") * await _scalar(connection, "PRAGMA page_size")
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise StorageUnavailableError(
            f"the copy before the migration needs {render_size(needed)},"
            f" {path.parent} has {render_size(free)} free",
            hint="free disk space; the relay then continues automatically",
        )
    part = copy.with_name(f"{copy.name}.part")
    part.unlink(missing_ok=True)  # left by an interrupted start
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    try:
        await connection.execute("VACUUM INTO ?", (str(part),))
        sync(part)
        part.replace(copy)
        sync(copy.parent)
    finally:
        part.unlink(missing_ok=True)


async def quick_check(connection: aiosqlite.Connection, path: Path) -> None:
    """Check the file for damage after an unclean stop.

    Raises:
        StorageError: SQLite found damage; the file is not changed.
    """
    rows = [*await connection.execute_fetchall("PRAGMA quick_check(1)")]
    if not rows or rows[0][0] != "ok":
        raise damaged(path, rows[0][0] if rows else "the check returned no result")


async def _scalar(connection: aiosqlite.Connection, sql: str) -> int:
    [(value,)] = await connection.execute_fetchall(sql)
    return int(value)


def unreadable(path: Path, error: sqlite3.Error) -> StorageError:
    """Return the error for a database that cannot be used: it is damaged, or its disk fails."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}:
        return damaged(path, str(error))
    return StorageUnavailableError(f"{path}: {error}", hint="check the disk, then start the relay again")


def damaged(path: Path, what: str) -> StorageError:
    """Return the error for a damaged file, with the next steps."""
    return StorageError(
        f"{path} is damaged: {what}",
        hint=(
            f"keep it (cp {path} {path}.damaged), then restore a backup or salvage with: "
            f"sqlite3 {path}.damaged .recover | sqlite3 {path}"
        ),
    )
