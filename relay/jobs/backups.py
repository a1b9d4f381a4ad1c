"""Periodic backups: the latest `keep` are kept; older ones are deleted after a newer one is verified."""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from relay.base.clock import SECOND, Clock, rfc3339
from relay.base.units import render_duration, render_size
from relay.config.schema import BackupConfig, Config
from relay.errors import StorageError
from relay.model import Backup, Check, Measured
from relay.process.logs import in_one_line
from relay.store import Store

if TYPE_CHECKING:
    from relay.metrics import Metrics

log = logging.getLogger("relay.backups")


LATE = 0.1  # share of `every` by which a backup may be late before it is reported
ALWAYS_LATE = 300.0  # seconds by which a backup may be late with any `every`
_NAME = "relay-%Y%m%dT%H%M%SZ.db"


def made_in(folder: Path) -> dict[Path, float]:
    """Return the backups of a folder, oldest first, with their times in seconds since the epoch."""
    found = {}
    for path in sorted(folder.glob("relay-*.db")):
        with suppress(ValueError):  # not a backup
            found[path] = datetime.strptime(path.name, _NAME).replace(tzinfo=UTC).timestamp()
    return found


def described(measured: Measured, made: Mapping[Path, float]) -> dict[str, Any]:
    """Return the measurements of a database and its backups, as the API shows them."""
    described = msgspec.structs.asdict(measured)
    for name in ("oldest", "newest"):
        described[name] = None if described[name] is None else rfc3339(described[name])
    backups = [
        {"path": str(path), "bytes": path.stat().st_size, "made_at": rfc3339(int(moment * SECOND))}
        for path, moment in made.items()
    ]
    name, _, version = measured.engine.partition(" ")
    return {**described, "sqlite": version if name == "SQLite" else None, "backups": backups}


def oldest_first(made: Mapping[Path, float], now: float) -> list[Path]:
    """Return backups in the order of deletion.

    A backup from the future was made while the clock was wrong; it is deleted first.
    """
    return sorted(made, key=lambda path: (made[path] <= now, made[path]))


def examine(made: Mapping[Path, float], every: float | None, now: float, failed: str | None = None) -> Check:
    """Check whether the latest backup is recent enough; `failed` is the latest error, `every` in seconds."""
    count = "1 backup" if len(made) == 1 else f"{len(made)} backups"
    if every is None:
        return Check(name="backups", ok=True, detail=f"automatic backups are off; {count} in the folder")
    latest = max((moment for moment in made.values() if moment <= now), default=None)
    found = "no backup" if latest is None else f"latest backup: {rfc3339(int(latest * SECOND))}"
    if failed is not None:
        detail = f"{found}; the next one failed: {failed}"
    elif is_overdue(latest, every, now):
        detail = f"{found}; due every {render_duration(every)}"
    else:
        return Check(name="backups", ok=True, detail=f"{found}, {count} in the folder")
    return Check(name="backups", ok=False, detail=detail, hint="make one now: relay jobs run backup")


def is_overdue(latest: float | None, every: float, now: float) -> bool:
    """Return whether the latest backup is too old, or there is none; all in seconds."""
    return latest is None or now - latest > every + max(every * LATE, ALWAYS_LATE)


class BackupSummary(msgspec.Struct, frozen=True):
    """The backups of the folder, as of the latest `look`."""

    last_success: int | None  # time of the latest backup, wall clock
    bytes: int | None  # size of the latest backup
    kept: int


class Backups:
    """Makes backups by `[backup]` of the current configuration."""

    every = 60.0  # seconds between checks whether a backup is due

    def __init__(
        self, store: Store, clock: Clock, config: Callable[[], Config], metrics: "Metrics | None" = None
    ) -> None:
        self.summary = BackupSummary(None, None, 0)
        self._store = store
        self._clock = clock
        self._config = config
        self._metrics = metrics
        self._failed: str | None = None  # error of the latest backup
        self._applied: BackupConfig | None = None  # settings of the latest run

    @property
    def folder(self) -> Path:
        """The folder of the backups."""
        config = self._config()
        return config.state_dir / config.backup.dir

    def made(self) -> dict[Path, float]:
        """Return all backups, oldest first, with their times in seconds since the epoch."""
        return made_in(self.folder)

    def look(self) -> None:
        """Read the names and sizes of the backups; `relay db backup FILE` may have added one."""
        now, made = self._clock.wall() // SECOND, self.made()
        times = {moment: path for path, moment in made.items() if moment <= now}
        latest, size = max(times, default=None), None
        if latest is not None:
            with suppress(OSError):  # it has just been deleted
                size = times[latest].stat().st_size
        at = None if latest is None else int(latest * SECOND)
        self.summary = BackupSummary(at, size, len(made))
        if self._metrics is not None:
            self._metrics.backup_at.set(latest or 0)
            self._metrics.backup_size.set(size or 0)

    @property
    def overdue(self) -> bool:
        """Whether the latest backup is too old; never before the first run of the job with these settings."""
        every, latest = self._applied_interval, self.summary.last_success
        if every is None:
            return False
        return is_overdue(None if latest is None else latest / SECOND, every, self._clock.wall() / SECOND)

    @property
    def _applied_interval(self) -> float | None:
        """The interval of backups in seconds; None until the job has run with the current settings."""
        settings = self._config().backup
        return settings.every if settings == self._applied else None

    @property
    def failed(self) -> str | None:
        """The error of the latest backup; None: it succeeded."""
        return self._failed

    async def run(self) -> None:
        """Make a backup if one is due, judged by the names of the existing files."""
        self.look()
        self._applied = self._config().backup
        every, now = self._applied.every, self._clock.wall() // SECOND
        if self._metrics is not None:
            self._metrics.backup_every.set(every or 0)
        if every is None or any(0 <= now - made < every for made in self.made().values()):
            return
        try:
            await self.make()
        except StorageError as error:
            raise StorageError(f"backup failed: {error.message}", hint=error.hint) from error

    def examine(self) -> Check:
        """Check the backups for `relay doctor`."""
        check = examine(self.made(), self._applied_interval, self._clock.wall() // SECOND, self._failed)
        if self._applied_interval is None and self._config().backup.every is not None:
            detail = "the first check of the backups is due within a minute"
            return msgspec.structs.replace(check, detail=detail)
        return check

    async def make(self) -> Backup:
        """Make a backup now, and delete the oldest beyond `[backup] keep`.

        If the disk has too little room, the oldest are deleted first, but never the latest.

        Raises:
            StorageError: the backup failed.
        """
        try:
            done = await self._make()
        except StorageError as error:
            self._failed = in_one_line(error)
            raise
        self._failed = None
        self.look()
        return done

    async def _make(self) -> Backup:
        folder, now = self.folder, self._clock.wall() // SECOND
        name = datetime.fromtimestamp(now, UTC).strftime(_NAME)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            floor = self._config().storage.free_after_backup
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
        """Delete the oldest backups if that makes enough room for a new one; keep the latest."""
        to_delete = []
        for path in oldest_first(self.made(), now)[:-1]:
            if lacking <= 0:
                break
            to_delete.append(path)
            lacking -= path.stat().st_blocks * 512
        if lacking > 0:
            return  # the backup reports the missing room; deleting would not help
        for path in to_delete:
            path.unlink()
            log.warning("%s was deleted to make room for a new backup", path.name)
