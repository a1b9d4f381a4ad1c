"""The keeper: a process that ends the PostgreSQL server of a demo and deletes its files, even after SIGKILL.

The parts of a demo, the keeper among them, read from a pipe whose other end only the demo has. When the demo
has ended, the pipe ends as well. Each folder is locked while its keeper runs, so the next demo recognizes and
deletes folders that have lost their keeper too.
"""

import asyncio
import fcntl
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from threading import Thread

import msgspec

from relay.demo.server import owners, stop_server, temporary_server
from relay.errors import RelayError

FOLDER = "hookferry-nodes-"
SERVER_FOLDER = "hookferry-postgres-"
SHORT = "/tmp"  # noqa: S108 - mkdtemp makes a private folder
"""Parent of the server's folder: the user `postgres` can enter it, and the path of a socket must be short."""

UNLOCKED = 10.0
"""Seconds within which a keeper locks the folder that it has created."""

KEEP = "from relay.demo.keeper import main; main()"
PATIENCE = 5.0  # seconds for nodes to end


class Kept(msgspec.Struct):
    """The first line of the keeper: the folders and the server that it started, or the error."""

    folder: str = ""
    url: str = ""  # of the server's database
    removed: list[str] = []  # folders of earlier demos
    error: str | None = None
    hint: str = ""
    pipe: int = 0  # file descriptor, the standard input of each node


# --- in the demo ----------------------------------------------------------------------------------


@asynccontextmanager
async def kept(*, with_server: bool) -> AsyncIterator[Kept]:
    """Start a keeper, and yield its folders and its server, which end with the context.

    Raises:
        RelayError: the server does not start.
    """
    reading, writing = os.pipe()
    end = open(writing, "wb", buffering=0)  # noqa: SIM115, ASYNC230, PTH123 - no file; closed below
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", KEEP, *(["server"] if with_server else []),
            stdin=reading, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None  # noqa: S101 - a pipe, see above
        try:
            line = await process.stdout.readline()
            if not line:
                raise RelayError("the demo failed: the process that keeps its server and its files has ended")
            first = msgspec.json.decode(line, type=Kept)
            if first.error is not None:
                raise RelayError(first.error, hint=first.hint)
            first.pipe = reading
            yield first
        finally:
            end.close()
            await process.wait()
    finally:
        os.close(reading)
        end.close()


# --- in a node ------------------------------------------------------------------------------------


def end_with_the_demo() -> None:
    """Kill this process when its standard input ends."""
    Thread(target=_kill_at_end, name="demo", daemon=True).start()


def _kill_at_end() -> None:
    _wait_for_end()
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_end() -> None:
    with suppress(OSError):
        while os.read(0, 1024):
            pass


# --- in the keeper --------------------------------------------------------------------------------


def main() -> None:
    """Keep a folder for nodes until the demo ends; with the argument "server", also a database server."""
    with ExitStack() as life:
        try:
            removed = remove_abandoned()
            # Nodes may still write to their folder while they end.
            nodes, url = life.enter_context(_folder(FOLDER, tempfile.gettempdir())), ""
            if "server" in sys.argv[1:]:
                place = life.enter_context(_folder(SERVER_FOLDER, SHORT))
                url = life.enter_context(temporary_server(place))
            first = Kept(str(nodes), url, removed)
        except RelayError as error:
            first = Kept(error=error.message, hint=error.hint)
        with suppress(BrokenPipeError):
            os.write(1, msgspec.json.encode(first) + b"\n")
        _wait_for_end()


def remove_abandoned() -> list[str]:
    """End the servers of demos whose keepers were killed, and delete their folders; returns the folders."""
    removed = []
    for parent in sorted({tempfile.gettempdir(), SHORT}):
        for folder in (*Path(parent).glob(f"{SERVER_FOLDER}*"), *Path(parent).glob(f"{FOLDER}*")):
            with suppress(OSError):  # not ours, or it has just been deleted
                status = folder.lstat()
                is_new = time.time() - status.st_ctime < UNLOCKED
                if is_new or not stat.S_ISDIR(status.st_mode) or status.st_uid not in owners():
                    continue
                with _locked(folder) as is_abandoned:
                    if is_abandoned:
                        stop_server(folder)
                        _remove(folder)
                        removed.append(str(folder))
    return removed


@contextmanager
def _folder(prefix: str, parent: str) -> Iterator[Path]:
    """Make and lock a folder, and remove it at the end."""
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    with _locked(folder):
        try:
            yield folder
        finally:
            _remove(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Lock a folder; yields False if another process has locked it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """Delete a folder, in which processes that are being killed may still write."""
    deadline = time.monotonic() + PATIENCE
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
