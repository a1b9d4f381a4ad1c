"""Fill the disk under the daemon in a loop, under load, with kills: nothing is lost, and the relay recovers.

Each round fills a small file system to the last byte, kills the daemon in every second round and starts it
on the full disk, and gives the room back. Run `python -m tests.torture.disk --rounds 100` as root, who may
mount; the harness must detect the other variants.
"""

import asyncio
import itertools
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

import click
from daemons import SERVE, SOURCES, Daemon, adorn, destination, write_config
from machines import SmallDisk, small_disk
from support import until
from wire import Wire, exchange, request

from torture.kill import IN_FLIGHT, SENDERS, Counting

SIZE = 24 * 2**20  # bytes of the file system
FLOOR = 2**20  # bytes, `min_free_disk` of `daemon.HEAD`
HEALED = 5.0  # seconds
LONGEST_FULL = 0.5  # seconds of load on a full disk
DRAIN = 60.0
BIGGEST = 200_000  # bytes of a body, most are small

HERE = Path(__file__).parent
VARIANTS: dict[str, Sequence[str]] = {
    "honest": SERVE,
    "acks-early": (sys.executable, str(HERE / "acks_early.py"), "serve"),
    **{
        name: (sys.executable, str(HERE / "broken_disk.py"), name, "serve")
        for name in ("gives-up", "stays-full", "no-floor")
    },
}


@dataclass
class Findings:
    """Lost and repeated events, odd answers and failed starts on full disks."""

    rounds: int = 0
    acknowledged: set[str] = field(default_factory=set)
    refused: int = 0
    undelivered: set[str] = field(default_factory=set)  # acknowledged, and never arrived
    odd: list[str] = field(default_factory=list)  # answers that are neither a 200 nor a 503 in the envelope
    down: list[str] = field(default_factory=list)  # starts on a full disk that did not come up
    slow: int = 0  # times that no event was accepted within 5 s of room
    worst: float = 0.0  # seconds until one was
    least: int = SIZE  # free bytes that the relay left
    repeated: int = 0  # deliveries made again beyond what was in flight at the kills
    corrupt: list[str] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """Return whether every check passed."""
        bad = self.undelivered or self.odd or self.down or self.slow or self.corrupt
        return not bad and self.repeated <= 0 and self.least >= FLOOR

    def __str__(self) -> str:
        return (
            f"{self.rounds} full disks: {len(self.acknowledged)} acknowledged, {self.refused} refused, "
            f"{len(self.undelivered)} undelivered, {len(self.odd)} odd answers, "
            f"{len(self.down)} starts failed, {self.slow} healed late (the slowest in {self.worst:.1f} s), "
            f"{len(self.corrupt)} corrupt files, {max(0, self.repeated)} repeated too often, "
            f"at least {self.least} bytes left free"
        )


async def torture(
    folder: Path,
    rounds: int,
    *,
    seed: int,
    variant: str = "honest",
    drain: float = DRAIN,
    report: Callable[[Findings], None] = lambda _findings: None,
) -> Findings:
    """Fill the disk in `rounds` rounds, then let the daemon deliver the rest."""
    rand, findings, kills = random.Random(seed), Findings(), 0
    state = folder / "state"
    with small_disk(state, SIZE) as disk:
        async with Counting() as receiver:
            crm = destination("crm", receiver.url, f"concurrency = {IN_FLIGHT}")
            kept = '[retention]\nevents = "1s"\nattempts = "1s"\n'
            daemon = Daemon(write_config(folder, SOURCES, crm, kept), VARIANTS[variant])
            await daemon.start()
            try:
                await daemon.ready()
                await _overfill(daemon, disk, findings)
                for findings.rounds in range(1, rounds + 1):
                    senders = [asyncio.create_task(_send(daemon, rand, findings)) for _ in range(SENDERS)]
                    await asyncio.sleep(
                        rand.uniform(0, LONGEST_FULL)
                    )  # a random moment, nothing is waited for
                    disk.fill()
                    await asyncio.sleep(rand.uniform(0, LONGEST_FULL))
                    if findings.rounds % 2:
                        kills += 1
                        await daemon.end()
                        # A start has to make these, and there is no room for them.
                        for name in ("relay.db-shm", "relay.db.ballast"):
                            (state / name).unlink(missing_ok=True)
                        disk.fill()
                        if not await _started(daemon, findings):
                            return findings
                    for sender in senders:
                        sender.cancel()
                    await asyncio.gather(*senders, return_exceptions=True)
                    disk.clear()
                    if not await _healed(daemon, findings):
                        return findings
                    report(findings)
                with suppress(AssertionError):
                    await until(lambda: findings.acknowledged <= receiver.counts.keys(), drain)
                await daemon.stop()
            finally:
                await daemon.end()
            findings.undelivered = findings.acknowledged - receiver.counts.keys()
            findings.repeated = receiver.repeated - kills * IN_FLIGHT
            with closing(sqlite3.connect(f"file:{state / 'relay.db'}?mode=ro", uri=True)) as reader:
                findings.corrupt += [
                    text for (text,) in reader.execute("PRAGMA integrity_check") if text != "ok"
                ]
    return findings


async def _overfill(daemon: Daemon, disk: SmallDisk, findings: Findings) -> None:
    """Send until the disk's floor is reached: the relay itself never goes below it."""

    async def work(number: int) -> None:
        for count in range(SIZE // 1_000_000):
            body = adorn(f"large {number}", payload={"n": count, "text": "x" * 1_000_000})
            answer = await exchange(daemon.url, request("POST", "/v1/events", body))
            findings.least = min(findings.least, disk.free)  # retention soon frees space again
            if not _note(answer.status, answer.headers, answer.body, findings):
                return
            findings.acknowledged.add(answer.json["event_id"])

    await asyncio.gather(*(work(number) for number in range(SENDERS)))
    findings.least = min(findings.least, disk.free)
    if findings.least >= FLOOR:
        await _healed(daemon, findings, seconds=3 * HEALED)  # by retention
    findings.worst, findings.slow = 0.0, 0


async def _send(daemon: Daemon, rand: random.Random, findings: Findings) -> None:
    """Send until cancelled, through kills and starts."""
    for number in itertools.count():
        size = rand.choice((10, 10, 10, BIGGEST))
        raw = request("POST", "/v1/events", adorn(f"session {number}", payload={"text": "x" * size}))
        try:
            async with await Wire.open(daemon.url) as wire:
                await wire.send(raw)
                answer = await wire.answer()
        except (ConnectionError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.01)  # killed
            continue
        if _note(answer.status, answer.headers, answer.body, findings):
            findings.acknowledged.add(answer.json["event_id"])
        else:
            await asyncio.sleep(0.005)


def _note(status: int, headers: dict[str, str], body: bytes, findings: Findings) -> bool:
    """Return whether an event was accepted; a refusal must be one that a sender understands."""
    if status == HTTPStatus.OK:
        return True
    findings.refused += 1
    is_json = headers.get("content-type", "").startswith("application/json") and b'"status":"error"' in body
    if status != HTTPStatus.SERVICE_UNAVAILABLE or "retry-after" not in headers or not is_json:
        findings.odd.append(f"{status}: {body[:200]!r}")
    return False


async def _started(daemon: Daemon, findings: Findings) -> bool:
    """Start on a full disk; return whether the relay starts and reports that it is not ready."""
    await daemon.start()
    try:
        await daemon.ready()
    except (AssertionError, TimeoutError):
        findings.down.append(daemon.output[-500:])
        return False
    return True


async def _healed(daemon: Daemon, findings: Findings, seconds: float = HEALED) -> bool:
    """Send until an event is accepted; return whether that was in time."""
    began = time.monotonic()
    raw = request("POST", "/v1/events", adorn("healed"))
    while True:
        answer = await exchange(daemon.url, raw)
        if _note(answer.status, answer.headers, answer.body, findings):
            findings.acknowledged.add(answer.json["event_id"])
            findings.worst = max(findings.worst, time.monotonic() - began)
            return True
        if time.monotonic() - began > seconds:
            findings.slow += 1
            return False
        await asyncio.sleep(0.05)


@click.command()
@click.option("--rounds", default=100, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--variant", type=click.Choice(list(VARIANTS)), default="honest", show_default=True)
def main(rounds: int, seed: int, variant: str) -> None:
    """Fill the disk in a loop, and print the findings."""

    def report(findings: Findings) -> None:
        if findings.rounds % 10 == 0:
            click.echo(findings)

    with tempfile.TemporaryDirectory() as folder:
        findings = asyncio.run(torture(Path(folder), rounds, seed=seed, variant=variant, report=report))
    click.echo(findings)
    sys.exit(0 if findings.fine else 1)


if __name__ == "__main__":
    main()
