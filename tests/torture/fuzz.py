"""Mutated requests at the running daemon: it refuses them in JSON, and neither falls, swells nor chatters.

Run `python -m tests.torture.fuzz --requests 1000000`. Each request follows from the seed and its number.
"""

import asyncio
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
from daemon import SERVE, SOURCES, Daemon, write_config
from samples import read_samples
from wire import Wire, exchange, request

CONNECTIONS = 32
WARM_UP = 500  # requests before memory is measured: code is loaded, buffers have found their size
PATIENCE = 0.2  # seconds for an answer; a request whose end never comes gets none
MOST_LOG = 2**20  # bytes
MOST_GROWTH = 16 * 2**20  # bytes
LONGEST = 4000  # bytes of a sample worth mutating: the few larger ones are about size alone

ODDITIES = (
    b"\x00", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"%00", b"%ff",
    b"NaN", b"-1", b"1e999", b"18446744073709551616", b'"', b"{", b"[" * 50, b"}", b"\\ud800", b"null",
    b"../", b"//", b"?", b"HTTP/1.1", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Content-Encoding: gzip\r\n", b"Expect: 100-continue\r\n", b"Authorization: Bearer x\r\n",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
)  # fmt: skip

Mutation = Callable[[random.Random, bytes], bytes]


def flip(rand: random.Random, raw: bytes) -> bytes:
    """Change one byte."""
    at = rand.randrange(len(raw))
    return raw[:at] + bytes([rand.randrange(256)]) + raw[at + 1 :]


def cut(rand: random.Random, raw: bytes) -> bytes:
    """Leave a piece out."""
    at = rand.randrange(len(raw))
    return raw[:at] + raw[at + rand.randrange(40) :]


def end(rand: random.Random, raw: bytes) -> bytes:
    """Stop early."""
    return raw[: rand.randrange(1, len(raw) + 1)]


def double(rand: random.Random, raw: bytes) -> bytes:
    """Say a piece twice."""
    at, size = rand.randrange(len(raw)), rand.randrange(200)
    return raw[: at + size] + raw[at:]


def insert(rand: random.Random, raw: bytes) -> bytes:
    """Put something odd in between."""
    at = rand.randrange(len(raw))
    return raw[:at] + rand.choice(ODDITIES) + raw[at:]


def lengthen(rand: random.Random, raw: bytes) -> bytes:
    """Announce another length."""
    number = str(rand.choice((0, 1, rand.randrange(5000), 2**21 + 1, 2**64))).encode()
    return re.sub(rb"(?i)(content-length: *)[0-9]+", rb"\g<1>" + number, raw, count=1)


MUTATIONS: tuple[Mutation, ...] = (flip, flip, cut, end, double, insert, insert, lengthen)


def mutate(seed: int, number: int, samples: list[bytes]) -> bytes:
    """Return the request of that number."""
    rand = random.Random(f"{seed}:{number}")
    raw = rand.choice(samples)
    if rand.random() < 0.1:  # the head of one with the body of another
        raw = raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + rand.choice(samples).partition(b"\r\n\r\n")[2]
    for _ in range(rand.choice((1, 1, 1, 2, 3, 8))):
        raw = rand.choice(MUTATIONS)(rand, raw) or b"\n"
    return raw


@dataclass
class Findings:
    """What came back."""

    requests: int = 0
    answers: Counter[int] = field(default_factory=Counter)  # by status; 0: none came
    faults: list[str] = field(default_factory=list)  # what must not happen, with the request that did it
    logged: int = 0  # bytes
    growth: int = 0  # bytes of resident memory since the warm-up

    @property
    def fine(self) -> bool:
        """Say whether nothing happened that must not."""
        return not self.faults and self.logged < MOST_LOG and self.growth < MOST_GROWTH

    def __str__(self) -> str:
        answers = ", ".join(f"{status or 'none'}: {count}" for status, count in sorted(self.answers.items()))
        memory = f"{self.growth / 2**20:+.1f} MiB"
        return f"{self.requests} requests ({answers}), log {self.logged} bytes, memory {memory}"


async def torture(
    folder: Path, requests: int, *, seed: int, tell: Callable[[Findings], None] = lambda _found: None
) -> Findings:
    """Send that many mutated requests to a daemon and look after it."""
    samples = [sample.request for sample in read_samples() if len(sample.request) < LONGEST]
    found = Findings()
    async with Daemon(write_config(folder, SOURCES), SERVE) as daemon:
        numbers = iter(range(requests))
        resident = 0

        async def work() -> None:
            nonlocal resident
            for number in numbers:
                raw = mutate(seed, number, samples)
                await _provoke(daemon.url, raw, found)
                found.requests += 1
                if found.requests == min(WARM_UP, requests):
                    resident = daemon.resident()
                found.growth = daemon.resident() - resident if resident else 0
                found.logged = daemon.logged
                tell(found)

        await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
        health = await exchange(daemon.url, request("GET", "/health"))
        if health.status != 200:
            found.faults.append(f"not healthy in the end: {health}")
        if "Traceback" in daemon.said or '"exception"' in daemon.said:
            found.faults.append(f"a traceback in the log:\n{daemon.said}")
        if (code := await daemon.stop()) != 0:
            found.faults.append(f"exit code {code}")
    return found


async def _provoke(url: str, raw: bytes, found: Findings) -> None:
    """Send one request and read what comes back, which may be several answers, or none."""
    answers = 0
    async with await Wire.open(url) as wire:
        try:
            async with asyncio.timeout(PATIENCE):
                await wire.send(raw)
                while True:
                    answer = await wire.answer(bodiless=raw.lstrip().startswith(b"HEAD"))
                    answers += 1
                    found.answers[answer.status] += 1
                    if answer.status >= 500 and answer.status != 503:
                        found.faults.append(f"{answer.status} for {raw!r}")
                    if answer.body:
                        json.loads(answer.body)
                    if answer.headers.get("connection") != "close" and answer.status != 100:
                        break
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass
        except (AssertionError, KeyError, ValueError) as error:
            found.faults.append(f"{error!r} in the answer to {raw!r}")
    if not answers:
        found.answers[0] += 1


@click.command()
@click.option("--requests", default=1_000_000, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(requests: int, seed: int) -> None:
    """Send mutated requests to a daemon of its own."""

    def tell(found: Findings) -> None:
        if found.requests % 10_000 == 0:
            click.echo(found)

    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(torture(Path(folder), requests, seed=seed, tell=tell))
    click.echo(found)
    for fault in found.faults[:20]:
        click.echo(fault)
    sys.exit(0 if found.fine else 1)


if __name__ == "__main__":
    main()
