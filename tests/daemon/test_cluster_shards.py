"""Two daemons that divide destinations into shards: limits, order, operators, and other numbers of shards."""

import asyncio
import json
import time
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from daemons import Recorder, adorn, destination, running, write_config
from postgres import database_of, drop_databases, maybe_pooled, needs_postgres
from support import until
from wire import exchange, request

from relay.delivery import owner
from relay.store.postgres import nodes as postgres_nodes

pytestmark = needs_postgres

CONCURRENCY, RATE = 5, 10
DIVIDED = {
    "crm": f"shards = 4\nconcurrency = {CONCURRENCY}",
    "ordered": 'shards = 4\nconcurrency = 8\norder_by = "subject"',
    "slow": f'shards = 2\nrate_limit = "{RATE}/s"',
    "sick": "shards = 2\ncircuit = { failures = 2 }",
}


class Timed(Recorder):
    """Records the time of each delivery and the greatest number at once, and may be out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.most, self.usual = [], 0, 200

    def note(self, event_id, body):
        super().note(event_id, body)
        self.times.append(time.monotonic())
        self.most = max(self.most, self.busy + 1)
        self.answers.append((self.usual, {}))


def config(folder, url, name, receivers, options):
    folder.mkdir(exist_ok=True)
    cluster = f'[cluster]\nenabled = true\nlease = "5s"\nnode = "{name}"\n'
    parts = (destination(each, receivers[each].url, more) for each, more in options.items())
    return write_config(folder, '[sources.adorn]\nplugin = "adorn"\n', cluster, *parts, url=url)


async def eventually(ask, accept, seconds=60.0):
    """Ask until the answer is accepted, and return it."""
    async with asyncio.timeout(seconds):
        while not accept(found := await ask()):  # noqa: ASYNC110 - the API offers nothing to await
            await asyncio.sleep(0.1)
    return found


class Pair:
    """Two daemons on one database, and the receivers of their destinations."""

    def __init__(self, folder, url, receivers):
        self.folder, self.url, self.receivers = folder, url, receivers
        self.nodes = []

    def lanes(self, name):
        return [relay.app.dispatcher.lanes[name] for relay in self.nodes]

    def numbers(self, name):
        """Return the shards of each node."""
        return [sorted(lane.shards.numbers) if lane.shards else None for lane in self.lanes(name)]

    def keeper(self, name):
        """Return the node that keeps the state of a destination, and the other one."""
        [keeper] = [relay for relay in self.nodes if relay.app.dispatcher.lanes[name].is_keeper]
        return keeper, self.nodes[keeper is self.nodes[0]]

    async def are_divided(self, count, *names):
        def is_divided():
            return all(
                sorted(number for some in self.numbers(name) for number in some or ())
                == list(range(count[name]))
                and all(self.numbers(name))  # on both nodes
                and sum(lane.is_keeper for lane in self.lanes(name)) == 1
                for name in names
            )

        await until(is_divided, 60)

    async def send(self, count, begin=0, session="s"):
        """Send events to both nodes in turns; returns their ids."""
        found = []
        for number in range(begin, begin + count):
            answer = await self.nodes[number % 2].exchange(request("POST", "/v1/events", adorn(session)))
            assert answer.status == 200, answer
            found.append(answer.json["event_id"])
        return found

    async def post(self, relay, path, body=b""):
        deadline = time.monotonic() + 30
        while True:
            answer = await exchange(relay.addresses.socket, request("POST", path, body))
            if b"another node delivers to it now; try again" not in answer.body:  # its lane has just moved
                break
            assert time.monotonic() < deadline, answer
            await asyncio.sleep(0.05)
        assert answer.status == 200, answer
        return answer.json

    async def show(self, relay, name):
        return await relay.operator("GET", f"/api/destinations/{name}")

    async def types(self):
        """Return how many events of each type the relay itself has raised."""
        rows = (await self.nodes[0].operator("GET", "/api/events?source=relay&limit=100"))["items"]
        return Counter((row["type"], row["subject"]) for row in rows)

    async def reload(self, number, options):
        name = ("one", "two")[number]
        config(self.folder / name, self.url, name, self.receivers, options)
        await self.post(self.nodes[number], "/api/reload")


@pytest.fixture
async def pair(tmp_path, monkeypatch):
    monkeypatch.setattr(postgres_nodes, "SETTLE_IN", 0.0)
    monkeypatch.setattr(owner, "RENEW_EVERY", 0.2)
    url = maybe_pooled(database_of(tmp_path))
    async with AsyncExitStack() as stack:
        receivers = {name: await stack.enter_async_context(Timed()) for name in DIVIDED}
        pair = Pair(tmp_path, url, receivers)
        for name in ("one", "two"):
            path = config(tmp_path / name, url, name, receivers, DIVIDED)
            pair.nodes.append(await stack.enter_async_context(running(path)))
        await pair.are_divided({"crm": 4, "ordered": 4, "slow": 2, "sick": 2}, *DIVIDED)
        yield pair
        for relay in pair.nodes[:1]:
            for name, counts in (await relay.app.store.ledger.audit()).items():
                assert counts.unaccounted == 0, name
    drop_databases()


async def test_two_nodes_send_the_shards_of_a_destination_within_its_limits(pair):
    first, second = pair.nodes
    crm, ordered, slow = (pair.receivers[name] for name in ("crm", "ordered", "slow"))
    crm.open.clear()
    sent = [
        id_ for number in range(8) for id_ in await pair.send(5, 5 * number, session=f"subject {number % 3}")
    ]

    # Limits: all slots of both nodes are used, and no more.
    await until(lambda: crm.busy == CONCURRENCY)
    for relay in pair.nodes:
        shown = await eventually(
            lambda relay=relay: pair.show(relay, "crm"), lambda shown: shown["in_flight"] == CONCURRENCY
        )
        assert [each["shard"] for each in shown["shards"]] == [0, 1, 2, 3]
        assert sorted(Counter(each["node"] for each in shown["shards"]).items()) == [("one", 2), ("two", 2)]
        assert sum(each["in_flight"] for each in shown["shards"]) == CONCURRENCY
        assert (shown["circuit"], shown["held"], shown["pending"]) == ("closed", None, 40)
    crm.open.set()
    await until(lambda: all(len(pair.receivers[name].arrived) >= 40 for name in DIVIDED), 60)
    for name in DIVIDED:
        assert sorted(pair.receivers[name].ids) == sorted(sent)
    assert crm.most == CONCURRENCY

    def attempts():
        metric, labels = "relay_delivery_attempts_total", {"destination": "crm", "result": "ok"}
        return [relay.counted(metric, **labels) for relay in pair.nodes]

    await until(lambda: sum(attempts()) == 40)
    assert min(attempts()) > 0

    # Order: deliveries of a subject arrive one after another.
    for number in range(3):
        order = [
            sent.index(id_) for id_, envelope in ordered.arrived if envelope["subject"] == f"subject {number}"
        ]
        assert order == sorted(order)

    # Rate: the shares of both nodes together are the rate, with a burst of one second.
    for begin, at in enumerate(slow.times):
        for end in range(begin + 1, len(slow.times)):
            assert end - begin + 1 <= RATE * (slow.times[end] - at + 1) + 1.5

    # The list of nodes has shards; gauges of the whole are not counted twice.
    lanes = {each["name"]: each["lanes"] for each in (await second.operator("GET", "/api/nodes"))["items"]}
    assert sorted(lanes["one"] + lanes["two"]) == sorted(
        [f"{name}/{number}" for name in ("crm", "ordered") for number in range(4)]
        + [f"{name}/{number}" for name in ("slow", "sick") for number in range(2)]
    )
    for relay in (first, second):
        shown = await eventually(
            lambda relay=relay: pair.show(relay, "crm"), lambda shown: not shown["in_flight"]
        )
        assert shown["delivered"] == 40


async def test_an_operator_sees_one_destination(pair):
    keeper, other = pair.keeper("sick")
    sick = pair.receivers["sick"]

    async def page():
        answer = await exchange(other.addresses.socket, request("GET", "/ui/destinations/sick"))
        return answer.body.decode().partition("Shards")[2]

    await eventually(page, lambda shown: "one: " in shown and "two: " in shown)  # after its next renewal
    for node, verb, held in (
        (other, "pause", "paused"),
        (keeper, "resume", None),
        (keeper, "disable", "disabled: operator"),
        (other, "enable", None),
    ):
        answer = await pair.post(node, f"/api/destinations/sick/{verb}")
        assert answer["held"] == held
        await until(lambda held=held: all(lane.held == held for lane in pair.lanes("sick")))
    await pair.post(other, "/api/destinations/sick/pause")
    await until(lambda: all(lane.held == "paused" for lane in pair.lanes("sick")))
    paused = await pair.send(6)
    rows = (await other.operator("GET", "/api/deliveries?destination=sick&state=pending"))["items"]
    body = json.dumps({"ids": [row["id"] for row in rows[:4]]}).encode()
    assert (await pair.post(other, "/api/deliveries/cancel", body))["cancelled"] == 4
    await pair.post(other, "/api/destinations/sick/resume")
    await until(lambda: len(sick.arrived) == 2)
    assert set(sick.ids) <= set(paused)

    # One event for the circuits of all shards, and one after all have closed.
    sick.usual = 503
    await pair.send(12, 12)
    await until(lambda: all(lane.health.circuit.is_open for lane in pair.lanes("sick")))
    opened = ("relay.destination.circuit_opened", "sick")
    await eventually(pair.types, lambda types: types[opened])
    metric = "relay_destination_circuit_open"
    await until(lambda: sum(relay.counted(metric, destination="sick") for relay in pair.nodes) == 1)
    for relay in pair.nodes:
        await eventually(
            lambda relay=relay: pair.show(relay, "sick"),
            lambda shown: {each["circuit"] for each in shown["shards"]} == {"open"},
        )
    sick.usual = 200
    answer = await pair.post(other, "/api/destinations/sick/test", b'{"close_circuit": true}')
    assert answer["circuit_closed"]
    await until(lambda: not any(lane.health.circuit.is_open for lane in pair.lanes("sick")))
    recovered = ("relay.destination.recovered", "sick")
    found = await eventually(pair.types, lambda types: types[recovered])
    assert (found[opened], found[recovered]) == (1, 1)

    # A response that disables the destination reaches the node that keeps its state, from both.
    sick.usual = 410
    await pair.send(6, 30)
    await until(lambda: all(lane.held == "disabled: gone" for lane in pair.lanes("sick")))
    disabled = ("relay.destination.disabled", "sick")
    found = await eventually(pair.types, lambda types: types[disabled])  # stored a moment later
    assert found[disabled] == 1


async def test_the_number_of_shards_changes_while_events_arrive(pair):
    crm, ordered = pair.receivers["crm"], pair.receivers["ordered"]
    sent, ends = [], asyncio.Event()

    async def send():
        while not ends.is_set():
            sent.extend(await pair.send(2, len(sent), session=f"subject {len(sent) % 4}"))

    sending = asyncio.create_task(send())
    names = ("crm", "ordered")
    for count in (3, 1, 2):
        changed = {name: more.replace("shards = 4", f"shards = {count}") for name, more in DIVIDED.items()}
        for number in range(2):  # first, the configurations differ: the smaller number counts
            await pair.reload(number, changed)
            arrived = len(crm.arrived)
            await until(lambda arrived=arrived: len(crm.arrived) > arrived + 5, 60)
        if count > 1:
            await pair.are_divided(dict.fromkeys(names, count), *names)
        else:
            await until(lambda: not any(lane.shards for name in names for lane in pair.lanes(name)), 60)
            await until(
                lambda: all(sum(lane.is_owned for lane in pair.lanes(name)) == 1 for name in names), 60
            )
    before = len(crm.arrived)
    await until(lambda: len(crm.arrived) > before + 10)

    # A node stops: the other one takes over its shards, and sends everything.
    ends.set()
    await sending
    await pair.nodes[1].app.owner.leave()
    await until(lambda: pair.numbers("crm")[0] == [0, 1], 60)
    await until(lambda: len(crm.arrived) >= len(sent) <= len(ordered.arrived), 60)
    assert sorted(crm.ids) == sorted(sent) == sorted(ordered.ids)
    for number in range(4):
        order = [
            sent.index(id_) for id_, envelope in ordered.arrived if envelope["subject"] == f"subject {number}"
        ]
        assert order == sorted(order)
    assert crm.most <= CONCURRENCY
