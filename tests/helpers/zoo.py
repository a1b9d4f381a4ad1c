"""All receivers that misbehave, at once: one server per animal, with the results that attempts may have.

`python tests/helpers/zoo.py` keeps them all until the process is ended, and prints their URLs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from collections.abc import Set as AbstractSet
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import receivers
from certificates import Certificates
from receivers import Receiver

Habitat = tuple[Callable[[], Receiver], AbstractSet[str]]
"""A factory of receivers, and the possible results of an attempt."""

OK = {"ok"}
TIMEOUT = {"timeout"}
PROTOCOL = {"protocol"}
ENDED = {"connect", "protocol"}  # depends on whether the write or the read notices first


@dataclass(frozen=True)
class Animal:
    """One receiver that misbehaves."""

    url: str
    results: AbstractSet[str]  # possible results of an attempt
    guarded: bool = False  # whether the address guard is on


HABITS: dict[str, Habitat] = {
    # silent and slow
    "hang": (receivers.hang, TIMEOUT),
    "never reads": (receivers.never_reads, TIMEOUT),
    "hangs in its head": (receivers.hang_in_head, TIMEOUT),
    "hangs in its body": (receivers.hang_in_body, OK),
    "hangs in the body of a failure": (partial(receivers.hang_in_body, status="502 Bad Gateway"), {"5xx"}),
    "drips its head": (
        receivers.drip_head,
        OK | TIMEOUT,
    ),  # depends on how much of its status line has arrived
    "drips its body": (receivers.drip_body, {"5xx"}),
    "takes TCP and never TLS": (partial(receivers.never_reads, scheme="https"), TIMEOUT),
    # too much
    "informational flood": (receivers.informational_flood, PROTOCOL),
    "endless headers": (receivers.endless_headers, OK),
    "100,000 headers": (receivers.many_headers, OK),
    "a header of 20 MB": (receivers.huge_header, OK),
    "a status line of 20 MB": (receivers.huge_status_line, PROTOCOL),
    "10 GB": (receivers.huge_body, OK),
    "10 GB with a failure": (partial(receivers.huge_body, status="500 Sorry"), {"5xx"}),
    "endless chunks": (receivers.endless_chunks, OK),
    "an endless chunk extension": (receivers.endless_chunk_extension, OK),
    "endless trailers": (receivers.endless_trailers, OK),
    "a gzip bomb": (receivers.gzip_bomb, OK),
    # connections
    "closes at once": (receivers.closes_at_once, ENDED),
    "closes unanswered": (receivers.closes_unanswered, PROTOCOL),
    "answers once": (receivers.answers_once, {"ok", *ENDED}),
    "sends first": (receivers.sends_first, ENDED),
    "resets": (receivers.resets, {"connect"}),
    "resets in its body": (receivers.resets_in_body, OK),
    "closes what it promised to keep": (receivers.closes_kept_alive, OK),
    "resets what it promised to keep": (receivers.resets_kept_alive, OK),
    "breaks off what it promised to keep": (receivers.breaks_off_kept_alive, {"ok", "protocol"}),
    "answers before it reads": (receivers.answers_before_reading, {"4xx", "timeout"}),  # and never again
    "sends more than its length": (receivers.sends_more_than_its_length, OK),
    "sends more than its length later": (receivers.sends_more_later, OK),
    "no TLS where it should be": (partial(receivers.sends_first, scheme="https"), {"tls"}),
    # answers
    "redirects to a metadata service": (
        partial(receivers.answers, status="302 Found", location="http://169.254.169.254/latest/"),
        {"3xx"},
    ),
    "redirects to itself for ever": (partial(receivers.answers, status="308 On", location="/hook"), {"3xx"}),
    "refuses": (partial(receivers.answers, status="403 Forbidden"), {"4xx"}),
    "fails": (partial(receivers.answers, status="500 Sorry"), {"5xx"}),
    "is gone": (partial(receivers.answers, status="410 Gone"), {"4xx"}),
    "asks for centuries": (partial(receivers.answers, status="429 Slow", retry_after="9" * 9), {"429"}),
    "asks for nonsense": (partial(receivers.answers, status="503 Wait", retry_after="1_0"), {"5xx"}),
    **{
        f"sends {name}": (partial(receivers.sends, answer=answer), PROTOCOL)
        for name, answer in receivers.NONSENSE.items()
    },
    **{
        f"breaks its body: {name}": (partial(receivers.breaks_its_body, answer=answer), OK)
        for name, answer in receivers.BROKEN_BODIES.items()
    },
}


def habitats(certificates: Certificates) -> dict[str, Habitat]:
    """Return the receivers with certificates."""
    return {
        f"a certificate that is {name}": (partial(receivers.answers, tls=certificates.server(name)), {"tls"})
        for name in (
            "good",
            "expired",
            "self_signed",
            "wrong_name",
        )  # no CA file: the good one is not trusted either
    }


@asynccontextmanager
async def zoo(folder: Path) -> AsyncIterator[dict[str, Animal]]:
    """Start all receivers and return them by name."""
    receivers._bomb(100 * 2**20)  # takes long: done before any test waits for it
    async with AsyncExitStack() as stack:
        animals = {
            "nobody listens": Animal(f"http://127.0.0.1:{receivers.unused_port()}/", {"connect"}),
            "a private address": Animal("http://10.0.0.1/", {"blocked"}, guarded=True),
            "loopback in IPv6": Animal("http://[::ffff:127.0.0.1]/", {"blocked"}, guarded=True),
        }
        for name, (make, results) in (HABITS | habitats(Certificates(folder))).items():
            receiver = await stack.enter_async_context(make())
            animals[name] = Animal(receiver.url, results)
        yield animals


async def main() -> None:
    """Keep the receivers running; benchmarks wait for the last line."""
    with TemporaryDirectory() as folder:
        async with zoo(Path(folder)) as animals:
            for animal in animals.values():
                if not animal.guarded:
                    print(f"animal {animal.url}")  # noqa: T201 - for the process that started it
            async with receivers.answers() as healthy:
                print(f"listens on {healthy.url.removesuffix('/hook')}", flush=True)  # noqa: T201
                await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
