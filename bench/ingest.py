"""Durable, acknowledged events: the relay with `synchronous = FULL` against a handler that stores nothing."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.load import send
from bench.processes import Server, python
from bench.rounds import Comparison, Plan, Round, alternate
from bench.subject import PATH, REQUEST, relay


async def run(plan: Plan) -> list[Comparison]:
    """Measure the relay and the handler."""

    async def one(server: Server) -> Round:
        cpu = server.cpu()
        began = await send(server.address, REQUEST, count=plan.requests, connections=plan.connections)
        return Round(plan.requests, time.perf_counter() - began, server.cpu() - cpu)

    with TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        async with (
            relay(folder) as ours,
            python(folder / "bare.log", "-m", "bench.serve", "handler", PATH) as theirs,
        ):
            mine, others = await alternate(plan, lambda: one(ours), lambda: one(theirs))
    return [
        Comparison(
            name="ingest",
            title="durable acknowledged events, no destinations (synchronous = FULL)",
            rival="bare aiohttp handler",
            target=0.65,
            ours=mine,
            theirs=others,
        )
    ]
