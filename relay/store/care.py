"""Watches the database's files while they are open.

Deleted files stay open, and writing to them goes on without an error. So every two seconds the files at the
paths are compared with the open ones. When they differ, nothing is acknowledged any more, and all that was
committed is copied to a new file beside the path before the daemon ends.

Besides, it notes how far the database is, and empties the log when nothing is written.
"""

import asyncio
import logging
import os
import sqlite3
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path

import aiosqlite

from relay.base.clock import Clock
from relay.base.units import render_size
from relay.errors import StorageError, StorageUnavailableError
from relay.process.logs import in_one_line
from relay.store.compact import empty_log
from relay.store.disk import Disk
from relay.store.files import Files
from relay.store.mark import HIGHEST_SQL, Mark, mark_in, write_mark
from relay.store.rescue import rescue, restoring
from relay.store.wal import log_of
from relay.store.writer import DAMAGED, Writer

log = logging.getLogger("relay.store")

TICK = 0.25  # seconds
LOOK_EVERY = 2.0  # seconds between looks at the files
MARK_EVERY = 1.0  # seconds, at least, between two marks
IDLE = 1.0  # seconds without a transaction after which the log is emptied
RESCUE_EVERY = 10.0  # seconds between tries to make a copy
RESCUE_EVERY_STOPPING = 1.0  # likewise, when the relay only waits for it to end
FOR_A_COPY = 2**63 - 1
"""Free bytes below which the reserve is deleted for a copy: always."""


def _tells_of_damage(error: StorageError) -> bool:
    """Return whether a copy failed because the original is damaged."""
    cause = error.__cause__
    return cause is None or getattr(cause, "sqlite_errorcode", 0) & 0xFF in DAMAGED


class Caretaker:
    """Runs between `start` and `stop`, beside the writer."""

    def __init__(
        self,
        path: Path,
        *,
        writer: Writer,
        reader: aiosqlite.Connection,
        files: Files,
        disk: Disk,
        clock: Clock,
    ) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader
        self._files = files
        self._disk = disk
        self._clock = clock
        self._moved = False  # whether the writer is halted because a path leads elsewhere
        self._copies: list[Path] = []  # that were made of all that was committed
        self._given_up = False  # no copy can be made
        self._stopping = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._mark = Mark()
        self._noted = True  # whether the mark could be written the last time

    @property
    def saved(self) -> bool:
        """Whether a copy of all committed data exists."""
        return bool(self._copies)

    def start(self) -> None:
        """Start."""
        self._once("caretaker", self._run)

    async def stop(self) -> None:
        """End, after the writer. If no file has the data, make a copy first."""
        saving = self._tasks.pop("rescue", None)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if saving is not None:
            saving.cancel()  # it may be between two tries
            await asyncio.gather(saving, return_exceptions=True)
        if self._writer.broken is None:
            if (moved := self._files.moved()) is not None:
                self._moved = True
                self._halt(moved)
            elif (overwritten := self._files.overwritten()) is not None:
                self._halt(overwritten)
        if self._writer.broken is None:
            await self._note()
            return
        self._stopping = True
        while not (self.saved or self._given_up):
            if not await self._rescue():
                await asyncio.sleep(RESCUE_EVERY_STOPPING)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        looked = noted = 0.0  # loop time
        written, since, fresh = self._written(), loop.time(), True
        while True:
            now = loop.time()
            if (latest := self._written()) != written:
                written, since, fresh = latest, now, True
            if now - looked >= LOOK_EVERY:
                looked = now
                self._look()
            if self._writer.broken is None and (shortened := self._files.shortened()) is not None:
                self._halt(shortened)
            if self._writer.broken is not None:
                if not (self.saved or self._given_up):
                    self._once("rescue", self._save)
            elif self._writer.failure is None:
                if fresh and now - noted >= MARK_EVERY:
                    fresh, noted = False, now
                    self._once("mark", self._note)
                if now - since >= IDLE and written[0]:
                    since = now  # once more after as long, should a reader be in the way
                    self._once("checkpoint", self._checkpoint)
            await asyncio.sleep(TICK)

    def _once(self, name: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Start a kind of work unless it is running: work that hangs must not stop the watch."""
        task = self._tasks.get(name)
        if task is None or task.done():
            self._tasks[name] = asyncio.create_task(work(), name=f"store {name}")

    def _look(self) -> None:
        """Compare the paths with the open files, and read the file's head between two transactions."""
        moved = self._files.moved()
        if moved is not None and self._writer.broken is None:
            self._moved = True
            self._halt(moved)
        elif moved is None and self._moved:
            self._moved = self._given_up = False
            self._writer.resume()
            log.warning("%s is back in its place: senders are accepted again", self._path)
            self._drop_copies()
        elif self._writer.failure is None:
            self._once("head", self._look_inside)

    async def _look_inside(self) -> None:
        async def look(_connection: aiosqlite.Connection) -> str | None:
            return self._files.overwritten()

        with suppress(StorageError):
            if (overwritten := await self._writer.errand(look)) is not None:
                self._halt(overwritten)

    def _halt(self, why: str) -> None:
        log.critical("%s: nothing is acknowledged any more, senders are refused with 503", why)
        self._writer.halt(why)

    async def _save(self) -> None:
        """Try to make a copy until one exists or none is needed."""
        await self._writer.halted.wait()
        while not (self.saved or self._given_up) and self._writer.broken is not None:
            if not await self._rescue():
                await asyncio.sleep(RESCUE_EVERY)

    async def _rescue(self) -> bool:
        """Copy all committed data to a file beside the database; returns whether that worked."""
        try:
            done = await rescue(self._reader, self._path, self._clock.wall(), self._mark)
        except StorageError as error:
            lacks_room = isinstance(error, StorageUnavailableError)
            if lacks_room and self._disk.throw_off(FOR_A_COPY):
                return await self._rescue()
            # Damage does not get better by waiting.
            self._given_up = _tells_of_damage(error) or not (lacks_room or self._moved)
            log.critical("no rescue copy: %s%s", in_one_line(error), self._advice())
            return False
        self._copies.append(Path(done.path))
        log.critical(
            "rescue copy %s: all %d events and %d deliveries, %s, checked; to restore it, stop the relay"
            " and its sockets, then: %s; then start the relay",
            done.path,
            done.events,
            done.deliveries,
            render_size(done.bytes),
            restoring(Path(done.path), self._path),
        )
        return True

    def _advice(self) -> str:
        if self._given_up:
            return ""
        if not self._stopping:
            return "; keep the relay running: it tries again until there is one"
        return (
            f"; the relay ends as soon as there is one: make room in {self._path.parent}"
            f" (kill -9 {os.getpid()} ends it at once, and all events are lost)"
        )

    def _drop_copies(self) -> None:
        """Delete the copies after the file came back, because it has all their data."""
        for copy in self._copies:
            with suppress(OSError):
                copy.unlink()
                log.info("%s was deleted: all that is in it is in %s", copy, self._path)
        self._copies = []

    async def _note(self) -> None:
        """Write the mark if the database has grown."""
        try:
            [row] = await self._reader.execute_fetchall(HIGHEST_SQL)
            if (mark := mark_in(row)) != self._mark:
                await asyncio.to_thread(write_mark, self._path, mark)
                self._mark, self._noted = mark, True
        except (OSError, sqlite3.Error) as error:
            level = logging.WARNING if self._noted else logging.DEBUG  # once, until it works again
            self._noted = False
            log.log(level, "the high-water mark of %s could not be written: %s", self._path, error)

    def _written(self) -> tuple[int, int]:
        """Return the log's size and time of change; a transaction without changes changes neither."""
        try:
            status = log_of(self._path).stat()
        except OSError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    async def _checkpoint(self) -> None:
        """Move the log into the file, because SQLite drops everything behind a damaged byte of the log."""
        with suppress(StorageError, sqlite3.Error):  # the disk is full, or the relay stops
            await self._writer.errand(empty_log)
