"""100,000 deliveries wait for a dead destination, which then recovers: ramped, in order, nothing lost.

Run `python -m tests.torture.backlog --events 100000`. `--variant unordered` must find keys out of order,
`--variant headlong`, whose circuit never opens, useless attempts and no ramp.
"""

import asyncio
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import click
from aiohttp import web
from daemons import SOURCES, Daemon, adorn, write_config
from stores import rows_of
from wire import Wire, request

from relay.process.sockets import bind

SENDERS = 16
CONCURRENCY = 8
FAILURES = 10  # in a row, until the circuit opens
PAGE_CACHE = 64 * 2**20  # bytes of the file that SQLite keeps; full at 110,000 events, then memory is level
MOST_GROWTH = 32 * 2**20  # bytes of resident memory beyond that
SLOW = 100  # requests that the receiver answers slowly, so that a ramp is visible

DESTINATION = """\
[destinations.crm]
url = "{url}"
events = ["*"]
allow_private = true
secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
retry = {{ schedule = {schedule} }}
concurrency = {concurrency}
{more}
"""
ORDER = 'order_by = "subject"\n'
CIRCUIT = f'circuit = {{ failures = {FAILURES}, probe = "0.5s", max_probe = "1s" }}\n'
VARIANTS = {
    "honest": ORDER + CIRCUIT,
    "unordered": CIRCUIT,
    "headlong": ORDER + "circuit = { failures = 1000000 }\n",
}


@dataclass
class Findings:
    """Lost, repeated and reordered deliveries, attempts and memory of a backlog."""

    events: int = 0
    pending: int = 0  # when the destination came back
    lost: int = 0  # acknowledged, and never arrived
    repeated: int = 0  # arrived more than once
    disordered: int = 0  # keys that did not arrive in the order of acceptance
    spent: int = 0  # attempts that deliveries spent on a dead destination
    rushed: int = 0  # arrivals before the ramp allowed them
    unbalanced: int = 0  # checks of the ledger that did not balance
    grown: int = 0  # bytes of resident memory while the backlog grew, after its first tenth
    drained: int = 0  # bytes of resident memory while it drained, at most, above what it was before
    filling: float = 0.0  # seconds
    draining: float = 0.0

    @property
    def fine(self) -> bool:
        """Return whether every check passed."""
        broken = (self.lost, self.repeated, self.disordered, self.rushed, self.unbalanced)
        few = self.spent < FAILURES + CONCURRENCY
        return not any(broken) and few and self.grown + self.drained < PAGE_CACHE + MOST_GROWTH

    def __str__(self) -> str:
        return (
            f"{self.events} events in {self.filling:.1f}s, {self.pending} pending at the recovery, "
            f"drained in {self.draining:.1f}s ({self.events / max(self.draining, 0.001):,.0f}/s); "
            f"{self.lost} lost, {self.repeated} repeated, {self.disordered} keys out of order, "
            f"{self.spent} attempts spent while it was dead, {self.rushed} requests before the ramp allowed "
            f"them, {self.unbalanced} checks of the ledger that did not balance; "
            f"memory {self.grown / 2**20:+.1f} MiB while it grew, "
            f"{self.drained / 2**20:+.1f} MiB while it drained"
        )


@dataclass
class Recovering:
    """A receiver that is dead at first: nobody listens on its port. It stores only numbers."""

    arrived: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # by subject
    requests: int = 0
    answered: int = 0
    rushed: int = 0

    async def __aenter__(self) -> Self:
        self.sock = bind("127.0.0.1:0", "the receiver")
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}/hook"
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        self.sock.close()

    async def recover(self) -> None:
        """Listen from now on."""
        await web.SockSite(self._runner, self.sock, backlog=1024).start()

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        event = json.loads(await request.read())
        self.requests += 1
        # The probe alone; then rounds of 1, 2, 4, 8: n answers allow the greatest power of two up to n.
        allowed = 1 << max(1, self.answered).bit_length() - 1
        self.rushed += self.requests - self.answered > min(allowed, CONCURRENCY)
        self.arrived[event["subject"]].append(event["data"]["n"])
        if self.requests <= SLOW:
            await asyncio.sleep(0.005)  # a slow start, so that the ramp is visible
        self.answered += 1
        return web.Response()


async def torture(
    folder: Path,
    events: int,
    *,
    variant: str = "honest",
    report: Callable[[str], None] = lambda _line: None,
) -> Findings:
    """Let `events` events pile up before a dead destination, then let it recover."""
    findings = Findings(events=events)
    keys = max(SENDERS, events // 100)
    async with Recovering() as receiver:
        schedule = ["0.02s"] * 2000 if variant == "headlong" else ["0.2s"] * 20
        crm = DESTINATION.format(
            url=receiver.url, schedule=schedule, concurrency=CONCURRENCY, more=VARIANTS[variant]
        )
        async with Daemon(write_config(folder, SOURCES, crm)) as daemon:
            began = time.monotonic()
            await _fill(daemon, keys, 0, events // 10)
            early = daemon.resident()
            await _fill(daemon, keys, events // 10, events)
            before = daemon.resident()
            findings.filling, findings.grown = time.monotonic() - began, before - early
            findings.pending = (await _books(daemon, findings))["pending"]
            report(f"{findings.pending} pending after {findings.filling:.1f}s")
            began = time.monotonic()
            await receiver.recover()
            while (books := await _books(daemon, findings))["pending"]:
                findings.drained = max(findings.drained, daemon.resident() - before)
                report(f"{books['pending']} pending")
                await asyncio.sleep(0.2)  # another process's progress
            findings.draining = time.monotonic() - began
            await daemon.stop()
        findings.rushed = receiver.rushed
    query = "SELECT sum(attempts) - count(*) FROM deliveries"
    [(findings.spent,)] = rows_of(folder / "config.toml", query)
    _compare(receiver.arrived, keys, events, findings)
    return findings


async def _fill(daemon: Daemon, keys: int, first: int, last: int) -> None:
    """Send events `first` to `last`; no two senders share a key, so the order of each key is known."""

    async def work(sender: int) -> None:
        async with await Wire.open(daemon.url) as wire:
            for number in range(first, last):
                if number % keys % SENDERS == sender:
                    body = adorn(f"session {number % keys}", payload={"n": number})
                    await wire.send(request("POST", "/v1/events", body))
                    assert (await wire.answer()).json["event_id"]

    await asyncio.gather(*(work(sender) for sender in range(SENDERS)))


async def _books(daemon: Daemon, findings: Findings) -> dict[str, Any]:
    [books] = (await daemon.operator("GET", "/api/destinations"))["items"]
    ends = ("delivered", "dead", "expired", "cancelled", "pending")
    findings.unbalanced += books["created"] != sum(books[end] for end in ends)
    return books


def _compare(arrived: dict[str, list[int]], keys: int, events: int, findings: Findings) -> None:
    for key in range(keys):
        expected, found = list(range(key, events, keys)), arrived[f"session {key}"]
        findings.lost += len(set(expected) - set(found))
        findings.repeated += len(found) - len(set(found))
        findings.disordered += found != sorted(found)


@click.command()
@click.option("--events", default=100_000, show_default=True)
@click.option("--variant", type=click.Choice(list(VARIANTS)), default="honest", show_default=True)
def main(events: int, variant: str) -> None:
    """Pile events up before a dead destination, let it recover, and print the findings."""
    with tempfile.TemporaryDirectory() as folder:
        findings = asyncio.run(torture(Path(folder), events, variant=variant, report=click.echo))
    click.echo(findings)
    sys.exit(0 if findings.fine else 1)


if __name__ == "__main__":
    main()
