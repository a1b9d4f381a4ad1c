"""A sender that config.toml describes and that signs, against a bundled source with a token."""

import hmac
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.load import post, send
from bench.rounds import Comparison, Plan, Round, alternate
from bench.subject import REQUEST, SAMPLE, relay

_SECRET = "bench-secret"
_SOURCE = f"""\
[sources.shop]
plugin = "generic"
path = "/hooks/shop/{{store}}"
secrets = ["{_SECRET}"]
verify = {{ hmac = {{ header = "X-Shop-Signature", prefix = "sha256=" }} }}
type = "{{body:event_type}}"
subject = "{{body:discord_id}}"
context = {{ store = "{{path:store}}" }}
data = "{{body:metadata}}"
reply = {{ status = 202, json = {{ ok = true }} }}
"""


async def run(plan: Plan) -> list[Comparison]:
    """Measure both sources in one relay with the same body, without idempotency keys: Moddy sends none."""
    signature = hmac.digest(_SECRET.encode(), SAMPLE, "sha256").hex()
    headers = {"Content-Type": "application/json", "X-Shop-Signature": f"sha256={signature}"}
    signed = post("/hooks/shop/berlin", SAMPLE, headers)
    with TemporaryDirectory(prefix="bench-") as name:
        async with relay(Path(name), more=_SOURCE) as server:

            async def one(request: bytes) -> Round:
                cpu = server.cpu()
                began = await send(server.address, request, count=plan.requests, connections=plan.connections)
                return Round(plan.requests, time.perf_counter() - began, server.cpu() - cpu)

            mine, others = await alternate(plan, lambda: one(signed), lambda: one(REQUEST))
    return [
        Comparison(
            name="generic",
            title="durable acknowledged events of a generic source with HMAC signatures",
            us="generic, HMAC",
            rival="moddy, token",
            target=1 / 1.25,
            is_of_cost=True,
            ours=mine,
            theirs=others,
        )
    ]
