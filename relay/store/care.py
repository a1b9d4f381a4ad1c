"""Looks after the database's files while they are open.

Deleted files stay open, and writing to them goes on without an error. So every two seconds the files at the
paths are compared with the open ones. When they differ, nothing is acknowledged any more, and all that was
committed is copied to a new file beside the path before the daemon ends.

Besides, it notes how far the database is, and empties the log when nothing is written.
"""

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path

import aiosqlite

from relay.clock import Clock
from relay.errors import StorageError
from relay.logs import in_one_line
from relay.store.compact import empty_log
from relay.store.files import Files
from relay.store.mark import HIGHEST_SQL, Mark, mark_in, write_mark
from relay.store.rescue import rescue, restoring
from relay.store.wal import log_of
from relay.store.writer import Writer
from relay.units import render_size

log = logging.getLogger("relay.store")

TICK = 0.25  # seconds
LOOK_EVERY = 2.0  # seconds between looks at the files
MARK_EVERY = 1.0  # seconds, at least, between two marks
IDLE = 1.0  # seconds without a transaction after which the log is emptied
RESCUE_EVERY = 10.0  # seconds between tries to make a copy


class Caretaker:
    """Works between `start` and `stop`, beside the writer."""

    def __init__(
        self, path: Path, *, writer: Writer, reader: aiosqlite.Connection, files: Files, clock: Clock
    ) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader
        self._files = files
        self._clock = clock
        self._moved = False  # whether the writer is halted because a path leads elsewhere
        self._saved = False  # whether there is a copy of all that was committed
        self._given_up = False  # no copy can be made
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._mark = Mark()

    def start(self) -> None:
        """Begin."""
        self._once("caretaker", self._run)

    async def stop(self) -> None:
        """End, after the writer; where nothing else has the data, a copy is made first."""
        saving = self._tasks.pop("rescue", None)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if saving is not None:
            saving.cancel()  # it may be between two tries
            await asyncio.gather(saving, return_exceptions=True)
        if self._writer.broken is None and (moved := self._files.moved()) is not None:
            self._halt(moved)
        if self._writer.broken is None:
            await self._note()
        elif not (self._saved or self._given_up):
            await self._rescue()

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
            if self._writer.broken is not None:
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
        """Begin work of a kind, unless it is under way: whatever hangs must not keep us from looking."""
        task = self._tasks.get(name)
        if task is None or task.done():
            self._tasks[name] = asyncio.create_task(work(), name=f"store {name}")

    def _look(self) -> None:
        """Compare the paths with what is open, and look into the file between two transactions."""
        moved = self._files.moved()
        if moved is not None and self._writer.broken is None:
            self._moved = True
            self._halt(moved)
        elif moved is None and self._moved:
            self._moved = self._saved = False
            self._writer.resume()
            log.warning("%s is back in its place: senders are accepted again", self._path)
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
        """Try to make a copy until there is one, or until it is not needed any more."""
        await self._writer.halted.wait()
        while not self._saved and self._writer.broken is not None:
            if await self._rescue():
                return
            if not self._moved:
                self._given_up = True  # what is damaged does not get better by waiting
                return
            await asyncio.sleep(RESCUE_EVERY)

    async def _rescue(self) -> bool:
        """Copy all that was committed to a file beside the database; return whether it is there."""
        try:
            done = await rescue(self._reader, self._path, self._clock.wall(), self._mark)
        except StorageError as error:
            advice = "; keep the relay running: it tries again until there is one" if self._moved else ""
            log.critical("no rescue copy: %s%s", in_one_line(error), advice)
            return False
        self._saved = True
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

    async def _note(self) -> None:
        """Write the mark where the database has got further."""
        try:
            [row] = await self._reader.execute_fetchall(HIGHEST_SQL)
            if (mark := mark_in(row)) != self._mark:
                await asyncio.to_thread(write_mark, self._path, mark)
                self._mark = mark
        except (OSError, sqlite3.Error) as error:
            log.warning("the high-water mark of %s could not be written: %s", self._path, error)

    def _written(self) -> tuple[int, int]:
        """Return the log's size and when it was written; a transaction without changes leaves both."""
        try:
            status = log_of(self._path).stat()
        except OSError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    async def _checkpoint(self) -> None:
        """Move the log into the file: what is in the log is lost behind the first damaged byte of it."""
        with suppress(StorageError, sqlite3.Error):  # the disk is full, or the relay stops
            await self._writer.errand(empty_log)
