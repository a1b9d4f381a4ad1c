"""Lanes with the real store, the real client, and receivers on loopback."""

import asyncio
import json

import pytest
from lanes import CLOCK, SECRET, Receiver, destination, dispatcher_for, ended, route, send
from stores import change_rows, hooks, ids
from support import until

from relay.base.clock import SECOND
from relay.config.schema import CircuitConfig, RetryConfig
from relay.config.secrets import Secret
from relay.delivery.http.http_client import HttpClient
from relay.delivery.lane import POLL
from relay.errors import StorageError
from relay.formats import FORMATS, Format
from relay.model import DestinationState
from relay.signing import verify


async def test_an_event_arrives_signed_and_once(store, receiver):
    async with dispatcher_for(store, destination("crm", receiver.url)):
        sent = await send(store)
        [row] = await ended(store)
    [(headers, body)] = receiver.requests
    verify((Secret(SECRET),), headers, body, CLOCK.wall() // 1_000_000)
    assert headers["webhook-id"] == sent
    assert (row["state"], row["attempts"], row["last_status"]) == ("delivered", 1, 200)


async def test_three_failures_and_a_recovery_leave_one_id_and_four_attempts(store, receiver):
    receiver.answers = [(500, {}), (503, {}), (404, {})]
    async with dispatcher_for(store, destination("crm", receiver.url)):
        sent = await send(store)
        [row] = await ended(store)
    assert [headers["webhook-id"] for headers, _ in receiver.requests] == [sent] * 4
    assert (row["state"], row["attempts"]) == ("delivered", 4)
    attempts = await store.queries.find("attempts", delivery_id=row["id"])
    assert [attempt["result"] for attempt in reversed(attempts)] == ["5xx", "5xx", "4xx", "ok"]


async def test_a_delivery_with_an_exhausted_schedule_is_dead(store, receiver):
    receiver.answers = [(500, {})] * 3
    config = destination("crm", receiver.url, retry=RetryConfig(schedule=(0.01, 0.01)))
    async with dispatcher_for(store, config):
        await send(store)
        [row] = await ended(store)
    assert (row["state"], row["reason"], row["attempts"]) == ("dead", "exhausted", 3)


def odd(render):
    """Return all formats and one of a plugin."""
    return {**FORMATS, "odd": Format(name="odd", content_type="text/x-odd", render=render)}


async def test_the_output_of_a_plugin_s_format_is_sent_and_signed(store, receiver):
    formats = odd(lambda event: event.type.upper().encode())
    config = destination("crm", receiver.url, format="odd")
    async with dispatcher_for(store, config, formats=formats):
        await send(store)
        await ended(store)
    [(headers, body)] = receiver.requests
    assert (headers["content-type"], body) == ("text/x-odd", b"SHOP.ORDER")
    verify((Secret(SECRET),), headers, body, CLOCK.wall() // 1_000_000)


@pytest.mark.parametrize(
    ("render", "error"),
    [
        (lambda event: {}["nothing"], "the format odd failed: KeyError: 'nothing'"),
        (lambda event: event.type, "the format odd failed: TypeError: expected bytes, got str"),
    ],
)
async def test_a_failing_format_uses_attempts_up_and_the_delivery_is_dead(
    store, receiver, caplog, render, error
):
    retry = RetryConfig(schedule=(0.01, 0.01))
    config = destination("crm", receiver.url, format="odd", retry=retry)
    async with dispatcher_for(
        store, config, destination("ok", receiver.url), formats=odd(render)
    ) as dispatcher:
        await send(store)
        rows = await ended(store, 2)
        assert dispatcher.lanes["crm"].health.circuit.is_open is False
    by_name = {row["destination"]: row for row in rows}
    assert by_name["ok"]["state"] == "delivered"
    dead = by_name["crm"]
    assert (dead["state"], dead["reason"], dead["last_error"]) == ("dead", "exhausted", error)
    assert [row["result"] for row in await store.queries.find("attempts", delivery_id=dead["id"])] == [
        "format"
    ] * 3
    assert len(receiver.requests) == 1
    assert len([record for record in caplog.records if record.exc_info]) == 1  # one traceback for all three


async def test_a_probe_that_cannot_be_rendered_is_replaced_by_another(store, receiver):
    """Otherwise it would repeat at once for ever: nothing is sent, so the circuit does not change."""
    written = []

    def render(event):
        written.append(event.subject)
        return b"fine" if event.subject != "poison" else 1 / 0

    config = destination(
        "crm",
        receiver.url,
        format="odd",
        concurrency=1,
        circuit=CircuitConfig(failures=1, probe=0.05, max_probe=0.05),
        retry=RetryConfig(schedule=(0.1, 5.0)),
    )
    receiver.answers = [(500, {})]
    async with dispatcher_for(store, config, formats=odd(render)) as dispatcher:
        await send(store)
        await until(lambda: dispatcher.lanes["crm"].health.circuit.is_open)
        await send(store, subject="poison")
        [row] = await ended(store)
        assert row["state"] == "delivered"
        assert written.count("poison") <= 2


async def test_a_receiver_may_abort_a_message(store, receiver):
    receiver.answers = [(400, {"webhook-delivery": "abort-message"})]
    async with dispatcher_for(store, destination("crm", receiver.url)):
        await send(store)
        [row] = await ended(store)
    assert (row["state"], row["reason"], row["attempts"]) == ("dead", "aborted", 1)


@pytest.mark.parametrize(
    ("answer", "reason"), [((410, {}), "gone"), ((500, {"webhook-delivery": "disable"}), "asked")]
)
async def test_a_gone_receiver_is_disabled_and_its_deliveries_are_held(store, receiver, answer, reason):
    receiver.answers = [answer]
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        first = await send(store)
        lane = dispatcher.lanes["crm"]
        await until(lambda: lane.health.state.disabled_reason == reason)
        second = await send(store)
        assert (await store.ledger.audit())["crm"].pending == 2
        assert len(receiver.requests) == 1
        await lane.set_state(DestinationState(name="crm"))
        rows = await ended(store, 2)
    assert {headers["webhook-id"] for headers, _ in receiver.requests} == {first, second}
    assert [row["state"] for row in rows] == ["delivered", "delivered"]


async def test_retry_after_on_503_rests_the_whole_destination(store, receiver):
    receiver.answers = [(503, {"Retry-After": "1"})]
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        await send(store)
        await until(lambda: dispatcher.lanes["crm"].held == "resting")
        began = asyncio.get_running_loop().time()
        await send(store)
        await ended(store, 2)
        assert asyncio.get_running_loop().time() - began > 0.7
    assert len(receiver.requests) == 3


async def test_a_hanging_destination_does_not_delay_others(store, receiver):
    async with Receiver().serve() as stuck:
        stuck.gate.clear()
        configs = destination("stuck", stuck.url, concurrency=2), destination("crm", receiver.url)
        async with dispatcher_for(store, *configs):
            for _ in range(20):
                await send(store)
            rows = await ended(store, 20)
            assert {row["destination"] for row in rows} == {"crm"}
            assert stuck.most_busy == 2
            stuck.gate.set()
            await ended(store, 40)


async def test_concurrency_limits_attempts_in_flight(store, receiver):
    receiver.gate.clear()
    async with dispatcher_for(store, destination("crm", receiver.url, concurrency=3)):
        for _ in range(10):
            await send(store)
        await until(lambda: receiver.busy == 3)
        receiver.gate.set()
        await ended(store, 10)
    assert receiver.most_busy == 3


async def test_a_backlog_larger_than_the_window_is_drained_from_the_store(store, receiver, monkeypatch):
    monkeypatch.setattr("relay.delivery.lane.WINDOW_SIZE", 8)
    receiver.gate.clear()
    async with dispatcher_for(store, destination("crm", receiver.url, concurrency=2)) as dispatcher:
        ids = [await send(store) for _ in range(60)]
        assert len(dispatcher.lanes["crm"]._first.deliveries) <= 8
        receiver.gate.set()
        await ended(store, 60)
    arrived = [headers["webhook-id"] for headers, _ in receiver.requests]
    assert sorted(arrived) == sorted(ids)


async def test_bodies_beyond_the_memory_budget_are_read_again_when_a_slot_is_free(store, receiver):
    receiver.gate.clear()
    async with dispatcher_for(
        store, destination("crm", receiver.url, concurrency=1), body_bytes=0
    ) as dispatcher:
        for number in range(5):
            await send(store, b'{"n":%d}' % number)
        assert all(delivery.event is None for delivery in dispatcher.lanes["crm"]._first.deliveries)
        receiver.gate.set()
        await ended(store, 5)
    assert sorted(json.loads(body)["data"]["n"] for _, body in receiver.requests) == [0, 1, 2, 3, 4]


async def test_a_body_that_does_not_match_its_digest_is_never_sent(store, receiver):
    async with Receiver().serve() as other:
        hooks(store).route = route([destination("crm", other.url)])
        await send(store)
        await change_rows(store, "UPDATE events SET body = x'7b7d'")
        store.deliveries.release(await ids(store, "deliveries"))
        async with dispatcher_for(store, destination("crm", other.url)):
            [row] = await ended(store)
    assert (row["state"], row["reason"]) == ("dead", "corrupt")
    assert other.requests == []


async def test_the_relays_own_listener_is_never_dialled_and_no_attempt_counts(store, receiver):
    port = int(receiver.url.split(":")[2].split("/")[0])
    async with dispatcher_for(
        store, destination("crm", receiver.url), own=[("127.0.0.1", port)]
    ) as dispatcher:
        await send(store)
        await until(lambda: dispatcher.lanes["crm"].held == "resting")
        await until(lambda: dispatcher.lanes["crm"].in_flight == 0)
    [row] = await store.queries.find("deliveries")
    assert (row["state"], row["attempts"]) == ("pending", 0)
    assert receiver.requests == []


async def test_a_stop_finishes_and_records_attempts_in_flight(store, receiver):
    receiver.gate.clear()
    async with dispatcher_for(store, destination("crm", receiver.url)):
        await send(store)
        await until(lambda: receiver.busy == 1)
        asyncio.get_running_loop().call_later(0.05, receiver.gate.set)
    [row] = await store.queries.find("deliveries")
    assert row["state"] == "delivered"


async def test_a_paused_destination_keeps_everything_and_resumes(store, receiver):
    async with dispatcher_for(store, destination("crm", receiver.url)) as dispatcher:
        lane = dispatcher.lanes["crm"]
        await lane.set_state(DestinationState(name="crm", paused=True))
        await send(store)
        assert (await store.ledger.audit())["crm"].pending == 1
        await lane.set_state(DestinationState(name="crm"))
        await ended(store)
    assert len(receiver.requests) == 1


async def test_a_restart_sends_pending_deliveries(store, receiver):
    hooks(store).route = route([destination("crm", receiver.url)])
    sent = await send(store)
    store.deliveries.release(await ids(store, "deliveries"))
    async with dispatcher_for(store, destination("crm", receiver.url)):
        await ended(store)
    assert receiver.requests[0][0]["webhook-id"] == sent


async def test_the_ledger_balances_after_every_kind_of_end(store, receiver):
    receiver.answers = [(200, {}), (400, {"webhook-delivery": "abort-message"}), (500, {})]
    async with dispatcher_for(store, destination("crm", receiver.url, concurrency=1)):
        for _ in range(3):
            await send(store)
        await ended(store, 3)
    counts = (await store.ledger.audit())["crm"]
    assert (counts.created, counts.delivered, counts.dead, counts.unaccounted) == (3, 2, 1, 0)


# --- errors of the relay and of plugins ---------------------------------------------------------------


def leave(_event):
    """Exit, as a plugin may that calls a program's main function."""
    raise SystemExit(3)


def written_with(content_type):
    """Return all formats and one that sends request bodies with this content type."""
    return {**FORMATS, "odd": Format(name="odd", content_type=content_type, render=lambda event: event.body)}


UNMADE = {
    "a line break in a header": (written_with("text/plain\r\nx-evil: 1"), "ValueError: a header contains"),
    "a header that cannot be encoded": (written_with("text/\ud83d"), "UnicodeEncodeError"),
    "a header that is not text": (written_with(7), "TypeError"),
    "an exit": (odd(leave), "SystemExit: 3"),
}


@pytest.mark.parametrize("why", UNMADE)
async def test_a_request_that_cannot_be_built_uses_attempts_up_and_blocks_no_key(store, receiver, why):
    formats, error = UNMADE[why]
    retry = RetryConfig(schedule=(0.01, 0.01))
    config = destination("crm", receiver.url, format="odd", order_by="subject", retry=retry)
    async with dispatcher_for(store, config, formats=formats) as dispatcher:
        await send(store)
        await send(store)
        rows = await ended(store, 2)
        assert not dispatcher.lanes["crm"].health.circuit.is_open
    assert [(row["state"], row["reason"], row["attempts"]) for row in rows] == [("dead", "exhausted", 3)] * 2
    assert error in rows[0]["last_error"]
    attempts = await store.queries.find("attempts", delivery_id=rows[0]["id"])
    assert [row["result"] for row in attempts] == ["format"] * 3


@pytest.mark.parametrize("where", ["client", "cancelled", "load", "standing"])
async def test_an_unexpected_error_ends_as_a_failed_attempt(store, receiver, monkeypatch, where):
    """Otherwise the delivery would stay pending for ever and block its key."""

    def fail(*_, **__):
        raise ValueError("a mistake of ours")

    async def fail_later(*_, **__):
        fail()

    async def cancel(*_, **__):
        raise asyncio.CancelledError("a mistake of ours")

    retry = RetryConfig(schedule=(0.01, 0.01))
    config = destination("crm", receiver.url, order_by="subject", retry=retry)
    receiver.usual = (200 if where == "standing" else 500, {})
    async with dispatcher_for(store, config, body_bytes=0) as dispatcher:
        if where == "client":
            monkeypatch.setattr(HttpClient, "send", fail_later)
        elif where == "cancelled":  # something that the attempt awaits, not the attempt itself
            monkeypatch.setattr(HttpClient, "send", cancel)
        elif where == "load":
            monkeypatch.setattr(store.events, "load", fail_later)
        else:
            monkeypatch.setattr(dispatcher.lanes["crm"].health, "succeed", fail_later)
        await send(store)
        await send(store)
        rows = await ended(store, 2)
    if where == "standing":
        assert [row["state"] for row in rows] == ["delivered"] * 2
        assert len(receiver.requests) == 2
    else:
        assert [(row["state"], row["attempts"]) for row in rows] == [("dead", 3)] * 2
        assert "a mistake of ours" in rows[0]["last_error"]


async def test_deliveries_that_cannot_be_read_ahead_are_read_in_their_slot(store, receiver, monkeypatch):
    """They are claimed already: if the failed read dropped them, no lane would send them."""
    receiver.answers = [(500, {})]
    load, failures = store.events.load, []

    async def fail_once(event_ids):
        if not failures:
            failures.append(1)
            raise StorageError("the disk does not answer")
        return await load(event_ids)

    monkeypatch.setattr(store.events, "load", fail_once)
    async with dispatcher_for(store, destination("crm", receiver.url)):
        sent = await send(store)
        await ended(store)
    assert failures
    assert receiver.ids == [sent, sent]


async def test_a_delivery_whose_event_cannot_be_read_is_sent_soon(store, receiver, monkeypatch, caplog):
    load, failures = store.events.load, []

    async def fail_twice(event_ids):
        if len(failures) < 2:
            failures.append(1)
            raise StorageError("the disk does not answer")
        return await load(event_ids)

    monkeypatch.setattr(store.events, "load", fail_twice)
    receiver.answers = [(500, {})]
    config = destination("crm", receiver.url, retry=RetryConfig(schedule=(0.01,)))
    async with dispatcher_for(store, config, body_bytes=0):
        sent = await send(store)
        async with asyncio.timeout(POLL / SECOND / 2):
            [row] = await ended(store)
    assert (receiver.ids, row["state"], row["attempts"]) == ([sent, sent], "delivered", 2)
    assert len(failures) == 2
    assert "crm: cannot read the event of a delivery: the disk does not answer" in caplog.messages
    assert not [record for record in caplog.records if record.exc_info]
