"""The worker registry of two nodes on one PostgreSQL database: they agree, and no event is stored twice."""

import asyncio
import itertools

import msgspec
import pytest
from postgres import needs_postgres
from postgres_stores import emptied, url_of
from stores import accept
from support import FakeClock

from relay.base.clock import SECOND
from relay.base.json_text import encode
from relay.config.schema import WorkerRules
from relay.errors import Conflict, StorageUnavailableError
from relay.model import Command, Heartbeat, Register, Session, SessionSeen, Unregister, Worker
from relay.store import Acceptance, opening
from relay.store.postgres.connection import connect
from relay.store.postgres.workers import Note, is_obsolete, judged_until
from relay.workers.rules import Now

LEASE = 30.0
RULES = WorkerRules(offline_after=90.0, startup_hold=120.0)
ENDPOINT = "https://worker.example:8001"


class Node:
    """A store of a cluster, and the events about workers that it has stored."""

    def __init__(self, url, folder, name, clock):
        self.events, self.changes = [], []
        folder.mkdir(exist_ok=True)
        self.store = opening.make_store(
            url,
            folder,
            clock,
            rules=lambda _source, _id: RULES,
            listeners=[self.listen],
            on_status_change=lambda _source, status: self.changes.append(status),
            node=name,
            cluster=LEASE,
        )
        self.workers = self.store.workers

    def listen(self, news):
        self.events += [(event.type.removeprefix("wa."), event.subject) for event in news.events]

    async def ask(self, change, **fields):
        return await self.store.events.append(Acceptance(source="wa", change=change, **fields))

    def row(self, id_="w1"):
        return self.workers.roster.get(("wa", id_))

    async def lose(self):
        """Lose the writing connection; the next write fails."""
        writer = self.store.database.writer
        writer.connection.terminate()
        with pytest.raises(StorageUnavailableError):
            await self.ask(Register(worker_id="lost"))


@pytest.fixture(autouse=True)
def emptied_databases():
    with emptied():
        yield


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
async def nodes(tmp_path, clock):
    url = url_of(tmp_path, clock)
    nodes = [Node(url, tmp_path / name, name, clock) for name in ("a", "b")]
    for node in nodes:
        await node.store.open()
    yield nodes
    for node in nodes:
        await node.store.close()


async def flushed(*nodes):
    """Let each node write its heartbeats, and then read those of the others."""
    for node in (*nodes, *nodes):
        await node.workers.flush()


async def settled(nodes, clock, seconds=60):
    """Let time pass, in which each node writes its heartbeats every two seconds."""
    for _ in range(0, seconds, 2):
        clock.advance(2)
        await asyncio.gather(*(node.workers.flush() for node in nodes))


def beat(id_="w1", **fields):
    return Heartbeat(worker_id=id_, **fields)


def events_of(*nodes):
    """Return the events that all nodes have stored."""
    return [event for node in nodes for event in node.events]


@needs_postgres
async def test_a_worker_that_registers_at_one_node_is_known_to_the_other(nodes):
    first, second = nodes
    await first.ask(Register(worker_id="w1", endpoint=ENDPOINT))
    assert second.row() is None
    await second.workers.flush()
    assert second.row() == first.row()
    assert second.workers.count("wa", "ONLINE") == 1
    assert first.changes == ["ONLINE"]
    assert second.changes == []


@needs_postgres
async def test_a_registration_at_two_nodes_at_once_is_one_event(nodes):
    for number in range(5):
        await asyncio.gather(*(node.ask(Register(worker_id=f"w{number}")) for node in (*nodes, *nodes)))
    assert sorted(events_of(*nodes)) == [("worker.registered", f"w{number}") for number in range(5)]


@needs_postgres
async def test_heartbeats_that_hop_keep_their_worker_alive_without_an_event(nodes, clock):
    await nodes[0].ask(Register(worker_id="w1"))
    for node, number in zip(itertools.cycle(nodes), range(20), strict=False):
        await settled(nodes, clock, 28)
        clock.advance(2)
        await node.ask(beat(cpu=float(number)))
        await flushed(*nodes) if number % 3 else await node.workers.flush()
    await flushed(*nodes)
    assert events_of(*nodes) == [("worker.registered", "w1")]
    assert nodes[0].row() == nodes[1].row()
    assert (nodes[0].row().cpu, nodes[0].row().last_heartbeat) == (19.0, clock.wall())


@needs_postgres
async def test_quiet_heartbeats_at_both_nodes_are_merged_by_their_time(nodes, clock):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await flushed(*nodes)
    await first.ask(beat(cpu=1.0, message_count=1))
    clock.advance(1)
    await second.ask(beat(cpu=2.0))
    assert first.row() != second.row()
    await second.workers.flush()  # the later heartbeat is written first
    await flushed(*nodes)
    assert first.row() == second.row()
    assert (first.row().cpu, first.row().last_heartbeat) == (2.0, clock.wall())
    assert first.row().deadline == clock.steady() + 90 * SECOND


@needs_postgres
async def test_an_outdated_row_takes_part_in_no_decision(nodes, clock):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await flushed(*nodes)
    await first.ask(beat(status="OFFLINE"))
    await second.ask(beat(status="OFFLINE"))  # in the memory of this node, the worker is ONLINE
    assert events_of(*nodes) == [("worker.registered", "w1"), ("worker.offline", "w1")]
    await second.ask(beat(status="ONLINE"))
    await first.ask(beat(status="ONLINE"))
    assert events_of(*nodes)[-1:] == [("worker.online", "w1")]
    assert len(events_of(*nodes)) == 3


@needs_postgres
async def test_a_quiet_heartbeat_revives_a_worker_that_another_node_has_marked(nodes, clock):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await flushed(*nodes)
    await first.ask(beat(status="OFFLINE"))
    clock.advance(1)
    receipt = await second.ask(beat())
    assert receipt.worker.status == "ONLINE"  # it is not known to be OFFLINE there yet
    await flushed(*nodes)
    assert events_of(*nodes) == [
        ("worker.registered", "w1"),
        ("worker.offline", "w1"),
        ("worker.online", "w1"),
    ]
    assert first.row().status == second.row().status == "ONLINE"


@needs_postgres
async def test_a_heartbeat_from_before_an_unregister_changes_nothing(nodes, clock):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await flushed(*nodes)
    await second.ask(beat())
    clock.advance(1)
    await first.ask(Unregister(worker_id="w1"))
    await flushed(*nodes)
    assert events_of(*nodes) == [("worker.registered", "w1"), ("worker.unregistered", "w1")]
    assert first.row().unregistered_at == second.row().unregistered_at == clock.steady()


@needs_postgres
async def test_a_forgotten_worker_leaves_the_memory_of_all_nodes(nodes):
    first, second = nodes
    for number in range(3):
        await first.ask(Register(worker_id=f"w{number}"))
    await flushed(*nodes)
    await second.ask(beat("w1"))  # in memory only
    assert await first.workers.change(lambda changes: changes.forget([("wa", "w1")])) == 1
    await first.ask(Register(worker_id="w9"))  # the number of workers is the same as before
    await flushed(*nodes)
    for node in nodes:
        assert {row.id for row in node.workers.all()} == {"w0", "w2", "w9"}


@needs_postgres
async def test_an_operators_change_sees_the_rows_of_other_nodes(nodes):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    row = await second.workers.change(lambda changes: changes.maintain(("wa", "w1"), on=True))
    assert row.status == "MAINTENANCE"
    await first.ask(beat())
    await flushed(*nodes)
    assert [node.row().status for node in nodes] == ["MAINTENANCE", "MAINTENANCE"]


@needs_postgres
async def test_a_change_of_a_row_that_another_node_has_changed_is_repeated(nodes, monkeypatch):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await flushed(*nodes)
    refresh, calls = second.workers._refresh, []

    async def refresh_later(fetch):
        calls.append(fetch)
        if len(calls) > 1:
            await refresh(fetch)

    monkeypatch.setattr(second.workers, "_refresh", refresh_later)
    await first.ask(beat(version="2.0.0"))
    row = await second.workers.change(lambda changes: changes.maintain(("wa", "w1"), on=True))
    assert (row.version, row.status, len(calls)) == ("2.0.0", "MAINTENANCE", 2)


@needs_postgres
async def test_changes_of_the_same_workers_at_both_nodes_are_all_kept(nodes):
    ids = [f"w{number}" for number in range(20)]
    await asyncio.gather(*(nodes[0].ask(Register(worker_id=id_)) for id_ in ids))
    sessions = [Session(id=f"s{number}", status="connected") for number in range(6)]
    await asyncio.gather(
        *(
            nodes[number % 2].ask(SessionSeen(worker_id=id_, session=session))
            for number, session in enumerate(sessions)
            for id_ in ids
        )
    )
    await flushed(*nodes)
    for node in nodes:
        assert {len(node.row(id_).sessions) for id_ in ids} == {6}


@needs_postgres
async def test_a_session_without_a_worker_belongs_to_the_one_that_another_node_knows(nodes):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await first.ask(beat(sessions=(Session(id="s1", status="connected"),)))
    await flushed(*nodes)
    await second.ask(SessionSeen(worker_id="", session=Session(id="s1", status="qr_ready")))
    await flushed(*nodes)
    assert [each.row().sessions[0].status for each in nodes] == ["qr_ready", "qr_ready"]


@needs_postgres
async def test_only_one_worker_gets_an_endpoint_that_must_not_be_shared(nodes):
    results = await asyncio.gather(
        *(
            node.ask(Register(worker_id=id_, endpoint=ENDPOINT, reject_conflict=True))
            for node, id_ in zip(nodes, ("w1", "w2"), strict=True)
        ),
        return_exceptions=True,
    )
    assert [type(each) for each in results].count(Conflict) == 1
    assert len(events_of(*nodes)) == 1


@needs_postgres
async def test_a_command_is_sent_once(nodes, clock):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await flushed(*nodes)
    command = Command(
        public_id="cmd_1",
        source="wa",
        worker_id="w1",
        body={"type": "restart"},
        created_at=clock.wall(),
        expires_at=clock.steady() + 60 * SECOND,
    )
    await first.workers.change(lambda changes: changes.queue(command))
    await flushed(*nodes)
    receipts = [await node.ask(beat()) for node in nodes]
    assert [len(receipt.commands) for receipt in receipts] == [1, 0]
    await flushed(*nodes)
    assert not second.workers.roster.commands


@needs_postgres
async def test_gauges_are_measured_once_a_minute_in_the_cluster(nodes, clock):
    await nodes[0].ask(Register(worker_id="w1"))
    await flushed(*nodes)
    for node, _ in zip(itertools.cycle(nodes), range(12), strict=False):
        await settled(nodes, clock, 10)
        await node.ask(beat(cpu=1.0))
        await flushed(*nodes)
    rows = await nodes[0].store.queries.find("worker_metrics")
    assert len(rows) == 2


# --- silence ----------------------------------------------------------------------------------------


async def started(nodes, clock):
    """Let the time pass in which a starting cluster waits for heartbeats; returns the node that sweeps."""
    await nodes[0].workers.sweep(extend=True)
    await nodes[0].ask(Register(worker_id="w1"))
    for _ in range(6):
        await settled(nodes, clock, 30)
        await nodes[1].ask(beat())
    await settled(nodes, clock, 2)
    return nodes[0]


@needs_postgres
async def test_a_silent_worker_is_one_event_even_if_two_nodes_sweep(nodes, clock):
    leader = await started(nodes, clock)
    await settled(nodes, clock, 86)
    assert await leader.workers.sweep() == ()
    await settled(nodes, clock, 8)
    marked = await asyncio.gather(*(node.workers.sweep() for node in nodes))
    assert [row.id for rows in marked for row in rows] == ["w1"]
    assert events_of(*nodes) == [("worker.registered", "w1"), ("worker.offline", "w1")]
    await flushed(*nodes)
    assert [node.row().status for node in nodes] == ["OFFLINE", "OFFLINE"]
    assert sorted(leader.changes + nodes[1].changes) == ["OFFLINE", "ONLINE"]


@needs_postgres
async def test_a_sweep_waits_for_heartbeats_that_another_node_has_not_written(nodes, clock):
    leader = await started(nodes, clock)
    await settled(nodes, clock, 80)
    await nodes[1].ask(beat())  # the other node hangs now
    await settled(nodes[:1], clock, 20)
    assert await leader.workers.sweep() == ()
    await settled(nodes, clock, 2)
    assert await leader.workers.sweep() == ()
    assert leader.row().status == "ONLINE"


@needs_postgres
async def test_after_a_node_vanished_a_sweep_waits_for_one_lease(nodes, clock):
    leader = await started(nodes, clock)
    await settled(nodes, clock, 80)
    await settled(nodes[:1], clock, 30)  # the other node was killed
    assert await leader.workers.sweep() == ()
    await settled(nodes[:1], clock, 6)
    assert [row.id for row in await leader.workers.sweep()] == ["w1"]


@needs_postgres
async def test_another_node_continues_the_sweeps_without_a_new_deadline(nodes, clock):
    await started(nodes, clock)
    await nodes[0].workers.sweep()
    await settled(nodes, clock, 100)
    assert [row.id for row in await nodes[1].workers.sweep(extend=True)] == ["w1"]


@needs_postgres
async def test_the_deadlines_are_extended_after_all_nodes_were_away(nodes, clock):
    leader = await started(nodes, clock)
    await leader.workers.sweep()
    clock.advance(3600)
    await settled(nodes, clock, 12)
    assert await leader.workers.sweep(extend=True) == ()
    await settled(nodes, clock, 100)
    assert await nodes[1].workers.sweep(extend=True) == ()
    await settled(nodes, clock, 30)
    assert [row.id for row in await leader.workers.sweep()] == ["w1"]


@needs_postgres
async def test_a_node_without_the_database_accepts_no_heartbeat_but_remembers_it(nodes, clock):
    first, second = nodes
    await started(nodes, clock)
    await settled(nodes, clock, 60)
    await second.lose()
    second.store.database.writer._set_failure("the network")
    with pytest.raises(StorageUnavailableError):
        await second.ask(beat())
    second.store.database.writer._set_failure(None)
    await flushed(*nodes)
    assert first.row().deadline == clock.steady() + 90 * SECOND


@needs_postgres
async def test_an_extension_is_made_up_for_when_the_database_is_back(nodes, clock):
    leader = await started(nodes, clock)
    await leader.workers.sweep()
    clock.advance(200)
    assert await leader.workers.sweep(extend=True) == ()  # before its first flush after the gap
    await settled(nodes, clock, 12)
    assert await leader.workers.sweep() == ()
    await settled(nodes, clock, 112)
    assert await leader.workers.sweep() == ()
    await settled(nodes, clock, 20)
    assert [row.id for row in await leader.workers.sweep()] == ["w1"]


@needs_postgres
async def test_a_node_that_was_frozen_refuses_requests_from_that_time(nodes, clock):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await first.ask(beat(uptime=100.0))
    await flushed(*nodes)
    await settled(nodes[:1], clock, 10)
    await first.ask(beat(uptime=110.0))
    for _ in range(2):
        with pytest.raises(StorageUnavailableError, match="was suspended"):
            await second.ask(beat(uptime=100.0))
        with pytest.raises(StorageUnavailableError, match="was suspended"):
            await second.ask(beat(status="OFFLINE"))
        await flushed(*nodes)
    clock.advance(1)
    await second.ask(beat(uptime=111.0))
    await flushed(*nodes)
    assert events_of(*nodes) == [("worker.registered", "w1")]
    assert first.row() == second.row()


@needs_postgres
async def test_a_refused_unregister_is_one_event(nodes, clock):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await flushed(*nodes)
    assert second.workers.note_refused("wa", Unregister(worker_id="w1")) == "ONLINE"
    await flushed(*nodes)
    marked = await asyncio.gather(*(node.workers.sweep(at=0) for node in nodes))
    assert [row.id for rows in marked for row in rows] == ["w1"]
    assert events_of(*nodes) == [("worker.registered", "w1"), ("worker.unregistered", "w1")]


@needs_postgres
async def test_rows_that_a_failover_has_taken_back_are_read_again(nodes):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await flushed(*nodes)
    sql = "UPDATE workers SET record = $1"  # with the version that the node knows
    record = encode(msgspec.structs.replace(first.row(), status="MAINTENANCE"))
    await first.store.database.fetch(sql, record)
    await second.workers.reload(second.store.database.writer.connection)
    assert second.row().status == "MAINTENANCE"
    assert second.workers.count("wa", "MAINTENANCE") == 1


@needs_postgres
async def test_a_row_of_a_long_transaction_is_read_after_its_end(nodes):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await flushed(*nodes)
    connection = await connect(first.store.database.address, writes=True)
    await connection.execute("BEGIN")
    record = encode(msgspec.structs.replace(first.row(), description="slow"))
    sql = "UPDATE workers SET version = pg_current_xact_id()::text::bigint, record = $1"
    await connection.execute(sql, record)
    await first.ask(Register(worker_id="w2"))  # a later transaction ends before
    await flushed(second)
    assert second.row().description == ""
    await connection.execute("COMMIT")
    await connection.close()
    await flushed(*nodes)
    assert [node.row().description for node in nodes] == ["slow", "slow"]


@needs_postgres
async def test_versions_of_a_restored_dump_do_not_hide_changes(nodes, clock, tmp_path):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    await first.store.database.fetch("UPDATE workers SET version = 2000000000")
    for node in nodes:
        await node.workers.reload(node.store.database.writer.connection)
    await first.ask(beat(status="MAINTENANCE"))
    await second.workers.flush()
    assert second.row().status == "MAINTENANCE"


@needs_postgres
async def test_an_event_and_its_session_are_stored_with_the_row_of_another_node(nodes, clock):
    first, second = nodes
    await first.ask(Register(worker_id="w1"))
    seen = SessionSeen(worker_id="w1", session=Session(id="s1", status="connected"))
    await second.store.events.append(accept(clock, change=seen, source="wa", type="wa.qr", key="k"))
    repeated = accept(clock, change=seen, source="wa", type="wa.qr", key="k")
    assert (await first.store.events.append(repeated)).duplicate
    await flushed(*nodes)
    assert [node.row().sessions for node in nodes] == [(seen.session,)] * 2


# --- decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flushes", "until"),
    [
        ((), 100),
        ((99, 98), 98),
        ((99, 67), 67),
        ((99, 66), 99),  # gone for more than a lease and two flushes
        ((99, 120), 99),  # it has just started
    ],
)
def test_a_sweep_compares_with_the_earliest_flush(flushes, until):
    assert judged_until(100, 100, flushes, 34) == until


def row(heard, **fields):
    """Return a row whose worker was heard at a moment, with an `offline_after` of 90."""
    return Worker(source="wa", id="w", deadline=heard + 90, last_beat=heard, **fields)


@pytest.mark.parametrize(
    ("known", "change", "then", "now", "obsolete"),
    [
        (row(100), beat("w"), 99, 110, True),
        (row(100), beat("w"), 100, 110, True),
        (row(100), beat("w"), 101, 110, False),
        (row(100), beat("w"), 101, 191, True),  # its deadline has passed as well
        (row(100, unregistered_at=105), beat("w"), 104, 110, True),
        (row(100, unregistered_at=105), beat("w"), 106, 110, False),
        (row(100), Unregister(worker_id="w"), 99, 110, False),  # the heartbeat may have been sent before
        (row(100 + 10 * SECOND), Unregister(worker_id="w"), 100, 110, True),
        (msgspec.structs.replace(row(101), last_beat=0), Unregister(worker_id="w"), 100, 110, True),
    ],
)
def test_a_note_is_obsolete_after_a_later_request(known, change, then, now, obsolete):
    assert is_obsolete(known, Note(change, Now(wall=0, steady=then), False), now, 90) == obsolete
