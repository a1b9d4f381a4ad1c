"""The database: its size, backups, compaction, and the doctor's checks."""

from pathlib import Path
from typing import Annotated, Any

import msgspec
from aiohttp import web

from relay import doctor
from relay.api.context import Context
from relay.api.endpoints import Lines, endpoint
from relay.api.query_params import DatabaseQuery
from relay.api.responses import stream_lines
from relay.api.views import Time, about
from relay.delivery.destination_health import ELSEWHERE, NO_STORAGE
from relay.jobs.backups import described
from relay.model import Backup, Check, Compacted


class BackupFileView(msgspec.Struct):
    """A backup file."""

    path: str
    bytes: int
    made_at: Time


class DatabaseView(msgspec.Struct):
    """Contents and size of the database, and its backups."""

    path: Annotated[str, about("File, or host and name of the database.")]
    engine: Annotated[str, about("Database engine with its version.")]
    version: int
    bytes: int
    free: Annotated[int | None, about("Free bytes in the file; null: PostgreSQL.")]
    log: Annotated[int | None, about("Bytes of the write-ahead log; null: PostgreSQL.")]
    events: Annotated[int | None, about("null with `counts=0`.")]
    oldest: Time | None
    newest: Time | None
    pending: int
    sqlite: Annotated[str | None, about("Version of SQLite; null: another engine.")]
    backups: tuple[BackupFileView, ...]


class ChecksView(msgspec.Struct):
    """The results of all checks of the doctor."""

    checks: tuple[Check, ...]


class DatabaseApi:
    """Endpoints under `/api/db`, and the doctor."""

    def __init__(self, context: Context) -> None:
        self._store = context.store
        self._state = context.state
        self._backups = context.backups
        self._reloads = context.reloads
        self._dispatcher = context.dispatcher
        self._jobs = context.jobs
        self._health = context.health
        self._clock = context.clock

    @endpoint(
        "GET", "/api/db", "showDatabase", "Show contents and size of the database, and its backups.",
        query=DatabaseQuery, returns=DatabaseView,
    )  # fmt: skip
    async def _show(self, _request: web.Request, query: DatabaseQuery) -> dict[str, Any]:
        return described(await self._store.upkeep.measure(counts=query.counts), self._backups.made())

    @endpoint(
        "POST", "/api/db/backup", "backUp", "Copy the database into `[backup] dir` and check the copy.",
        returns=Lines[Backup], scope="admin",
    )  # fmt: skip
    async def _back_up(self, request: web.Request) -> web.StreamResponse:
        size = (await self._store.upkeep.measure(counts=False)).bytes

        def progress() -> dict[str, int]:
            return {"bytes": sum(map(_size, self._backups.folder.glob("*.part"))), "of": size}

        def result(done: Backup) -> Backup:
            return msgspec.structs.replace(done, seconds=round(done.seconds, 3))

        return await stream_lines(request, self._backups.make(), progress=progress, result=result)

    @endpoint(
        "POST", "/api/db/compact", "compact", "Return free space of the database file to the disk.",
        returns=Lines[Compacted], scope="admin",
    )  # fmt: skip
    async def _compact(self, request: web.Request) -> web.StreamResponse:
        path = Path((await self._store.upkeep.measure(counts=False)).path)
        return await stream_lines(
            request, self._store.upkeep.compact(), progress=lambda: {"bytes": _size(path)}
        )

    @endpoint("GET", "/api/doctor", "examine", "Run every check.", returns=Lines[ChecksView])
    async def _examine(self, request: web.Request) -> web.StreamResponse:
        return await stream_lines(request, self._checks(), result=ChecksView)

    async def _checks(self) -> tuple[Check, ...]:
        config, nodes = self._state.config, self._store.nodes
        found = await self._store.upkeep.examine(
            min_free=config.storage.min_free_disk,
            destinations=config.destinations.keys(),
            sources=config.sources.keys(),
            config=config.path,
        )
        return (
            *found,
            doctor.held(self._destinations(), self._clock.steady()),
            *([] if nodes.alone else [doctor.wakeups(nodes.figures(), nodes.cautions())]),
            *([self._backups.examine()] if self._store.files else []),
            doctor.writable(config, config.state_dir),
            doctor.ready(self._health.reasons()),
            doctor.jobs(self._jobs.all()),
            await self._reloads.drift(),
        )

    def _destinations(self) -> list[doctor.DestinationBacklog]:
        pending = self._store.ledger.pending()
        return [
            doctor.DestinationBacklog(
                name=name,
                # The check `ready` reports the storage; another node reports its own lanes.
                held=None if lane.held in {ELSEWHERE, NO_STORAGE} else lane.held,
                pending=pending.get(name, 0),
                failing_since=lane.health.state.failing_since if lane.is_owned else None,
            )
            for name, lane in self._dispatcher.lanes.items()
        ]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it was renamed to its final name
        return 0
