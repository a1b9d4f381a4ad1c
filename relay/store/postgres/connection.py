"""Connections to PostgreSQL: one writes, up to three read; every call has a timeout.

No session state is needed, so a pooler in transaction mode works: settings and locks belong to a transaction.
`?pooler=true` in the URL declares one; then no statement is prepared under a name, because the next
transaction may run in another session.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Never, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg
import msgspec

from relay.errors import RelayError, StorageError, StorageUnavailableError
from relay.store.writer import Writer

CONNECT_TIMEOUT = 10.0  # seconds, for all hosts of the URL together
CALL_TIMEOUT = 30.0  # seconds of one statement; a silent network would stop the relay for ever
READERS = 3

ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
"""Everything that a call can raise."""

TRANSIENT_CLASSES = ("08", "53", "57", "58")
"""SQLSTATE classes: connection, resources (full disk, too many connections), shutdown or cancel, I/O."""

TRANSIENT_CODES = ("25006", "55P03", "XX001", "XX002", "28P01", "28000", "3D000")
"""Read-only (a standby), a lock timeout, damage, and refused logins: all of them end without a restart."""

PLANS = {
    # Cached plans must still be right after a table has grown: always along an index.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
"""Settings of the writing session without a pooler. With one, each statement is planned when it runs."""


EXAMPLE = 'write url = "postgresql://USER@HOST/DATABASE" in config.toml'


class Address(msgspec.Struct, frozen=True):
    """A database, as `[storage] url` names it."""

    dsn: str  # with the password
    is_pooled: bool  # a pooler in transaction mode is in between
    location: str  # for messages: hosts and database, without user and password

    @property
    def options(self) -> dict[str, Any]:
        """Options of `asyncpg.connect`."""
        found: dict[str, Any] = {"dsn": self.dsn, "timeout": CONNECT_TIMEOUT}
        if "target_session_attrs" not in urlsplit(self.dsn).query:
            found["target_session_attrs"] = "read-write"
        if self.is_pooled:
            found["statement_cache_size"] = 0
        found["max_cached_statement_lifetime"] = 0
        return found


def read_url(url: str) -> Address:
    """Return the address in a URL such as `postgresql://relay@db1,db2/relay?sslmode=verify-full`.

    Raises:
        RelayError: it is not a PostgreSQL URL. The text does not contain the URL, which may be a secret.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise RelayError("[storage] url: the host cannot be read", hint=EXAMPLE) from None
    options = parse_qsl(parts.query, keep_blank_values=True)
    pooler = dict(options).get("pooler", "false")
    if pooler not in {"true", "false"}:
        raise RelayError(f'[storage] url: pooler: expected "true" or "false", got "{pooler}"')
    if not parts.path.strip("/") and "dbname" not in dict(options) and "database" not in dict(options):
        raise RelayError("[storage] url: the URL names no database; write postgresql://USER@HOST/DATABASE")
    rest = urlencode([(name, value) for name, value in options if name != "pooler"], safe="/:,")
    hosts = parts.netloc.rpartition("@")[2] or dict(options).get("host", "")
    return Address(
        dsn=urlunsplit(parts._replace(scheme="postgresql", query=rest)),
        is_pooled=pooler == "true",
        location=f"postgresql://{hosts}{parts.path}",
    )


def code_of(error: BaseException) -> str:
    """Return the SQLSTATE of an error; empty for errors that do not come from the server."""
    return getattr(error, "sqlstate", None) or ""


def is_transient(error: BaseException) -> bool:
    """Return whether an error comes from the server's state or the network, not from the statement."""
    if isinstance(error, asyncpg.PostgresError):
        code = code_of(error)
        return code[:2] in TRANSIENT_CLASSES or code in TRANSIENT_CODES
    if isinstance(error, asyncpg.InterfaceError):
        return not isinstance(error, asyncpg.DataError | ValueError | TypeError)
    return isinstance(error, OSError | TimeoutError | asyncpg.InternalClientError)


def is_lost(error: BaseException, connection: "Connection") -> bool:
    """Return whether an error leaves no usable session."""
    code = code_of(error)
    return (
        connection.is_closed
        or code[:2] == "08"
        or code[:3] == "57P"
        or isinstance(error, OSError | TimeoutError)
    )


def text_of(error: BaseException) -> str:
    """Return one line about an error."""
    return " ".join(str(error).split()) or type(error).__name__


class Connection:
    """One session. After a timeout, a cancelled call or a lost network it is closed and stays closed."""

    def __init__(self, raw: "asyncpg.Connection[asyncpg.Record]", *, is_pooled: bool) -> None:
        self._raw = raw
        self.pid = 0 if is_pooled else raw.get_server_pid()  # of the session's process; 0: unknown
        self.is_unconfirmed = False  # a commit did not wait until its standbys had it

        def note(_connection: Any, message: Any) -> None:
            if "synchronous replication" in message.message:
                self.is_unconfirmed = True

        raw.add_log_listener(note)

    @property
    def is_closed(self) -> bool:
        """Whether the connection was lost."""
        return bool(self._raw.is_closed())

    @property
    def server_version(self) -> int:
        """The server's major version."""
        return int(self._raw.get_server_version().major)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return not self._raw.is_closed() and self._raw.is_in_transaction()

    async def fetch(self, sql: str, *values: Any, seconds: float = CALL_TIMEOUT) -> list[asyncpg.Record]:
        """Run a statement and return its rows."""
        try:
            rows: list[asyncpg.Record] = await self._raw.fetch(sql, *values, timeout=seconds)
        except (TimeoutError, asyncio.CancelledError, OSError):
            self._raw.terminate()
            raise
        return rows

    async def execute(self, sql: str, *values: Any, seconds: float = CALL_TIMEOUT) -> str:
        """Run a statement, or several without values; returns the command's tag."""
        try:
            tag: str = await self._raw.execute(sql, *values, timeout=seconds)
        except (TimeoutError, asyncio.CancelledError, OSError):
            self._raw.terminate()
            raise
        return tag

    async def copy(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, seconds: float
    ) -> None:
        """Insert rows with COPY."""
        try:
            await self._raw.copy_records_to_table(table, columns=columns, records=rows, timeout=seconds)
        except (TimeoutError, asyncio.CancelledError, OSError):
            self._raw.terminate()
            raise

    async def value(self, sql: str, *values: Any) -> Any:
        """Run a statement and return the first column of its first row; None without rows."""
        rows = await self.fetch(sql, *values)
        return rows[0][0] if rows else None

    @asynccontextmanager
    async def transaction(self, begin: str = "BEGIN") -> AsyncIterator[None]:
        """Run the statements inside in one transaction."""
        await self.execute(begin)
        try:
            yield
        except BaseException:
            await self.roll_back()
            raise
        await self.execute("COMMIT")

    async def roll_back(self) -> None:
        """End an open transaction."""
        if self.in_transaction:
            try:
                await self.execute("ROLLBACK")
            except ERRORS:
                self.terminate()

    def terminate(self) -> None:
        """Close the connection without waiting for the server."""
        self._raw.terminate()

    async def close(self) -> None:
        """Close the connection; waits a moment for the server."""
        try:
            await self._raw.close(timeout=2.0)
        except ERRORS:
            self._raw.terminate()


async def connect(address: Address, *, writes: bool) -> Connection:
    """Open a connection; raises the errors of asyncpg."""
    settings = {} if address.is_pooled else {"application_name": "hookferry", "jit": "off"}
    if writes and not address.is_pooled:
        settings |= PLANS
    async with asyncio.timeout(CONNECT_TIMEOUT + 1):
        raw = await asyncpg.connect(**address.options, server_settings=settings)
    return Connection(raw, is_pooled=address.is_pooled)


class _Closed:
    """Replaces the writer of a closed database: any use raises the reason."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, _name: str) -> Never:
        raise StorageUnavailableError(f"the store cannot be opened: {self._why}")


class Database:
    """Shared by the parts of the store. `writer` is used for changes, the other methods for reads."""

    writer: Writer[Connection]

    def __init__(self, address: Address) -> None:
        self.address = address
        self._idle: list[Connection] = []
        self._slots = asyncio.Semaphore(READERS)
        self._is_open = False
        self._why = "it is not open yet"
        self.set_closed(self._why)

    def set_closed(self, why: str) -> None:
        """Let every use raise `StorageUnavailableError` with a reason."""
        self._is_open, self._why = False, why
        self.writer = cast("Writer[Connection]", _Closed(why))

    def set_open(self) -> None:
        """Allow reads."""
        self._is_open = True

    async def fetch(self, sql: str, *values: Any) -> list[asyncpg.Record]:
        """Run a statement on a reader and return its rows.

        Raises:
            StorageUnavailableError: the database cannot be reached.
        """
        async with self.reader() as connection:
            return await connection.fetch(sql, *values)

    async def value(self, sql: str, *values: Any) -> Any:
        """Run a statement on a reader and return the first column of its first row; None without rows."""
        async with self.reader() as connection:
            return await connection.value(sql, *values)

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Connection]:
        """Let several statements see the same data; raises as `fetch`."""
        async with (
            self.reader() as connection,
            connection.transaction("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"),
        ):
            yield connection

    @asynccontextmanager
    async def reader(self) -> AsyncIterator[Connection]:
        """Lend a reader; raises as `fetch`."""
        if not self._is_open:
            raise StorageUnavailableError(f"the store cannot be opened: {self._why}")
        async with self._slots:
            connection = None
            try:
                while self._idle and connection is None:
                    connection = self._idle.pop()
                    if connection.is_closed:
                        connection = None
                if connection is None:
                    connection = await connect(self.address, writes=False)
                yield connection
            except ERRORS as error:
                if not is_transient(error):
                    raise
                if connection is not None:
                    connection.terminate()
                raise StorageUnavailableError(f"{self.address.location}: {text_of(error)}") from error
            finally:
                if connection is not None and not connection.is_closed:
                    await connection.roll_back()
                    self._idle.append(connection)

    async def close(self) -> None:
        """Close the readers."""
        self.set_closed("it is closed")
        while self._idle:
            await self._idle.pop().close()


def refused(address: Address, error: BaseException) -> StorageError:
    """Return the error of `Store.open` for a failed connection or statement."""
    code, what = code_of(error), f"{address.location}: {text_of(error)}"
    if code in {"28P01", "28000"}:
        return StorageError(
            what, hint="check user and password of [storage] url, and the server's pg_hba.conf"
        )
    if code == "3D000":
        name = urlsplit(address.dsn).path.strip("/")
        return StorageError(what, hint=f"create the database: createdb --encoding=UTF8 {name}")
    if code == "42501":
        return StorageError(
            what, hint="let the user create tables: ALTER DATABASE … OWNER TO the user of the URL"
        )
    if is_transient(error):
        return StorageUnavailableError(
            what, hint="check that PostgreSQL runs and accepts connections from this machine"
        )
    return StorageError(what, hint="check [storage] url and the server's log")
