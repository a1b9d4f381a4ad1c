"""Makes the store that `[storage] url` names. No module outside of `relay.store` knows the database engine.

The engine's modules are imported when a store is made, because most commands run without one.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from relay.base.clock import Clock, SystemClock
from relay.config.effective import Digests
from relay.config.schema import WorkerRules
from relay.config.validators import POSTGRES
from relay.errors import RelayError, StorageError, installing
from relay.model import StoredEvent, WorkerStatus
from relay.store import Listener, OfflineStore, Resolve, Route, Rules, Store

if TYPE_CHECKING:
    from relay.store.moving import Move, Source, Target

FILE = "relay.db"
"""The file of the default URL, `sqlite:relay.db`."""

DISK_RESERVE = 2 * 2**20
"""Bytes of the reserve that a daemon keeps for outcomes and retention on a full disk."""


def no_route(_event: StoredEvent) -> tuple[()]:
    """Route an event to no destination."""
    return ()


def no_options(_destination: str, _event: StoredEvent) -> None:
    """Return no options of a destination."""


def default_rules(_source: str, _worker_id: str) -> WorkerRules:
    """Return the default rules of workers."""
    return WorkerRules()


def clock_of(url: str, *, shared: bool) -> Clock:
    """Return the clock of a daemon for a store: the clock of the server if several daemons share the data."""
    if not shared or file_of(url, Path()) is not None:
        return SystemClock()
    from relay.store.postgres.clock import ServerClock  # noqa: PLC0415 - see above

    return ServerClock(SystemClock())


def make_store(
    url: str,
    folder: Path,
    clock: Clock,
    *,
    route: Route = no_route,
    resolve: Resolve = no_options,
    rules: Rules = default_rules,
    listeners: Sequence[Listener] = (),
    on_status_change: Callable[[str, WorkerStatus], None] = lambda _source, _status: None,
    observe_seconds: Callable[[float], None] = lambda _seconds: None,
    observe_requests: Callable[[float], None] = lambda _requests: None,
    on_fatal: Callable[[str], None] = lambda _why: None,
    durability: Literal["full", "normal"] = "full",
    min_free: int = 0,
    reserve: int = 0,
    node: str = "",
    cluster: float | None = None,
    digests: Callable[[], Digests] = Digests,
    listen_url: str | None = None,
) -> Store:
    """Make a store that is not open yet.

    Args:
        url: `sqlite:NAME`, or the URL of a PostgreSQL database.
        folder: the state folder; relative names are relative to it.
        clock: of every time that the store writes or compares.
        route: returns the deliveries of a new event.
        resolve: returns the options of the destination that gets the event of a dead delivery.
        rules: returns the rules of a worker.
        listeners: called after each commit with its changes; must not raise or block. Read at every commit,
            so a caller may change the sequence.
        on_status_change: called with source and new status of a worker, after the commit.
        observe_seconds: called after each commit with its duration in seconds.
        observe_requests: called after each commit with its number of requests.
        on_fatal: called with a reason when the process must stop at once.
        durability: `normal` may lose the last commits at a power failure, never at a crash of the process.
        min_free: bytes of the disk that senders cannot fill.
        reserve: bytes kept in a file that is deleted when the disk is full.
        node: name of this node in lists; "": the host name.
        cluster: seconds after which other nodes take over the lanes of a node that does not answer; None: no
            other daemon uses the data.
        digests: returns the digests of the configuration that all nodes should share.
        listen_url: of the same database, for notifications; None: `url`, unless that is a pooler.

    Raises:
        RelayError: no engine supports the URL.
    """
    if (path := file_of(url, folder)) is None:
        with _needing_asyncpg():
            from relay.store.postgres.connection import read_url  # noqa: PLC0415 - see above
            from relay.store.postgres.store import PostgresStore  # noqa: PLC0415 - see above

        return PostgresStore(
            read_url(url),
            folder,
            clock,
            route=route,
            resolve=resolve,
            rules=rules,
            listeners=listeners,
            on_status_change=on_status_change,
            observe_seconds=observe_seconds,
            observe_requests=observe_requests,
            on_fatal=on_fatal,
            full=durability == "full",
            node=node,
            cluster=cluster,
            digests=digests,
            listen_address=None if listen_url is None else read_url(listen_url, "listen_url"),
            find_former=partial(_former, folder),
        )
    from relay.store.sqlite.disk import Disk  # noqa: PLC0415 - see above
    from relay.store.sqlite.store import SqliteStore  # noqa: PLC0415 - see above

    if cluster is not None:
        raise RelayError(
            "[cluster] enabled: only daemons on a PostgreSQL database can be a cluster",
            hint="set [storage] url to a postgresql:// URL, or enabled = false",
        )
    return SqliteStore(
        path,
        clock,
        route=route,
        resolve=resolve,
        rules=rules,
        listeners=listeners,
        on_status_change=on_status_change,
        observe_seconds=observe_seconds,
        observe_requests=observe_requests,
        on_fatal=on_fatal,
        full=durability == "full",
        node=node,
        digests=digests,
        disk=Disk(path, floor=min_free, ballast=reserve),
    )


async def _former(folder: Path) -> str | None:
    """Describe the default SQLite database of a daemon; None if it does not exist or has no events."""
    path = folder / FILE
    if not path.is_file():
        return None
    from relay.store.sqlite.offline import SqliteOffline  # noqa: PLC0415 - see above

    try:
        async with SqliteOffline(path).read() as stored:
            if not await stored.queries.find("events", limit=1):
                return None
            pending = sum(counts.pending for counts in (await stored.ledger.totals()).values())
    except StorageError as error:
        return error.message
    noun = "delivery" if pending == 1 else "deliveries"
    return f"{path} has the events of this relay, with {pending} pending {noun}"


@asynccontextmanager
async def open_store(
    url: str, folder: Path, clock: Clock, *, route: Route = no_route, rules: Rules = default_rules
) -> AsyncIterator[Store]:
    """Make a store, open it, and close it at the end. For programs that are not the daemon."""
    store = make_store(url, folder, clock, route=route, rules=rules)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def offline_store(url: str, folder: Path) -> OfflineStore:
    """Return access to stored data for commands that need no daemon; `folder` as for `make_store`.

    Raises:
        RelayError: no engine supports the URL.
    """
    if (path := file_of(url, folder)) is None:
        with _needing_asyncpg():
            from relay.store.postgres.connection import read_url  # noqa: PLC0415 - see above
            from relay.store.postgres.offline import PostgresOffline  # noqa: PLC0415 - see above

        return PostgresOffline(read_url(url))
    from relay.store.sqlite.offline import SqliteOffline  # noqa: PLC0415 - see above

    return SqliteOffline(path)


@contextmanager
def _needing_asyncpg() -> Iterator[None]:
    """Explain that the optional package of PostgreSQL is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "asyncpg":
            raise
        raise RelayError(
            "[storage] url: PostgreSQL needs the package asyncpg",
            hint=f"install it: {installing('asyncpg')}",
        ) from error


def move_of(source: str, target: str, folder: Path) -> "Move":
    """Return a move of all data from one URL to another; relative names are relative to `folder`.

    Raises:
        RelayError: no engine supports a URL, or both are of the same kind.
    """
    from relay.store.moving import Move  # noqa: PLC0415 - see above

    if (file_of(source, folder) is None) == (file_of(target, folder) is None):
        tool = "`relay db backup`" if source.startswith("sqlite:") else "pg_dump"
        raise RelayError(
            "FROM and TO are of the same kind; a move is from SQLite to PostgreSQL or back",
            hint=f"copy the database with {tool}",
        )
    return Move(_source(source, folder), _target(target, folder))


def _source(url: str, folder: Path) -> "Source":
    if (path := file_of(url, folder)) is None:
        with _needing_asyncpg():
            from relay.store.postgres.connection import read_url  # noqa: PLC0415 - see above
            from relay.store.postgres.moving import PostgresSource  # noqa: PLC0415 - see above

        return PostgresSource(read_url(url))
    from relay.store.sqlite.moving import SqliteSource  # noqa: PLC0415 - see above

    return SqliteSource(path)


def _target(url: str, folder: Path) -> "Target":
    if (path := file_of(url, folder)) is None:
        with _needing_asyncpg():
            from relay.store.postgres.connection import read_url  # noqa: PLC0415 - see above
            from relay.store.postgres.moving import PostgresTarget  # noqa: PLC0415 - see above

        return PostgresTarget(read_url(url))
    from relay.store.sqlite.moving import SqliteTarget  # noqa: PLC0415 - see above

    return SqliteTarget(path)


def is_storage_failure(error: Exception) -> bool:
    """Return whether an exception of the engine comes from the file, its disk or another program.

    False: another exception, or a faulty statement.
    """
    if type(error).__module__.startswith("asyncpg."):
        from relay.store.postgres.connection import is_transient  # noqa: PLC0415 - see above

        return is_transient(error)
    from relay.store.sqlite.writer import DAMAGED, TRANSIENT  # noqa: PLC0415 - see above

    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in TRANSIENT | DAMAGED


def file_of(url: str, folder: Path) -> Path | None:
    """Return the file of a URL; None: the data is in a PostgreSQL database. Raises as `path_of`."""
    return None if url.partition(":")[0] in POSTGRES else path_of(url, folder)


def path_of(url: str, folder: Path) -> Path:
    """Return the file of an SQLite URL; `folder` as for `make_store`.

    Raises:
        RelayError: no engine supports the URL.
    """
    scheme, _, name = url.partition(":")
    if scheme != "sqlite" or not name:
        raise RelayError(
            f'[storage] url: unsupported storage "{url}"', hint='write url = "sqlite:relay.db" in config.toml'
        )
    return folder / name
