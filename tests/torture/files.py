"""Files that are deleted, moved or replaced under load, and bytes of the log that flip after a kill.

Run `python -m tests.torture.files --cycles 200`. `--variant blind`, which never checks its files, must
acknowledge lost events; `--variant trusting`, which trusts its log, must lose events without a report.
"""

import asyncio
import itertools
import json
import random
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import click
from daemons import SERVE, SOURCES, Daemon, adorn, write_config
from support import until
from wire import Wire, request

SENDERS = 4
SOON = 5.0  # seconds within which senders must be refused
LONGEST_LIFE = 0.5  # seconds of load before something happens

VARIANTS: dict[str, Sequence[str]] = {
    "honest": SERVE,
    **{
        name: (sys.executable, str(Path(__file__).with_name("files_unwatched.py")), name, "serve")
        for name in ("blind", "trusting")
    },
}


def delete(database: Path) -> None:
    """Delete the database."""
    database.unlink()


def delete_log(database: Path) -> None:
    """Delete its log."""
    database.with_name(f"{database.name}-wal").unlink()


def delete_all(database: Path) -> None:
    """Delete the whole state folder."""
    shutil.rmtree(database.parent)


def move(database: Path) -> None:
    """Move the database away."""
    database.rename(database.with_name("elsewhere"))


def replace(database: Path) -> None:
    """Move another database over it."""
    other = database.with_name("other.db")
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE other (a)")
    other.replace(database)


HAPPENINGS: tuple[Callable[[Path], None], ...] = (delete, delete_log, delete_all, move, replace)


@dataclass
class Findings:
    """Faults that were noticed late, and lost events."""

    cycles: int = 0
    acknowledged: int = 0
    late: list[str] = field(default_factory=list)  # faults after which the relay still answered 200
    lost: int = 0  # acknowledged, and neither in the database nor in its rescue copy
    flips: int = 0  # flipped bytes
    dropped: int = 0  # flips that lost acknowledged events
    silent: int = 0  # of these, flips without a report

    @property
    def fine(self) -> bool:
        """Return whether every check passed."""
        return not (self.late or self.lost or self.silent)

    def __str__(self) -> str:
        return (
            f"{self.cycles} cycles: {self.acknowledged} acknowledged, {self.lost} lost, "
            f"answers of 200 for longer than {SOON:g} s after {self.late or 'none'}; "
            f"{self.flips} flipped bytes, {self.dropped} cost events, {self.silent} of them without a word"
        )


async def torture(
    folder: Path,
    kinds: Sequence[Callable[[Path], None] | None],
    *,
    seed: int,
    variant: str = "honest",
    report: Callable[[Findings], None] = lambda _findings: None,
) -> Findings:
    """Apply each fault to a separate daemon; None: a byte of its log flips after a kill."""
    rand, findings = random.Random(seed), Findings()
    for findings.cycles, happens in enumerate(kinds, start=1):
        place = folder / str(findings.cycles)
        place.mkdir()
        config = write_config(place, SOURCES)
        if happens is None:
            await _flip(config, rand, findings, VARIANTS[variant])
        else:
            await _vanish(config, rand, findings, VARIANTS[variant], happens)
        shutil.rmtree(place)
        report(findings)
    return findings


async def _vanish(
    config: Path,
    rand: random.Random,
    findings: Findings,
    command: Sequence[str],
    happens: Callable[[Path], None],
) -> None:
    database = _database(config)
    async with Daemon(config, command) as daemon:
        acknowledged: set[str] = set()
        senders = [asyncio.create_task(_send(daemon.url, acknowledged)) for _ in range(SENDERS)]
        await until(lambda: acknowledged)
        await asyncio.sleep(rand.uniform(0, LONGEST_LIFE))  # the random moment, nothing is waited for
        happens(database)
        _, going_on = await asyncio.wait(senders, timeout=SOON)
        if going_on:
            findings.late.append(happens.__name__)
        await daemon.stop()
        await asyncio.gather(*senders)
        copies = sorted(database.parent.glob("relay.db.rescue-*"))
        kept = _events(copies[-1]) if copies else set()
        findings.acknowledged += len(acknowledged)
        findings.lost += len(acknowledged - kept)


async def _flip(config: Path, rand: random.Random, findings: Findings, command: Sequence[str]) -> None:
    database, acknowledged = _database(config), set[str]()
    async with Daemon(config, command) as daemon:
        senders = [asyncio.create_task(_send(daemon.url, acknowledged)) for _ in range(SENDERS)]
        await until(lambda: len(acknowledged) > 10 * SENDERS)
        await asyncio.sleep(rand.uniform(0, LONGEST_LIFE))  # as above
        await daemon.end()
        await asyncio.gather(*senders)
    log = database.with_name(f"{database.name}-wal")
    raw = bytearray(log.read_bytes())
    raw[rand.randrange(len(raw))] ^= 1 << rand.randrange(8)
    log.write_bytes(raw)
    async with Daemon(config, command) as daemon:
        is_reported = any("data was lost" in json.loads(line)["message"] for line in daemon.lines)
        await daemon.stop()
    missing = acknowledged - _events(database)
    findings.acknowledged += len(acknowledged)
    findings.flips += 1
    # The last transaction may go unnoticed if it came after the last mark: it looks like one cut short.
    if len(missing) > SENDERS:
        findings.dropped += 1
        findings.silent += not is_reported


async def _send(url: str, acknowledged: set[str]) -> None:
    """Send until a refusal, or until the daemon is gone."""
    try:
        async with await Wire.open(url) as wire:
            for number in itertools.count():
                await wire.send(request("POST", "/v1/events", adorn(f"session {number}")))
                answer = await wire.answer()
                if answer.status != 200:
                    return
                acknowledged.add(answer.json["event_id"])
    except (ConnectionError, asyncio.IncompleteReadError):
        return  # killed


def _database(config: Path) -> Path:
    return config.parent / "state" / "relay.db"


def _events(database: Path) -> set[str]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as reader:
        return {public_id for (public_id,) in reader.execute("SELECT public_id FROM events")}


@click.command()
@click.option("--cycles", default=200, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--variant", type=click.Choice(list(VARIANTS)), default="honest", show_default=True)
def main(cycles: int, seed: int, variant: str) -> None:
    """Take files away from a daemon and flip bytes of its log, and print the findings."""

    def report(findings: Findings) -> None:
        if findings.cycles % 10 == 0:
            click.echo(findings)

    kinds = list(itertools.islice(itertools.cycle([*HAPPENINGS, *[None] * len(HAPPENINGS)]), cycles))
    with tempfile.TemporaryDirectory() as folder:
        findings = asyncio.run(torture(Path(folder), kinds, seed=seed, variant=variant, report=report))
    click.echo(findings)
    sys.exit(0 if findings.fine else 1)


if __name__ == "__main__":
    main()
