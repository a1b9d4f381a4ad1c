"""A PostgreSQL server for benchmarks: a new cluster in a temporary folder, with the server's own defaults."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import asyncpg
import click

USER = "postgres"
_TICK: float = 1 / os.sysconf("SC_CLK_TCK")
_READY = 60.0  # seconds until a new server answers
_STOP = 60.0  # seconds until a server has stopped


@contextmanager
def server(url: str | None, *settings: str) -> Iterator[str]:
    """Yield the URL of a database: the given one, or one of a new server that stops at the end.

    The new server has PostgreSQL's default settings, plus `settings` ("name=value").
    """
    if url is not None:
        yield url
        return
    binaries = _binaries()
    with TemporaryDirectory(prefix="bench-postgres-") as name:
        folder = Path(name)
        as_user = []
        if os.geteuid() == 0:  # the server refuses to run as root
            shutil.chown(folder, USER, USER)
            as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        make = [
            str(binaries / "initdb"),
            "-D",
            str(folder / "data"),
            "-U",
            USER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "-N",
        ]
        subprocess.run([*as_user, *make, "--locale=C.UTF-8"], check=True, capture_output=True, cwd="/")
        port = _free_port()
        options = ("listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", f"port={port}")
        flags = [part for option in (*options, *settings) for part in ("-c", option)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*as_user, str(binaries / "postgres"), "-D", str(folder / "data"), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        try:
            ready = [str(binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            _wait(ready, process, folder / "log")
            yield f"postgresql://{USER}@127.0.0.1:{port}/{USER}"
        finally:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(_STOP)


@asynccontextmanager
async def database(url: str, name: str) -> AsyncIterator[str]:
    """Create a database beside that of a URL, yield its URL, and drop it at the end."""
    await execute(url, f'CREATE DATABASE "{name}" TEMPLATE template0')
    try:
        yield urlsplit(url)._replace(path=f"/{name}").geturl()
    finally:
        await execute(url, f'DROP DATABASE "{name}" WITH (FORCE)')


class Processes:
    """All processes of a server on this machine."""

    def __init__(self, main: int) -> None:
        self._main = main

    @classmethod
    async def of(cls, url: str) -> "Processes":
        """Find the server of a database."""
        connection = await asyncpg.connect(url)
        try:
            backend = await connection.fetchval("SELECT pg_backend_pid()")
            return cls(int(_stat(backend)[1]))
        finally:
            await connection.close()

    def cpu(self) -> float:
        """Return the seconds of CPU that they have used so far, including those that have ended."""
        ended = [int(ticks) * _TICK for ticks in _stat(self._main)[13:15]]
        children = Path(f"/proc/{self._main}/task/{self._main}/children").read_text().split()
        return sum(ended) + sum(_cpu_of(pid) for pid in (self._main, *map(int, children)))


def _cpu_of(pid: int) -> float:
    try:
        return time.clock_gettime(~pid << 3 | 2)  # see bench.processes.Server.cpu
    except OSError:  # it has ended
        return 0.0


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _binaries() -> Path:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: int(each.parent.name))
    found = str(folders[-1] / "postgres") if folders else shutil.which("postgres")
    if found is None:
        raise click.ClickException("PostgreSQL is not installed: apt install postgresql, or give a URL")
    return Path(found).parent


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(ready: list[str], process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(int(_READY / 0.05)):
        if subprocess.run(ready, check=False).returncode == 0:
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise click.ClickException(f"PostgreSQL did not start:\n{log.read_text()}")


async def execute(url: str, sql: str) -> None:
    """Run a statement on a separate connection."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()
