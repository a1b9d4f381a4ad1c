"""Backups in their time: so many are kept, and the latest stays until a newer one has been checked."""

import logging
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from relay.base.clock import SECOND, Clock, rfc3339
from relay.base.units import render_duration, render_size
from relay.config.schema import Config
from relay.errors import StorageError
from relay.model import Backup, Check, Measured
from relay.process.logs import in_one_line
from relay.store import Store

log = logging.getLogger("relay.backups")


LATE = 0.1  # of `every`, after which a backup that is due is missed
LATEST = 300.0  # seconds that it may always be late
_NAME = "relay-%Y%m%dT%H%M%SZ.db"


def made_in(folder: Path) -> dict[Path, float]:
    """Return the backups of a folder, the oldest first, and when each was made, in seconds since 1970."""
    found = {}
    for path in sorted(folder.glob("relay-*.db")):
        with suppress(ValueError):  # somebody else's file
            found[path] = datetime.strptime(path.name, _NAME).replace(tzinfo=UTC).timestamp()
    return found


def described(measured: Measured, made: Mapping[Path, float]) -> dict[str, Any]:
    """Return what was measured of a database, and its backups, as JSON has them."""
    told = msgspec.structs.asdict(measured)
    for name in ("oldest", "newest"):
        told[name] = None if told[name] is None else rfc3339(told[name])
    backups = [
        {"path": str(path), "bytes": path.stat().st_size, "made_at": rfc3339(int(moment * SECOND))}
        for path, moment in made.items()
    ]
    return {**told, "sqlite": sqlite3.sqlite_version, "backups": backups}


def oldest_first(made: Mapping[Path, float], now: float) -> list[Path]:
    """Return backups in the order in which they go.

    One from the future was made by a clock that was wrong, and before now: it goes before all others.
    """
    return sorted(made, key=lambda path: (made[path] <= now, made[path]))


def examine(made: Mapping[Path, float], every: float | None, now: float, failed: str | None = None) -> Check:
    """Say whether there is a backup as new as `every` asks for; `failed` is why the latest one failed."""
    count = "1 backup" if len(made) == 1 else f"{len(made)} backups"
    if every is None:
        return Check(name="backups", ok=True, detail=f"none are made by themselves, {count} in the folder")
    latest = max((moment for moment in made.values() if moment <= now), default=None)
    found = "there is none" if latest is None else f"the latest is of {rfc3339(int(latest * SECOND))}"
    if failed is not None:
        detail = f"{found}, and the next one failed: {failed}"
    elif latest is None or now - latest > every + max(every * LATE, LATEST):
        detail = f"{found}, and one is due every {render_duration(every)}"
    else:
        return Check(name="backups", ok=True, detail=f"{found}, {count} in the folder")
    return Check(name="backups", ok=False, detail=detail, hint="make one and see: relay jobs run backup")


class Backups:
    """Goes by `[backup]`, whatever it says at the moment."""

    every = 60.0  # seconds between looks at whether one is due

    def __init__(self, store: Store, clock: Clock, config: Callable[[], Config]) -> None:
        self._store = store
        self._clock = clock
        self._config = config
        self._failed: str | None = None  # why the latest one could not be made
        self._looked = False  # whether one was due has been looked at since the start

    @property
    def folder(self) -> Path:
        """Where they are."""
        config = self._config()
        return config.state_dir / config.backup.dir

    def made(self) -> dict[Path, float]:
        """Return those there are, the oldest first, and when each was made, in seconds since 1970."""
        return made_in(self.folder)

    async def run(self) -> None:
        """Make a backup if one is due; the files themselves say when the last one was made."""
        every, now = self._config().backup.every, self._clock.wall() // SECOND
        self._looked = True
        if every is None or any(0 <= now - made < every for made in self.made().values()):
            return
        try:
            await self.make()
        except StorageError as error:
            raise StorageError(f"no backup: {error.message}", hint=error.hint) from error

    def examine(self) -> Check:
        """Say for the doctor how it is with backups; right after the start, none is missed."""
        every = self._config().backup.every if self._looked else None
        return examine(self.made(), every, self._clock.wall() // SECOND, self._failed)

    async def make(self) -> Backup:
        """Make a backup now, and let go of the oldest where there are more than `[backup] keep`.

        Where there is no room for one, the oldest go first, but never the latest.

        Raises:
            StorageError: it could not be made.
        """
        try:
            done = await self._make()
        except StorageError as error:
            self._failed = in_one_line(error)
            raise
        self._failed = None
        return done

    async def _make(self) -> Backup:
        folder, now = self.folder, self._clock.wall() // SECOND
        name = datetime.fromtimestamp(now, UTC).strftime(_NAME)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            floor = self._config().storage.min_free_disk
            if lacking := await self._store.upkeep.missing_space(folder, keep_free=floor):
                self._make_room(lacking, now)
            done = await self._store.upkeep.backup(folder / name, keep_free=floor)
            others = {path: moment for path, moment in self.made().items() if path.name != name}
            for old in oldest_first(others, now)[: max(0, len(others) + 1 - self._config().backup.keep)]:
                old.unlink()
        except OSError as error:
            raise StorageError(f"{folder}: {error.strerror}", hint="see `[backup] dir`") from error
        log.info(
            "backed up %d events in %.1f s to %s, %s",
            done.events,
            done.seconds,
            name,
            render_size(done.bytes),
        )
        return done

    def _make_room(self, lacking: int, now: float) -> None:
        """Delete the oldest backups for a new one, if that makes enough room; the latest stays."""
        going = []
        for path in oldest_first(self.made(), now)[:-1]:
            if lacking <= 0:
                break
            going.append(path)
            lacking -= path.stat().st_blocks * 512
        if lacking > 0:
            return  # the backup says what is missing, and none has gone for it
        for path in going:
            path.unlink()
            log.warning("%s was deleted, as there is no room for another backup", path.name)
