"""The servers under test, one process each: starts them, reads their CPU time, and terminates them by pid."""

import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

_LISTENS = re.compile(r"listens on http://([0-9.]+):([0-9]+)")
_START = 30.0  # seconds until a server listens
_STOP = 30.0  # seconds until it exits after SIGTERM


class Server(msgspec.Struct, frozen=True):
    """One running server."""

    pid: int
    address: tuple[str, int]

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def cpu(self) -> float:
        """Return the seconds of CPU that the process and all its threads have used.

        The resolution is 1 ns (glibc's `clock_getcpuclockid`); `/proc/PID/stat` has steps of 10 ms.
        """
        return time.clock_gettime(~self.pid << 3 | 2)

    def main_thread_cpu(self) -> float:
        """Return the seconds of CPU that the main thread has used, which runs the event loop."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]) / 1e9


@asynccontextmanager
async def python(log: Path, *arguments: str) -> AsyncIterator[Server]:
    """Run a Python program until the block ends; its address is read from its log.

    Raises:
        RuntimeError: the program exited, or did not listen within 30 s.
    """
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield Server(process.pid, await _address(process, log))
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(_STOP):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _address(process: asyncio.subprocess.Process, log: Path) -> tuple[str, int]:
    text = ""
    for _ in range(int(_START / 0.02)):
        text = log.read_text()  # noqa: ASYNC240 - no other task runs yet
        found = _LISTENS.search(text)
        if found is not None:
            return found[1], int(found[2])
        if process.returncode is not None:
            break
        await asyncio.sleep(0.02)
    raise RuntimeError(f"a server did not come up:\n{text}")
