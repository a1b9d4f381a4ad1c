"""Wake-ups over PostgreSQL: sent together, heard by the other nodes, replaced by polls if they get lost."""

import asyncio
from unittest.mock import patch

import pytest
from postgres import database_of, drop_databases, needs_postgres
from support import until

from relay.store.postgres import wakeups
from relay.store.postgres.wakeups import WakeUp, WakeUps

asyncpg = pytest.importorskip("asyncpg")


class Deaf:
    """A connection through a pooler in transaction mode: LISTEN has no effect."""

    def __init__(self, connection):
        self.connection = connection

    async def add_listener(self, channel, callback):
        pass

    async def execute(self, *args):
        return await self.connection.execute(*args)

    def add_termination_listener(self, callback):
        self.connection.add_termination_listener(callback)

    def terminate(self):
        self.connection.terminate()


@pytest.fixture
async def make(tmp_path):
    url, made = database_of(tmp_path), []

    def make(sender, *, is_deaf=False):
        async def connect():
            connection = await asyncpg.connect(url)
            return Deaf(connection) if is_deaf else connection

        heard = []
        node = WakeUps(connect, sender, heard.append)
        node.heard = heard
        node.start()
        made.append(node)
        return node

    yield make
    for node in made:
        await node.stop()
    drop_databases()


@needs_postgres
async def test_a_node_stops_even_if_a_notification_arrives_at_the_same_moment(make):
    node = make("a", is_deaf=True)
    await until(lambda: node._answered._waiters)
    node._answered.set()
    async with asyncio.timeout(60):
        await node.stop()


async def test_a_second_start_connects_no_more():
    """A store that could not be opened at the first time becomes a node again."""
    asked = []

    async def connect():
        asked.append(1)
        await asyncio.Event().wait()

    node = WakeUps(connect, "a", print)
    node.start()
    node.start()
    await until(lambda: asked)
    assert asked == [1]
    await node.stop()


@needs_postgres
async def test_the_other_nodes_hear_an_announcement(make):
    first, second = make("a"), make("b")
    await until(lambda: first.arrives and second.arrives)
    first.heard.clear()
    second.heard.clear()
    for name, since in (("crm", 7), ("erp", 5), ("crm", 9)):
        first.announce((name,), since=since)
    await until(lambda: second.heard)
    assert second.heard == [WakeUp("a", lanes=("crm", "erp"), since=5)]
    first.announce(leases=True)
    first.announce(requests=True)
    await until(lambda: len(second.heard) == 2)
    assert second.heard[1] == WakeUp("a", leases=True, requests=True)
    first.announce(("crm",), retries=True)
    await until(lambda: len(second.heard) == 3)
    assert second.heard[2] == WakeUp("a", lanes=("crm",), retries=True)
    assert first.heard == []


@needs_postgres
async def test_many_announcements_are_few_notifications(make):
    first, second = make("a"), make("b")
    await until(lambda: first.arrives and second.arrives)
    second.heard.clear()
    for number in range(2000):
        first.announce((f"destination-{number % 1000}",))
        if number % 100 == 0:
            await asyncio.sleep(0)
    names = {f"destination-{number}" for number in range(1000)}
    await until(lambda: {name for message in second.heard for name in message.lanes} == names)
    assert len(second.heard) <= 6


@needs_postgres
async def test_announcements_without_a_connection_are_sent_later(make):
    second = make("b")
    await until(lambda: second.arrives)
    first = make("a")
    first.announce(("crm",))
    await until(lambda: WakeUp("a", lanes=("crm",)) in second.heard)


@needs_postgres
async def test_a_lost_connection_is_noticed_at_once_and_polls_replace_it(make):
    with patch.object(wakeups, "PROBE_EVERY", 600.0), patch.object(wakeups, "RETRY", 0.5):
        node, other = make("a"), make("b")
        await until(lambda: node.arrives and other.arrives)
        node.heard.clear()
        await other._connection.execute("SELECT pg_terminate_backend($1)", node._connection.get_server_pid())
        await until(lambda: node.heard)
        assert not node.arrives
        assert node.heard[0] == WakeUp("", is_poll=True)
        node.announce(("crm",))
        await until(lambda: WakeUp("a", lanes=("crm",)) in other.heard)
        assert node.arrives


@needs_postgres
async def test_probes_notice_a_network_that_is_silent(make):
    with patch.object(wakeups, "PROBE_EVERY", 0.05), patch.object(wakeups, "PROBE_TIMEOUT", 0.2):
        node = make("a")
        await until(lambda: node.arrives)
        await node._connection.execute("UNLISTEN relay")
        await until(lambda: not node.arrives and node.heard)
        assert set(node.heard) == {WakeUp("", is_poll=True)}


@needs_postgres
async def test_behind_a_pooler_a_node_polls_every_quarter_second(make):
    with patch.object(wakeups, "PROBE_TIMEOUT", 0.1):
        deaf, other = make("a", is_deaf=True), make("b")
        await until(lambda: other.arrives and len(deaf.heard) >= 3)
        assert not deaf.arrives
        assert set(deaf.heard) == {WakeUp("", is_poll=True)}
        deaf.announce(("crm",))
        await until(lambda: WakeUp("a", lanes=("crm",)) in other.heard)


def test_names_are_divided_into_portions():
    names = [f"{number:063d}" for number in range(300)]
    portions = list(wakeups._portions(names))
    assert [name for portion in portions for name in portion] == names
    assert all(sum(map(len, portion)) <= wakeups.MOST_BYTES for portion in portions)
    assert len(portions) == 3
