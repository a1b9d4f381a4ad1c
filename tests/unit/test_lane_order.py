"""Order and expiry, end to end: randomly failing receivers get each key in order and nothing expired."""

import asyncio
import json
import random
from collections import defaultdict

from lanes import CLOCK, Receiver, destination, dispatcher_for, ended, router, send, send_many
from stores import hooks
from support import until

from relay.base.clock import SECOND
from relay.config.schema import CircuitConfig, RetryConfig

KEYS = 20
EACH = 15


class Flaky(Receiver):
    """Is slow, fails about every third request, and keeps accepted bodies by subject."""

    def __init__(self):
        super().__init__()
        self.rand = random.Random(5)
        self.taken = defaultdict(list)
        self.most_of_a_key = 0
        self._open = defaultdict(int)

    async def handle(self, request):
        subject = json.loads(await request.read())["subject"]
        self._open[subject] += 1
        self.most_of_a_key = max(self.most_of_a_key, self._open[subject])
        try:
            return await super().handle(request)
        finally:
            self._open[subject] -= 1

    async def wait(self):
        await asyncio.sleep(0.002)  # a slow receiver

    def answer(self, request_headers, body):
        if self.rand.random() < 0.3:
            return 500, {}
        event = json.loads(body)
        self.taken[event["subject"]].append(event["data"]["n"])
        return 200, {}


async def test_each_key_arrives_strictly_in_order_and_once_despite_failures(store):
    async with Flaky().serve() as receiver:
        crm = destination(
            "crm", receiver.url, order_by="subject", concurrency=8,
            circuit=CircuitConfig(failures=1_000_000), retry=RetryConfig(schedule=(0.01,) * 30),
        )  # fmt: skip
        async with dispatcher_for(store, crm):
            for number in range(EACH):
                body = b'{"n":%d}' % number
                await asyncio.gather(*(send(store, body, f"key {key}") for key in range(KEYS)))
            rows = await ended(store, KEYS * EACH)
    assert {row["state"] for row in rows} == {"delivered"}
    assert receiver.taken == {f"key {key}": list(range(EACH)) for key in range(KEYS)}
    assert receiver.most_of_a_key == 1
    assert receiver.most_busy > 1
    assert len(receiver.requests) > KEYS * EACH


async def test_after_a_dead_delivery_the_next_of_its_key_is_sent(store, receiver):
    receiver.answers = [(400, {"webhook-delivery": "abort-message"})]
    async with dispatcher_for(store, destination("crm", receiver.url, order_by="subject")):
        sent = [await send(store) for _ in range(3)]
        rows = await ended(store, 3)
    assert [row["state"] for row in rows] == ["dead", "delivered", "delivered"]
    assert receiver.ids == sent


async def test_order_survives_a_restart(store, receiver):
    receiver.gate.clear()
    crm = destination("crm", receiver.url, order_by="subject")
    async with dispatcher_for(store, crm):
        sent = [await send(store, subject=f"key {n % 2}") for n in range(20)]
        await until(lambda: receiver.busy == 2)
        receiver.gate.set()
    async with dispatcher_for(store, crm):
        await ended(store, 20)
    assert sorted(receiver.ids) == sorted(sent)
    for key in (0, 1):
        assert [id_ for id_ in receiver.ids if id_ in sent[key::2]] == sent[key::2]


async def test_a_delivery_that_expires_while_it_waits_for_a_slot_is_not_sent(store, receiver):
    receiver.gate.clear()
    crm = destination("crm", receiver.url, concurrency=1, ttl=0.5)
    async with dispatcher_for(store, crm) as dispatcher:
        first = await send(store)
        await send_many(store, 10)
        assert len(dispatcher.lanes["crm"]._first.deliveries) == 10
        stored = CLOCK.steady()
        await until(lambda: CLOCK.steady() > stored + 0.5 * SECOND)
        receiver.gate.set()
        rows = await ended(store, 11)
    assert [(row["state"], row["reason"]) for row in rows] == [
        ("delivered", None),
        *[("expired", "ttl")] * 10,
    ]
    assert [row["attempts"] for row in rows[1:]] == [0] * 10
    assert receiver.ids == [first]
    assert await store.queries.find("attempts", delivery_id=rows[1]["id"]) == []


async def test_a_delivery_that_was_cancelled_during_an_attempt_before_a_crash_is_not_sent(store, receiver):
    crm = destination("crm", receiver.url)
    hooks(store).route, made = router([crm]).route, []
    hooks(store).listener = lambda news: made.extend(news.deliveries)
    await send(store)
    assert store.deliveries.begin_attempt(made[0].id)
    assert (await store.deliveries.cancel([made[0].id])).in_flight == 1
    store.claims.release([made[0].id])  # all that a crash leaves
    async with dispatcher_for(store, crm):
        [row] = await ended(store, 1)
    assert (row["state"], row["reason"], row["attempts"]) == ("cancelled", "operator", 0)
    assert receiver.ids == []
    assert (await store.ledger.audit())["crm"].unaccounted == 0


async def test_a_delivery_that_expires_while_held_is_not_sent_on_resume(store, receiver):
    receiver.answers = [(503, {"Retry-After": "1"})]
    crm = destination("crm", receiver.url, concurrency=1, ttl=0.5)
    async with dispatcher_for(store, crm) as dispatcher:
        first = await send(store)
        await until(lambda: dispatcher.lanes["crm"].held == "resting")
        await send_many(store, 5)
        rows = await ended(store, 6)
    assert {(row["state"], row["reason"]) for row in rows} == {("expired", "ttl")}
    assert receiver.ids == [first]
    assert (await store.ledger.audit())["crm"].unaccounted == 0


async def test_a_final_status_ends_a_delivery_at_once_and_frees_its_key(store, receiver):
    receiver.answers = [(400, {}), (200, {})]
    crm = destination("crm", receiver.url, order_by="subject", final_statuses=(400,), on_dead="spare")
    spare = destination("spare", receiver.url, events=())
    async with dispatcher_for(store, crm, spare) as dispatcher:
        first, second = await send(store), await send(store)
        await ended(store, 2, destination="crm")
        [spared] = await ended(store, 1, destination="spare")
        assert not dispatcher.lanes["crm"].health.circuit.is_open
    dead, delivered = await ended(store, 2, destination="crm")
    assert (dead["state"], dead["reason"], dead["attempts"]) == ("dead", "final_status", 1)
    assert delivered["state"] == spared["state"] == "delivered"
    assert sorted(receiver.ids) == sorted([first, second, first])


async def test_a_probe_with_a_final_status_ends_its_delivery(store, receiver):
    receiver.answers = [(500, {}), (503, {})]
    crm = destination(
        "crm", receiver.url, concurrency=1, final_statuses=(503,),
        circuit=CircuitConfig(failures=1, probe=0.05, max_probe=0.05),
    )  # fmt: skip
    async with dispatcher_for(store, crm):
        await send(store)
        [row] = await ended(store)
    assert (row["state"], row["reason"], row["attempts"]) == ("dead", "final_status", 2)
