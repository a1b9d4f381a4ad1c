"""A new id at an endpoint that another worker has: a healthy worker stays ONLINE, a missing one does not."""

import msgspec
import pytest
from stores import hooks, opened

from relay.base.clock import SECOND
from relay.config.schema import WorkerRules
from relay.errors import Conflict
from relay.model import Heartbeat, Register, Unregister
from relay.store import Acceptance
from relay.workers.rules import FORMER, Now, apply, former, identifies_worker, names_one_machine, note_refused

PUBLIC = "https://worker.example:8001"
PATIENT = WorkerRules(offline_after=600.0)
BEAT = Heartbeat(worker_id="w")


def at(seconds):
    return Now(wall=int((1000 + seconds) * SECOND), steady=int((1000 + seconds) * SECOND))


def beaten(*moments, rules=PATIENT, refused=()):
    """Return a row after heartbeats at these seconds, the first of which is its registration."""
    row = None
    for moment in moments:
        if moment in refused:
            row = note_refused(row, BEAT, at(moment), rules)
        else:
            row = apply(row, BEAT, "s", at(moment), rules).worker
    return row


def left(row, now, rules=PATIENT):
    """Return the seconds that a former id has from a moment."""
    return (former(row, at(now), rules).deadline - at(now).steady) / SECOND


@pytest.mark.parametrize("interval", [30, 45, 60, 120, 240])
@pytest.mark.parametrize("beats", [2, 5, 40])
def test_a_former_id_has_time_for_its_next_heartbeat_and_a_timeout(interval, beats):
    row = beaten(*range(0, beats * interval, interval))
    assert interval + 5 <= left(row, (beats - 1) * interval) <= max(234, interval * 7 / 6)


def test_a_former_id_has_little_more_than_its_usual_interval():
    assert left(beaten(*range(0, 3600, 60)), 3540) < 72
    assert left(beaten(*range(0, 3600, 5)), 3595) == FORMER / SECOND


def test_a_former_id_never_gets_a_later_deadline():
    row = beaten(*range(0, 3600, 60))
    assert left(row, 3540 + 590) == 10


def test_irregular_heartbeats_change_the_usual_interval_little():
    steady = list(range(0, 3600, 60))
    assert left(beaten(*steady, 3541), 3541) > 60
    assert left(beaten(*steady, 3700, 3760), 3760) > 60
    assert left(beaten(*steady, refused=set(steady[20:])), 3540) < 72


def test_silence_downtime_and_registration_do_not_change_the_usual_interval():
    row = beaten(*range(0, 3600, 60))
    offline = msgspec.structs.replace(row, status="OFFLINE")
    assert apply(offline, BEAT, "s", at(90_000), PATIENT).worker.rhythm == row.rhythm
    registered = apply(row, Register(worker_id="w"), "s", at(3600), PATIENT).worker
    assert apply(registered, BEAT, "s", at(3601), PATIENT).worker.rhythm == row.rhythm
    assert apply(row, BEAT, "s", at(-500), PATIENT).worker.rhythm == row.rhythm  # another run's steady clock


@pytest.mark.parametrize(
    ("offline_after", "seconds"), [(90.0, 35), (600.0, 600 / 3 * 7 / 6), (60.0, 35), (20.0, 20)]
)
def test_without_heartbeats_the_configured_interval_counts(offline_after, seconds):
    rules = WorkerRules(offline_after=offline_after)
    row = apply(None, Register(worker_id="w"), "s", at(0), rules).worker
    assert left(row, 0, rules) == pytest.approx(seconds)


TELLING = [
    PUBLIC, "http://203.0.113.9:8001", "http://[2001:db8::1]:8001", "w.example:1", "http://w", "http://8.8.8.8",
    "http://172.15.0.1", "http://172.32.0.1", "http://100.128.0.1",
]  # fmt: skip
SHARED = [
    "http://localhost:8001", "http://127.0.0.1:8001", "http://[::1]:8001", "http://0.0.0.0:8001",
    "http://10.0.0.2:8001",
    "http://172.17.0.2:3001", "http://192.168.1.5", "192.168.1.5:8001", "http://[fd00::1]",
    "http://[fe80::1%25eth0]:1",
    "http://169.254.1.1", "http://100.64.0.1", "http://[::ffff:10.0.0.1]",
    "http://host.docker.internal:8001", "",
    "nonsense://", "http://[",
]  # fmt: skip


def test_loopback_and_private_endpoints_identify_no_worker():
    assert [endpoint for endpoint in TELLING + SHARED if identifies_worker(endpoint)] == TELLING


@pytest.fixture
async def store(tmp_path, clock):
    async with opened(tmp_path / "relay.db", clock) as store:
        hooks(store).rules = lambda _source, _worker: PATIENT
        yield store


async def message(store, change):
    await store.events.append(Acceptance(source="shop", change=change))


async def test_two_healthy_workers_at_one_endpoint_are_never_offline(store, clock):
    for worker in ("a", "b"):
        await message(store, Register(worker_id=worker, endpoint=PUBLIC))
        clock.advance(30)
    for second in range(0, 3600, 10):
        if second % 60 == 0:
            await message(store, Heartbeat(worker_id="a"))
        if second % 60 == 30:
            await message(store, Heartbeat(worker_id="b"))
        if second % 600 == 10:  # crashes of a third one, which has a new id each time
            await message(store, Register(worker_id=f"c{second}", endpoint=PUBLIC))
            await message(store, Unregister(worker_id=f"c{second}"))
        clock.advance(10)
        assert await store.workers.sweep() == ()


async def test_a_replaced_worker_is_offline_long_before_its_usual_deadline(store, clock):
    await message(store, Register(worker_id="a", endpoint=PUBLIC))
    for _ in range(40):
        clock.advance(60)
        await message(store, Heartbeat(worker_id="a"))
    await message(store, Register(worker_id="b", endpoint=PUBLIC))
    clock.advance(60)
    assert await store.workers.sweep() == ()
    clock.advance(15)
    assert [worker.id for worker in await store.workers.sweep()] == ["a"]


@pytest.mark.parametrize("endpoint", ["http://localhost:8001", "http://172.17.0.2:3001", ""])
async def test_a_shared_default_endpoint_shortens_no_deadline(store, clock, endpoint):
    for worker in ("a", "b"):
        await message(store, Register(worker_id=worker, endpoint=endpoint))
    clock.advance(590)
    assert await store.workers.sweep() == ()


@pytest.mark.parametrize(
    ("endpoint", "rejected"),
    [
        (PUBLIC, True),
        ("http://10.0.0.2:8001", True),
        ("http://localhost:8001", False),
        ("http://[::1]", False),
    ],
)
async def test_rejected_conflicts_concern_only_endpoints_that_name_one_machine(store, endpoint, rejected):
    assert names_one_machine(endpoint) is rejected
    await message(store, Register(worker_id="a", endpoint=endpoint))
    second = Register(worker_id="b", endpoint=endpoint, reject_conflict=True)
    if rejected:
        with pytest.raises(Conflict):
            await message(store, second)
    else:
        await message(store, second)
