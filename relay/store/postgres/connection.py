"""Connections to PostgreSQL: one writes, up to three read; every call has a timeout.

No session state is needed, so a pooler in transaction mode works: settings and locks belong to a transaction.
`?pooler=true` in the URL declares one; then no statement is prepared under a name, because the next
transaction may run in another session.
"""

import asyncio
import os
import re
import shlex
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Never, cast
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

import asyncpg
import msgspec
from asyncpg.protocol import protocol

from relay.config.validators import SYSTEM_CA, postgres_options
from relay.errors import RelayError, StorageError, StorageUnavailableError
from relay.store.postgres.rows import text
from relay.store.writer import Writer

if hasattr(protocol, "IterableABC"):
    # For each value of an array, asyncpg looks whether that is an array, too: an `Iterable` by Python's
    # abstract classes. That took a tenth of the store's CPU for an event with 3 deliveries (asyncpg 0.32). An
    # array is a list or tuple here: each more type would cost another 40 ns per value.
    protocol.IterableABC = (list, tuple)

CONNECT_TIMEOUT = 10.0  # seconds, for all hosts of the URL together
CALL_TIMEOUT = 30.0  # seconds of one statement; a silent network would stop the relay for ever
READERS = 3

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"
"""A statement that has waited for a lock must see what others committed meanwhile, whatever the server's
default is."""

SHORT = "SET LOCAL idle_in_transaction_session_timeout = 5000"
"""Sent with BEGIN: if this node is suspended or loses the network in a transaction, its locks end after 5 s.

Otherwise the server would keep them until the end of TCP's keepalive, two hours by default. Meanwhile,
another node that adds a delivery of a locked order key answers no sender. That wait must end well before
`CALL_TIMEOUT`, after which that node would refuse its senders, too."""

ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
"""Everything that a call can raise."""

TRANSIENT_CLASSES = ("08", "53", "57", "58")
"""SQLSTATE classes: connection, resources (full disk, too many connections), shutdown or cancel, I/O."""

NO_TABLE = "42P01"

TRANSIENT_CODES = ("25006", "55P03", "XX001", "XX002", "28P01", "28000", "3D000", "55000", NO_TABLE)
"""Read-only (a standby), a lock timeout, damage, refused logins, a database that accepts no connections, and
tables that somebody dropped and may restore: all of them end without a restart."""

PLANS = {
    # Cached plans must still be right after a table has grown: always along an index.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "jit": "off",
}
"""Settings of the writing session without a pooler. With one, each statement is planned when it runs."""


QUICK = {"jit": "off", "max_parallel_workers_per_gather": "0"}
"""Settings of every session without a pooler: compiling, and starting workers, takes longer than a list."""

ARRAYS = {
    "bool": (1000, 16),
    "bytea": (1001, 17),
    "int": (1007, 23),
    "text": (1009, 25),
    "bigint": (1016, 20),
    "float8": (1022, 701),
    "uuid": (2951, 2950),
}
"""OIDs of the arrays in statements, and of their elements. They are the same in every database.

asyncpg asks the server for them, once per connection. If JIT is on, that takes up to 8 s of CPU
(PostgreSQL 15), and behind a pooler asyncpg cannot turn it off.
"""

STANDBY = "it is a standby, or accepts no writes"

LOGIN = (
    "check the user in [storage] url, the password (in ~/.pgpass with mode 0600, in PGPASSWORD, or in the URL"
    " if that is a secret), and the server's pg_hba.conf"
)
POOLER = "this is a pooler such as PgBouncer: add pooler=true to [storage] url"
POOLER_PATH = "a pooler accepts no search_path; set it at the server: ALTER ROLE … SET search_path = …"

HINTS = {
    "28P01": LOGIN,
    "28000": LOGIN,
    "3D000": "{createdb}",
    "3F000": "create the schema that search_path names: CREATE SCHEMA … AUTHORIZATION the user of the URL",
    "42501": "{owner}; if there are tables, use the role that owns them",
    NO_TABLE: "somebody dropped the tables: restore a backup, or restart the relay to begin without events",
    "53300": (
        "end other sessions, or raise max_connections of the server or CONNECTION LIMIT of the role; a node"
        " needs up to 7 connections"
    ),
}
"""By SQLSTATE: what an operator can do."""

HINTS_BY_TEXT = {
    STANDBY: "promote this server, or name the primary in [storage] url; it may name all servers",
    "root certificate file": "add sslrootcert=/PATH, or sslrootcert=system for public CAs, to [storage] url",
}

EXAMPLE = 'write url = "postgresql://USER@HOST/DATABASE" in config.toml'


class Host(msgspec.Struct, frozen=True):
    """One host of a URL, with everything that a connection to it needs."""

    name: str  # for messages
    dsn: str  # with the password

    def __repr__(self) -> str:
        return self.name


class Address(msgspec.Struct, frozen=True):
    """The database that `[storage] url` names."""

    hosts: tuple[Host, ...]
    database: str
    user: str  # without password, for hints; "" if the URL does not name it
    is_pooled: bool  # a pooler in transaction mode is in between
    location: str  # for messages: hosts and database, without user and password
    options: Mapping[str, Any]  # of `asyncpg.connect`, for each host
    _latest: list[Host] = []  # the host that accepted the latest connection; asked first

    def ordered(self) -> list[Host]:
        """Return the hosts in the order in which a connection tries them."""
        return self._latest + [host for host in self.hosts if host not in self._latest]

    def prefer(self, host: Host) -> None:
        """Try this host first from now on."""
        self._latest[:] = [host]


class HostsError(ConnectionError):
    """No host of a URL with several hosts accepted a connection."""

    def __init__(self, errors: Sequence[tuple[Host, Exception]]) -> None:
        super().__init__("; ".join(f"{host.name}: {text_of(error)}" for host, error in errors))
        self.sqlstate = next((code for _, error in errors if (code := code_of(error))), "")


def read_url(url: str, key: str = "url") -> Address:
    """Return the address in a URL such as `postgresql://relay@db1,db2/relay?sslmode=verify-full`.

    `key` of `[storage]` has the URL; errors name it.

    Raises:
        RelayError: it is not a PostgreSQL URL. The text does not contain the URL, which may be a secret.
    """
    try:
        options = postgres_options(url)
    except ValueError as error:
        raise RelayError(f"[storage] {key}: {error}", hint=EXAMPLE) from None
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    is_pooled = options.pop("pooler", "false") == "true"
    more: dict[str, Any] = {"max_cached_statement_lifetime": 0}
    if is_pooled:
        more["statement_cache_size"] = 0
    if "target_session_attrs" not in options:
        more["target_session_attrs"] = "read-write"
    if options.get("sslrootcert") == SYSTEM_CA:
        more["ssl"] = _with_system_ca(options)
    places: list[tuple[str, dict[str, str]]]
    if hosts:
        places = [(name, {}) for name in hosts.split(",")]
    else:  # unix sockets, hosts among the options, or PGHOST
        names = options.get("host", "").split(",")
        ports = options.get("port", "").split(",")
        ports = ports * len(names) if len(ports) == 1 else ports
        places = [
            ("", {key: each for key, each in (("host", name), ("port", port)) if each})
            for name, port in zip(names, ports, strict=False)
        ]
    return Address(
        hosts=tuple(
            Host(
                name or place.get("host", "the local server"),
                urlunsplit(
                    parts._replace(
                        scheme="postgresql",
                        netloc=f"{user}{at}{name}",
                        query=urlencode(options | place, safe="/:,"),
                    )
                ),
            )
            for name, place in places
        ),
        database=unquote(parts.path.strip("/")) or options.get("dbname", options.get("database", "")),
        user=unquote(user.partition(":")[0]) or options.get("user", ""),
        is_pooled=is_pooled,
        location=f"postgresql://{hosts or options.get('host', '')}{parts.path}",
        options=more,
    )


def _with_system_ca(options: dict[str, str]) -> ssl.SSLContext:
    """Return a TLS context that trusts the operating system's CAs; removes its keys from the options."""
    context = ssl.create_default_context()
    context.check_hostname = options.pop("sslmode", "verify-full") == "verify-full"
    del options["sslrootcert"]
    certificate, key = options.pop("sslcert", None), options.pop("sslkey", None)
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, options.pop("sslpassword", None))
        except OSError as error:
            raise RelayError(f"[storage] url: cannot use {certificate}: {error}") from None
    return context


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
    """Return an error as one line of text."""
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return STANDBY
    if isinstance(error, socket.gaierror):
        return str(error.strerror)
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno:
        return os.strerror(error.errno)  # asyncio's message contains the errno and the address as a tuple
    return " ".join(str(error).split()) or type(error).__name__


_closing: set[asyncio.Task[None]] = set()
"""Connections that are being closed in the background."""


async def finish_closing() -> None:
    """Wait until the connections that are being closed in the background are closed, each within 2 s."""
    loop = asyncio.get_running_loop()
    if tasks := [task for task in _closing if task.get_loop() is loop]:
        await asyncio.wait(tasks)


class Connection:
    """One session. After a timeout, a cancelled call or a lost network it is closed and stays closed."""

    def __init__(self, raw: "asyncpg.Connection[asyncpg.Record]", *, is_pooled: bool) -> None:
        self._raw = raw
        self._is_abandoned = False
        self.pid = 0 if is_pooled else raw.get_server_pid()  # of the session's process; 0: unknown
        self.is_unconfirmed = False  # a commit did not wait until its standbys had it

        def note(_connection: Any, message: Any) -> None:
            if "synchronous replication" in message.message:
                self.is_unconfirmed = True

        raw.add_log_listener(note)

    @property
    def is_closed(self) -> bool:
        """Whether the connection was lost."""
        return self._is_abandoned or bool(self._raw.is_closed())

    @property
    def server_version(self) -> int:
        """The server's major version."""
        return int(self._raw.get_server_version().major)

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        return not self.is_closed and self._raw.is_in_transaction()

    async def fetch(self, sql: str, *values: Any, seconds: float = CALL_TIMEOUT) -> list[asyncpg.Record]:
        """Run a statement and return its rows."""
        self._refuse_closed()
        try:
            rows: list[asyncpg.Record] = await self._raw.fetch(sql, *values, timeout=seconds)
        except (asyncio.CancelledError, OSError) as error:  # or a TimeoutError, which has no text
            self._abandon()
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"no answer within {round(seconds, 1):g} s") from None
            raise
        return rows

    async def execute(self, sql: str, *values: Any, seconds: float = CALL_TIMEOUT) -> str:
        """Run a statement, or several without values; returns the command's tag."""
        self._refuse_closed()
        try:
            tag: str = await self._raw.execute(sql, *values, timeout=seconds)
        except (asyncio.CancelledError, OSError) as error:  # or a TimeoutError, which has no text
            self._abandon()
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"no answer within {round(seconds, 1):g} s") from None
            raise
        return tag

    async def copy(
        self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, seconds: float
    ) -> None:
        """Insert rows with COPY."""
        try:
            await self._raw.copy_records_to_table(table, columns=columns, records=rows, timeout=seconds)
        except (asyncio.CancelledError, OSError) as error:  # or a TimeoutError, which has no text
            self._abandon()
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"no answer within {round(seconds, 1):g} s") from None
            raise

    async def value(self, sql: str, *values: Any) -> Any:
        """Run a statement and return the first column of its first row; None without rows."""
        rows = await self.fetch(sql, *values)
        return rows[0][0] if rows else None

    @asynccontextmanager
    async def transaction(self, begin: str = f"{BEGIN}; {SHORT}") -> AsyncIterator[None]:
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

    def _refuse_closed(self) -> None:
        if self.is_closed:  # asyncpg's own message does not say of what
            raise ConnectionError("the connection to PostgreSQL was lost")

    def _abandon(self) -> None:
        """Close the connection, and let the server cancel the statement, in the background.

        A statement that waits for a lock or a standby does not notice that its client is gone. Without the
        cancellation, each new try would leave another session on the server, until that accepts no more.
        """
        if not self.is_closed:
            task = asyncio.get_running_loop().create_task(self._close())
            _closing.add(task)
            task.add_done_callback(_closing.discard)
        self._is_abandoned = True

    def terminate(self) -> None:
        """Close the connection without waiting for the server."""
        if not self._is_abandoned:
            self._raw.terminate()

    async def close(self) -> None:
        """Close the connection; waits a moment for the server."""
        if not self._is_abandoned:
            await self._close()

    async def _close(self) -> None:
        try:
            await self._raw.close(timeout=2.0)
        except ERRORS:
            self._raw.terminate()


async def connect(address: Address, *, writes: bool) -> Connection:
    """Open a connection; raises the errors of asyncpg."""
    return Connection(await connect_raw(address, writes=writes), is_pooled=address.is_pooled)


async def connect_raw(address: Address, *, writes: bool = False) -> "asyncpg.Connection[asyncpg.Record]":
    """Open a connection of asyncpg to the first host that accepts one.

    asyncpg itself would give the time for all hosts to the first one. If that machine is switched off, the
    others would never be tried.
    """
    settings = {} if address.is_pooled else {"application_name": "hookferry", **QUICK}
    if writes and not address.is_pooled:
        settings |= PLANS
    share = CONNECT_TIMEOUT / len(address.hosts)
    errors: list[tuple[Host, Exception]] = []
    for host in address.ordered():
        try:
            async with asyncio.timeout(share):
                raw = await asyncpg.connect(
                    host.dsn, timeout=share, server_settings=settings, **address.options
                )
        except TimeoutError:
            errors.append((host, TimeoutError(f"no answer within {share:g} s")))
        except ERRORS as error:
            errors.append((host, error))
        else:
            address.prefer(host)
            _register_arrays(raw)
            return raw
    if len(errors) == 1:
        raise errors[0][1]
    raise HostsError(errors)


def _storable(value: Any) -> Any:
    """Return a value of a statement with texts as the database stores them."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], str):
        return [text(each) for each in value]
    return value


def _register_arrays(raw: "asyncpg.Connection[asyncpg.Record]") -> None:
    settings = raw.get_settings()
    if not hasattr(settings, "register_data_types"):  # asyncpg changed it; then it asks the server
        return
    unused = ("basetype", "range_subtype", "attrtypoids", "attrnames", "elemtype_name")
    settings.register_data_types(
        [
            {"oid": oid, "ns": "pg_catalog", "name": f"_{name}", "kind": b"b", "elemtype": element}
            | {"elemdelim": ",", **dict.fromkeys(unused)}
            for name, (oid, element) in ARRAYS.items()
        ]
    )


class _Closed:
    """Replaces the writer of a closed database: any use raises the reason."""

    def __init__(self, reason: Callable[[], StorageUnavailableError]) -> None:
        self._reason = reason

    def __getattr__(self, _name: str) -> Never:
        raise self._reason()


class Database:
    """Shared by the parts of the store. `writer` is used for changes, the other methods for reads."""

    writer: Writer[Connection]

    def __init__(self, address: Address) -> None:
        self.address = address
        self._idle: list[Connection] = []  # readers
        self._lent: set[Connection] = set()
        self._slots = asyncio.Semaphore(READERS)
        self._is_open = False
        self.set_closed("it is not open yet")

    def set_closed(self, why: str, hint: str = "") -> None:
        """Let every use raise `StorageUnavailableError` with a reason."""
        self._is_open, self._why, self._hint = False, why, hint
        self.writer = cast("Writer[Connection]", _Closed(self._reason))

    def _reason(self) -> StorageUnavailableError:
        return StorageUnavailableError(f"the store cannot be opened: {self._why}", hint=self._hint)

    def set_open(self) -> None:
        """Allow reads."""
        self._is_open = True

    def renew_readers(self) -> None:
        """Drop the readers that are open now: the writer has connected again, perhaps to another server."""
        for connection in self._idle:
            connection.terminate()
        self._idle.clear()
        self._lent.clear()

    async def fetch(self, sql: str, *values: Any) -> list[asyncpg.Record]:
        """Run a statement on a reader and return its rows; texts may contain NUL.

        Raises:
            StorageUnavailableError: the database cannot be reached.
        """
        async with self.reader() as connection:
            return await connection.fetch(sql, *map(_storable, values))

    async def value(self, sql: str, *values: Any) -> Any:
        """Run a statement on a reader and return the first column of its first row; None without rows."""
        async with self.reader() as connection:
            return await connection.value(sql, *map(_storable, values))

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
            raise self._reason()
        async with self._slots:
            connection = None
            try:
                while self._idle and connection is None:
                    connection = self._idle.pop()
                    if connection.is_closed:
                        connection = None
                if connection is None:
                    connection = await connect(self.address, writes=False)
                self._lent.add(connection)
                yield connection
            except ERRORS as error:
                if not is_transient(error):
                    raise
                if connection is not None:
                    connection.terminate()
                what = f"{self.address.location}: {text_of(error)}"
                raise StorageUnavailableError(what, hint=_advice(self.address, error)) from error
            finally:
                if connection is not None:
                    await self._take_back(connection)

    async def _take_back(self, connection: Connection) -> None:
        """Keep a reader for later, unless it is lost or outdated."""
        if not connection.is_closed:
            await connection.roll_back()
            if connection in self._lent:
                self._idle.append(connection)
            else:
                connection.terminate()
        self._lent.discard(connection)

    async def close(self) -> None:
        """Close the readers; those in use are closed afterwards."""
        self.set_closed("it is closed")
        self._lent.clear()
        while self._idle:
            await self._idle.pop().close()


def refused(address: Address, error: BaseException) -> StorageError:
    """Return the error of `Store.open` for a failed connection or statement."""
    what, hint = f"{address.location}: {text_of(error)}", _advice(address, error)
    if code_of(error) not in {"28P01", "28000", "3D000"} and is_transient(error):
        return StorageUnavailableError(what, hint=hint)
    return StorageError(what, hint=hint)


def sql_name(name: str) -> str:
    """Return a name for a statement that an operator types."""
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else '"' + name.replace('"', '""') + '"'


def owner_advice(address: Address, user: str) -> str:
    """Return the hint that lets a user create tables."""
    owner = sql_name(user) if user else "the user of the URL"
    return f"let the user create tables: ALTER DATABASE {sql_name(address.database)} OWNER TO {owner}"


def database_advice(address: Address, name: str | None = None) -> str:
    """Return the hint for creating a database."""
    owner = [f"--owner={address.user}"] if address.user else []
    words = ["createdb", *owner, "--encoding=UTF8", "--template=template0", name or address.database]
    return f"create the database on its server: {shlex.join(words)}"


def _advice(address: Address, error: BaseException) -> str:
    """Return the hint for a failed connection or statement."""
    if (hint := HINTS.get(code_of(error))) is not None:
        return hint.format(owner=owner_advice(address, address.user), createdb=database_advice(address))
    text = f"{error} {text_of(error)}"
    if "unsupported startup parameter" in text:
        return POOLER_PATH if "search_path" in text else POOLER
    for part, hint in HINTS_BY_TEXT.items():
        if part in text:
            return hint
    if isinstance(error, ssl.SSLError) or "SSL" in text:
        return "check sslmode and sslrootcert of [storage] url, and the server's certificate"
    if not is_transient(error):
        return "check [storage] url and the server's log"
    return "check that PostgreSQL runs and accepts connections from this machine"
