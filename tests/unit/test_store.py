"""The contract of every store: one suite, run against each implementation."""

import asyncio

import msgspec
import pytest
from stores import KINDS, hooks, ids, make_event, make_store, refuse_writes, rows
from support import until

from relay.base.clock import SECOND
from relay.errors import Overloaded, StorageError, StorageUnavailableError
from relay.model import (
    Attempt,
    Heartbeat,
    Outcome,
    Outlook,
    Register,
    Selection,
    Session,
    SessionSeen,
    Target,
    Unregister,
)
from relay.store import Acceptance


@pytest.fixture(params=KINDS)
async def store(request, tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock, kind=request.param)
    hooks(store).route = lambda event: () if event.type.startswith("relay.") else (Target("crm"),)
    await store.open()
    yield store
    await store.close()


def event(clock, body=b'{"a": {"n": 45000.00}}', data=b'{"n": 45000.00}', **fields):
    return make_event(
        clock, body, **{"source": "shop", "subject": "s1", "data": data, "context": b'{"c":1}', **fields}
    )


def accept(clock, key=None, change=None, **fields):
    return Acceptance(source="shop", event=event(clock, **fields), key=key, change=change)


def outcome(delivery, state="delivered", **fields):
    attempt = Attempt(started_at=1, duration_ms=2.5, result="ok", status=200, answer=b"yes")
    return Outcome(delivery=delivery, attempt=attempt, state=state, **fields)


async def test_an_event_is_read_back_byte_for_byte(store, clock):
    sent = event(clock)
    await store.events.append(Acceptance(source="shop", event=sent))
    [id_] = await ids(store)
    assert await store.events.load([id_]) == {id_: msgspec.structs.replace(sent, id=id_)}


async def test_data_that_is_not_part_of_the_body_is_read_back(store, clock):
    sent = event(clock, body=b"x=1", data=b"{}")
    await store.events.append(Acceptance(source="shop", event=sent))
    [id_] = await ids(store)
    assert (await store.events.load([id_]))[id_].data == b"{}"


async def test_an_event_and_its_deliveries_appear_together(store, clock):
    heard = []
    hooks(store).listener = lambda news: heard.append((list(news.events), list(news.deliveries)))
    receipt = await store.events.append(accept(clock))
    [(events, deliveries)] = heard
    assert [e.public_id for e in events] == [receipt.event_id]
    assert [d.destination for d in deliveries] == ["crm"]
    assert deliveries[0].event is events[0]


async def test_concurrent_requests_share_commits(store, clock):
    receipts = await asyncio.gather(*(store.events.append(accept(clock)) for _ in range(500)))
    assert len({receipt.event_id for receipt in receipts}) == 500
    assert (await store.ledger.audit())["crm"].created == 500
    assert store.commits < 50


async def test_a_key_is_remembered_for_seven_days(store, clock):
    first = await store.events.append(accept(clock, key="k"))
    clock.advance(6.9 * 86400)
    again = await store.events.append(accept(clock, key="k"))
    assert (again.event_id, again.duplicate) == (first.event_id, True)
    clock.advance(0.2 * 86400)
    later = await store.events.append(accept(clock, key="k"))
    assert later.event_id != first.event_id
    assert (await store.events.append(accept(clock, key="k"))).event_id == later.event_id
    assert (await store.ledger.audit())["crm"].created == 2


async def test_equal_requests_in_one_batch_become_one_event(store, clock):
    receipts = await asyncio.gather(*(store.events.append(accept(clock, key="k")) for _ in range(5)))
    assert len({receipt.event_id for receipt in receipts}) == 1
    assert sorted(receipt.duplicate for receipt in receipts) == [False, True, True, True, True]


async def test_a_new_delivery_is_claimed_until_it_is_released(store, clock):
    fresh = []
    hooks(store).listener = lambda news: fresh.extend(news.deliveries)
    await store.events.append(accept(clock))
    assert (await store.deliveries.claim("crm", 10, retries=False)).deliveries == ()
    store.deliveries.release([fresh[0].id])
    claimed = (await store.deliveries.claim("crm", 10, retries=False)).deliveries
    assert [d.id for d in claimed] == [fresh[0].id]
    assert (await store.deliveries.claim("crm", 10, retries=False)).deliveries == ()


async def test_a_claim_takes_the_longest_due_first_and_no_more_than_asked(store, clock):
    fresh = []
    hooks(store).listener = lambda news: fresh.extend(news.deliveries)
    for _ in range(5):
        await store.events.append(accept(clock))
        clock.advance(1)
    store.deliveries.release([d.id for d in fresh])
    claim = await store.deliveries.claim("crm", 2, retries=False)
    assert [d.id for d in claim.deliveries] == [fresh[0].id, fresh[1].id]
    assert claim.next_due is not None
    assert [d.id for d in (await store.deliveries.claim("crm", 9, retries=False)).deliveries] == [
        d.id for d in fresh[2:]
    ]


async def test_a_delivery_is_settled_once_with_its_attempt(store, clock):
    fresh = []
    hooks(store).listener = lambda news: fresh.extend(news.deliveries)
    await store.events.append(accept(clock))
    assert await store.deliveries.settle(outcome(fresh[0])) is True
    assert await store.deliveries.settle(outcome(fresh[0], "dead")) is False
    [row] = await store.queries.find("deliveries")
    assert (row["state"], row["attempts"], row["last_status"]) == ("delivered", 1, 200)
    attempts = await store.queries.find("attempts", delivery_id=row["id"])
    assert [a["answer"] for a in attempts] == [b"yes", b"yes"]
    counts = (await store.ledger.audit())["crm"]
    assert (counts.created, counts.delivered, counts.dead, counts.unaccounted) == (1, 1, 0, 0)


async def test_listeners_get_each_recorded_outcome_once(store, clock):
    fresh, seen = [], []

    def listen(news):
        fresh.extend(news.deliveries)
        seen.extend(news.outcomes)

    hooks(store).listener = listen
    await store.events.append(accept(clock))
    assert seen == []
    failed = outcome(fresh[0], "pending", next_attempt_at=clock.steady() + SECOND)
    await store.deliveries.settle(failed)
    assert seen == [failed]
    clock.advance(1)
    [again] = (await store.deliveries.claim("crm", 1, retries=True)).deliveries
    delivered, late = outcome(again), outcome(again, "dead")
    assert [await store.deliveries.settle(delivered), await store.deliveries.settle(late)] == [True, False]
    assert seen == [failed, delivered]


@pytest.mark.parametrize("counts", [True, False])
async def test_a_retry_that_became_due_before_the_latest_claim_is_claimed(store, clock, counts):
    """The outcome of an attempt waits for the store, and the lane claims other deliveries meanwhile."""
    fresh = []
    hooks(store).listener = lambda news: fresh.extend(news.deliveries)
    await store.events.append(accept(clock))
    delivery, due = fresh[0], clock.steady()
    clock.advance(10)
    for retries in (True, False):
        assert (await store.deliveries.claim("crm", 9, retries=retries)).deliveries == ()
    await store.deliveries.settle(outcome(delivery, "pending", next_attempt_at=due, counts=counts))
    [again] = (await store.deliveries.claim("crm", 9, retries=counts)).deliveries
    assert (again.id, again.attempts) == (delivery.id, int(counts))


async def test_a_retry_is_due_at_its_time_and_announced_before(store, clock):
    fresh = []
    hooks(store).listener = lambda news: fresh.extend(news.deliveries)
    await store.events.append(accept(clock))
    due = clock.steady() + 5 * SECOND
    await store.deliveries.settle(outcome(fresh[0], "pending", next_attempt_at=due))
    claim = await store.deliveries.claim("crm", 10, retries=True)
    assert (claim.deliveries, claim.next_due) == ((), due)
    clock.advance(5)
    [delivery] = (await store.deliveries.claim("crm", 10, retries=True)).deliveries
    assert delivery.attempts == 1


async def test_an_uncounted_attempt_uses_nothing_of_the_schedule(store, clock):
    fresh = []
    hooks(store).listener = lambda news: fresh.extend(news.deliveries)
    await store.events.append(accept(clock))
    await store.deliveries.settle(outcome(fresh[0], "pending", next_attempt_at=clock.steady(), counts=False))
    [delivery] = (await store.deliveries.claim("crm", 10, retries=False)).deliveries
    assert delivery.attempts == 0


async def test_everything_survives_a_reopening(tmp_path, clock):
    path = tmp_path / "relay.db"
    store = make_store(path, clock)
    hooks(store).route = lambda _event: (Target("crm"),)
    await store.open()
    receipt = await store.events.append(accept(clock, key="k", change=Register(worker_id="w1")))
    await store.close()
    again = make_store(path, clock)
    await again.open()
    try:
        assert len((await again.deliveries.claim("crm", 10, retries=False)).deliveries) == 2
        assert (await again.events.append(accept(clock, key="k"))).event_id == receipt.event_id
        assert [w.id for w in again.workers.all()] == ["w1"]
        newer = await again.events.append(accept(clock))
        [*_, third] = await ids(again)
        [row] = await again.queries.find("events", id=newer.event_id)
        assert (row["row"], len(await ids(again))) == (third, 3)
    finally:
        await again.close()


async def test_deliveries_with_times_of_a_clock_that_was_ahead_become_due_at_a_start(tmp_path, clock, caplog):
    path, stores = tmp_path / "relay.db", []

    async def reopened():
        if stores:
            await stores.pop().close()
        store = make_store(path, clock)
        store.fresh = []
        hooks(store).route = lambda _event: (Target("crm"),)
        hooks(store).listener = lambda news: store.fresh.extend(news.deliveries)
        await store.open()
        stores.append(store)
        return store

    async def fail(store, at):
        attempt = Attempt(started_at=clock.wall(), duration_ms=1.0, result="5xx", status=500)
        due = clock.steady() + 3600 * SECOND
        await store.deliveries.settle(
            Outcome(delivery=store.fresh[at], attempt=attempt, state="pending", next_attempt_at=due)
        )

    try:
        store = await reopened()
        for _ in range(2):
            await store.events.append(accept(clock))
        await fail(store, 0)  # it waits for an hour, rightly
        clock.advance(20 * 3600)  # the clock jumps
        await fail(store, 1)
        for _ in range(2):
            await store.events.append(accept(clock))
        await fail(store, 2)
        clock.advance(-19.9 * 3600)  # and is corrected
        store = await reopened()
        made = await ids(store, "deliveries")
        claims = [(await store.deliveries.claim("crm", 9, retries=retries)) for retries in (False, True)]
        assert [[each.id for each in claim.deliveries] for claim in claims] == [made[3:], made[1:3]]
        assert claims[1].next_due - clock.steady() == 3240 * SECOND
        assert "the clock was ahead when 3 deliveries were stored or tried: they are due now" in caplog.text
        caplog.clear()
        await reopened()
        assert "ahead" not in caplog.text
    finally:
        await stores[0].close()


async def test_a_faulty_request_fails_alone(store, clock):
    bad = accept(clock, received_at=2**70)
    results = await asyncio.gather(
        store.events.append(accept(clock)),
        store.events.append(bad),
        store.events.append(accept(clock)),
        return_exceptions=True,
    )
    assert isinstance(results[1], StorageError)
    assert not isinstance(results[1], StorageUnavailableError)
    assert len(await store.queries.find("events")) == 2


async def test_a_full_disk_fails_the_batch_and_writes_resume_by_themselves(store, clock):
    await refuse_writes(store, now=True)
    big = b'{"a":"' + b"x" * 4_000_000 + b'"}'
    with pytest.raises(StorageUnavailableError):
        await store.events.append(accept(clock, body=big, data=b"{}"))
    assert store.failure is not None
    with pytest.raises(StorageUnavailableError):
        await store.events.append(accept(clock))
    await refuse_writes(store, now=False)
    await until(lambda: store.failure is None)
    await store.events.append(accept(clock))
    assert len(await store.queries.find("events")) == 1


async def test_the_queue_is_bounded(store, clock, monkeypatch):
    monkeypatch.setattr("relay.store.writer.MAX_JOBS", 3)
    tasks = [asyncio.ensure_future(store.events.append(accept(clock))) for _ in range(8)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(result, Overloaded) for result in results) == 5


async def test_a_worker_lives_through_all_its_states(store, clock):
    types = []
    hooks(store).listener = lambda news: types.extend(e.type for e in news.events)

    async def change(what):
        await store.events.append(Acceptance(source="shop", change=what))

    await change(Register(worker_id="w1", endpoint="http://w"))
    await change(Register(worker_id="w1", endpoint="http://w"))
    clock.advance(89)
    assert await store.workers.sweep() == ()
    clock.advance(2)
    assert [w.id for w in await store.workers.sweep()] == ["w1"]
    assert await store.workers.sweep() == ()
    await change(Heartbeat(worker_id="w1"))
    await change(Unregister(worker_id="w1"))
    await change(Unregister(worker_id="w1"))
    await change(Heartbeat(worker_id="w1"))
    assert types == [
        "shop.worker.registered", "shop.worker.offline", "shop.worker.online", "shop.worker.unregistered",
    ]  # fmt: skip


async def test_a_quiet_heartbeat_costs_no_commit_and_is_flushed(store, clock):
    await store.events.append(Acceptance(source="shop", change=Register(worker_id="w1")))
    before = store.commits
    clock.advance(30)
    await store.events.append(Acceptance(source="shop", change=Heartbeat(worker_id="w1", cpu=3.5)))
    assert store.commits == before
    await store.workers.flush()
    assert store.commits == before + 1
    assert await rows(store, "SELECT last_heartbeat FROM workers") == [(clock.wall(),)]


async def test_a_heartbeat_while_its_worker_s_row_is_written_is_not_lost(store, clock):
    sessions = (Session(id="s1", status="CONNECTING"),)
    await store.events.append(Acceptance(source="shop", change=Heartbeat(worker_id="w1", sessions=sessions)))
    beats = []

    def route(_event):
        beats.append(asyncio.create_task(beat()))  # it runs when the transaction awaits the disk
        return ()

    async def beat():
        clock.advance(30)
        await store.events.append(Acceptance(source="shop", change=Heartbeat(worker_id="w1")))

    hooks(store).route = route
    seen = SessionSeen(session=Session(id="s1", status="CONNECTED"))
    await store.events.append(accept(clock, change=seen))
    await asyncio.gather(*beats)
    [worker] = store.workers.all()
    assert (worker.last_heartbeat, worker.sessions) == (clock.wall(), (seen.session,))


async def test_a_new_id_at_an_old_endpoint_shortens_the_deadline_of_the_old_id(store, clock):
    await store.events.append(
        Acceptance(source="shop", change=Register(worker_id="old", endpoint="http://w"))
    )
    await store.events.append(
        Acceptance(source="shop", change=Register(worker_id="new", endpoint="http://w"))
    )
    clock.advance(36)
    assert [w.id for w in await store.workers.sweep()] == ["old"]


async def test_after_a_start_deadlines_are_extended(store, clock):
    await store.events.append(Acceptance(source="shop", change=Register(worker_id="w1")))
    clock.advance(3600)
    assert await store.workers.sweep(extend=True) == ()
    assert await store.workers.sweep() == ()
    clock.advance(91)
    assert [w.id for w in await store.workers.sweep()] == ["w1"]


@pytest.mark.parametrize("most", [10_000, 1])
async def test_the_backlog_of_one_destination_is_that_of_all(store, clock, monkeypatch, most):
    for engine in ("sqlite", "postgres"):
        monkeypatch.setattr(f"relay.store.{engine}.ledger.MOST_LATER", most)
    fresh = []
    hooks(store).listener = lambda news: fresh.extend(news.deliveries)
    hooks(store).route = lambda event: (Target("crm", order_key=event.subject), Target("erp"))
    for subject in ("a", "a", "b", "c"):  # the second waits behind the first
        await store.events.append(accept(clock, subject=subject))
        clock.advance(1)
    [first, *others] = [each for each in fresh if each.destination == "erp"]
    later = clock.steady() + 60 * SECOND
    await store.deliveries.settle(outcome(first))
    for each in others[:2]:
        await store.deliveries.settle(outcome(each, "pending", next_attempt_at=later))
    for now in (clock.steady(), later):
        found = await store.ledger.backlog(now)
        assert {name: each.due for name, each in found.items()} == {"crm": 3, "erp": 3 if now == later else 1}
        for name in ("crm", "erp"):
            for start in (None, found[name].row):
                assert await store.ledger.backlog_of(name, now, start) == found[name]
    former = found["crm"].row
    [delivery] = [each for each in fresh if each.id == former]
    await store.deliveries.settle(outcome(delivery))
    found = await store.ledger.backlog(later)
    assert former < found["crm"].row
    assert await store.ledger.backlog_of("crm", later, former) == found["crm"]
    assert await store.ledger.backlog_of("bi", later) is None


async def test_the_outlook_names_the_first_to_expire_and_counts_order_keys(store, clock, monkeypatch):
    ttl = 600 * SECOND

    def route(event):
        return Target("crm", order_key=event.subject, ttl=ttl if event.subject == "b" else 2 * ttl), Target(
            "erp"
        )

    hooks(store).route = route
    for subject in ("a", "a", "b", "c"):
        await store.events.append(accept(clock, subject=subject))
        clock.advance(1)
    found = await store.ledger.backlog(clock.steady())
    shortest = clock.steady() - 2 * SECOND + ttl  # the third, when it was stored
    assert await store.ledger.outlook_of("crm", found["crm"].row) == Outlook(shortest, 3, 2, True)
    assert await store.ledger.outlook_of("erp", found["erp"].row) == Outlook(None, 0, 0, True)
    for engine in ("sqlite", "postgres"):
        monkeypatch.setattr(f"relay.store.{engine}.ledger.MOST_KEYS", 2)
        monkeypatch.setattr(f"relay.store.{engine}.ledger.MOST_EXPIRING", 0)
    bounded = await store.ledger.outlook_of("crm", found["crm"].row)
    assert (bounded.is_whole, bounded.longest >= 1) == (False, True)
    assert bounded.expires_at == shortest + ttl - 2 * SECOND  # of the oldest


async def test_a_delivery_that_was_sent_again_names_the_latest_later_one(store, clock):
    fresh = []
    hooks(store).listener = lambda news: fresh.extend(news.deliveries)
    both = (Target("crm"), Target("erp"))
    hooks(store).route = lambda event: () if event.type.startswith("relay.") else both
    for subject in ("a", "b"):
        await store.events.append(accept(clock, subject=subject))
    first, erp, _, _ = dead = list(fresh)
    for each in dead:
        await store.deliveries.settle(outcome(each, "dead"))
    event = (await store.events.load([first.event_id]))[first.event_id]
    for _ in range(2):  # the second replaces the first as the latest
        assert await store.deliveries.repeat([(event, Target("crm"))]) == (True,)
        await store.deliveries.settle(outcome(fresh[-1], "dead"))
    middle, last = fresh[-2:]
    rows = {row["id"]: row["replayed_by"] for row in await store.queries.find("deliveries", state="dead")}
    named = {first.public_id: last.public_id, middle.public_id: last.public_id}
    assert rows == {each.public_id: named.get(each.public_id) for each in fresh}

    async def listed(**filters):
        page = await store.queries.page("deliveries", state="dead", **filters)
        return {row["id"] for row in page.rows}

    assert await listed(replayed=True) == named.keys()
    others = {each.public_id for each in (*dead[1:], last)}
    assert await listed(replayed=False) == others
    assert await listed(replayed=False, subject="a", destination="erp") == {erp.public_id}
    assert await listed(replayed=True, event_id=event.public_id) == named.keys()
    pages = store.queries.select(Selection(state="dead"), await store.queries.span(Selection(state="dead")))
    assert sum([len(one.destinations) async for page in pages for one in page]) == len(others)
