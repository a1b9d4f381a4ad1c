"""A healthy destination beside a zoo of faulty ones, compared with the same relay without the zoo."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.load import send
from bench.processes import Server, python
from bench.relay import relay_round
from bench.rounds import Comparison, Plan, Round, alternate
from bench.subject import TOKEN, relay, request

_ANIMALS = Path(__file__).parents[1] / "tests" / "helpers" / "zoo.py"
_EVENTS = 4  # for every faulty destination, at the beginning of a round
_PREFIX = "/zoo"
_SOURCE = f"""\
[sources.keeper]
plugin = "moddy"
prefix = "{_PREFIX}"
tokens = ["{TOKEN}"]
"""
# Each faulty destination is probed about every 5 s (the default is 30 s to 5 min), so its load does not
# decrease. The intervals differ, so that the probes do not coincide.
_DESTINATION = """\
[destinations.animal{number}]
url = "{url}"
events = ["keeper.*"]
allow_private = true
timeout = "1s"
concurrency = 4
retry = {{ schedule = ["1s", "1s", "1s", "1s", "1s"] }}
circuit = {{ probe = "{probe}ms", max_probe = "{probe}ms" }}
"""


async def run(plan: Plan) -> list[Comparison]:
    """Measure the healthy destination with and without the zoo."""
    with TemporaryDirectory(prefix="bench-") as one, TemporaryDirectory(prefix="bench-") as other:
        crowded, alone = Path(one), Path(other)
        async with (
            python(alone / "receiver.log", "-m", "bench.serve", "receiver") as receiver,
            python(crowded / "zoo.log", str(_ANIMALS)) as animals,
            relay(crowded, receiver.url, _destinations(crowded / "zoo.log")) as ours,
            relay(alone, receiver.url) as theirs,
        ):

            async def beside() -> Round:
                with _suspended(theirs):
                    await send(ours.address, request(_PREFIX), count=_EVENTS, connections=1)
                    return await relay_round(plan, ours, crowded / "relay.db")

            async def by_itself() -> Round:
                with _suspended(ours, animals):
                    return await relay_round(plan, theirs, alone / "relay.db")

            mine, others = await alternate(plan, beside, by_itself)
    return [
        Comparison(
            name="zoo",
            title="events from the first byte in to the recorded answer of a healthy destination",
            us="with broken receivers",
            rival="without",
            target=1 / 1.2,
            ours=mine,
            theirs=others,
        )
    ]


def _destinations(log: Path) -> str:
    """Return the configuration: a destination for every address in the zoo's log."""
    urls = re.findall(r"^animal (.+)$", log.read_text(), re.MULTILINE)
    tables = [
        _DESTINATION.format(number=number, url=url, probe=5000 + 77 * number)
        for number, url in enumerate(urls)
    ]
    return "\n".join([_SOURCE, *tables])


@contextmanager
def _suspended(*servers: Server) -> Iterator[None]:
    """Suspend the processes that are not being measured (SIGSTOP)."""
    for server in servers:
        os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for server in servers:
            os.kill(server.pid, signal.SIGCONT)
