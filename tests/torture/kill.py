"""kill -9 in a loop, under load: nothing acknowledged is lost, nothing is corrupt, all of it arrives.

Run `python -m tests.torture.kill --cycles 1000`; `--variant acks-early` must find losses.
"""

import asyncio
import itertools
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
from daemons import SERVE, SOURCES, Daemon, Recorder, adorn, destination, write_config
from stores import faults_of, rows_of
from support import until
from wire import Wire, request

SENDERS = 4
IN_FLIGHT = 8  # the destination's concurrency: what may arrive twice after one kill
LONGEST_LIFE = 0.25  # seconds of load before a kill
DRAIN = 120.0  # seconds for the last life to deliver what is left

VARIANTS: dict[str, Sequence[str]] = {
    "honest": SERVE,
    "acks-early": (sys.executable, str(Path(__file__).with_name("acks_early.py")), "serve"),
}


@dataclass
class Findings:
    """Lost and repeated events after the kills."""

    cycles: int = 0
    acknowledged: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)  # acknowledged, and not in the database
    undelivered: set[str] = field(default_factory=set)  # in the database, and never arrived
    corrupt: list[str] = field(default_factory=list)
    most_repeated: int = 0  # deliveries made again after one kill

    @property
    def fine(self) -> bool:
        """Return whether every check passed."""
        return not (self.lost or self.undelivered or self.corrupt) and self.most_repeated <= IN_FLIGHT

    def __str__(self) -> str:
        return (
            f"{self.cycles} kills: {len(self.acknowledged)} acknowledged, {len(self.lost)} lost, "
            f"{len(self.undelivered)} undelivered, {len(self.corrupt)} corrupt files, "
            f"at most {self.most_repeated} of {IN_FLIGHT} repeated after one kill"
        )


class Counting(Recorder):
    """A receiver that stores only numbers, for runs of hours."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def note(self, event_id: str, body: bytes) -> None:
        """Count an arrival."""
        _ = body
        self.counts[event_id] += 1

    @property
    def repeated(self) -> int:
        """How many arrivals were not the first of their event."""
        return self.counts.total() - len(self.counts)


async def torture(
    folder: Path,
    cycles: int,
    *,
    seed: int,
    variant: str = "honest",
    report: Callable[[Findings], None] = lambda _findings: None,
) -> Findings:
    """Kill the daemon `cycles` times, then let it deliver the rest."""
    rand, findings = random.Random(seed), Findings()
    async with Counting() as receiver:
        config = write_config(folder, SOURCES, destination("crm", receiver.url, f"concurrency = {IN_FLIGHT}"))
        newest = 0
        for findings.cycles in range(1, cycles + 1):
            repeated = receiver.repeated
            async with Daemon(config, VARIANTS[variant]) as daemon:
                acknowledged = await load_and_kill(daemon, rand)
            findings.acknowledged |= acknowledged
            findings.most_repeated = max(findings.most_repeated, receiver.repeated - repeated)
            found = rows_of(config, f"SELECT id, public_id FROM events WHERE id > {newest}")
            findings.corrupt += faults_of(config, quick=True)
            findings.lost |= acknowledged - {public_id for _, public_id in found}
            newest = max([newest, *(id_ for id_, _ in found)])
            report(findings)
        repeated = receiver.repeated
        async with Daemon(config, VARIANTS[variant]) as daemon:
            await until(lambda: pending(config) == 0, DRAIN)
            await daemon.stop()
        findings.most_repeated = max(findings.most_repeated, receiver.repeated - repeated)
        stored = {public_id for (public_id,) in rows_of(config, "SELECT public_id FROM events")}
        findings.corrupt += faults_of(config)
        findings.undelivered = stored - receiver.counts.keys()
        findings.lost |= findings.acknowledged - stored
    return findings


async def load_and_kill(daemon: Daemon, rand: random.Random) -> set[str]:
    """Send from several connections, kill at a random moment, return the acknowledged events."""
    acknowledged: set[str] = set()
    senders = [asyncio.create_task(_send(daemon.url, acknowledged)) for _ in range(SENDERS)]
    await until(lambda: acknowledged)
    await asyncio.sleep(rand.uniform(0, LONGEST_LIFE))  # this is the random moment, nothing is waited for
    await daemon.end()
    await asyncio.gather(*senders)
    return acknowledged


async def _send(url: str, acknowledged: set[str]) -> None:
    try:
        async with await Wire.open(url) as wire:
            for number in itertools.count():
                await wire.send(request("POST", "/v1/events", adorn(f"session {number}")))
                acknowledged.add((await wire.answer()).json["event_id"])
    except (ConnectionError, asyncio.IncompleteReadError):
        return  # killed


def pending(config: Path) -> int:
    """Count the deliveries that have not ended."""
    [(count,)] = rows_of(config, "SELECT count(*) FROM deliveries WHERE state = 'pending'")
    return int(count)


@click.command()
@click.option("--cycles", default=1000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--variant", type=click.Choice(list(VARIANTS)), default="honest", show_default=True)
def main(cycles: int, seed: int, variant: str) -> None:
    """Kill the daemon in a loop, and print the findings."""

    def report(findings: Findings) -> None:
        if findings.cycles % 50 == 0:
            click.echo(findings)

    with tempfile.TemporaryDirectory() as folder:
        findings = asyncio.run(torture(Path(folder), cycles, seed=seed, variant=variant, report=report))
    click.echo(findings)
    sys.exit(0 if findings.fine else 1)


if __name__ == "__main__":
    main()
