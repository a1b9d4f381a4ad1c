"""Lanes and jobs of a cluster: a node acts only for those that it owns. The other nodes are scripted."""

import asyncio
import itertools
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import msgspec
import pytest
from lanes import CLOCK, Receiver, destination, dispatcher_for, ended, send, send_many
from stores import accept, hooks, make_store
from support import until

from relay.base.clock import SECOND
from relay.base.shards import Shards
from relay.base.units import Rate
from relay.config.schema import CircuitConfig, DestinationConfig, Retention
from relay.config.secrets import Url
from relay.delivery.destination_health import ELSEWHERE, NO_STORAGE
from relay.delivery.dispatcher import Dispatcher
from relay.delivery.owner import Owner
from relay.errors import RelayError, StorageUnavailableError
from relay.jobs.ledger_check import LedgerCheck
from relay.jobs.retention import Upkeep
from relay.jobs.scheduler import Jobs
from relay.metrics import Metrics
from relay.model import Attempt, DestinationState, Heartbeat, Node, Outcome, Register, Target
from relay.state import State
from relay.store import FOREVER, Acceptance, Ownership, Standing
from relay.store.nodes import OneNode
from relay.store.retention_policy import Policy
from relay.workers.watch import Watch

DAY = 86_400
ERROR = "HTTP 500 Internal Server Error"
FAILS_ONCE = CircuitConfig(failures=1, probe=3600.0, max_probe=3600.0)


class ScriptedNodes:
    """A cluster of two nodes, in which the test decides which node owns a lane."""

    alone = False

    def __init__(self):
        self.ownership = Ownership(until={})
        self.error = None
        self.asked = []
        self.given = []
        self.left = False
        self.leads = set()
        self.requests = []
        self.owner_there = None
        self.others = ()
        self.live = 2
        self.reported = {}  # standing of lanes, by the latest `own` and `give`
        self.is_due = False  # whether `own` should be called at once

    def figures(self):
        return {"nodes": self.live}

    async def own(self, lanes, jobs, shards, standing):
        self.asked.append((dict(lanes), set(jobs)))
        self.reported, self.is_due = dict(standing), False
        if self.error is not None:
            raise self.error
        return self.ownership

    def attend(self, attendant):
        self.attendant = attendant

    def handle(self, verb, handle):
        pass

    async def ask(self, lane, verb, argument):
        self.requests.append((lane, verb, argument))
        return await self.owner_there.answer(lane, verb, argument)

    async def give(self, lanes, standing):
        if self.error is not None:
            raise self.error
        self.given += lanes
        self.reported.update(standing)

    def report_soon(self):
        self.is_due = True

    def lead(self, job):
        return job in self.leads

    async def all(self):
        return self.others

    async def leave(self):
        self.left = True


@pytest.fixture
async def receiver():
    async with Receiver().serve() as receiver:
        yield receiver


@pytest.fixture
async def store(tmp_path):
    store = make_store(tmp_path / "relay.db", CLOCK)
    store.nodes = ScriptedNodes()
    await store.open()
    yield store
    await store.close()


def owned(*names, seconds=30.0, **fields):
    return Ownership(until=dict.fromkeys(names, CLOCK.steady() + int(seconds * SECOND)), **fields)


async def test_only_the_owner_sends_and_a_gained_lane_sends_its_backlog(store, receiver):
    crm, erp = destination("crm", receiver.url), destination("erp", receiver.url)
    async with dispatcher_for(store, crm, erp) as dispatcher:
        owner = Owner(dispatcher, store, lambda: {"sweep"})
        store.nodes.ownership = owned("erp", elsewhere={"crm": "b"})
        await owner.renew()
        sent = await send_many(store, 3)
        await ended(store, 3, "erp")
        assert sorted(receiver.ids) == sorted(sent)
        lane = dispatcher.lanes["crm"]
        assert (lane.held, lane.node, lane.is_owned) == (ELSEWHERE, "b", False)
        assert not any(window.deliveries for window in lane._windows)
        assert not store.claims.of("crm")
        store.nodes.ownership = owned("crm", "erp")
        await owner.renew()
        assert (lane.held, lane.node, lane.is_owned) == (None, "", True)
        await ended(store, 3, "crm")
        assert store.nodes.asked == [({"crm": 2.0, "erp": 2.0}, {"sweep"})] * 2


def owned_shards(*numbers, count=4, keeps=True, hand_over=(), **fields):
    names = [*(f"crm/{number}" for number in numbers), *(["crm"] if keeps else [])]
    return owned(*names, shards={"crm": count}, hand_over=frozenset(hand_over), **fields)


async def test_a_shard_is_handed_over_when_its_part_of_the_limits_is_free(store, receiver, monkeypatch):
    slots = itertools.chain((0, 1, 2, 0), itertools.cycle(range(4)))
    monkeypatch.setattr("relay.store.batch.slot_of", lambda _key, _id: next(slots))
    crm = destination("crm", receiver.url, shards=4, concurrency=4, rate_limit=Rate(4000, 1))
    async with dispatcher_for(store, crm) as dispatcher:
        owner, lane = Owner(dispatcher, store, set), dispatcher.lanes["crm"]
        store.nodes.ownership = owned_shards(0, 1, 2, 3)
        await owner.renew()
        assert (lane.shards, lane.is_owned, lane.is_keeper) == (Shards(4, frozenset(range(4))), True, True)
        receiver.gate.clear()
        await send_many(store, 30)
        await until(lambda: len(receiver.requests) == 4)
        store.nodes.ownership = owned_shards(0, 1, 2, 3, hand_over={"crm/3"})
        await owner.renew()
        assert lane.shards == Shards(4, frozenset({0, 1, 2}))
        assert all(each.slot % 4 != 3 for window in lane._windows for each in window.deliveries)
        assert lane.has_foreign  # four attempts at other shards, and a limit of three
        await owner.renew()
        assert store.nodes.given == []
        receiver.gate.set()
        await until(lambda: store.nodes.given == ["crm/3"])
        receiver.most_busy = 0
        store.nodes.ownership = owned_shards(0, 1, 2, elsewhere={"crm/3": "b"}, keeps=False)
        await owner.renew()
        await send_many(store, 30)
        await until(lambda: len(receiver.requests) > 30 and not lane.in_flight)
        assert receiver.most_busy <= 3
        assert [(each.number, each.node) for each in lane.others] == [(3, "b")]
        assert not lane.is_keeper
        assert lane.leases == ["crm/0", "crm/1", "crm/2"]
        sent = len(receiver.requests)
        for changing in (owned_shards(count=0), owned_shards(keeps=False)):
            store.nodes.ownership = changing
            await owner.renew()
            assert (lane.is_owned, lane.held) == (False, ELSEWHERE)
        await send_many(store, 3)
        assert len(receiver.requests) == sent
        store.nodes.ownership = owned("crm")
        await owner.renew()
        await ended(store, 63)
        assert lane.shards is None
        assert len(receiver.requests) == 63


async def test_a_node_without_the_state_of_a_destination_asks_its_keeper_to_disable_it(store, receiver):
    receiver.usual = (410, {})
    async with dispatcher_for(store, destination("crm", receiver.url, shards=2)) as dispatcher:
        owner, lane = Owner(dispatcher, store, set), dispatcher.lanes["crm"]
        store.nodes.ownership = owned_shards(0, 1, count=2, keeps=False)
        await owner.renew()
        store.nodes.owner_there = owner  # which refuses: it is not the keeper
        await send(store)
        await until(lambda: store.nodes.requests)
        assert store.nodes.requests == [("crm", "disable", {"reason": "gone", "is_quiet": False})]
        await until(lambda: lane.held == "disabled: gone")
        assert await store.queries.destination_states() == {}
        store.nodes.ownership = owned_shards(0, 1, count=2)
        await owner.renew()
        assert lane.held is None  # as stored, until the next response
        await owner.answer("crm", "disable", {"reason": "gone", "is_quiet": False})
        assert lane.held == "disabled: gone"
        assert (await store.queries.destination_states())["crm"].disabled_reason == "gone"


async def events_about(store, name="crm"):
    rows = await store.queries.find("events", source="relay", subject=name)
    return [row["type"].removeprefix("relay.destination.") for row in reversed(rows)]


async def opened_circuit(dispatcher, store):
    """Let a node find that a destination fails."""
    lane = dispatcher.lanes["crm"]
    await send_many(store, 24)  # each belongs to one of two shards, by its random id
    await until(lambda: lane.health.circuit.is_open and not lane.in_flight)


async def test_a_new_keeper_does_not_report_again_what_the_former_one_has_reported(store, receiver):
    """The former one had no time to tell its standing to the new one."""
    receiver.usual = (500, {})
    config, nodes = destination("crm", receiver.url, shards=2, circuit=FAILS_ONCE), store.nodes
    async with dispatcher_for(store, config) as here, dispatcher_for(store, config) as there:
        first, second = Owner(here, store, set), Owner(there, store, set)
        hooks(store).listener = here.listen
        nodes.ownership = owned_shards(0, count=2)
        await first.renew()
        nodes.ownership = owned_shards(count=2, keeps=False)
        await second.renew()
        await opened_circuit(here, store)
        opened = {"crm/0": Standing(circuit=ERROR, probe_at=CLOCK.steady() + 3600 * SECOND)}
        for stored in ({}, opened):
            nodes.ownership = owned_shards(0, count=2, standing=stored)
            await first.renew()
            await here.drained("crm")
            assert await events_about(store) == ["circuit_opened"] * len(stored)
        assert nodes.reported["crm/0"]["circuit"] == ERROR
        for stored in (opened, opened, {"crm/0": Standing()}, {"crm/0": Standing()}):
            nodes.ownership = owned_shards(count=2, standing=stored)
            await second.renew()
            await there.drained("crm")
        assert await events_about(store) == ["circuit_opened", "recovered"]


@pytest.mark.parametrize("count", [1, 2], ids=["undivided", "shards"])
async def test_a_new_owner_waits_for_the_probe_of_an_open_circuit(store, receiver, count):
    receiver.usual = (500, {})
    config = destination("crm", receiver.url, shards=count, circuit=FAILS_ONCE)
    mine = partial(owned_shards, 0, 1, count=2) if count > 1 else partial(owned, "crm")
    async with dispatcher_for(store, config) as here, dispatcher_for(store, config) as there:
        first, second = Owner(here, store, set), Owner(there, store, set)
        hooks(store).listener = here.listen
        store.nodes.ownership = mine()
        await first.renew()
        await opened_circuit(here, store)
        assert store.nodes.is_due
        await first.renew()
        reported = store.nodes.reported
        store.nodes.ownership = mine(standing=msgspec.convert(reported, dict[str, Standing]))
        await first.renew()
        probe_at = here.lanes["crm"].health.circuit.open_until
        assert {each["probe_at"] for name, each in reported.items() if "probe_at" in each} == {probe_at}
        await until(lambda: here.lanes["crm"].health.state.circuit_opened is not None)
        store.nodes.ownership, lane = owned(), there.lanes["crm"]
        await first.renew()
        sent = len(receiver.requests)
        store.nodes.ownership = mine(standing=msgspec.convert(reported, dict[str, Standing]))
        await second.renew()
        assert (lane.held, lane.health.circuit.open_until) == ("circuit open", probe_at)
        store.nodes.ownership = owned()
        await second.renew()
        receiver.usual = (200, {})
        reported = {name: {**each, "probe_at": CLOCK.steady()} for name, each in reported.items()}
        store.nodes.ownership = mine(standing=msgspec.convert(reported, dict[str, Standing]))
        await second.renew()
        hooks(store).listener = there.listen
        await send_many(store, 3)  # SQLite does not store the slots of the others
        await until(lambda: len(receiver.requests) > sent and not lane.health.circuit.is_open)
        await second.renew()
        store.nodes.ownership = mine(standing=msgspec.convert(store.nodes.reported, dict[str, Standing]))
        await second.renew()
        await until(lambda: lane.health.state.circuit_opened is None)
    assert await events_about(store) == ["circuit_opened", "recovered"]


@pytest.mark.parametrize("count", [1, 2], ids=["undivided", "shards"])
async def test_a_new_owner_goes_on_doubling_the_wait_before_probes(store, receiver, count):
    receiver.usual = (500, {})
    circuit = CircuitConfig(failures=1, probe=60.0, max_probe=3600.0)
    config = destination("crm", receiver.url, shards=count, circuit=circuit)
    mine = partial(owned_shards, 0, 1, count=2) if count > 1 else partial(owned, "crm")
    async with dispatcher_for(store, config) as here, dispatcher_for(store, config) as there:
        first, second = Owner(here, store, set), Owner(there, store, set)
        hooks(store).listener = here.listen
        store.nodes.ownership = mine()
        await first.renew()
        await opened_circuit(here, store)
        before, after = here.lanes["crm"].health.circuit, there.lanes["crm"].health.circuit
        for _ in range(3):
            before.record("5xx", CLOCK.steady(), before.openings)  # a failed probe
        await first.renew()
        store.nodes.ownership = owned(standing=msgspec.convert(store.nodes.reported, dict[str, Standing]))
        await first.renew()
        await here.drained("crm")
        store.nodes.ownership = mine(standing=store.nodes.ownership.standing)
        await second.renew()
        assert (after.open_until, after.wait) == (before.open_until, 480 * SECOND)


async def test_a_new_owner_pauses_as_long_as_the_receiver_has_requested(store, receiver):
    receiver.usual = (503, {"Retry-After": "600"})
    config = destination("crm", receiver.url, concurrency=1)
    async with dispatcher_for(store, config) as here, dispatcher_for(store, config) as there:
        first, second = Owner(here, store, set), Owner(there, store, set)
        hooks(store).listener = here.listen
        store.nodes.ownership = owned("crm")
        await first.renew()
        assert store.nodes.reported == {}  # a destination that works needs no report
        await send_many(store, 3)
        await until(lambda: here.lanes["crm"].held == "resting" and not here.lanes["crm"].in_flight)
        assert store.nodes.is_due
        store.nodes.ownership = owned("crm", hand_over=frozenset({"crm"}))
        await first.renew()
        await until(lambda: store.nodes.given == ["crm"])
        until_ = here.lanes["crm"].health.rest_until
        assert until_ > CLOCK.steady() + 500 * SECOND
        assert store.nodes.reported["crm"]["rest_until"] == until_
        store.nodes.ownership = owned("crm", standing={"crm": Standing(rest_until=until_)})
        await second.renew()
        lane = there.lanes["crm"]
        assert (lane.held, lane.health.held_until) == ("resting", until_)
        await second.close_circuit(lane, "for the test")
        assert store.nodes.is_due
        await second.renew()
        assert store.nodes.reported["crm"]["rest_until"] == 0
        await until(lambda: len(receiver.requests) == 2)


async def test_no_attempt_begins_after_the_end_of_a_lease(store, receiver):
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        owner, lane = Owner(dispatcher, store, set), dispatcher.lanes["crm"]
        store.nodes.ownership = owned("crm", seconds=-1)
        await owner.renew()
        await send(store)
        store.nodes.error = StorageUnavailableError("the database does not answer")
        await owner._try_to_renew()
        assert lane.held == NO_STORAGE
        assert not receiver.requests
        store.nodes.error, store.nodes.ownership = None, owned("crm")
        await owner.renew()
        await ended(store)
        assert len(receiver.requests) == 1


async def test_after_a_reload_with_a_longer_timeout_attempts_wait_for_a_longer_lease(store, receiver):
    """Otherwise, an attempt could outlive the lease."""
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        owner, lane, own = Owner(dispatcher, store, set), dispatcher.lanes["crm"], store.nodes.own
        store.nodes.ownership = owned("crm", seconds=10)

        async def reload(seconds):
            config = {"crm": destination("crm", receiver.url, timeout=seconds)}
            dispatcher.adopt(await dispatcher.plan(config))

        await owner.renew()
        await reload(3.0)
        assert lane.is_owned
        await reload(20.0)
        assert lane.held == NO_STORAGE
        await send(store)
        assert not receiver.requests

        async def reload_meanwhile(*args):
            found = await own(*args)
            if lane.config.timeout < 30.0:
                await reload(30.0)
            return found

        with patch.object(store.nodes, "own", reload_meanwhile):
            await owner.renew()
        assert [lanes for lanes, _ in store.nodes.asked] == [{"crm": 2.0}, {"crm": 20.0}, {"crm": 30.0}]
        await ended(store)


async def test_a_lease_that_ends_while_a_body_is_read_stops_the_attempt(store, receiver):
    async with dispatcher_for(store, destination("crm", receiver.url), body_bytes=0) as dispatcher:
        owner, lane, load = Owner(dispatcher, store, set), dispatcher.lanes["crm"], store.events.load
        await send(store)
        reads = []

        async def load_late(ids):
            reads.append(ids)
            lane.health.owned_until = CLOCK.steady() - 1
            return await load(ids)

        with patch.object(store.events, "load", load_late):
            store.nodes.ownership = owned("crm")
            await owner.renew()
            await until(lambda: reads and not lane.in_flight)
        assert not receiver.requests
        assert not store.claims.of("crm")
        await owner.renew()
        await ended(store)


REGAINED = [
    pytest.param("claim", {}, id="claim"),
    pytest.param("load", {}, id="body"),
    pytest.param("load", {"format": "slack", "group_by": "type", "group_wait": 0.02}, id="group"),
]


@pytest.mark.parametrize(("step", "options"), REGAINED)
async def test_a_lane_that_was_lost_and_taken_again_sends_nothing_that_it_had_claimed_before(
    store, receiver, step, options
):
    """In between, another node has sent it; this node notices both in one renewal."""
    crm = destination("crm", receiver.url, **options)
    async with dispatcher_for(store, crm, body_bytes=0) as dispatcher:
        owner, lane, claimed = Owner(dispatcher, store, set), dispatcher.lanes["crm"], []
        claim, load = store.deliveries.claim, store.events.load

        async def move():
            lane.health.owned_until = CLOCK.steady() - 1
            await sent_elsewhere(store, claimed)
            claimed.clear()
            store.nodes.ownership = owned("crm")
            await owner.renew()

        async def note(*args, **fields):
            found = await claim(*args, **fields)
            claimed.extend(each for first in found.deliveries for each in first.members)
            if claimed and step == "claim":
                await move()
            return found

        async def read(ids):
            found = await load(ids)
            if claimed:
                await move()
            return found

        await send_many(store, 2)
        with patch.object(store.deliveries, "claim", note), patch.object(store.events, "load", read):
            store.nodes.ownership = owned("crm")
            await owner.renew()
            await ended(store, 2)
            await until(lambda: not lane.in_flight and not lane._tasks)
        assert not receiver.requests
        assert not store.claims.of("crm")
        await send(store)
        await until(lambda: len(receiver.requests) == 1)


@pytest.mark.parametrize("shards", [1, 2])
async def test_a_lane_that_was_lost_and_taken_again_empties_its_window(store, receiver, shards):
    receiver.gate.clear()
    crm = destination("crm", receiver.url, concurrency=shards, shards=shards)
    async with dispatcher_for(store, crm) as dispatcher:
        owner, lane = Owner(dispatcher, store, set), dispatcher.lanes["crm"]
        store.nodes.ownership = owned("crm") if shards == 1 else owned_shards(0, 1, count=2)
        await owner.renew()
        await send_many(store, 9)
        await until(lambda: receiver.busy == shards and lane._first.deliveries)
        lane.health.owned_until = CLOCK.steady() - 1
        await sent_elsewhere(store, lane._first.deliveries)
        await owner.renew()
        receiver.gate.set()
        await ended(store, 9)
        await until(lambda: not lane.in_flight)
        assert len(receiver.requests) == shards
        assert not store.claims.of("crm")


async def sent_elsewhere(store, deliveries):
    """Record that another node has sent deliveries."""
    attempt = Attempt(started_at=CLOCK.wall(), duration_ms=1.0, result="ok", status=200)
    for each in tuple(deliveries):
        assert await store.deliveries.settle(Outcome(delivery=each, attempt=attempt, state="delivered"))


async def test_a_lane_is_handed_over_after_its_attempts_in_flight(store, receiver):
    receiver.gate.clear()
    async with dispatcher_for(store, destination("crm", receiver.url, concurrency=1)) as dispatcher:
        owner, lane = Owner(dispatcher, store, set), dispatcher.lanes["crm"]
        store.nodes.ownership = owned("crm")
        await owner.renew()
        await send_many(store, 3)
        await until(lambda: receiver.busy == 1)
        store.nodes.ownership = owned("crm", hand_over=frozenset({"crm"}))
        await owner.renew()
        await owner.renew()  # the attempt is still in flight
        assert (lane.held, lane.in_flight, store.nodes.given) == (ELSEWHERE, 1, [])
        receiver.gate.set()
        await until(lambda: store.nodes.given == ["crm"])
        [row] = await ended(store)
        assert (row["state"], len(receiver.requests)) == ("delivered", 1)
        assert store.claims.of("crm") == 0


async def test_a_failed_hand_over_is_repeated(store, receiver):
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        owner = Owner(dispatcher, store, set)
        store.nodes.ownership = owned("crm", hand_over=frozenset({"crm"}))
        await owner.renew()
        store.nodes.error = StorageUnavailableError("the database does not answer")
        await until(lambda: not owner._hand_overs)
        assert store.nodes.given == []
        store.nodes.error = None
        await owner.renew()
        await until(lambda: store.nodes.given == ["crm"])


async def test_a_stopping_node_leaves_then_drains_then_gives_its_lanes(store, receiver):
    receiver.gate.clear()
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        owner = Owner(dispatcher, store, set)
        store.nodes.ownership = owned("crm")
        await owner.start()
        await send(store)
        await until(lambda: receiver.busy == 1)
        await owner.leave()
        assert (store.nodes.left, store.nodes.given) == (True, [])
        receiver.gate.set()
        await dispatcher.stop(5.0)
        await owner.stop()
        assert store.nodes.given == ["crm"]
        [row] = await ended(store)
        assert row["state"] == "delivered"


async def test_a_removed_destination_is_given_after_its_last_attempt(store, receiver):
    receiver.gate.clear()
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        owner = Owner(dispatcher, store, set)
        store.nodes.ownership = owned("crm")
        await owner.renew()
        await send(store)
        await until(lambda: receiver.busy == 1)
        dispatcher.adopt(await dispatcher.plan({}))
        store.nodes.ownership = owned("crm", hand_over=frozenset({"crm"}))
        await owner.renew()
        await asyncio.sleep(0)
        assert store.nodes.given == []
        receiver.gate.set()
        await until(lambda: store.nodes.given == ["crm"])


async def test_a_gained_lane_has_the_state_that_the_other_node_stored(store, receiver):
    config = destination("crm", receiver.url)
    async with dispatcher_for(store, config) as dispatcher:
        owner, lane = Owner(dispatcher, store, set), dispatcher.lanes["crm"]
        store.nodes.ownership = owned("crm")
        await store.deliveries.set_destination(DestinationState(name="crm", paused=True))
        await owner.renew()
        assert lane.held == "paused"
        store.nodes.ownership = owned()
        await owner.renew()
        await store.deliveries.set_destination(DestinationState(name="crm", failing_since=CLOCK.steady()))
        store.nodes.ownership = owned("crm")
        await owner.renew()
        assert (lane.held, lane.health.limit(CLOCK.steady())) == (None, 1)  # it was failing: one at a time


async def test_an_operator_may_ask_any_node(store, receiver):
    """Two dispatchers on one store stand for two nodes; the second one owns the lane."""
    config, nodes = destination("crm", receiver.url), store.nodes
    receiver.usual = (500, {})
    async with dispatcher_for(store, config) as here, dispatcher_for(store, config) as there:
        nodes.owner_there = owner_there = Owner(there, store, set)
        owner, lane = Owner(here, store, set), here.lanes["crm"]
        nodes.ownership = owned(elsewhere={"crm": "b"})
        await owner.renew()
        nodes.ownership = owned("crm")
        await owner_there.renew()
        shown = await owner.steer(lane, {"paused": True, "paused_until": None})
        assert shown == {
            "held": "paused", "paused_by": "operator", "paused_until": None, "in_flight": 0, "node": "b",
        }  # fmt: skip
        assert there.lanes["crm"].held == "paused"
        assert (await store.queries.destination_states())["crm"].paused
        nodes.ownership = owned(elsewhere={"crm": "b"})
        await owner.renew()
        assert lane.held == "paused"  # it shows what the other node stored
        await owner.steer(lane, {"paused": False})
        circuit = there.lanes["crm"].health.circuit
        while not circuit.is_open:
            circuit.record("connect", CLOCK.steady(), circuit.openings)
        assert await owner.close_circuit(lane, "for the test")
        assert not circuit.is_open
        assert len(nodes.requests) == 3
        there.lanes["crm"].disown()
        with pytest.raises(RelayError, match="another node delivers to it now"):
            await owner.steer(lane, {"paused": True})


async def test_wake_ups_concern_only_lanes_of_this_node(store, receiver):
    async with dispatcher_for(store, *(destination(name, receiver.url) for name in ("crm", "erp"))) as found:
        owner = Owner(found, store, set)
        store.nodes.ownership = owned("crm")
        await owner.start()
        assert store.nodes.attendant is owner
        await until(lambda: all(count for count, _ in found.lanes["crm"].refills))
        for wake in (lambda: owner.wake(("crm", "erp", "none"), retries=True), lambda: owner.wake(None)):
            before = [count for count, _ in found.lanes["crm"].refills]
            wake()
            await until(lambda: found.lanes["crm"].refills[0][0] > before[0])  # noqa: B023 - waited for
        assert [count for count, _ in found.lanes["erp"].refills] == [0, 0]
        asked = len(store.nodes.asked)
        owner.renew_soon()
        await until(lambda: len(store.nodes.asked) > asked)
        await owner.stop()


async def test_a_node_that_is_alone_owns_every_lane_without_asking(tmp_path):
    nodes = OneNode(CLOCK)
    assert nodes.alone
    assert nodes.lead("sweep")
    assert await nodes.own({"crm": 15.0}, ()) == Ownership(until={"crm": FOREVER})
    [node] = await nodes.all()
    assert node.is_self
    assert node.seen_at >= node.started_at


async def test_a_pause_of_a_source_is_not_undone_by_a_look_that_began_before_it():
    mounts = {name: SimpleNamespace(paused=False) for name in ("here", "there", "neither")}

    async def paused_sources():
        mounts["here"].paused = True  # by an operator, after the statement has read the rows
        return frozenset({"there"})

    state = SimpleNamespace(
        ingest=SimpleNamespace(mounts=mounts, admission=SimpleNamespace(nodes=1)),
        _store=SimpleNamespace(nodes=ScriptedNodes(), queries=SimpleNamespace(paused_sources=paused_sources)),
    )
    await State.refresh(state)
    assert {name: mount.paused for name, mount in mounts.items()} == {
        "here": True, "there": True, "neither": False,
    }  # fmt: skip
    assert state.ingest.admission.nodes == 2


async def test_a_job_of_the_cluster_runs_only_where_it_is_led():
    leads, runs = set(), []
    jobs = Jobs(CLOCK, Metrics(), lambda name: name in leads)

    async def work():
        runs.append("all")

    async def fail():
        runs.append("one")
        raise ValueError("for the test")

    jobs.add("all", 0.01, work)
    jobs.add("one", 0.01, fail, cluster=True)
    assert jobs.of_cluster == ["one"]
    jobs.start()
    try:
        await until(lambda: len(runs) >= 3)
        assert set(runs) == {"all"}
        with pytest.raises(RelayError, match="job one runs on another node"):
            await jobs.run("one")
        leads.add("one")
        await until(lambda: "one" in runs)
        [_, past] = jobs.all()
        assert past.error == "ValueError: for the test"
        leads.clear()
        await until(lambda: past.error is None)  # the other node's runs count now
    finally:
        jobs.stop()


@pytest.fixture
async def held(tmp_path, clock):
    """A store with deliveries that are held for 30 days, and a dispatcher that owns the lane of one."""
    configs = {
        name: DestinationConfig(name=name, url=Url("http://127.0.0.1:9/"))
        for name in ("mine", "other", "theirs")
    }
    store = make_store(tmp_path / "relay.db", clock)
    store.nodes = ScriptedNodes()
    await store.open()
    mine = {name: configs[name] for name in ("mine", "other")}
    dispatcher = Dispatcher(mine, store=store, clock=clock, metrics=Metrics({}, configs))
    await dispatcher.start()
    dispatcher.lanes["mine"].own(FOREVER, None)
    await dispatcher.lanes["mine"].set_state(DestinationState(name="mine", paused=True))
    hooks(store).route = lambda event: (
        () if event.source == "relay" else tuple(map(Target, (*configs, "orphan")))
    )
    await store.events.append(accept(clock, subject=None))
    yield store, dispatcher
    await dispatcher.stop(0)
    await store.close()


async def pending(store):
    rows = await store.queries.find("deliveries", limit=50)
    return {row["destination"] for row in rows if row["state"] == "pending"}


@pytest.mark.parametrize(
    ("leads", "kept"), [(False, {"other", "theirs", "orphan"}), (True, {"other", "theirs"})]
)
async def test_each_node_expires_its_own_held_deliveries_and_the_leader_those_of_no_node(
    held, clock, leads, kept
):
    store, dispatcher = held
    store.nodes.others = (
        Node(name="b", version="1", started_at=0, seen_at=0, destinations=("other", "theirs")),
    )
    store.nodes.leads = {"retention"} if leads else set()
    upkeep = Upkeep(store, dispatcher, Policy(Retention(events=60.0 * DAY)))
    await upkeep.run()
    clock.advance(31 * DAY)
    with patch.object(store.upkeep, "prune", wraps=store.upkeep.prune) as prune:
        await upkeep.run()
    assert prune.called == leads
    assert await pending(store) == kept


async def test_one_node_exports_the_gauges_of_all_deliveries(held, clock):
    store, dispatcher = held
    metrics = dispatcher._metrics
    check = LedgerCheck(store, dispatcher, metrics, clock)
    sample = metrics.registry.get_sample_value

    def gauge(name, state):
        return sample("relay_deliveries_pending", {"destination": name, "state": state})

    store.nodes.leads = {"ledger"}
    await check.check()
    assert [gauge("mine", "held"), gauge("other", "held"), gauge("other", "due")] == [1, 0, 1]
    store.nodes.leads = set()
    await check.check()
    assert [gauge("mine", "held"), gauge("other", "held"), gauge("other", "due")] == [0, 0, 0]


async def test_one_node_marks_silent_workers_and_a_new_leader_gives_them_time(held, clock):
    store, _ = held
    watch = Watch(store, clock, 10.0)
    await store.events.append(Acceptance(source="shop", change=Register(worker_id="w1")))

    async def sweep(*moments):
        for seconds in moments:
            clock.advance(seconds)
            await watch.sweep()
        return store.workers.count("shop", "OFFLINE")

    assert await sweep(*[10] * 20) == 0
    store.nodes.leads = {"sweep"}
    assert await sweep(0, *[10] * 9) == 0
    await store.events.append(Acceptance(source="shop", change=Heartbeat(worker_id="w1")))
    store.nodes.leads = set()
    assert await sweep(*[10] * 20) == 0
    store.nodes.leads = {"sweep"}
    assert await sweep(0, *[10] * 9) == 0
    assert await sweep(1) == 1


@pytest.mark.parametrize(
    ("live", "later", "level"), [(1, False, "DEBUG"), (2, False, "INFO"), (1, True, "INFO")]
)
async def test_the_start_of_a_node_without_others_is_not_logged(
    store, receiver, caplog, *, live, later, level
):
    caplog.set_level("DEBUG", "relay.delivery")
    store.nodes.live = live
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        owner = Owner(dispatcher, store, set)
        if later:  # another node had the lane, and has died
            store.nodes.ownership = owned(elsewhere={"crm": "b"})
            await owner.renew()
        store.nodes.ownership = owned("crm")
        await owner.renew()
    [line] = [each for each in caplog.records if each.message == "crm: this node runs the lane"]
    assert line.levelname == level
