"""Large events at the running daemon: their bodies leave its memory once they are stored.

Run `python -m tests.torture.memory --events 1500`; the harness must detect `--variant keeps-bodies`.
"""

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

import click
from daemons import SERVE, SOURCES, Daemon, adorn, write_config
from wire import Wire, request

SENDERS = 8
SIZE = 400_000  # bytes of a body
MOST = 200 * 10**6  # bytes of resident memory, however many events came

VARIANTS: dict[str, Sequence[str]] = {
    "honest": SERVE,
    "keeps-bodies": (sys.executable, str(Path(__file__).with_name("keeps_bodies.py")), "serve"),
}


async def torture(folder: Path, events: int, command: Sequence[str] = SERVE) -> int:
    """Send `events` large events and return the daemon's resident memory in bytes."""
    raw = request("POST", "/v1/events", adorn("large", payload={"text": "x" * SIZE}))
    async with Daemon(write_config(folder, SOURCES), command) as daemon:

        async def send(count: int) -> None:
            async with await Wire.open(daemon.url) as wire:
                for _ in range(count):
                    await wire.send(raw)
                    assert (await wire.answer()).status == HTTPStatus.OK

        await asyncio.gather(*(send(events // SENDERS) for _ in range(SENDERS)))
        return daemon.resident()


@click.command()
@click.option("--events", default=1500, show_default=True)
@click.option("--variant", type=click.Choice(list(VARIANTS)), default="honest", show_default=True)
def main(events: int, variant: str) -> None:
    """Start a daemon and send large events to it."""
    with tempfile.TemporaryDirectory() as folder:
        resident = asyncio.run(torture(Path(folder), events, VARIANTS[variant]))
    click.echo(
        f"{events} events of {SIZE:,} bytes: {resident / 1e6:.0f} MB resident, at most {MOST / 1e6:.0f}"
    )
    sys.exit(0 if resident <= MOST else 1)


if __name__ == "__main__":
    main()
