"""Take the daemon's file descriptors away under load: nothing is lost, and no receiver is blamed for it.

The limit of open files is lowered below what is open, so that every new socket fails, while events come in
over a connection that is open already; then it is raised again. Run `python -m tests.torture.descriptors`;
`--variant blames-receivers` must find attempts that failed.
"""

import asyncio
import itertools
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

import click
from daemons import SERVE, SOURCES, Daemon, Recorder, adorn, destination, write_config
from stores import rows_of
from support import until
from wire import Wire, request

EVENTS = 60
KNOCKS_A_SECOND = 20  # new senders while there is no descriptor for them
LINES_A_SECOND = 3.0  # of the log, on average: one for deliveries, one for senders, and few others
QUIET = 10  # lines at start and for other things

VARIANTS: dict[str, Sequence[str]] = {
    "honest": SERVE,
    "without-uvloop": (
        sys.executable,
        "-c",
        "import sys; sys.modules['uvloop'] = None; from relay.cli import main; main()",
        "serve",
    ),
    "blames-receivers": (sys.executable, str(Path(__file__).with_name("blames_receivers.py")), "serve"),
}


@dataclass
class Findings:
    """Effects of a lack of descriptors."""

    seconds: float = 0.0  # duration
    held: int = 0  # deliveries at its end that waited
    acknowledged: set[str] = field(default_factory=set)
    undelivered: set[str] = field(default_factory=set)
    failed: int = 0  # attempts
    opened: int = 0  # circuits
    lines: int = 0  # of the log
    answers_after: bool = False  # whether new senders are accepted again

    @property
    def fine(self) -> bool:
        """Return whether nothing was lost, no receiver was blamed, and the log stayed short."""
        quiet = self.lines <= QUIET + self.seconds * LINES_A_SECOND
        return self.answers_after and quiet and not (self.undelivered or self.failed or self.opened)

    def __str__(self) -> str:
        return (
            f"{self.seconds:.1f} s without descriptors: {len(self.acknowledged)} acknowledged, "
            f"{self.held} held, {len(self.undelivered)} undelivered, {self.failed} attempts failed, "
            f"{self.opened} circuits opened, {self.lines} lines; "
            f"new senders {'are' if self.answers_after else 'are NOT'} heard again"
        )


async def torture(folder: Path, seconds: float, *, variant: str = "honest", events: int = EVENTS) -> Findings:
    """Let the daemon work for some seconds without a free descriptor, then give it some."""
    findings = Findings()
    async with Recorder() as receiver, AsyncExitStack() as stack:
        more = 'concurrency = 8\ntimeout = "1h"\ncircuit = { failures = 3, probe = "0.2s" }'
        config = write_config(folder, SOURCES, destination("crm", receiver.url, more))
        daemon = await stack.enter_async_context(Daemon(config, VARIANTS[variant]))
        sender = await stack.enter_async_context(await Wire.open(daemon.url))
        await _send(sender, findings)
        await until(lambda: len(receiver.arrived) == 1)
        pid, before = daemon.process.pid, len(daemon.lines)
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        receiver.open.clear()  # its one connection is in use while the others are wanted
        began = time.monotonic()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (_lowest_free(pid), limits[1]))
        knocking = asyncio.create_task(_knock(daemon.url))
        for _ in range(events):
            await _send(sender, findings)
        await asyncio.sleep(seconds)  # the requested duration
        knocking.cancel()
        findings.held = _count(folder, "SELECT count(*) FROM deliveries WHERE state = 'pending'")
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        findings.seconds = time.monotonic() - began
        receiver.open.set()
        async with asyncio.timeout(20):
            findings.answers_after = await _is_heard(daemon.url)
        with suppress(AssertionError):
            await until(lambda: findings.acknowledged <= set(receiver.ids), 20)
        findings.undelivered = findings.acknowledged - set(receiver.ids)
        findings.lines = len(daemon.lines) - before
        findings.opened = daemon.output.count("circuit opened")
        await daemon.stop()
    findings.failed = _count(folder, "SELECT count(*) FROM attempts WHERE result <> 'ok'")
    return findings


def _lowest_free(pid: int) -> int:
    """Return the number that a process's next descriptor would have."""
    used = {int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir()}
    return next(number for number in itertools.count() if number not in used)


async def _send(sender: Wire, findings: Findings) -> None:
    await sender.send(request("POST", "/v1/events", adorn()))
    findings.acknowledged.add((await sender.answer()).json["event_id"])


async def _knock(url: str) -> None:
    """Connect again and again, as refused senders do."""
    async with AsyncExitStack() as stack:
        while True:
            with suppress(OSError):
                await stack.enter_async_context(await Wire.open(url))
            await asyncio.sleep(1 / KNOCKS_A_SECOND)


async def _is_heard(url: str) -> bool:
    while True:
        with suppress(OSError, asyncio.IncompleteReadError):
            async with await Wire.open(url) as wire:
                await wire.send(request("GET", "/health"))
                return (await wire.answer()).status == HTTPStatus.OK
        await asyncio.sleep(0.1)


def _count(folder: Path, query: str) -> int:
    return int(rows_of(folder / "config.toml", query)[0][0])


@click.command()
@click.option("--seconds", default=30.0, show_default=True)
@click.option("--variant", type=click.Choice(list(VARIANTS)), default="honest", show_default=True)
def main(seconds: float, variant: str) -> None:
    """Take the daemon's descriptors away, and print the findings."""
    with tempfile.TemporaryDirectory() as folder:
        findings = asyncio.run(torture(Path(folder), seconds, variant=variant))
    click.echo(findings)
    sys.exit(0 if findings.fine else 1)


if __name__ == "__main__":
    main()
