"""The memory for bodies: the share of one sender, and the rest for others."""

import asyncio
import json
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from daemons import SOURCES, adorn, running, write_config
from support import until
from wire import Wire, request

from relay.errors import Overloaded
from relay.ingest.body import SMALL, Budget

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADORN, COMPOZY = "/v1/events", "/api/v1/events"
TOKEN = {"authorization": "Bearer test-token"}
LARGEST = 2 * 2**20  # bytes, the default of `max_body`
PATHS = {
    "adorn": (ADORN, {}),
    "compozy": (COMPOZY, TOKEN),
    "lazychat": ("/api/woocommerce-plugin/events", {"authorization": "Bearer dev-token"}),
    "moddy": ("/internal/event/notify", {"authorization": "Bearer dev-token"}),
    "whatsapp": ("/api/v1/workers/register", {"authorization": "Bearer worker-secret-token-12345"}),
}
BODIES = {
    "adorn": {"event_type": "session.started", "session_id": "s"},
    "compozy": {"name": "user.created"},
    "lazychat": {"event_type": "plugin.updated"},
    "moddy": {"event_type": "member_joined", "discord_id": "1"},
    "whatsapp": {"workerId": "w", "endpoint": "http://w:1"},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory, listener):
    config = write_config(tmp_path_factory.mktemp("relay"), SOURCES)
    server = '[server]\nmin_body_rate = "0 B"\ntrusted_proxies = ["127.0.0.9"]'
    config.write_text(config.read_text().replace("[server]", server))
    async with running(config) as relay:
        yield relay


@pytest.fixture(autouse=True)
def nothing_is_left(relay):
    yield
    budget = relay.app.ingest._budget
    assert (budget.used, budget.small._peers, budget.large._peers) == (0, {}, {})
    assert (budget.small._used, budget.large._used) == (0, 0)
    assert (budget.small._used_by_strangers, budget.large._used_by_strangers) == (0, 0)


async def connect(relay, address="127.0.0.1"):
    parts = urlsplit(relay.addresses.public)
    return Wire(*await asyncio.open_connection(parts.hostname, parts.port, local_addr=(address, 0)))


@asynccontextmanager
async def hogs(relay, path, count=17, address="127.0.0.1", size=LARGEST, **headers):
    """Send bodies without their last byte; the relay refuses some, and holds the bytes of the others."""
    async with AsyncExitStack() as stack:
        head = request("POST", path, content_length=str(size), **headers)
        wires = [await stack.enter_async_context(await connect(relay, address)) for _ in range(count)]
        await asyncio.gather(*(wire.send(head + bytes(size - 1)) for wire in wires))
        await asyncio.sleep(0.2)
        yield wires
    await until(lambda: relay.app.ingest._budget.used == 0)


async def send(relay, name, address="127.0.0.1", size=0, *, split=False, **more):
    """Send an event as an honest sender does, and return the status of its answer."""
    path, headers = PATHS[name]
    body = json.dumps(BODIES[name] | ({"payload": {"text": "x" * size}} if size else {})).encode()
    raw = request("POST", path, body, **headers, **more)
    async with asyncio.timeout(30), await connect(relay, address) as wire:
        if split:
            await wire.send(raw[: -len(body)])
            await asyncio.sleep(0.01)
            await wire.send(body[:1])
            await asyncio.sleep(0.01)
            await wire.send(body[1:])
        else:
            await wire.send(raw)
        return (await wire.answer()).status


@pytest.mark.parametrize("name", ["compozy", "lazychat", "moddy", "whatsapp"])
@pytest.mark.parametrize("token", [{}, {"authorization": "Bearer guess"}])
async def test_the_body_of_an_unauthenticated_sender_is_refused_unread(relay, name, token):
    async with hogs(relay, PATHS[name][0], 20, **token) as wires:
        assert relay.app.ingest._budget.used == 0
        for wire in wires:
            assert (await wire.answer()).status in (401, 403)
        for other in PATHS:
            assert await send(relay, other, size=300_000) == 200 + 2 * (other == "compozy")


async def test_an_unauthenticated_sender_gets_no_100_continue(relay):
    async with asyncio.timeout(30), await connect(relay) as wire:
        await wire.send(request("POST", COMPOZY, content_length="9", expect="100-continue"))
        assert (await wire.answer()).status == 401


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("count", [17, 40])
async def test_large_bodies_at_an_open_source_do_not_block_other_senders(relay, split, count):
    async with hogs(relay, ADORN, count):
        assert await send(relay, "adorn", split=split) == 200
        assert await send(relay, "compozy", split=split) == 202
        assert await send(relay, "compozy", size=1_000_000, split=split) == 202
        assert await send(relay, "adorn", "127.0.0.2", size=1_000_000, split=split) == 200


async def test_slow_small_bodies_do_not_block_other_senders(relay):
    async with hogs(relay, ADORN, 300, size=SMALL):
        assert await send(relay, "adorn") == 200
        assert await send(relay, "adorn", "127.0.0.2", split=True) == 200
        assert await send(relay, "adorn", "127.0.0.2", size=1_000_000) == 200
        assert await send(relay, "compozy", size=1_000_000) == 202


async def test_one_authenticated_sender_cannot_use_the_whole_budget(relay):
    async with hogs(relay, COMPOZY, 30, **TOKEN):
        assert await send(relay, "compozy", split=True) == 202
        assert await send(relay, "adorn", split=True) == 200
        assert await send(relay, "compozy", "127.0.0.2", size=1_000_000) == 202


async def test_senders_behind_a_trusted_proxy_have_separate_shares(relay):
    proxy = "127.0.0.9"
    async with hogs(relay, ADORN, 17, proxy, x_forwarded_for="203.0.113.1"):
        refused = await send(relay, "adorn", proxy, size=1_000_000, x_forwarded_for="203.0.113.1")
        passed = await send(relay, "adorn", proxy, size=1_000_000, x_forwarded_for="203.0.113.2")
        assert (refused, passed) == (503, 200)


async def test_a_forged_proxy_header_gives_no_larger_share(relay):
    async with AsyncExitStack() as stack:
        for number in range(8):
            spoof = {"x_forwarded_for": f"203.0.113.{number}"}
            await stack.enter_async_context(hogs(relay, ADORN, 2, **spoof))
        assert await send(relay, "adorn", size=1_000_000, x_forwarded_for="203.0.113.99") == 503
        assert await send(relay, "adorn", "127.0.0.2", size=1_000_000) == 200


def fill(budget, who, size):
    hold = budget.hold(lambda: who)
    hold.take(size)
    return hold


async def test_unauthenticated_senders_leave_half_to_authenticated_ones():
    budget = Budget(32 * 2**20)
    held = [fill(budget, (f"stranger {number}", False), LARGEST) for number in range(8)]
    with pytest.raises(Overloaded):
        fill(budget, ("stranger", False), SMALL + 1)
    held += [fill(budget, (f"known {number}", True), LARGEST) for number in range(6)]
    with pytest.raises(Overloaded):
        fill(budget, ("known", True), LARGEST)
    held += [fill(budget, (f"known {number}", True), SMALL) for number in range(256)]
    with pytest.raises(Overloaded):
        fill(budget, ("known", True), 1)
    for hold in held:
        hold.release()
    assert budget.used == 0


@pytest.mark.parametrize("is_known", [False, True])
async def test_a_single_body_may_use_the_whole_budget(is_known):
    budget = Budget(2**20)
    hold = budget.hold(lambda: ("a", is_known))
    for _ in range(64):
        hold.take(2**14)
    with pytest.raises(Overloaded):
        hold.take(1)
    hold.release()
    hold.release()
    assert budget.used == 0


async def test_a_refused_piece_does_not_change_the_held_bytes():
    budget = Budget(2**20)
    one, other = budget.hold(lambda: ("a", False)), budget.hold(lambda: ("a", False))
    one.take(2**18)
    with pytest.raises(Overloaded):
        other.take(SMALL + 1)
    other.take(SMALL)
    with pytest.raises(Overloaded):
        other.take(1)
    assert other.size == SMALL
    one.release()
    other.release()
    assert (budget.used, budget.small._peers, budget.large._peers) == (0, {}, {})


async def test_an_event_is_stored_whole_in_every_pool(relay):
    body = adorn("pool", payload={"text": "x" * 100_000})
    async with asyncio.timeout(30), await connect(relay) as wire:
        raw = request("POST", ADORN, body)
        for at in range(0, len(raw), 5000):
            await wire.send(raw[at : at + 5000])
            await asyncio.sleep(0)
        answer = await wire.answer()
    assert (await relay.event(answer.json["event_id"])).body == body
