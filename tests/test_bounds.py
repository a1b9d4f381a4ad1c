"""Tables in memory that a sender can fill: each has its bound, which docs/design.md names."""

import asyncio
import importlib
import json
import logging
import re
import sys
from pathlib import Path

import pytest
from daemon import SOURCES, running, write_config
from stores import make_event
from support import FakeClock, until
from wire import Wire, request

from relay import logs
from relay.config.model import Retention, SourceRetention
from relay.ingest import echoes
from relay.ingest.echoes import Echoes, fingerprint
from relay.logs import Sparing
from relay.model import Receipt, Worker
from relay.retention import Policy
from relay.store import Acceptance, prune
from relay.store.sqlite import SqliteStore

DESIGN = (Path(__file__).parent.parent / "docs" / "design.md").read_text()
BOUNDS = re.findall(r"^\| .+ \| ([0-9,]+) \(`(relay[a-z_.]*)\.([A-Z_]+)`\) \| .+ \|$", DESIGN, re.MULTILINE)


def test_the_bounds_that_the_design_names_are_those_of_the_code():
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


# --- answers that nobody heard ------------------------------------------------------------------------


def unheard(table, clock, number, size=0):
    """Note one request whose sender was gone before its answer; return what it is known by."""
    text = "x" * size
    event = make_event(clock, body=b"%d" % number, subject=text, context=f'"{text}"'.encode())
    mark = fingerprint("/a", event, None)
    worker = Worker(source="shop", id="w", description=text)
    entry = table.begin(mark, lambda: True)
    table.end(mark, entry, Receipt(event_id=event.public_id, worker=worker), gone=True)
    return mark


async def test_what_is_kept_of_an_unheard_answer_has_one_size_whatever_the_sender_wrote():
    clock = FakeClock()
    small, large = Echoes(clock), Echoes(clock)
    for number in range(600):
        unheard(small, clock, number)
        unheard(large, clock, number, 100_000)
    assert weight(large._unheard) == weight(small._unheard) < 600 * 500


async def test_a_request_under_way_is_known_by_little_whatever_the_sender_wrote():
    clock, text = FakeClock(), "x" * 1_000_000
    mark = fingerprint("/a", make_event(clock, subject=text, context=text.encode()), None)
    assert weight(mark) < 2000
    assert mark != fingerprint("/a", make_event(clock, subject=text, context=text.encode() + b"y"), None)
    assert mark != fingerprint("/a", make_event(clock, subject=text + "y", context=text.encode()), None)


async def test_answers_that_nobody_heard_are_forgotten_after_a_minute():
    clock = FakeClock()
    table = Echoes(clock)
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


async def test_no_more_than_so_many_unheard_answers_are_remembered_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr(echoes, "MOST", 10)
    clock = FakeClock()
    table = Echoes(clock)
    marks = [unheard(table, clock, number) for number in range(20)]
    assert len(table._unheard) == 10
    assert await table.first(marks[9]) is None
    assert await table.first(marks[10]) is not None


async def test_senders_that_hang_up_on_large_contexts_leave_little_in_memory(tmp_path, monkeypatch):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        original, gate = relay.app.store.append, asyncio.Event()

        async def append(acceptance):
            await gate.wait()
            return await original(acceptance)

        monkeypatch.setattr(relay.app.store, "append", append)
        table = relay.app.ingest._echoes
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


def test_a_rate_limited_log_remembers_so_many_keys_and_stays_rate_limited(caplog, monkeypatch):
    monkeypatch.setattr(logs, "MOST_KEYS", 10)
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    sparing = Sparing(logging.getLogger("relay.test"), clock)
    for number in range(1000):
        sparing.info(f"key {number}", "line")
    assert len(sparing._last) <= 11
    assert len(caplog.messages) == 11
    clock.advance(10)
    for number in range(1000, 2000):
        sparing.info(f"key {number}", "line")
    assert len(sparing._last) <= 11
    assert len(caplog.messages) <= 22
    assert "(989 more like it)" in caplog.text


# --- retention of invented types ----------------------------------------------------------------------


@pytest.mark.parametrize("most", [5, 1000])
async def test_retention_keeps_its_rules_however_many_types_a_sender_invents(tmp_path, monkeypatch, most):
    monkeypatch.setattr(prune, "MOST_TYPES", most)
    monkeypatch.setattr(prune, "LONGEST_PAUSE", 0)
    clock = FakeClock()
    policy = Policy(Retention(), {"shop": SourceRetention(types={"qr_*": 3600.0, "day_*": 86_400.0})})
    store = SqliteStore(tmp_path / "relay.db", clock)
    await store.open()
    for number in range(20):
        for kind in ("qr", "day", "plain"):
            event = make_event(clock, type=f"shop.{kind}_{number}")
            await store.append(Acceptance(source="shop", event=event))
    left = []
    for hours in (2, 26, 15 * 24):
        clock.advance(hours * 3600)
        await store.prune(policy)
        assert len(store._cursors) <= 2 * 20 + 1 if most == 1000 else len(store._cursors) <= 3
        left.append(sorted({row["type"].split("_")[0] for row in await store.find("events", limit=500)}))
    assert left == [["shop.day", "shop.plain"], ["shop.plain"], []]
    await store.close()
