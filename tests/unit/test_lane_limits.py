"""The limits and the order of a lane: rate limit, slots, shares, shared slots, windows."""

import asyncio
from functools import partial

import pytest
from lanes import CLOCK, Receiver, destination, dispatcher_for, ended, send, send_many
from stores import is_postgres, watch_statements
from support import until

from relay.base.clock import SECOND
from relay.base.units import Rate
from relay.config.schema import CircuitConfig, RetryConfig
from relay.delivery.lane import Lane
from relay.delivery.limits import Slots
from relay.model import DestinationState

NEVER_OPENS = CircuitConfig(failures=1_000_000)


@pytest.fixture
def turns(monkeypatch):
    """Count the turns of lanes."""
    counted = []
    turn = Lane.turn
    monkeypatch.setattr(Lane, "turn", lambda lane: (counted.append(lane.name), turn(lane))[1])
    return counted


class HangsOnRetries(Receiver):
    """Fails the first attempt of each delivery that it must refuse, and hangs at the later ones."""

    def answer(self, request_headers, body):
        if b"refuse" not in body:
            return 200, {}
        return (500, {}) if self.ids.count(request_headers["webhook-id"]) == 1 else (200, {})

    async def wait(self):
        headers, body = self.requests[-1]
        if b"refuse" in body and self.ids.count(headers["webhook-id"]) > 1:
            await self.gate.wait()


# --- rate ---------------------------------------------------------------------------------------------


async def test_a_rate_limit_counts_no_attempt_and_waits_no_longer_than_needed(store, receiver, turns):
    crm = destination("crm", receiver.url, rate_limit=Rate(50, 1))
    async with dispatcher_for(store, crm):
        began = CLOCK.steady()
        await send_many(store, 65)
        rows = await ended(store, 65)
    assert {(row["state"], row["attempts"]) for row in rows} == {("delivered", 1)}
    late = [(at - began) / SECOND for at in receiver.times[50:]]
    due = [number / 50 for number in range(1, 16)]  # after the burst of one second
    assert all(at >= least for at, least in zip(late, due, strict=True))
    assert late[-1] < due[-1] + 10  # a busy machine; a lane that misses the time polls after 30 s
    assert len(turns) < 65 * 5  # an offer, an attempt's end, a timer; a busy loop would be thousands


async def test_a_rate_limit_holds_across_bursts_of_retries(store, receiver):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, rate_limit=Rate(100, 1), circuit=NEVER_OPENS)
    async with dispatcher_for(store, crm):
        began = CLOCK.steady()
        await send_many(store, 30)
        rows = await ended(store, 30)
    assert {(row["state"], row["attempts"]) for row in rows} == {("dead", 5)}
    assert len(receiver.times) == 150
    assert receiver.times[-1] - began >= (150 - 100) / 100 * SECOND


# --- shares -------------------------------------------------------------------------------------------


async def test_hundreds_of_hanging_retries_leave_a_quarter_of_the_slots_to_first_attempts(store):
    async with HangsOnRetries().serve() as receiver:
        crm = destination(
            "crm", receiver.url, concurrency=8, circuit=NEVER_OPENS, timeout=30.0,
            retry=RetryConfig(schedule=(0.01,)),
        )  # fmt: skip
        receiver.gate.clear()
        async with dispatcher_for(store, crm):
            await send_many(store, 200, b'{"refuse":true}')
            await until(lambda: len(receiver.ids) >= 200 + 6)
            fresh = await send_many(store, 100)
            await until(lambda: set(fresh) <= set(receiver.ids))
            await ended(store, 100)
            assert receiver.busy == 6
            receiver.gate.set()
            await ended(store, 300)


async def test_with_one_slot_first_attempts_and_retries_take_turns(store, receiver):
    receiver.answers = [(500, {})]
    crm = destination("crm", receiver.url, concurrency=1, retry=RetryConfig(schedule=(0.2,)))
    async with dispatcher_for(store, crm) as dispatcher:
        refused = await send(store)
        await until(lambda: receiver.requests)
        receiver.gate.clear()
        await send_many(store, 60)
        await until(lambda: len(dispatcher.lanes["crm"]._retry.deliveries) == 1)  # due
        assert len(receiver.ids) == 2
        receiver.gate.set()
        await ended(store, 61)
    assert receiver.ids.index(refused, 1) <= 3


async def test_within_a_rate_limit_first_attempts_and_retries_take_turns(store, receiver):
    receiver.answers = [(500, {})]
    crm = destination("crm", receiver.url, rate_limit=Rate(20, 1), retry=RetryConfig(schedule=(0.2,)))
    async with dispatcher_for(store, crm):
        refused = await send(store)
        await until(lambda: store.commits >= 2)  # with the event, and with its failed attempt
        await send_many(store, 60)
        await ended(store, 61)
    assert receiver.ids.index(refused, 1) < 58  # about the 24th; behind all others without turns


async def test_older_deliveries_are_sent_first(store, monkeypatch):
    monkeypatch.setattr("relay.delivery.lane.WINDOW_SIZE", 4)
    accepted, sending = [], []

    class Busy(Receiver):
        def answer(self, request_headers, body):
            if len(self.ids) <= 40:  # each event that arrives causes another one
                sending.append(asyncio.create_task(accept()))
            return 200, {}

    async def accept():
        accepted.append(await send(store))

    async with Busy().serve() as receiver:
        receiver.gate.clear()
        async with dispatcher_for(store, destination("crm", receiver.url, concurrency=1)):
            for _ in range(30):
                await accept()
            receiver.gate.set()
            await until(lambda: len(receiver.ids) == 70)
            await asyncio.gather(*sending)
            await ended(store, 70)
    assert receiver.ids[:30] == accepted[:30]
    assert sorted(receiver.ids) == sorted(accepted)


# --- shared slots -------------------------------------------------------------------------------------


async def test_every_lane_progresses_while_all_shared_slots_hang(store, receiver, monkeypatch):
    monkeypatch.setattr("relay.delivery.dispatcher.Slots", partial(Slots, 4))
    async with Receiver().serve() as stuck:
        stuck.gate.clear()
        hanging = [destination(f"stuck{n}", stuck.url, concurrency=8, timeout=30.0) for n in range(3)]
        async with dispatcher_for(store, *hanging, destination("crm", receiver.url)) as dispatcher:
            await send_many(store, 30)
            await ended(store, 30, "crm")
            assert stuck.busy == 3 * 2 + 4
            stuck.gate.set()
            await ended(store, 4 * 30)
            assert dispatcher.lanes["crm"].in_flight == 0
    assert stuck.most_busy == 10


# --- no read, no busy loop ----------------------------------------------------------------------------


async def test_a_fresh_event_reaches_an_idle_lane_without_a_database_read(store, receiver):
    receiver.gate.clear()
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        await until(lambda: not dispatcher.lanes["crm"]._tasks)  # it has queried the store
        await send(store)  # asyncpg reads types of columns before the first statement
        await until(lambda: receiver.requests)
        statements = await watch_statements(store)
        await send(store)
        await until(lambda: len(receiver.requests) == 2)
        verbs = [statement.split()[0] for statement in statements]
        receiver.gate.set()
    if is_postgres(store):
        assert verbs == ["WITH"]
    else:
        assert (verbs[0], set(verbs[1:-1]), verbs[-1]) == ("BEGIN", {"INSERT"}, "COMMIT")


async def paused(lane, receiver):
    await lane.set_state(DestinationState(name="crm", paused=True))


async def open_circuit(lane, receiver):
    receiver.usual = (500, {})


async def rate_limited(lane, receiver):
    assert lane.config.rate_limit == Rate(1, 3600)


async def slots_taken(lane, receiver):
    receiver.gate.clear()


@pytest.mark.parametrize("hold", [paused, open_circuit, rate_limited, slots_taken])
async def test_a_lane_with_waiting_deliveries_is_idle(store, receiver, turns, hold):
    rate = Rate(1, 3600) if hold is rate_limited else None
    in_flight = 8 if hold is slots_taken else 0
    circuit = CircuitConfig(failures=3)
    crm = destination("crm", receiver.url, circuit=circuit, timeout=30.0, rate_limit=rate)
    async with dispatcher_for(store, crm) as dispatcher:
        lane = dispatcher.lanes["crm"]
        await hold(lane, receiver)
        await send_many(store, 200)
        await until(lambda: lane.in_flight == len(lane._tasks) == in_flight)
        turns.clear()
        await asyncio.sleep(0.2)  # the window that is measured
        assert turns == []
        assert (await store.ledger.audit())["crm"].pending >= 199
        assert len(receiver.requests) <= 10
        receiver.gate.set()


async def test_an_idle_lane_does_no_work(store, receiver, turns):
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        await send(store)
        await ended(store)
        await until(lambda: not dispatcher.lanes["crm"]._tasks)
        turns.clear()
        await asyncio.sleep(0.2)  # the window that is measured
        assert turns == []


async def test_a_delivery_whose_expiry_could_not_be_stored_is_sent(store, receiver, monkeypatch):
    begin, refused = store.deliveries.begin_attempt, []

    def refuse_once(delivery_id):
        if refused:
            return begin(delivery_id)
        refused.append(delivery_id)  # a transaction is ending it, and will fail
        return False

    monkeypatch.setattr(store.deliveries, "begin_attempt", refuse_once)
    async with dispatcher_for(store, destination("crm", receiver.url)):
        await send(store)
        [row] = await ended(store)
    assert (row["state"], len(receiver.requests), len(refused)) == ("delivered", 1, 1)
