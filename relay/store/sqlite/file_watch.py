"""Watches the database's files while they are open.

A deleted file stays open, and writing to it causes no error. So every two seconds the files at the paths are
compared with the open ones. If they differ, the writer stops, and everything committed is copied to a new
file beside the path before the daemon exits.

It also writes the high-water mark, and moves the log into the file after a second without writes.
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
from relay.store.sqlite.compact import empty_log
from relay.store.sqlite.disk import Disk
from relay.store.sqlite.files import Files
from relay.store.sqlite.mark import HIGHEST_SQL, Mark, mark_in, write_mark
from relay.store.sqlite.rescue import rescue, restore_command
from relay.store.sqlite.wal import log_of
from relay.store.sqlite.writer import DAMAGED, SqliteWriter

log = logging.getLogger("relay.store")

TICK = 0.25  # seconds
CHECK_EVERY = 2.0  # seconds between checks of the files
MARK_EVERY = 1.0  # seconds between two marks, at least
IDLE = 1.0  # seconds without a transaction after which the log is moved into the file
RESCUE_EVERY = 10.0  # seconds between attempts to make a rescue copy
RESCUE_EVERY_STOPPING = 1.0  # the same while the daemon stops
ALWAYS = 2**63 - 1
"""An argument of `Disk.release_reserve`: delete the reserve for a rescue copy, however much is free."""


def _is_damage(error: StorageError) -> bool:
    """Return whether a copy failed because the original is damaged."""
    cause = error.__cause__
    return cause is None or getattr(cause, "sqlite_errorcode", 0) & 0xFF in DAMAGED


class FileWatch:
    """Watches the files between `start` and `stop`, in parallel with the writer."""

    def __init__(
        self,
        path: Path,
        *,
        writer: SqliteWriter,
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
        self._moved = False  # whether the writer is halted because a path leads to another file
        self._copies: list[Path] = []  # rescue copies of everything committed
        self._given_up = False  # whether a rescue copy is impossible
        self._stopping = False
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._mark = Mark()
        self._is_mark_written = True  # whether the latest attempt to write the mark succeeded

    @property
    def saved(self) -> bool:
        """Whether a rescue copy of everything committed exists."""
        return bool(self._copies)

    def start(self) -> None:
        """Start the watch."""
        self._start_unless_running("file watch", self._run)

    async def stop(self) -> None:
        """Stop, after the writer. If the paths do not lead to the data, wait until a rescue copy exists."""
        saving = self._tasks.pop("rescue", None)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if saving is not None:
            saving.cancel()  # it may be waiting for its next attempt
            await asyncio.gather(saving, return_exceptions=True)
        if self._writer.broken is None:
            if (moved := self._files.moved()) is not None:
                self._moved = True
                self._halt(moved)
            elif (overwritten := self._files.overwritten()) is not None:
                self._halt(overwritten)
        if self._writer.broken is None:
            await self._write_mark()
            return
        self._stopping = True
        while not (self.saved or self._given_up):
            if not await self._rescue():
                await asyncio.sleep(RESCUE_EVERY_STOPPING)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        checked = marked = 0.0  # loop time
        written, since, changed = self._log_status(), loop.time(), True
        while True:
            now = loop.time()
            if (latest := self._log_status()) != written:
                written, since, changed = latest, now, True
            if now - checked >= CHECK_EVERY:
                checked = now
                self._check_paths()
            if self._writer.broken is None and (shortened := self._files.shortened()) is not None:
                self._halt(shortened)
            if self._writer.broken is not None:
                if not (self.saved or self._given_up):
                    self._start_unless_running("rescue", self._save)
            elif self._writer.failure is None:
                if changed and now - marked >= MARK_EVERY:
                    changed, marked = False, now
                    self._start_unless_running("mark", self._write_mark)
                if now - since >= IDLE and written[0]:
                    since = now  # a reader may prevent it: try again after the same time
                    self._start_unless_running("checkpoint", self._checkpoint)
            await asyncio.sleep(TICK)

    def _start_unless_running(self, name: str, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Start a task unless one with its name is running: work that hangs must not stop the watch."""
        task = self._tasks.get(name)
        if task is None or task.done():
            self._tasks[name] = asyncio.create_task(work(), name=f"store {name}")

    def _check_paths(self) -> None:
        """Compare the paths with the open files, and check the file's head between two transactions."""
        moved = self._files.moved()
        if moved is not None and self._writer.broken is None:
            self._moved = True
            self._halt(moved)
        elif moved is None and self._moved:
            self._moved = self._given_up = False
            self._writer.resume()
            log.warning("%s is in its place again: the relay accepts requests", self._path)
            self._drop_copies()
        elif self._writer.failure is None:
            self._start_unless_running("head", self._check_head)

    async def _check_head(self) -> None:
        async def check(_connection: aiosqlite.Connection) -> str | None:
            return self._files.overwritten()

        with suppress(StorageError):
            if (overwritten := await self._writer.call(check)) is not None:
                self._halt(overwritten)

    def _halt(self, why: str) -> None:
        log.critical("%s: no event is acknowledged any more, senders are refused with 503", why)
        self._writer.halt(why)

    async def _save(self) -> None:
        """Try to make a rescue copy until a copy exists or is no longer needed."""
        await self._writer.halted.wait()
        while not (self.saved or self._given_up) and self._writer.broken is not None:
            if not await self._rescue():
                await asyncio.sleep(RESCUE_EVERY)

    async def _rescue(self) -> bool:
        """Copy everything committed to a file beside the database; returns whether that worked."""
        try:
            done = await rescue(self._reader, self._path, self._clock.wall(), self._mark)
        except StorageError as error:
            lacks_room = isinstance(error, StorageUnavailableError)
            if lacks_room and self._disk.release_reserve(ALWAYS):
                return await self._rescue()
            # Waiting does not repair damage.
            self._given_up = _is_damage(error) or not (lacks_room or self._moved)
            log.critical("no rescue copy: %s%s", in_one_line(error), self._advice())
            return False
        self._copies.append(Path(done.path))
        log.critical(
            "rescue copy %s: all %d events and %d deliveries, %s, checked; to restore it, stop the relay"
            " and its sockets, run: %s; then start the relay",
            done.path,
            done.events,
            done.deliveries,
            render_size(done.bytes),
            restore_command(Path(done.path), self._path),
        )
        return True

    def _advice(self) -> str:
        if self._given_up:
            return ""
        if not self._stopping:
            return "; keep the relay running: it tries again until the copy succeeds"
        return (
            f"; the relay stops as soon as the copy succeeds: free space in {self._path.parent}"
            f" (kill -9 {os.getpid()} stops it at once, and all events are lost)"
        )

    def _drop_copies(self) -> None:
        """Delete the rescue copies after the file is back, because it has all their data."""
        for copy in self._copies:
            with suppress(OSError):
                copy.unlink()
                log.info("deleted %s, because %s has the same data", copy, self._path)
        self._copies = []

    async def _write_mark(self) -> None:
        """Write the high-water mark if the database has grown."""
        try:
            [row] = await self._reader.execute_fetchall(HIGHEST_SQL)
            if (mark := mark_in(row)) != self._mark:
                await asyncio.to_thread(write_mark, self._path, mark)
                self._mark, self._is_mark_written = mark, True
        except (OSError, sqlite3.Error) as error:
            level = logging.WARNING if self._is_mark_written else logging.DEBUG  # once, until it works again
            self._is_mark_written = False
            log.log(level, "the high-water mark of %s could not be written: %s", self._path, error)

    def _log_status(self) -> tuple[int, int]:
        """Return the log's size and time of change; both stay the same while nothing is written."""
        try:
            status = log_of(self._path).stat()
        except OSError:
            return 0, 0
        return status.st_size, status.st_mtime_ns

    async def _checkpoint(self) -> None:
        """Move the log into the file, because SQLite drops everything after a damaged byte of the log."""
        with suppress(StorageError, sqlite3.Error):  # the disk is full, or the relay stops
            await self._writer.call(empty_log)
