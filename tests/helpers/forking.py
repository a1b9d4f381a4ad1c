"""Python programs that start within milliseconds, because a process that has imported the relay forks them.

`relay serve` uses half a second of CPU for its imports, and the suite starts it hundreds of times. A forked
process gets its own arguments, environment, standard streams and signal handlers. `python forking.py FD` is
the process that forks; it answers requests on a socket, until the other end closes it.
"""

import asyncio
import atexit
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Never, Self

IMPORTED = ("relay.app", "relay.standby", "relay.cli.serve", "relay.ingest.fast", "uvloop")
"""The modules that the forking process imports, if they are installed."""


class Forked:
    """A forked Python program, with those parts of `asyncio.subprocess.Process` that the tests use."""

    pid: int
    returncode: int | None
    stderr: asyncio.StreamReader

    @staticmethod
    def may_run(command: Sequence[str]) -> bool:
        """Return whether a command runs this Python interpreter with code or a file."""
        return command[0] == sys.executable and (command[1] == "-c" or command[1].endswith(".py"))

    @classmethod
    async def start(
        cls, command: Sequence[str], environ: Mapping[str, str], stdout: int | None = None
    ) -> Self:
        """Start a command. Its stdin is empty, its stderr is a pipe."""
        self, loop = cls(), asyncio.get_running_loop()
        ours, theirs = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        try:
            request = {"arguments": command[1:], "environ": dict(environ)}
            self.pid = _Server.get().ask(request, (null, null if stdout is None else stdout, theirs))
        finally:
            os.close(theirs)
            os.close(null)
        self.returncode, self._ended = None, asyncio.Event()
        self._handle = os.pidfd_open(self.pid)
        threading.Thread(target=self._wait, args=(loop,), daemon=True).start()
        self.stderr = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: _Pipe(self.stderr), os.fdopen(ours, "rb", 0))
        return self

    async def wait(self) -> int:
        """Wait until the process ends, and return its exit code; if a signal ended it, minus its number."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the end in a thread: uvloop keeps a handle for a while after the last callback."""
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        poll.poll()
        with suppress(RuntimeError):  # the loop is closed, and no caller waits
            loop.call_soon_threadsafe(self._reap)

    def _reap(self) -> None:
        self.returncode = _Server.get().ask({"reap": self.pid})
        os.close(self._handle)
        self._ended.set()


class _Pipe(asyncio.StreamReaderProtocol):
    def eof_received(self) -> bool:
        """Close the pipe, as the subprocesses of asyncio do."""
        super().eof_received()
        return False


class _Server:
    """The process that forks, as the tests see it. One serves all tests of a process, and ends with it."""

    _only: "_Server | None" = None

    def __init__(self) -> None:
        self._door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        atexit.register(self.close)

    @classmethod
    def get(cls) -> "_Server":
        """Return the process, started at the first call."""
        if cls._only is None:
            cls._only = cls()
        return cls._only

    def ask(self, request: dict[str, Any], streams: Sequence[int] = ()) -> int:
        """Return the answer to a request: a process id, or an exit code."""
        socket.send_fds(self._door, [json.dumps(request).encode()], list(streams))
        answer = self._door.recv(100)
        assert answer, "the process that forks has ended"
        return int(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        self._door.close()
        self._process.wait(30)


# --- the process that forks -----------------------------------------------------------------------------


def _serve(door: socket.socket) -> None:
    """Answer requests: start a program, or return the exit code of one that has ended."""
    while True:
        message, streams, _, _ = socket.recv_fds(door, 2**18, 3)
        if not message:
            return
        request = json.loads(message)
        if "reap" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["reap"], 0)[1])
        elif (answer := os.fork()) == 0:
            door.close()
            _become(streams, request["environ"])
            _run(request["arguments"])
        for stream in streams:
            os.close(stream)
        door.send(json.dumps(answer).encode())


def _become(streams: Sequence[int], environ: dict[str, str]) -> None:
    """Set up a forked process like a new one."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    is_terminal = os.isatty(1)
    sys.stdout = os.fdopen(1, "w", 1 if is_terminal else -1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environ)
    gc.unfreeze()


def _run(arguments: Sequence[str]) -> Never:
    """Run a program as `python ARGUMENTS` does, and end as it ends."""
    first, *rest = arguments
    if first == "-c":
        code, *rest = rest
    else:
        sys.path[0] = str(Path(first).parent)
        code = compile(Path(first).read_text(), first, "exec")
    sys.argv = [first, *rest]
    status = 0
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:  # noqa: BLE001 - the last place that can print it
        traceback.print_exc()
        status = 1
    # An interpreter also frees all modules, which would take longer than the start.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path[0] = ""
    for name in IMPORTED:
        with suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    gc.collect()
    gc.freeze()  # otherwise each process would copy the memory that its collector touches
    _serve(socket.socket(fileno=int(sys.argv[1])))
