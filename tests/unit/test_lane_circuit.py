"""Failing destinations: circuit breaker, disabling, enabling, operator events."""

import asyncio
from unittest.mock import patch

import msgspec
import pytest
from lanes import CLOCK, Receiver, destination, dispatcher_for, ended, send, send_many
from stores import make_store
from support import until

from relay.base.clock import SECOND
from relay.config.schema import CircuitConfig, RetryConfig
from relay.errors import StorageError
from relay.model import DestinationState, GeneratedEvent

QUICK = CircuitConfig(failures=3, probe=0.1, max_probe=0.2)
LASTING = CircuitConfig(failures=3, probe=3600.0, max_probe=3600.0)
NEVER_OPENS = CircuitConfig(failures=1_000_000)
OFTEN = RetryConfig(schedule=(0.01,) * 30)


class Stepped(Receiver):
    """Responds to as many requests as the test allows; the others wait."""

    def __init__(self):
        super().__init__()
        self.allowed = asyncio.Semaphore(0)

    async def wait(self):
        if self.usual[0] == 200:
            await self.allowed.acquire()

    def allow(self, count):
        for _ in range(count):
            self.allowed.release()


@pytest.fixture
async def ops():
    """A receiver of operator events."""
    async with Receiver().serve() as ops:
        yield ops


async def spent(store):
    """Return the attempts that deliveries have counted, and those recorded."""
    rows = await store.queries.find("deliveries", limit=1000)
    return sum(row["attempts"] for row in rows), len(await store.queries.find("attempts", limit=1000))


def types(rows):
    return [row["type"] for row in reversed(rows)]


# --- the circuit --------------------------------------------------------------------------------------


async def test_an_open_circuit_holds_deliveries_without_counting_attempts(store, receiver):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, concurrency=1, circuit=LASTING, retry=OFTEN)
    async with dispatcher_for(store, crm) as dispatcher:
        await send_many(store, 5)
        await until(lambda: dispatcher.lanes["crm"].held == "circuit open")
        await send_many(store, 5)
        await until(lambda: not dispatcher.lanes["crm"]._tasks)
        assert (await store.ledger.audit())["crm"].pending == 10
        assert await spent(store) == (3, 3)
    assert len(receiver.requests) == 3


async def test_probes_are_single_and_spaced_and_a_failed_one_is_recorded_but_not_counted(store, receiver):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, circuit=QUICK, retry=OFTEN, concurrency=1)
    async with dispatcher_for(store, crm):
        await send_many(store, 50)
        await until(lambda: len(receiver.requests) == 3 + 4)
        pauses = [(b - a) / SECOND for a, b in zip(receiver.times[2:], receiver.times[3:], strict=False)]
        await until(lambda: receiver.busy == 0)
    for pause, least in zip(pauses, (0.1, 0.2, 0.2, 0.2), strict=True):
        assert least <= pause < least + 2.0
    assert await spent(store) == (3, 7)
    assert (await store.ledger.audit())["crm"].pending == 50


async def test_a_probe_that_falls_due_in_the_middle_of_a_turn_is_not_forgotten(store, receiver, monkeypatch):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, circuit=QUICK, retry=OFTEN, concurrency=1)
    async with dispatcher_for(store, crm) as dispatcher:
        lane = dispatcher.lanes["crm"]
        await send(store)
        await until(lambda: lane.held == "circuit open" and not lane._tasks)
        due = lane.health.circuit.open_until
        readings = iter([due - 1])
        with monkeypatch.context() as patched:
            patched.setattr(CLOCK, "steady", lambda: next(readings, due + 1))
            lane._timer.cancel()
            lane._on_timer()
        assert lane._timer is not None
        receiver.usual = (200, {})
        await ended(store)


async def test_a_probe_loads_one_delivery_instead_of_a_window(store, receiver):
    receiver.usual = (500, {})
    async with dispatcher_for(
        store, destination("crm", receiver.url, circuit=QUICK, retry=OFTEN)
    ) as dispatcher:
        await send_many(store, 200)
        lane = dispatcher.lanes["crm"]
        await until(lambda: lane.held == "circuit open" and not lane._tasks)
        receiver.gate.clear()
        await until(lambda: lane.in_flight == 1 and len(lane._tasks) == 1)
        assert len(lane._first.deliveries) + len(lane._retry.deliveries) <= 2
        assert receiver.busy == 1
        receiver.gate.set()


async def test_after_recovery_one_two_four_and_eight_attempts_are_in_flight(store):
    async with Stepped().serve() as receiver:
        receiver.usual = (500, {})
        crm = destination("crm", receiver.url, circuit=QUICK, retry=OFTEN, concurrency=8, timeout=30.0)
        async with dispatcher_for(store, crm) as dispatcher:
            lane = dispatcher.lanes["crm"]
            await send_many(store, 100)
            await until(lambda: lane.held == "circuit open" and lane.in_flight == 0)
            receiver.usual = (200, {})
            seen = []
            for probe_or_round in (1, 1, 2, 4, 8):
                await until(lambda: receiver.busy == probe_or_round)  # noqa: B023 - awaited at once
                await until(lambda: len(lane._tasks) == lane.in_flight)
                lane.turn()
                seen.append(lane.in_flight)
                receiver.allow(probe_or_round)
            assert seen == [1, 1, 2, 4, 8]
            receiver.allow(100)
            rows = await ended(store, 100)
    assert {row["state"] for row in rows} == {"delivered"}
    assert receiver.most_busy == 8


async def test_a_probe_with_a_4xx_closes_the_circuit_and_counts_as_an_attempt(store, receiver):
    receiver.answers = [(500, {})] * 3
    receiver.usual = (404, {})
    crm = destination(
        "crm", receiver.url, circuit=QUICK, concurrency=1, retry=RetryConfig(schedule=(0.01,) * 3)
    )
    async with dispatcher_for(store, crm) as dispatcher:
        await send(store)
        [row] = await ended(store)
        assert dispatcher.lanes["crm"].held is None
    assert (row["state"], row["reason"], row["attempts"]) == ("dead", "exhausted", 4)
    assert len(receiver.requests) == 4


async def test_a_failed_probe_as_the_last_attempt_does_not_end_the_delivery(store, receiver):
    receiver.answers = [(500, {})] * 5
    crm = destination(
        "crm", receiver.url, circuit=QUICK, concurrency=1, retry=RetryConfig(schedule=(0.01,) * 3)
    )
    async with dispatcher_for(store, crm):
        await send(store)
        [row] = await ended(store)
    assert (row["state"], row["attempts"], len(receiver.requests)) == ("delivered", 4, 6)


async def test_a_refused_address_holds_deliveries_and_opens_no_circuit(store, receiver):
    crm = destination("crm", receiver.url, allow_private=False, circuit=CircuitConfig(failures=1))
    async with dispatcher_for(store, crm) as dispatcher:
        await send_many(store, 20)
        lane = dispatcher.lanes["crm"]
        await until(lambda: lane.held == "resting" and not lane._tasks)
        assert not lane.health.circuit.is_open
        attempts, recorded = await spent(store)
        assert attempts == 0
        assert 1 <= recorded <= 8
        assert {row["result"] for row in await store.queries.find("attempts")} == {"blocked"}
        assert (await store.ledger.audit())["crm"].pending == 20
    assert receiver.requests == []


# --- disabled -----------------------------------------------------------------------------------------


async def test_failures_for_disable_after_disable_the_destination_and_lose_nothing(store, receiver):
    receiver.usual = (500, {})
    crm = destination(
        "crm", receiver.url, disable_after=0.3, circuit=NEVER_OPENS,
        retry=RetryConfig(schedule=(0.02,) * 100),
    )  # fmt: skip
    async with dispatcher_for(store, crm) as dispatcher:
        await send_many(store, 3)
        lane = dispatcher.lanes["crm"]
        await until(lambda: lane.held == "disabled: failing" and not lane._tasks)
        assert 0.3 < (receiver.times[-1] - receiver.times[0]) / SECOND < 5.0
        await send(store)
        assert (await store.ledger.audit())["crm"].pending == 4


async def test_a_success_in_between_restarts_disable_after(store, receiver):
    crm = destination("crm", receiver.url, disable_after=0.2, retry=RetryConfig(schedule=(0.1,)))
    receiver.answers = [(500, {}), (200, {}), (500, {}), (200, {}), (500, {}), (200, {}), (500, {})]
    async with dispatcher_for(store, crm) as dispatcher:
        for number in range(4):
            await send(store)
            await ended(store, number + 1)
        assert dispatcher.lanes["crm"].health.state == DestinationState(name="crm")
    assert receiver.times[-1] - receiver.times[0] > 0.3 * SECOND


async def test_the_time_of_failing_survives_a_restart(tmp_path, receiver):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, disable_after=0.3, retry=RetryConfig(schedule=(0.4, 0.1, 0.1)))
    store = make_store(tmp_path / "relay.db", CLOCK)
    await store.open()
    async with dispatcher_for(store, crm) as dispatcher:
        await send(store)
        await until(lambda: receiver.requests)
        await until(lambda: dispatcher.lanes["crm"].in_flight == 0)
    await store.close()
    store = make_store(tmp_path / "relay.db", CLOCK)
    await store.open()
    async with dispatcher_for(store, crm) as dispatcher:
        lane = dispatcher.lanes["crm"]
        assert lane.health.state.failing_since is not None
        await until(lambda: lane.held == "disabled: failing" and not lane._tasks)
        assert await spent(store) == (2, 2)
    await store.close()
    store = make_store(tmp_path / "relay.db", CLOCK)
    await store.open()
    async with dispatcher_for(store, crm) as dispatcher:
        assert dispatcher.lanes["crm"].held == "disabled: failing"
        assert (await store.ledger.audit())["crm"].pending == 1
    await store.close()
    assert len(receiver.requests) == 2


async def test_enabling_probes_at_once_releases_deliveries_and_forgets_failures(store, receiver):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, disable_after=0.1, circuit=QUICK, retry=OFTEN, concurrency=1)
    async with dispatcher_for(store, crm) as dispatcher:
        lane = dispatcher.lanes["crm"]
        await send_many(store, 5)
        await until(lambda: lane.held == "disabled: failing" and not lane._tasks)
        before = await spent(store)
        lane.health.circuit.open_until = CLOCK.steady() + 3600 * SECOND
        receiver.answers, receiver.usual = (
            [(500, {})],
            (200, {}),
        )  # a failure right afterwards changes nothing
        await lane.set_state(
            msgspec.structs.replace(lane.health.state, disabled_at=None, disabled_reason=None)
        )
        rows = await ended(store, 5)
        assert lane.health.state == DestinationState(name="crm")
    assert [row["state"] for row in rows] == ["delivered"] * 5
    assert sum(row["attempts"] for row in rows) == before[0] + 5


@pytest.mark.parametrize(
    "state",
    [
        DestinationState(name="crm", paused=True),
        DestinationState(name="crm", disabled_at=1, disabled_reason="operator"),
    ],
    ids=["paused", "disabled"],
)
async def test_deliveries_held_by_an_operator_count_no_attempt_and_are_sent_on_resume(store, receiver, state):
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        lane = dispatcher.lanes["crm"]
        await lane.set_state(state)
        sent = await send_many(store, 300)
        assert await spent(store) == (0, 0)
        assert receiver.requests == []
        await lane.set_state(DestinationState(name="crm"))
        rows = await ended(store, 300)
    assert {(row["state"], row["attempts"]) for row in rows} == {("delivered", 1)}
    assert sorted(receiver.ids) == sorted(sent)


@pytest.mark.parametrize("wait", [0.4, -1.0], ids=["while the relay runs", "while the relay is stopped"])
async def test_a_pause_with_an_end_survives_a_restart_and_ends_by_itself(store, receiver, wait):
    end = CLOCK.steady() + int(wait * SECOND)
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        await dispatcher.lanes["crm"].set_state(DestinationState(name="crm", paused=True, paused_until=end))
        sent = await send(store)
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        lane = dispatcher.lanes["crm"]
        assert (lane.held, lane.health.paused_by, lane.health.paused_until) == ("paused", "operator", end)
        [row] = await ended(store)
        assert (lane.held, lane.health.paused_by) == (None, None)
        assert await store.queries.destination_states() == {"crm": DestinationState(name="crm")}
    assert (row["state"], row["attempts"], receiver.ids) == ("delivered", 1, [sent])
    assert receiver.times[0] >= end


async def test_a_pause_that_ends_leaves_a_disabled_destination_disabled(store, receiver):
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        lane = dispatcher.lanes["crm"]
        disabled = DestinationState(name="crm", disabled_at=1, disabled_reason="operator")
        state = msgspec.structs.replace(disabled, paused=True, paused_until=CLOCK.steady() + SECOND // 10)
        await lane.set_state(state)
        assert lane.held == "paused"
        await until(lambda: lane.held == "disabled: operator")
        assert lane.health.state == disabled


# --- operator events ----------------------------------------------------------------------------------


async def test_each_change_is_an_event_for_destinations_that_subscribe_by_name(store, receiver, ops):
    receiver.answers = [(500, {})] * 3 + [(200, {}), (400, {"webhook-delivery": "abort-message"}), (410, {})]
    crm = destination("crm", receiver.url, concurrency=1, circuit=QUICK, retry=OFTEN)
    watch = destination("watch", ops.url, events=("relay.*",), concurrency=1)
    async with dispatcher_for(store, crm, watch):
        for count in (1, 2):
            await send(store)
            await ended(store, count, "crm")
        await send(store)
        await ended(store, 4, "watch")
        events = [msgspec.json.decode(body) for _, body in ops.requests]
    assert [event["type"] for event in events] == [
        "relay.destination.circuit_opened",
        "relay.destination.recovered",
        "relay.delivery.dead",
        "relay.destination.disabled",
    ]
    assert [event["data"]["reason"] for event in events[2:]] == ["aborted", "gone"]
    assert {event["subject"] for event in events} == {"crm"}
    opened = events[0]["data"]
    assert opened.keys() == {"destination", "url", "reason"}
    assert (opened["destination"], opened["url"]) == ("crm", receiver.url)


async def test_star_does_not_match_operator_events(store, receiver):
    receiver.answers = [(400, {"webhook-delivery": "abort-message"})]
    async with dispatcher_for(store, destination("crm", receiver.url)):
        sent = await send(store)
        await ended(store)
        assert "relay.delivery.dead" in types(await store.queries.find("events"))
        assert len(await store.queries.find("deliveries")) == 1
    assert receiver.ids == [sent]


async def test_deliveries_of_operator_events_raise_no_operator_events(store, receiver, ops):
    receiver.answers = [(400, {"webhook-delivery": "abort-message"})]
    ops.answers = [(500, {})] * 4 + [(410, {})]
    watch = destination(
        "watch", ops.url, events=("relay.*",), circuit=QUICK, retry=RetryConfig(schedule=(0.01,) * 6)
    )
    async with dispatcher_for(store, destination("crm", receiver.url), watch) as dispatcher:
        await send(store)
        await until(lambda: dispatcher.lanes["watch"].held == "disabled: gone")  # after the circuit
        await until(lambda: not dispatcher.lanes["watch"]._tasks)
        assert types(await store.queries.find("events")) == ["shop.order", "relay.delivery.dead"]
        assert len(ops.requests) == 5


async def test_a_dead_delivery_of_an_operator_event_raises_no_other(store, receiver, ops):
    receiver.answers = [(400, {"webhook-delivery": "abort-message"})]
    ops.usual = (500, {})
    watch = destination("watch", ops.url, events=("relay.*",), retry=RetryConfig(schedule=(0.01,)))
    async with dispatcher_for(store, destination("crm", receiver.url), watch):
        await send(store)
        [row] = await ended(store, 1, "watch")
        assert (row["state"], row["reason"]) == ("dead", "exhausted")
        assert types(await store.queries.find("events")) == ["shop.order", "relay.delivery.dead"]


async def test_a_restart_does_not_report_an_open_circuit_again(store, receiver):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, circuit=LASTING, retry=OFTEN)

    async def types_of_events():
        return types(await store.queries.find("events", source="relay"))

    async with dispatcher_for(store, crm) as dispatcher:
        await send_many(store, 20)
        await until(lambda: dispatcher.lanes["crm"].health.state.circuit_opened is not None)
    sent = len(receiver.requests)
    async with dispatcher_for(store, crm) as dispatcher:
        lane = dispatcher.lanes["crm"]
        await until(lambda: len(receiver.requests) > sent and lane.in_flight == 0)
        assert lane.held == "circuit open"
        assert len(receiver.requests) == sent + 1  # one probe
        assert await types_of_events() == ["relay.destination.circuit_opened"]
    receiver.usual = (200, {})
    async with dispatcher_for(store, crm):
        await ended(store, 19)  # the probe waits for the next one
        assert await types_of_events() == [
            "relay.destination.circuit_opened",
            "relay.destination.recovered",
        ]


async def test_a_report_that_could_not_be_stored_is_repeated(store, receiver):
    crm = destination("crm", receiver.url, circuit=QUICK, retry=OFTEN, concurrency=1)
    stored, failing = store.deliveries.set_destination, True

    async def fail_reports(state, event=None):
        if event is not None and failing:
            raise StorageError("for the test")
        await stored(state, event)

    with patch.object(store.deliveries, "set_destination", fail_reports):
        async with dispatcher_for(store, crm) as dispatcher:
            lane = dispatcher.lanes["crm"]
            for status, type_ in ((500, "circuit_opened"), (200, "recovered")):
                receiver.usual, failing = (status, {}), True
                await send_many(store, 3)
                await until(lambda status=status: lane.health.circuit.is_open == (status == 500))
                failing = False
                await send(store)
                async with asyncio.timeout(30):
                    while type_ not in str(await store.queries.find("events", source="relay")):  # noqa: ASYNC110 - the store offers nothing to await
                        await asyncio.sleep(0.01)
            await ended(store, 8)
    rows = await store.queries.find("events", source="relay")
    assert types(rows) == ["relay.destination.circuit_opened", "relay.destination.recovered"]


async def test_a_state_that_is_stored_twice_is_one_event(store):
    """A node may not know what another one has stored at the same moment."""
    opened = DestinationState(name="crm", circuit_opened="HTTP 500")
    both = msgspec.structs.replace(opened, disabled_at=1, disabled_reason="gone")
    for state in (opened, opened, both, both, DestinationState(name="crm"), DestinationState(name="crm")):
        event = GeneratedEvent(type="destination.changed", subject="crm", data={})
        await store.deliveries.set_destination(state, event)
    assert len(await store.queries.find("events", source="relay")) == 3
    assert await store.queries.destination_states() == {"crm": DestinationState(name="crm")}
