"""The database for operators: what it takes, copies of it, giving room back, and what could be wrong."""

from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from relay import doctor
from relay.api.context import Parts
from relay.api.responses import say, tell
from relay.config.paths import database_path
from relay.delivery.lane import NO_STORAGE
from relay.jobs.backups import described
from relay.model import Backup, Check
from relay.store.doctor import database


class DatabaseApi:
    """The part of the admin API under `/api/db`, and the doctor."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._state = parts.state
        self._backups = parts.backups
        self._reloads = parts.reloads
        self._engine = parts.engine
        self._jobs = parts.jobs
        self._health = parts.health
        self._clock = parts.clock

    def routes(self) -> list[web.RouteDef]:
        """Return what to mount."""
        return [
            web.get("/api/db", self._show),
            web.post("/api/db/backup", self._back_up),
            web.post("/api/db/compact", self._compact),
            web.get("/api/doctor", self._examine),
        ]

    async def _show(self, _request: web.Request) -> web.Response:
        return say(described(await self._store.upkeep.measure(), self._backups.made()))

    async def _back_up(self, request: web.Request) -> web.StreamResponse:
        size = (await self._store.upkeep.measure()).bytes

        def progress() -> dict[str, int]:
            return {"bytes": sum(map(_size, self._backups.folder.glob("*.part"))), "of": size}

        def result(done: Backup) -> dict[str, Any]:
            return {**msgspec.structs.asdict(done), "seconds": round(done.seconds, 3)}

        return await tell(request, self._backups.make(), progress=progress, result=result)

    async def _compact(self, request: web.Request) -> web.StreamResponse:
        path = Path((await self._store.upkeep.measure()).path)
        return await tell(request, self._store.upkeep.compact(), progress=lambda: {"bytes": _size(path)})

    async def _examine(self, request: web.Request) -> web.StreamResponse:
        return await tell(request, self._checks(), result=lambda checks: {"checks": checks})

    async def _checks(self) -> list[Check]:
        config = self._state.config
        found = await self._store.upkeep.examine(
            min_free=config.storage.min_free_disk,
            destinations=config.destinations.keys(),
            sources=config.sources.keys(),
        )
        return [
            database(database_path(config), config.path),
            *found,
            doctor.held(self._owing(), self._clock.steady()),
            self._backups.examine(),
            doctor.writable(config, config.state_dir),
            doctor.ready(self._health.reasons()),
            doctor.jobs(self._jobs.all()),
            await self._reloads.drift(),
        ]

    def _owing(self) -> list[doctor.Owing]:
        owed = self._store.ledger.pending()
        return [
            doctor.Owing(
                name=name,
                held=None if lane.held == NO_STORAGE else lane.held,  # `ready` says so
                pending=owed.get(name, 0),
                failing_since=lane.health.state.failing_since,
            )
            for name, lane in self._engine.lanes.items()
        ]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has got its name meanwhile
        return 0
