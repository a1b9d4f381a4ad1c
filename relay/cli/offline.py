"""Read-only access to the database for `--offline`; no daemon needed."""

import asyncio
import os
from collections.abc import AsyncGenerator, Generator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from relay.api.query_params import filter_of
from relay.base.clock import SECOND, SystemClock
from relay.cli.main import NOT_ALLOWED, NOTHING, CommandError
from relay.config.binding import Binder
from relay.config.document import read
from relay.config.installed_service import directories_of, installed
from relay.config.paths import find_config, is_there
from relay.config.problems import ConfigError
from relay.config.schema import Config
from relay.config.secrets import Absent, Secret
from relay.config.tables import bind_tables
from relay.errors import StorageError, UnknownError
from relay.model import PAUSED_IN_CONFIG, Check, Selection
from relay.process.state_dir import obstacle
from relay.store import Stop, StoredData
from relay.store.opening import file_of, offline_store

if TYPE_CHECKING:
    from relay import doctor


class Offline:
    """Reads the database; has the same reading methods as `Daemon`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        tables = read(config.path).data.get("sources")
        self._sources = tuple(tables) if isinstance(tables, dict) else ()
        self._file = database_of(config)
        if self._file is not None:
            readable(self._file)
        self._store = offline_store(url_of(config), state_of(config))

    def measure(self) -> dict[str, Any]:
        """Return the contents and size of the database, and its backups; raises `StorageError`."""
        from relay.jobs.backups import described, made_in  # noqa: PLC0415 - see `_read`

        folder = state_of(self._config) / self._config.backup.dir
        backups = {} if self._file is None else made_in(folder)
        return described(self._store.measure(Stop()), backups)

    def examine(self) -> list[Check]:
        """Run every check that needs no daemon."""
        from relay import doctor  # noqa: PLC0415 - see `_read`
        from relay.jobs import backups  # noqa: PLC0415 - see `_read`

        config, now = self._config, SystemClock().wall()
        found = self._store.examine(
            Stop(),
            now=now,
            min_free=config.storage.min_free_disk,
            destinations=config.destinations.keys(),
            config=config.path,
        )
        with suppress(StorageError):  # the checks above report an unreadable file
            # No daemon retries now, so a failed last attempt is a problem at once.
            found.append(doctor.held(asyncio.run(self._backlogs()), now, patience=0))
        if self._file is not None:
            made = backups.made_in(state_of(config) / config.backup.dir)
            found.append(backups.examine(made, config.backup.every, now // SECOND))
        elif (error := obstacle(config.state_dir)) is not None:  # a file in such a folder is refused earlier
            found.append(Check(name="state_dir", ok=False, detail=error.message, hint=error.hint))
        return [*found, doctor.writable(config, state_of(config))]

    async def _backlogs(self) -> list["doctor.DestinationBacklog"]:
        from relay import doctor  # noqa: PLC0415 - see `_read`

        async with self._store.read() as stored:
            ledger, states = await stored.ledger.totals(), await stored.queries.destination_states()
        return [
            doctor.DestinationBacklog(
                name=name,
                held=PAUSED_IN_CONFIG if each.paused else states[name].held if name in states else None,
                pending=ledger[name].pending,
                failing_since=states[name].failing_since if name in states else None,
            )
            for name, each in self._config.destinations.items()
            if name in ledger
        ]

    def get(self, kind: str, given: str | None = None, /, **query: Any) -> Any:
        """Return a page of a list, or one item of it, with the types that JSON has, as `Daemon` does.

        Raises:
            CommandError: the item does not exist.
            RelayError: the file cannot be read, or a filter is invalid.
        """
        try:
            return msgspec.to_builtins(asyncio.run(self._read(kind, given, **query)), str_keys=True)
        except UnknownError as error:
            raise CommandError(error.message, hint=error.hint, code=NOTHING) from None

    def stream(
        self, _method: str, _kind: str, *, deliveries: int, **query: Any
    ) -> Generator[bytes, None, None]:
        """Yield the lines of an export, a JSON object each."""
        with asyncio.Runner() as runner:
            lines = self._export(query, deliveries=bool(deliveries))
            try:
                while True:
                    yield runner.run(anext(lines))
            except StopAsyncIteration:
                return
            finally:
                runner.run(lines.aclose())

    async def _export(self, query: dict[str, Any], *, deliveries: bool) -> AsyncGenerator[bytes, None]:
        selection = _selection(query)
        async with self._store.read() as stored:
            await self._check_names(stored, selection)
            span = await stored.queries.span(selection)
            async for line in stored.queries.export(selection, span, deliveries=deliveries):
                yield line

    async def _check_names(self, stored: StoredData, selection: Selection) -> None:
        from relay.api.views import check_names  # noqa: PLC0415 - see `_read`

        await check_names(
            stored,
            source=selection.source,
            type_=selection.type,
            destination=selection.destination,
            sources=self._sources,
            destinations=self._config.destinations,
        )

    async def _read(self, kind: str, given: str | None, **query: Any) -> Any:
        # Imported here, because commands that talk to the daemon must start fast without the store.
        from relay.api.views import (  # noqa: PLC0415 - see above
            list_destinations,
            list_items,
            list_stats,
            show_delivery,
            show_destination,
            show_event,
        )

        known, now = self._config.destinations, SystemClock().wall()
        sources = self._sources
        async with self._store.read() as stored:
            if kind == "destinations":
                return await (
                    list_destinations(stored, known, now)
                    if given is None
                    else show_destination(stored, given, known, now)
                )
            if kind == "export":
                selection = _selection(query, "dry_run")
                await self._check_names(stored, selection)
                span = await stored.queries.span(selection)
                return {"count": sum([len(page) async for page in stored.queries.select(selection, span)])}
            if kind == "stats":
                limit, cursor = query.pop("limit"), query.pop("cursor")
                return await list_stats(
                    stored, _selection(query), limit=limit, cursor=cursor, sources=sources
                )
            if given is not None:
                return await (show_event if kind == "events" else show_delivery)(stored, given)
            limit, cursor = query.pop("limit"), query.pop("cursor")
            return await list_items(
                stored,
                kind,
                limit=limit,
                cursor=cursor,
                filters=query,
                now=now,
                sources=sources,
                destinations=known.keys(),
            )


def _selection(query: dict[str, Any], *others: str) -> Selection:
    filters = {name: value for name, value in query.items() if value is not None and name not in others}
    return filter_of(filters).selection(SystemClock(), everything=True)


STATE = Path("/var/lib/relay")
"""Folder of the database with `StateDirectory=relay`; a shell lacks the unit's environment."""


def tables_of(given: Path | None) -> Config:
    """Return the configuration without the settings that plugins define.

    Raises:
        ConfigError: the file is missing, is not TOML, or does not say where the data is: the default would be
            another database.
    """
    path = find_config(given)
    binder = Binder(read(path), directories_of(path), lenient=True)
    config = bind_tables(binder)
    if wrong := [each for each in binder.problems if each.key in {"storage", "storage.url", "state_dir"}]:
        raise ConfigError(wrong, hint=f"correct it, then run `relay check-config {path}`")
    return config


def url_of(config: Config) -> str:
    """Return the URL of the storage.

    Raises:
        CommandError: it is a secret that this command cannot read.
    """
    url: Secret = config.storage.url  # `Absent` if the look-up was lenient
    if isinstance(url, Absent):
        hint = "run the command as root or as the daemon's user, with the same environment"
        raise CommandError(f"[storage] url: {url.why}", hint=hint, code=NOT_ALLOWED)
    return url.reveal()


def database_of(config: Config) -> Path | None:
    """Return the path of the database file; None: PostgreSQL."""
    return file_of(url_of(config), state_of(config))


def state_of(config: Config) -> Path:
    """Return the state folder, which contains an SQLite database."""
    url = url_of(config)
    ours, theirs = (file_of(url, folder) or folder for folder in (config.state_dir, STATE))
    return STATE if not is_there(ours) and is_there(theirs) else config.state_dir


def readable(path: Path) -> Path:
    """Return the path of a database file, after a check that this user can read it.

    Raises:
        CommandError: permission denied, or the path is too long or is not below a directory.
    """
    if (error := obstacle(path.parent)) is not None:
        raise CommandError(error.message, hint=error.hint)
    if is_there(path) and not os.access(path, os.R_OK):
        raise _denied(f"cannot read {path}")
    return path


def writable(folder: Path) -> None:
    """Check that this user can write to a folder.

    Raises:
        CommandError: permission denied.
    """
    if is_there(folder) and not os.access(folder, os.W_OK | os.X_OK):
        raise _denied(f"cannot write to {folder}")


def _denied(what: str) -> CommandError:
    service = installed()
    user = service.user if service else "the daemon's user"
    return CommandError(
        f"{what}: permission denied", hint=f"run the command as root, or as {user}", code=NOT_ALLOWED
    )
