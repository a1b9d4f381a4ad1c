"""An SQLite database without a daemon: read it, check it and copy it. Nothing here changes the file."""

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from relay.model import Backup, Check, Measured
from relay.store import Stop, StoredData
from relay.store.sqlite.backup import back_up
from relay.store.sqlite.doctor import Examined, examine
from relay.store.sqlite.measure import measure
from relay.store.sqlite.read_only import reading


class SqliteOffline:
    """`relay.store.OfflineStore` over an SQLite file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> AbstractAsyncContextManager[StoredData]:
        """See `OfflineStore.read`."""
        return reading(self._path)

    def measure(self, stop: Stop) -> Measured:
        """See `OfflineStore.measure`."""
        return measure(self._path, stop)

    def examine(
        self,
        stop: Stop,
        *,
        now: int,
        min_free: int = 0,
        destinations: Collection[str] | None = None,
        config: Path | None = None,
    ) -> list[Check]:
        """See `OfflineStore.examine`."""
        examined = Examined(
            path=self._path, now=now, min_free=min_free, destinations=destinations, config=config
        )
        return examine(examined, stop)

    def back_up(self, target: Path, stop: Stop, *, replace: bool = False, keep_free: int = 0) -> Backup:
        """See `OfflineStore.back_up`."""
        return back_up(self._path, target, stop, replace=replace, keep_free=keep_free)
