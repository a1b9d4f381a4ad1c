"""A command on a terminal of its own: a pseudo-terminal of a known size, and what is drawn on it."""

import asyncio
import fcntl
import os
import signal
import struct
import sys
import termios
from typing import Self

from support import until

RELAY = (sys.executable, "-c", "from relay.cli import main; main()")
_UNSET = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "RELAY_SOCKET")


class Terminal:
    """A running `relay …` with stdout on a terminal, and stderr beside it."""

    def __init__(self, *args, rows=24, columns=200, **environment) -> None:
        self._args = [str(arg) for arg in args]
        self._size = (rows, columns)
        inherited = {name: value for name, value in os.environ.items() if name not in _UNSET}
        self._environment = {**inherited, "TERM": "xterm", **environment}
        self.out = ""
        self.err = ""

    async def __aenter__(self) -> Self:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *self._size, 0, 0))
        self.process = await asyncio.create_subprocess_exec(
            *RELAY,
            *self._args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=theirs,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        os.close(theirs)
        os.set_blocking(self._ours, False)
        self._over = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._ours, self._read)
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(self, *_) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.exit()
        os.close(self._ours)

    async def shows(self, text, seconds=15.0):
        """Wait until it has been drawn."""
        await until(lambda: text in self.out, seconds)

    async def says(self, text, seconds=15.0):
        """Wait until it stands on stderr."""
        await until(lambda: text in self.err, seconds)

    async def interrupt(self):
        """Press Ctrl-C, and return the exit code."""
        self.process.send_signal(signal.SIGINT)
        return await self.exit()

    async def exit(self):
        """Wait for the end and return the exit code."""
        async with asyncio.timeout(15):
            await self._over.wait()
            await self._listening
            return await self.process.wait()

    def _read(self) -> None:
        try:
            data = os.read(self._ours, 2**16)
        except OSError:  # Linux says so when nobody has the other side open any more
            data = b""
        self.out += data.decode()
        if not data:
            asyncio.get_running_loop().remove_reader(self._ours)
            self._over.set()

    async def _listen(self) -> None:
        while data := await self.process.stderr.read(2**16):
            self.err += data.decode()
