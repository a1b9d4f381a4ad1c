"""File descriptors: the limit is raised at start, connections fit it, and their lack is nobody's failure."""

import contextlib
import sys
from pathlib import Path

from daemon import SOURCES, Daemon, adorn, write_config
from wire import Wire, request


def limited(soft, hard):
    """Return the command of a daemon that starts with these limits of open files."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))"
    return (sys.executable, "-c", f"{code}; from relay.cli import main; main()", "serve")


def limits(pid):
    """Return a process's soft and hard limit of open files."""
    [line] = [
        each for each in Path(f"/proc/{pid}/limits").read_text().splitlines() if "Max open files" in each
    ]
    return tuple(int(word) for word in line.split()[3:5])


async def test_the_soft_limit_is_raised_to_the_hard_one(tmp_path):
    async with Daemon(write_config(tmp_path, SOURCES), limited(256, 4096)) as daemon:
        assert limits(daemon.process.pid) == (4096, 4096)


async def test_more_silent_connections_than_descriptors_keep_no_sender_out(tmp_path):
    async with (
        Daemon(write_config(tmp_path, SOURCES), limited(64, 256)) as daemon,
        contextlib.AsyncExitStack() as held,
    ):
        for number in range(400):
            await held.enter_async_context(await Wire.open(daemon.url))
            if number % 50 == 0:
                async with await Wire.open(daemon.url) as wire:
                    await wire.send(request("POST", "/v1/events", adorn(f"s{number}")))
                    assert (await wire.answer()).status == 200
        assert not [line for line in daemon.lines if "system resource" in line or "Too many open" in line]
