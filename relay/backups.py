"""Backups in their time: so many are kept, and none is thrown away before a newer one has been checked."""

import logging
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from relay.clock import SECOND, Clock, rfc3339
from relay.config.model import Config
from relay.errors import StorageError
from relay.logs import in_one_line
from relay.model import Backup, Measured
from relay.store import Store
from relay.units import render_size

log = logging.getLogger("relay.backups")


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


class Backups:
    """Goes by `[backup]`, whatever it says at the moment."""

    every = 60.0  # seconds between looks at whether one is due

    def __init__(self, store: Store, clock: Clock, config: Callable[[], Config]) -> None:
        self._store = store
        self._clock = clock
        self._config = config

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
        if every is None or any(0 <= now - made < every for made in self.made().values()):
            return
        try:
            await self.make()
        except StorageError as error:
            log.error("no backup: %s", in_one_line(error))  # noqa: TRY400 - said in words; the next look tries again

    async def make(self) -> Backup:
        """Make a backup now, and let go of the oldest where there are more than `[backup] keep`.

        Raises:
            StorageError: it could not be made; none was let go of.
        """
        folder, now = self.folder, self._clock.wall() // SECOND
        name = datetime.fromtimestamp(now, UTC).strftime(_NAME)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            done = await self._store.backup(folder / name)
            for old in list(self.made())[: -self._config().backup.keep]:
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
