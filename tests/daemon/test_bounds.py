"""Tables in memory that a sender can fill: each has its bound, which docs/design.md names."""

import asyncio
import importlib
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from daemons import SOURCES, adorn, destination, running, write_config
from stores import make_event, make_store, rows
from support import FakeClock, until
from wire import Wire, exchange, request

from relay.config.problems import ConfigError
from relay.config.schema import Retention, SourceRetention
from relay.errors import Overloaded
from relay.ingest import dedupe
from relay.ingest.dedupe import UnheardReplies, fingerprint
from relay.ingest.replies import MOST_REPLIED, MOST_REPLIES, RecentReplies, Sent
from relay.model import Heartbeat, Receipt, Register, Session, Worker
from relay.plugin_loading.loader import load
from relay.process import logs
from relay.process.logs import RateLimitedLog
from relay.store import Acceptance, roster, worker_changes
from relay.store import pruning as prune
from relay.store.retention_policy import Policy

DESIGN = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
BOUNDS = re.findall(r"^\| .+ \| ([0-9,]+) \(`(relay[a-z_.]*)\.([A-Z_]+)`\) \| .+ \|$", DESIGN, re.MULTILINE)


def test_the_bounds_in_the_design_page_are_those_of_the_code():
    assert len(BOUNDS) > 15
    for stated, module, name in BOUNDS:
        assert int(stated.replace(",", "")) == getattr(importlib.import_module(module), name), name


def weight(value, seen=None):
    """Return the bytes that a table takes, with everything in it."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = list(value)
    else:
        inner = [getattr(value, name) for name in getattr(value, "__struct_fields__", ())]
    return sys.getsizeof(value) + sum(weight(each, seen) for each in inner)


# --- answers that did not reach their sender ----------------------------------------------------------


def unheard(table, clock, number, size=0):
    """Note one request whose sender disconnected before the answer; return its fingerprint."""
    text = "x" * size
    event = make_event(clock, body=b"%d" % number, subject=text, context=f'"{text}"'.encode())
    mark = fingerprint("/a", event, None)
    worker = Worker(source="shop", id="w", description=text)
    entry = table.begin(mark, lambda: True)
    table.end(mark, entry, Receipt(event_id=event.public_id, worker=worker), gone=True)
    return mark


async def test_an_unheard_reply_is_remembered_in_constant_size():
    clock = FakeClock()
    small, large = UnheardReplies(clock), UnheardReplies(clock)
    for number in range(600):
        unheard(small, clock, number)
        unheard(large, clock, number, 100_000)
    assert weight(large._unheard) == weight(small._unheard) < 600 * 500


def test_the_replies_about_the_latest_events_are_remembered_with_their_repetitions():
    table = RecentReplies()
    for number in range(3 * MOST_REPLIED):
        table.note([f"evt_{number}"], Sent(number, 200, 5))
    assert weight([table.recent, table._older]) < 2 * MOST_REPLIED * 500
    assert [sent.received_at for sent in table.of(f"evt_{3 * MOST_REPLIED - 1}")] == [3 * MOST_REPLIED - 1]
    assert table.of("evt_0") == ()
    for number in range(100):
        table.note(["evt_x"], Sent(number, 200, 5))
    assert [sent.received_at for sent in table.of("evt_x")] == [*range(MOST_REPLIES - 1), 99]
    table.lose(["evt_x", "evt_unknown"], 99)
    assert [sent.heard for sent in table.of("evt_x")] == [*[True] * (MOST_REPLIES - 1), False]


def test_a_reply_that_did_not_reach_its_sender_is_marked_after_later_replies():
    table = RecentReplies()
    table.note(["evt_a", "evt_b"], Sent(1, 200, 5))
    table.note(["evt_b"], Sent(2, 200, 5))
    table.lose(["evt_b"], 1)  # not the latest one
    assert [sent.heard for sent in table.of("evt_b")] == [False, True]
    table.drop_older()
    table.note(["evt_a"], Sent(3, 200, 5))
    table.lose(["evt_a"], 1)  # in the older part
    assert [sent.heard for sent in table.of("evt_a")] == [False, True]


async def test_a_request_in_progress_is_identified_by_a_bounded_text():
    clock, text = FakeClock(), "x" * 1_000_000
    mark = fingerprint("/a", make_event(clock, subject=text, context=text.encode()), None)
    assert weight(mark) < 2000
    assert mark != fingerprint("/a", make_event(clock, subject=text, context=text.encode() + b"y"), None)
    assert mark != fingerprint("/a", make_event(clock, subject=text + "y", context=text.encode()), None)


async def test_unheard_replies_are_forgotten_after_a_minute():
    clock = FakeClock()
    table = UnheardReplies(clock)
    for number in range(100):
        unheard(table, clock, number)
    clock.advance(30)
    young = unheard(table, clock, 100)
    clock.advance(31)
    last = unheard(table, clock, 101)
    assert len(table._unheard) == 2
    assert (await table.first(young)).duplicate
    clock.advance(61)
    assert await table.first(last) is None
    assert len(table._unheard) == 0


async def test_the_number_of_unheard_replies_is_bounded_and_the_oldest_is_forgotten(monkeypatch):
    monkeypatch.setattr(dedupe, "MOST", 10)
    clock = FakeClock()
    table = UnheardReplies(clock)
    marks = [unheard(table, clock, number) for number in range(20)]
    assert len(table._unheard) == 10
    assert await table.first(marks[9]) is None
    assert await table.first(marks[10]) is not None


async def test_large_contexts_of_disconnected_senders_are_not_kept_in_memory(tmp_path, monkeypatch):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        original, gate = relay.app.store.events.append, asyncio.Event()

        async def append(acceptance):
            await gate.wait()
            return await original(acceptance)

        monkeypatch.setattr(relay.app.store.events, "append", append)
        table = relay.app.ingest._unheard_replies
        large = json.dumps({"event_type": "plugin.updated", "site_info": {"name": "x" * 500_000}}).encode()
        token = "Bearer dev-token"
        path = "/api/woocommerce-plugin/events"
        raw = [
            request("POST", path, large, authorization=token, x_lazychat_shop_id=f"s{n}") for n in range(10)
        ]
        for number, each in enumerate(raw):
            async with await Wire.open(relay.addresses.public) as wire:
                await wire.send(each)
                await until(lambda number=number: len(table._open) == number + 1)
        await until(lambda: all(entry.gone() for entry in table._open.values()))
        assert weight(table._open) < 10 * 2000
        gate.set()
        await until(lambda: len(table._unheard) == 10)
        assert weight(table._unheard) < 10 * 1000
        answer = await relay.exchange(raw[3])
        assert answer.status == 200
        assert [row["duplicate"] for row in await relay.rows(subject="s3")] == [1]
        assert len(await relay.rows()) == 10


# --- rate-limited logs --------------------------------------------------------------------------------


def test_the_keys_of_a_rate_limited_log_are_bounded(caplog, monkeypatch):
    monkeypatch.setattr(logs, "MOST_KEYS", 10)
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    limited = RateLimitedLog(logging.getLogger("relay.test"), clock)
    for number in range(1000):
        limited.info(f"key {number}", "line")
    assert len(limited._last) <= 11
    assert len(caplog.messages) == 11
    clock.advance(10)
    for number in range(1000, 2000):
        limited.info(f"key {number}", "line")
    assert len(limited._last) <= 11
    assert len(caplog.messages) <= 22
    assert "(989 more like it)" in caplog.text


# --- retention of invented types ----------------------------------------------------------------------


@pytest.mark.parametrize("most", [5, 1000])
async def test_retention_applies_its_rules_to_any_number_of_types(tmp_path, monkeypatch, most):
    monkeypatch.setattr(prune, "MOST_TYPES", most)
    monkeypatch.setattr(prune, "LONGEST_PAUSE", 0)
    clock = FakeClock()
    policy = Policy(Retention(), {"shop": SourceRetention(types={"qr_*": 3600.0, "day_*": 86_400.0})})
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    for number in range(20):
        for kind in ("qr", "day", "plain"):
            event = make_event(clock, type=f"shop.{kind}_{number}")
            await store.events.append(Acceptance(source="shop", event=event))
    left = []
    for hours in (2, 26, 15 * 24):
        clock.advance(hours * 3600)
        await store.upkeep.prune(policy)
        assert (
            len(store.upkeep._retention._cursors) <= 2 * 20 + 1
            if most == 1000
            else len(store.upkeep._retention._cursors) <= 3
        )
        left.append(
            sorted({row["type"].split("_")[0] for row in await store.queries.find("events", limit=500)})
        )
    assert left == [["shop.day", "shop.plain"], ["shop.plain"], []]
    await store.close()


# --- the registry of workers --------------------------------------------------------------------------


@pytest.fixture
async def registry(tmp_path, monkeypatch):
    """A store on a fake clock, with room for 10 workers and 20 sessions."""
    monkeypatch.setattr(worker_changes, "MOST_WORKERS", 10)
    monkeypatch.setattr(worker_changes, "FORGET_AT_ONCE", 2)
    monkeypatch.setattr(roster, "MOST_SESSIONS", 20)
    store = make_store(tmp_path / "relay.db", FakeClock())
    await store.open()
    yield store
    await store.close()


async def apply_change(store, change):
    return await store.events.append(Acceptance(source="wa", change=change))


def beat(number, sessions=0):
    listed = tuple(Session(id=f"{number}-{each}", status="CONNECTED") for each in range(sessions))
    return Heartbeat(worker_id=f"w{number}", counts={"total": sessions}, sessions=listed)


async def test_at_the_limit_a_new_worker_replaces_those_gone_for_longest(registry):
    for number in range(10):
        registry._clock.advance(1)
        await apply_change(registry, beat(number))
    registry._clock.advance(600)
    for number in range(5, 10):
        await apply_change(registry, beat(number))
    await registry.workers.sweep()
    await asyncio.gather(*(apply_change(registry, beat(number)) for number in range(10, 14)))
    left = sorted(f"w{number}" for number in range(4, 14))
    assert sorted(worker.id for worker in registry.workers.all()) == left
    found = await rows(registry, "SELECT id FROM workers")
    assert sorted(id_ for (id_,) in found) == left


async def test_a_worker_that_is_removed_to_make_room_registers_again(registry):
    for number in range(10):
        await apply_change(registry, beat(number))
    registry._clock.advance(600)
    await registry.workers.sweep()
    heard = await asyncio.gather(*(apply_change(registry, beat(number)) for number in (10, 11, 0, 1)))
    assert [receipt.worker.status for receipt in heard] == ["ONLINE"] * 4
    known = {worker.id: worker.status for worker in registry.workers.all()}
    assert len(known) <= 10
    assert {known.get(f"w{number}") for number in (10, 11, 0, 1)} == {"ONLINE"}


async def test_at_the_limit_a_new_worker_is_refused_while_all_are_online(registry):
    await asyncio.gather(*(apply_change(registry, Register(worker_id=f"w{number}")) for number in range(10)))
    for change in (beat(10), Register(worker_id="w10")):
        with pytest.raises(Overloaded):
            await apply_change(registry, change)
    assert (await apply_change(registry, beat(3))).worker.status == "ONLINE"
    assert (await apply_change(registry, Register(worker_id="w3"))).worker.status == "ONLINE"
    assert len(registry.workers.all()) == 10


@pytest.mark.parametrize("together", [True, False])
async def test_sessions_beyond_the_limit_are_only_counted(registry, together):
    beats = [beat(number, 6) for number in range(6)]
    if together:
        await asyncio.gather(*(apply_change(registry, each) for each in beats))
    else:
        for each in beats:
            await apply_change(registry, each)
    for each in beats:
        await apply_change(registry, each)  # quiet ones
    kept = {worker.id: len(worker.sessions) for worker in registry.workers.all()}
    assert registry.workers.roster.sessions == sum(kept.values()) == 20
    assert all(worker.counts == {"total": 6} for worker in registry.workers.all())
    await apply_change(registry, beat(0, 1))
    await apply_change(registry, beat(5, 6))
    assert registry.workers.roster.sessions == 20 - 5 + 5
    await registry.workers.change(lambda wish: wish.forget([("wa", "w0"), ("wa", "w1")]))
    assert registry.workers.roster.sessions == sum(len(worker.sessions) for worker in registry.workers.all())


# --- bodies -------------------------------------------------------------------------------------------


async def drip(relay, raw, pieces, pause):
    """Send a request's last bytes in pieces; return the answer."""
    async with await Wire.open(relay.addresses.public) as wire:
        step = -(-len(raw) // pieces)
        for at in range(0, len(raw), step):
            await wire.send(raw[at : at + step])
            await asyncio.sleep(pause)
        return await wire.answer()


async def test_a_body_has_more_time_the_more_of_it_has_arrived(tmp_path):
    config = write_config(tmp_path, SOURCES)
    more = '[server]\nbody_timeout = "300ms"\nmin_body_rate = "10 KiB"'
    text = config.read_text().replace("[server]", more)
    config.write_text(text)
    async with running(config) as relay:
        large = request("POST", "/v1/events", adorn("large", payload={"text": "x" * 100_000}))
        assert (await drip(relay, large, 10, 0.1)).status == 200  # in a second
        small = request("POST", "/v1/events", adorn("small", payload={"text": "x" * 500}))
        assert (await drip(relay, small, 10, 0.1)).status == 408
        config.write_text(text.replace("10 KiB", "0 B"))
        await exchange(relay.addresses.socket, request("POST", "/api/reload", b"{}"))
        assert (await drip(relay, large, 10, 0.1)).status == 408


async def test_a_max_body_above_the_budget_works(tmp_path):
    arrived = []

    async def take(request):
        arrived.append(len(await request.read()))
        return web.Response()

    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_post("/", take)
    text = SOURCES.replace('plugin = "adorn"', 'plugin = "adorn"\nmax_body = "48 MiB"')
    async with TestServer(app) as receiver:
        crm = destination("crm", str(receiver.make_url("/")))
        async with running(write_config(tmp_path, text, crm)) as relay:
            raw = request("POST", "/v1/events", adorn("huge", payload={"text": "x" * 40 * 2**20}))
            async with await Wire.open(relay.addresses.public) as wire:
                await wire.send(raw)
                assert (await wire.answer()).status == 200
            await until(lambda: arrived, seconds=30)
            assert arrived[0] > 40 * 2**20
            over = request("POST", "/v1/events", content_length=str(48 * 2**20 + 1))
            assert (await relay.exchange(over)).status == 413


@pytest.mark.parametrize("table", ["server", "sources.adorn"])
def test_an_absurd_max_body_is_refused_at_its_line(tmp_path, table):
    text = '[sources.adorn]\nplugin = "adorn"\n' + ("[server]\n" if table == "server" else "")
    path = tmp_path / "config.toml"
    path.write_text(text + 'max_body = "257 MiB"\n')
    with pytest.raises(ConfigError, match="expected at most 256 MiB, because bodies are held in memory"):
        load(path)
