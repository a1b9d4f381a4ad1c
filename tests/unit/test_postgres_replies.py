"""Replies that did not reach their senders, shared by two nodes: a repetition anywhere counts once."""

import asyncio

import pytest
from postgres import needs_postgres
from postgres_stores import emptied, listen_url_of, url_of
from stores import make_event
from support import FakeClock, until

from relay.base.clock import SystemClock
from relay.errors import StorageError, StorageUnavailableError
from relay.ingest.dedupe import UnheardReplies, fingerprint
from relay.model import Receipt
from relay.store import opening
from relay.store.postgres import replies
from relay.store.postgres.replies import Replies

CLOCK = SystemClock()


class Attendant:
    def wake(self, lanes, *, retries=False):
        pass

    def renew_soon(self):
        pass

    async def answer(self, lane, verb, argument):
        raise StorageError("not in this test")


class Table:
    """The table `unheard`, shared by nodes in memory; it can fail."""

    def __init__(self):
        self.rows, self.fails, self.announced = {}, False, 0
        self.nodes = []

    def node(self):
        node = Replies(self.fetch, self.announce)
        self.nodes.append(node)
        return node

    def announce(self):
        self.announced += 1

    async def fetch(self, sql, *values):
        await asyncio.sleep(0)
        if self.fails:
            raise StorageUnavailableError("away")
        if sql == replies.KEEP_SQL:
            self.rows.update(zip(values[0], values[1], strict=True))
        elif sql == replies.TAKE_SQL:
            found = self.rows.pop(values[0], None)
            return [] if found is None else [{"event_ids": found, "is_valid": True}]
        return [{"digest": digest} for digest in self.rows]


@pytest.fixture(autouse=True)
def emptied_databases():
    with emptied():
        yield


@pytest.fixture
async def nodes(tmp_path):
    url, stores = url_of(tmp_path, CLOCK), []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        store = opening.make_store(
            url, tmp_path / name, CLOCK, node=name, cluster=30.0, listen_url=listen_url_of(url)
        )
        await store.open()
        store.nodes.attend(Attendant())
        stores.append(store)
    await until(lambda: all(store.nodes._wake_ups.arrives for store in stores))
    yield [UnheardReplies(CLOCK, store.nodes.replies) for store in stores]
    for store in stores:
        await store.close()


def request(number=0):
    return fingerprint("/a", make_event(CLOCK, body=b"%d" % number), None)


def unheard(node, mark, *ids):
    """Let a sender disconnect before its reply."""
    entry = node.begin(mark, lambda: True)
    each = tuple(Receipt(event_id=id_) for id_ in ids[1:] and ids)
    node.end(mark, entry, Receipt(event_id=ids[0], each=each), gone=True)


async def known(node, count=1):
    await until(lambda: len(node._shared) == count)


@needs_postgres
async def test_a_repetition_at_another_node_is_recognized_once(nodes):
    first, second = nodes
    unheard(first, request(), "evt_1")
    await known(second)
    receipts = await asyncio.gather(*(node.first(request()) for node in (second, first, second)))
    assert [receipt.event_id for receipt in receipts if receipt is not None] == ["evt_1"]
    assert await first.first(request()) is None


@needs_postgres
async def test_the_events_of_one_request_are_repeated_together(nodes):
    first, second = nodes
    unheard(first, request(), "evt_1", "evt_2")
    await known(second)
    receipt = await second.first(request())
    assert [each.event_id for each in receipt.each] == ["evt_1", "evt_2"]


@needs_postgres
async def test_another_request_is_not_a_repetition(nodes):
    first, second = nodes
    unheard(first, request(1), "evt_1")
    await known(second)
    assert await second.first(request(2)) is None
    assert (await first.first(request(1))).event_id == "evt_1"
    assert await second.first(request(1)) is None


@needs_postgres
async def test_an_expired_reply_is_forgotten(nodes, monkeypatch):
    first, second = nodes
    monkeypatch.setattr(replies, "KEPT", 0.05)
    unheard(first, request(), "evt_1")
    await until(first._shared._task.done)
    await asyncio.sleep(0.1)
    assert await first.first(request()) is None
    await second._shared.refresh(second._shared._fetch)
    assert await second.first(request()) is None


async def test_a_reply_is_shared_again_after_a_failure(monkeypatch):
    monkeypatch.setattr(replies, "RETRY", 0.01)
    table = Table()
    node = table.node()
    table.fails = True
    node.share(b"x", ["evt_1"])
    node.share(b"y", ["evt_2"])
    await asyncio.sleep(0.02)
    assert await node.take(b"x") == ("evt_1",)  # no other node knows it
    table.fails = False
    await until(lambda: table.rows == {b"y": "evt_2"})
    assert table.announced == 1
    await node.stop()


async def test_a_reply_that_is_being_written_is_taken_from_the_table():
    table = Table()
    node = table.node()
    node.share(b"x", ["evt_1"])
    await asyncio.sleep(0)
    assert node._writing
    assert await node.take(b"x") == ("evt_1",)
    assert table.rows == {}


async def test_without_the_database_a_node_knows_its_own_replies():
    table = Table()
    node = UnheardReplies(FakeClock(), table.node())
    unheard(node, request(), "evt_1")
    await until(lambda: table.rows)
    table.fails = True
    assert (await node.first(request())).event_id == "evt_1"


async def test_the_replies_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(replies, "MOST", 3)
    table = Table()
    node = table.node()
    for number in range(5):
        node.share(b"%d" % number, ["evt"])
    assert list(node._waiting) == [b"2", b"3", b"4"]
    await node.stop()
    assert len(table.rows) == 3
