"""The path of one event through the code: `python -m bench.trace [--list]` prints its files and functions.

Starts the daemon in this process, sends warm-up events, and then traces single events from the first byte in
to the recorded attempt: one source, one destination, success. Counts named functions of `relay/` and
`plugins/` in every thread; a comprehension or lambda counts for the function around it. A function counts if
all traces have it, so that a periodic job that happens to run does not, even on a busy machine.
"""

import asyncio
import contextlib
import sqlite3
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple

import click

from bench.loop import run
from bench.receiver import listening
from bench.subject import REQUEST, write_config
from relay.app import Addresses, App
from relay.plugin_loading.loader import load

WARM_UP = 20  # events before the first trace
TRACES = 9
DEADLINE = 10.0  # seconds for one event
SETTLED = 0.02  # seconds of tracing after the event's attempt is visible in the database

_ROOT = Path(__file__).parents[1]
_PACKAGES = tuple(str(_ROOT / name) + "/" for name in ("relay", "plugins"))


class Function(NamedTuple):
    """A function, by its file and name."""

    file: str  # "relay/app.py"
    name: str  # qualified: "App.run"


class Way(NamedTuple):
    """The functions that all traces have in common."""

    functions: tuple[Function, ...]  # by file, then by name
    calls: int  # from a function of one file to one of another, median over the traces

    @property
    def files(self) -> tuple[str, ...]:
        """The files of all functions."""
        return tuple(dict.fromkeys(function.file for function in self.functions))


class Tracer:
    """Records the calls of every thread with a profile function, between `install` and `remove`."""

    def __init__(self) -> None:
        self.traces: list[tuple[set[Function], int]] = []
        self._on = False
        self._seen: set[Function] = set()
        self._crossings = 0

    def install(self) -> None:
        """Trace this thread and all that start later."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def remove(self) -> None:
        """Stop tracing."""
        self._on = False
        threading.setprofile(None)
        sys.setprofile(None)

    def begin(self) -> None:
        """Begin the trace of one event."""
        self._seen, self._crossings, self._on = set(), 0, True

    def end(self) -> None:
        """End the trace and keep it."""
        self._on = False
        self.traces.append((self._seen, self._crossings))

    def way(self) -> Way:
        """Return the functions that all traces have in common."""
        common = sorted(set.intersection(*(seen for seen, _ in self.traces)))
        calls = sorted(crossings for _, crossings in self.traces)[len(self.traces) // 2]
        return Way(tuple(common), calls)

    def _profile(self, frame: FrameType, event: str, _argument: Any) -> None:
        if not self._on or event != "call" or (callee := _file_of(frame)) is None:
            return
        name = frame.f_code.co_qualname
        if name.endswith(">"):  # <lambda>, <listcomp>, <genexpr>
            return
        self._seen.add(Function(callee, name))
        caller = frame.f_back
        while caller is not None and _file_of(caller) is None:
            caller = caller.f_back
        if caller is not None and _file_of(caller) != callee:
            self._crossings += 1


def _file_of(frame: FrameType) -> str | None:
    """Return the file of a frame, relative to the repository; None for other code."""
    path = frame.f_code.co_filename
    return str(Path(path).relative_to(_ROOT)) if path.startswith(_PACKAGES) else None


async def trace() -> Way:
    """Trace events through a daemon in this process."""
    tracer = Tracer()
    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        async with listening() as url:
            app = App(load(write_config(folder, url)))
            started: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
            tracer.install()
            life = asyncio.create_task(app.run(started.set_result))
            try:
                both: tuple[asyncio.Future[Any], ...] = (life, started)
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if life.done():
                    await life
                await _send_events(tracer, started.result().public, folder / "relay.db")
            finally:
                tracer.remove()
                app.stopping.set()
                await life
    return tracer.way()


async def _send_events(tracer: Tracer, url: str, database: Path) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.closing(writer), contextlib.closing(sqlite3.connect(database)) as db:
        for number in range(WARM_UP + TRACES):
            traced = number >= WARM_UP
            if traced:
                tracer.begin()
            async with asyncio.timeout(DEADLINE):
                writer.write(REQUEST)
                head = await reader.readuntil(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 200 "):
                    raise RuntimeError(f"the relay answered {head!r}")
                [length] = [
                    line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
                ]
                await reader.readexactly(int(length.partition(b":")[2]))
                while db.execute("SELECT count(*) FROM attempts").fetchone()[0] <= number:  # noqa: ASYNC110 - SQLite has no notification
                    await asyncio.sleep(0.001)
                await asyncio.sleep(SETTLED)
            if traced:
                tracer.end()


@click.command()
@click.option("--list", "listed", is_flag=True, help="Print every function below its file.")
def main(*, listed: bool) -> None:
    """Count the files and functions that one event runs through."""
    way = run(trace())
    for file in way.files:
        names = [function.name for function in way.functions if function.file == file]
        print(f"  {file:<44}{len(names):>4}")
        for name in names if listed else ():
            print(f"      {name}")
    print(f"{len(way.files)} files, {len(way.functions)} functions, {way.calls} calls across files")


if __name__ == "__main__":
    main(prog_name="python -m bench.trace")
