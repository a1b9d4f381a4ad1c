"""One message for several events: each delivery keeps its own row, attempts and end."""

import asyncio
import json

import pytest
from commands import run
from daemons import write_config
from lanes import CLOCK, Receiver, destination, dispatcher_for, ended, send, send_many
from stores import change_rows, hooks, is_postgres, make_store, rows
from support import until

from relay.base.clock import SECOND
from relay.config.schema import CircuitConfig, RetryConfig
from relay.formats import FORMATS, Format
from relay.model import DestinationState
from relay.store import claims

LONG = 3600.0
SOON = 0.15
NEVER_OPENS = CircuitConfig(failures=1_000_000)


class Chat(Receiver):
    """Refuses messages that contain a word, with a status."""

    def __init__(self, word=b"poison", status=400, headers=None):
        super().__init__()
        self.refuses = (word, status, headers or {})

    def answer(self, request_headers, body):
        word, status, headers = self.refuses
        return (status, headers) if word in body else super().answer(request_headers, body)


@pytest.fixture
async def chat():
    async with Chat().serve() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
async def books(store):
    """After each test, every delivery is accounted for."""
    yield
    for name, counts in (await store.ledger.audit()).items():
        assert counts.unaccounted == 0, name


def grouping(receiver, wait=LONG, **fields):
    fields = {"format": "slack", "group_by": "type", "group_wait": wait, "circuit": NEVER_OPENS, **fields}
    return destination("chat", receiver.url, **fields)


def lines_of(request):
    """Return the lines of a message for Slack."""
    return json.loads(request[1])["text"].splitlines()


async def flush(store):
    """Make all groups due that wait, so that no test depends on the speed of the machine."""
    waiting = await store.queries.find("deliveries", limit=1000, state="pending")
    await store.deliveries.make_due([row["row"] for row in waiting])


async def until_pending(store, name, count):
    """Wait until a destination has this number of pending deliveries."""
    async with asyncio.timeout(30):
        while len(await store.queries.find("deliveries", state="pending", destination=name)) < count:  # noqa: ASYNC110 - the store offers nothing to await
            await asyncio.sleep(0.01)


async def attempts(store):
    return await store.queries.find("attempts", limit=1000)


async def test_several_events_are_one_message_and_each_delivery_is_recorded(store, chat):
    async with dispatcher_for(store, grouping(chat)) as dispatcher:
        sent = [await send(store, subject=f"s{number}") for number in range(5)]
        await flush(store)
        found = await ended(store, 5)
        counted = dispatcher._metrics.registry.get_sample_value(
            "relay_delivery_attempts_total", {"destination": "chat", "result": "ok"}
        )
    assert [row["event_id"] for row in found] == sent
    assert {(row["state"], row["attempts"], row["group_key"]) for row in found} == {
        ("delivered", 1, "shop.order")
    }
    [request] = chat.requests
    assert lines_of(request)[0] == "5 \u00d7 shop.order"
    assert [line for line in lines_of(request) if "s3" in line] == ["• shop.order · s3"]
    made = await attempts(store)
    assert len(made) == 5
    assert {(each["group_size"], each["group_id"]) for each in made} == {(5, request[0]["webhook-id"])}
    assert counted == 1


async def test_a_single_event_is_an_ordinary_message_after_its_wait(store, chat):
    async with dispatcher_for(store, grouping(chat, SOON)):
        began = CLOCK.steady()
        event = await send(store, subject="alone")
        [row] = await ended(store)
    assert chat.times[0] - began >= SOON * SECOND
    assert chat.ids == [event]
    [made] = await attempts(store)
    assert (made["group_id"], made["group_size"], row["attempts"]) == (None, None, 1)


async def test_a_full_group_does_not_wait(store, chat):
    async with dispatcher_for(store, grouping(chat, group_max=3)):
        await asyncio.gather(*(send(store) for _ in range(4)))
        for _ in range(3):
            await send(store)
        found = await ended(store, 6)
        pending = await store.queries.find("deliveries", state="pending")
    assert {row["attempts"] for row in found} == {1}
    assert sorted(each["group_size"] for each in await attempts(store)) == [3] * 6
    assert len(pending) == 1
    assert pending[0]["next_attempt_at"] > CLOCK.steady() + 3000 * SECOND
    assert len(chat.requests) == 2


async def test_each_value_has_its_group_and_an_empty_list_is_one_group_for_all(store, chat):
    async with dispatcher_for(store, grouping(chat, group_by=("subject", "data.n"))):
        for subject in ("a", "b", "a", "b"):
            await send(store, subject=subject)
        await send(store, b'{"n":2}', subject="a")
        await send(store, b"{}", subject="a")
        await flush(store)
        await ended(store, 6)
    assert sorted(each["group_size"] or 1 for each in await attempts(store)) == [1, 1, 2, 2, 2, 2]
    async with dispatcher_for(store, grouping(chat, group_by=())):
        await send(store, type_="shop.order")
        await send(store, type_="shop.refund")
        await flush(store)
        await ended(store, 8)
    assert lines_of(chat.requests[-1])[0] == "2 events of 2 types"


async def test_a_failed_group_is_retried_as_one_with_the_same_id(store, chat):
    chat.answers = [(500, {}), (503, {})]
    async with dispatcher_for(store, grouping(chat)):
        await send_many(store, 4)
        await flush(store)
        found = await ended(store, 4)
    assert {(row["state"], row["attempts"]) for row in found} == {("delivered", 3)}
    assert len(chat.requests) == 3
    assert len(set(chat.ids)) == 1
    assert len(await attempts(store)) == 12


async def test_a_group_that_fails_to_the_end_is_dead_delivery_by_delivery(store, chat):
    chat.usual = (500, {})
    async with dispatcher_for(store, grouping(chat)):
        await send_many(store, 3)
        await flush(store)
        found = await ended(store, 3, "chat")
    assert {(row["state"], row["reason"], row["attempts"]) for row in found} == {("dead", "exhausted", 5)}
    assert len(chat.requests) == 5
    [died] = {row["type"] for row in await store.queries.find("events", source="relay")}
    assert died == "relay.delivery.dead"
    assert len(await store.queries.find("events", source="relay")) == 3


@pytest.mark.parametrize(
    ("status", "headers", "final"),
    [
        (400, {}, ()),
        (413, {}, ()),
        (422, {}, ()),
        (404, {}, (404,)),
        (500, {"webhook-delivery": "abort-message"}, ()),
    ],
)
async def test_one_event_that_a_receiver_refuses_ends_no_other(store, status, headers, final):
    async with Chat(status=status, headers=headers).serve() as chat:
        chat_config = grouping(chat, final_statuses=final, retry=RetryConfig(schedule=(0.02,)))
        async with dispatcher_for(store, chat_config):
            for subject in ("a", "poison", "c"):
                await send(store, subject=subject)
            await flush(store)
            found = await ended(store, 3, "chat")
    states = {row["event_id"]: (row["state"], row["reason"]) for row in found}
    ended_badly = "exhausted" if not final and "webhook-delivery" not in headers else None
    assert sorted(state for state, _ in states.values()) == ["dead", "delivered", "delivered"]
    assert ended_badly in {reason for _, reason in states.values()} or ended_badly is None
    if not is_postgres(store):  # there, an ended delivery shows the group with which it was created
        assert {row["group_key"] for row in found} == {None}
    first = [each for each in await attempts(store) if each["group_size"] == 3]
    assert len(first) == 3
    assert {row["attempts"] for row in found if row["state"] == "delivered"} == {
        1
    }  # the group's is not counted


@pytest.mark.parametrize("status", [401, 404, 408, 429, 302])
async def test_other_failures_keep_the_group_together(store, chat, status):
    chat.answers = [(status, {})]
    async with dispatcher_for(store, grouping(chat)):
        await send_many(store, 3)
        await flush(store)
        found = await ended(store, 3)
    assert {(row["state"], row["attempts"]) for row in found} == {("delivered", 2)}
    assert len(chat.requests) == 2


async def test_a_format_that_cannot_group_some_events_sends_them_alone(store, receiver):
    def group(_events):
        raise ValueError("one of them is odd")

    odd = Format(name="odd", content_type="text/plain", render=lambda event: event.body, group=group)
    config = grouping(receiver, format="odd")
    async with dispatcher_for(store, config, formats={**FORMATS, "odd": odd}):
        sent = await send_many(store, 3)
        await flush(store)
        found = await ended(store, 3)
    assert sorted(receiver.ids) == sorted(sent)
    assert {(row["state"], row["attempts"]) for row in found} == {("delivered", 1)}
    failed = [each for each in await attempts(store) if each["result"] == "format"]
    assert [each["error"] for each in failed] == [
        "the format odd cannot group: ValueError: one of them is odd"
    ] * 3


async def test_a_waiting_group_survives_a_restart(tmp_path, chat):
    path = tmp_path / "groups.db"
    first = make_store(path, CLOCK)
    await first.open()
    async with dispatcher_for(first, grouping(chat, 1.0)):
        sent = await send_many(first, 3)
    await first.close()
    assert chat.requests == []
    again = make_store(path, CLOCK)
    await again.open()
    async with dispatcher_for(again, grouping(chat, 1.0)):
        found = await ended(again, 3)
    assert sorted(row["event_id"] for row in found) == sorted(sent)
    assert [each["group_size"] for each in await attempts(again)] == [3] * 3
    await again.close()


async def test_an_unfinished_attempt_is_repeated_as_a_group_after_a_restart(tmp_path, chat):
    path = tmp_path / "groups.db"
    first = make_store(path, CLOCK)
    await first.open()
    chat.gate.clear()
    async with dispatcher_for(first, grouping(chat, timeout=30.0)) as dispatcher:
        await send_many(first, 3)
        await flush(first)
        await until(lambda: chat.busy)
        await dispatcher.stop(0.0)
    await first.close()
    chat.gate.set()
    again = make_store(path, CLOCK)
    await again.open()
    async with dispatcher_for(again, grouping(chat)):
        found = await ended(again, 3)
    assert {(row["state"], row["attempts"]) for row in found} == {("delivered", 1)}
    assert len(set(chat.ids)) == 1
    await again.close()


async def test_held_groups_are_joined_when_the_destination_resumes(store, chat):
    async with dispatcher_for(store, grouping(chat, SOON, group_max=10)) as dispatcher:
        lane = dispatcher.lanes["chat"]
        await lane.set_state(DestinationState(name="chat", paused=True))
        for _ in range(2):
            await send_many(store, 3)
            await asyncio.sleep(SOON * 1.2)  # the first group is due, so the next events form another one
        assert chat.requests == []
        await lane.set_state(DestinationState(name="chat"))
        await ended(store, 6)
    assert [each["group_size"] for each in await attempts(store)] == [6] * 6


async def test_a_backlog_goes_out_in_full_messages_with_as_many_slots_as_permitted(store, chat):
    async with dispatcher_for(store, grouping(chat, SOON, group_max=7, concurrency=2)) as dispatcher:
        lane = dispatcher.lanes["chat"]
        await lane.set_state(DestinationState(name="chat", paused=True))
        await send_many(store, 100)
        await lane.set_state(DestinationState(name="chat"))
        await ended(store, 100)
        assert lane.in_flight == 0
    assert chat.most_busy <= 2
    assert len(chat.requests) <= 2 * -(-100 // 7)
    assert max(each["group_size"] or 1 for each in await attempts(store)) == 7


async def test_deliveries_that_expire_or_are_cancelled_are_not_in_the_message(store, chat):
    async with dispatcher_for(store, grouping(chat)):
        sent = [await send(store, subject=f"s{number}") for number in range(4)]
        pending = {
            row["event_id"]: row["row"] for row in await store.queries.find("deliveries", state="pending")
        }
        await store.deliveries.cancel([pending[sent[1]]])
        await flush(store)
        found = await ended(store, 4)
    assert [row["state"] for row in found] == ["delivered", "cancelled", "delivered", "delivered"]
    assert not any("s1" in line for line in lines_of(chat.requests[0]))
    assert len(chat.requests) == 1


async def test_a_delivery_that_expires_while_its_group_waits_is_left_out(store, chat):
    async with dispatcher_for(store, grouping(chat, ttl=1.0)):
        await send_many(store, 2)
        await asyncio.sleep(1.1)
        late = await send(store)
        await flush(store)
        found = await ended(store, 3)
    assert [(row["state"], row["reason"]) for row in found[:2]] == [("expired", "ttl")] * 2
    assert [row["event_id"] for row in found if row["state"] == "delivered"] == chat.ids == [late]


async def test_an_operator_sends_a_waiting_group_at_once(store, chat):
    async with dispatcher_for(store, grouping(chat)):
        await send_many(store, 3)
        [row, *_] = await store.queries.find("deliveries", state="pending")
        await store.deliveries.make_due([row["row"]])
        await ended(store, 3)
    assert len(chat.requests) == 1


async def test_a_message_has_at_most_one_event_of_each_ordered_value(store, chat):
    async with dispatcher_for(store, grouping(chat, order_by="subject", group_by=())):
        sent = [await send(store, subject=subject) for subject in ("a", "b", "a", "a", "b")]
        await flush(store)
        found = await ended(store, 5)
    assert [row["event_id"] for row in found] == sent
    by_time = sorted(await attempts(store), key=lambda each: each["row"])
    ids = {row["id"]: row["event_id"] for row in found}
    order = [ids[each["delivery_id"]] for each in by_time]
    assert [order.index(sent[n]) for n in (0, 2, 3)] == sorted(order.index(sent[n]) for n in (0, 2, 3))
    assert order.index(sent[1]) < order.index(sent[4])


async def test_a_newer_event_replaces_one_that_waits_in_a_group(store, chat):
    async with dispatcher_for(store, grouping(chat, latest_by="subject")):
        sent = [await send(store, subject=subject) for subject in ("a", "b", "a")]
        await flush(store)
        found = await ended(store, 3)
    states = {row["event_id"]: (row["state"], row["reason"]) for row in found}
    assert states == {
        sent[0]: ("expired", "superseded"),
        sent[1]: ("delivered", None),
        sent[2]: ("delivered", None),
    }
    assert [each["group_size"] for each in await attempts(store)] == [2, 2]


async def test_the_backlog_is_limited_delivery_by_delivery(store, chat):
    async with dispatcher_for(store, grouping(chat, max_pending=3)):
        for _ in range(5):
            await send(store)
        found = await ended(store, 2)
    assert [(row["state"], row["reason"]) for row in found] == [("dead", "backlog_full")] * 2


async def test_large_events_share_a_message_only_within_the_bytes_of_a_group(store, chat, monkeypatch):
    monkeypatch.setattr(claims, "GROUP_BYTES", 1000)
    body = json.dumps({"n": "x" * 400}).encode()
    async with dispatcher_for(store, grouping(chat)):
        for _ in range(5):
            await send(store, body)
        await flush(store)
        await ended(store, 5)
    assert sorted(each["group_size"] or 1 for each in await attempts(store)) == [1, 2, 2, 2, 2]


async def test_a_group_is_one_probe_and_a_failed_probe_spends_no_attempt(store, chat):
    chat.answers = [(503, {})] * 3
    circuit = CircuitConfig(failures=1, probe=0.1, max_probe=0.1)
    async with dispatcher_for(store, grouping(chat, circuit=circuit)):
        await send_many(store, 3)
        await flush(store)
        found = await ended(store, 3, "chat")
    assert {(row["state"], row["attempts"]) for row in found} == {("delivered", 2)}
    assert len(chat.requests) == 4
    assert len(await attempts(store)) == 12


async def test_410_holds_the_group_until_the_destination_is_enabled(store, chat):
    chat.answers = [(410, {})]
    async with dispatcher_for(store, grouping(chat)) as dispatcher:
        lane = dispatcher.lanes["chat"]
        await send_many(store, 3)
        await flush(store)
        await until(lambda: lane.health.state.disabled_at is not None)
        assert len(await store.queries.find("deliveries", state="pending", destination="chat")) == 3
        await lane.set_state(DestinationState(name="chat"))
        found = await ended(store, 3, "chat")
    assert {(row["state"], row["attempts"]) for row in found} == {("delivered", 1)}


async def test_a_damaged_body_is_left_out_and_its_delivery_dead(store, chat):
    async with dispatcher_for(store, grouping(chat)):
        sent = [await send(store, subject=f"s{number}") for number in range(3)]
        [(damaged,)] = await rows(store, "SELECT id FROM events WHERE public_id = ?", (sent[1],))
        await change_rows(store, "UPDATE events SET body = ? WHERE id = ?", (b'{"n":9}', damaged))
        await flush(store)
        found = await ended(store, 3, "chat")
    assert [(row["state"], row["reason"]) for row in found] == [
        ("delivered", None), ("dead", "corrupt"), ("delivered", None),
    ]  # fmt: skip


async def test_events_of_dead_deliveries_are_grouped_at_the_destination_that_gets_them(store, chat):
    async with Receiver().serve() as broken:
        broken.usual = (500, {})
        crm = destination(
            "crm", broken.url, on_dead="chat", retry=RetryConfig(schedule=()), circuit=NEVER_OPENS
        )
        async with dispatcher_for(store, crm, grouping(chat, events=("none.*",), group_by="subject")):
            for subject in ("a", "b", "a"):
                await send(store, subject=subject)
            await until_pending(store, "chat", 3)
            await flush(store)
            await ended(store, 3, "chat")
    assert sorted(each["group_size"] or 1 for each in await attempts(store) if each["status"] == 200) == [
        1,
        2,
        2,
    ]


async def test_without_group_by_waiting_deliveries_go_out_alone(store, chat):
    async with dispatcher_for(store, grouping(chat)):
        sent = await send_many(store, 3)
    async with dispatcher_for(store, grouping(chat, group_by=None)):
        await flush(store)
        await ended(store, 3)
    assert sorted(chat.ids) == sorted(sent)


async def test_new_events_do_not_join_a_group_in_flight(store, chat):
    chat.gate.clear()
    async with dispatcher_for(store, grouping(chat, group_max=3, concurrency=4)):
        await send_many(store, 3)
        await until(lambda: chat.busy == 1)
        for _ in range(2):
            await send(store)
        await flush(store)
        await until(lambda: chat.busy == 2)
        chat.gate.set()
        await ended(store, 5)
    assert sorted(each["group_size"] for each in await attempts(store)) == [2, 2, 3, 3, 3]


async def test_a_claimed_group_that_waits_for_a_slot_loses_deliveries_that_end_meanwhile(store, chat):
    chat.gate.clear()
    async with dispatcher_for(store, grouping(chat, group_by="subject", concurrency=1)) as dispatcher:
        await send(store, subject="first")
        await flush(store)
        await until(lambda: chat.busy)
        sent = [await send(store, b'{"n":%d}' % number, subject="second") for number in range(4)]
        await flush(store)
        await until(lambda: dispatcher.lanes["chat"]._first.deliveries)
        [claimed] = dispatcher.lanes["chat"]._first.deliveries
        assert len(claimed.members) == 4
        await store.deliveries.cancel([claimed.id, claimed.followers[1].id])
        chat.gate.set()
        found = await ended(store, 5)
    states = {row["event_id"]: row["state"] for row in found}
    assert [states[each] for each in sent] == ["cancelled", "delivered", "cancelled", "delivered"]
    assert sorted(each["group_size"] or 1 for each in await attempts(store)) == [1, 2, 2]


async def test_the_claims_of_a_query_that_fails_are_released(store, chat, monkeypatch):
    hooks(store).route = lambda _event: ()
    config = grouping(chat)
    async with dispatcher_for(store, config):
        await send_many(store, 3)
    await rows(store, "SELECT 1")
    await store.deliveries.make_due([row["row"] for row in await store.queries.find("deliveries")])

    def fail(*_args, **_options):
        raise ValueError("no")

    with monkeypatch.context() as patched:
        patched.setattr(claims.Claims, "choose_followers", fail)
        with pytest.raises(ValueError, match="no"):
            await store.deliveries.claim("chat", 5, retries=False, together=10)
    claim = await store.deliveries.claim("chat", 5, retries=False, together=10)
    [first] = claim.deliveries
    assert len(first.followers) == 2
    store.deliveries.release(each.id for each in first.members)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ('group_by = "type"', '"standard" has one body for each event; these formats can group: slack'),
        ('format = "pagerduty"\nmessage.routing_key = "k"\ngroup_by = []', '"pagerduty" has one body'),
        ('template = "x"\ngroup_by = []', 'group_by: "template" has one body for each event'),
        ('format = "slack"\ngroup_by = "typ"', 'group_by: "typ": a path starts with'),
        ('format = "slack"\ngroup_by = ["type", "x"]', 'group_by[1]: "x": a path starts with'),
        ('format = "slack"\ngroup_by = "type"\ngroup_max = 1', "group_max: must be at least 2, got 1"),
        ('format = "slack"\ngroup_by = []\ngroup_max = 2000', "group_max: must be at most 1000, got 2000"),
        ('format = "slack"\ngroup_by = "type"\ngroup_wait = "0s"', "group_wait: must be more than 0"),
        ('format = "slack"\ngroup_by = 5', "group_by: expected a string"),
    ],
)  # fmt: skip
def test_each_mistake_is_a_problem(tmp_path, config, problem):
    path = write_config(tmp_path, f'[destinations.chat]\nurl = "https://chat.example/"\n{config}\n')
    assert problem in run("check-config", "-c", path, code=1).err
