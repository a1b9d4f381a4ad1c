"""When silence counts: clocks that step, suspended processes, late sweeps."""

import asyncio
import contextlib
import signal
from datetime import timedelta
from unittest.mock import patch

import pytest
from daemons import SOURCES, Daemon, running, write_config
from stores import make_store
from support import SteppedClock, until
from wire import Wire, exchange, request

from relay.errors import StorageUnavailableError
from relay.model import Heartbeat, Register
from relay.store import Acceptance
from relay.workers.watch import Watch

TOKEN = {"Authorization": "Bearer worker-secret-token-12345"}
DEAD = "/api/workers/whatsapp/dead"
OFFLINE = "/api/events?type=whatsapp.worker.offline"


def rules(**seconds):
    """Render `[workers]`."""
    return "[workers]\n" + "".join(f'{name} = "{value}s"\n' for name, value in seconds.items())


def beat(worker):
    return request("PUT", f"/api/v1/workers/{worker}/heartbeat", body=b'{"status": "ONLINE"}', **TOKEN)


@contextlib.asynccontextmanager
async def beating(url, workers, every):
    """Have workers send heartbeats until the block ends; each waits for its answer, as real workers do."""

    async def live(worker):
        async with await Wire.open(url) as wire:
            while True:
                await wire.send(beat(worker))
                assert (await wire.answer()).status == 200
                await asyncio.sleep(every)

    lives = [asyncio.create_task(live(worker)) for worker in workers]
    try:
        yield
    finally:
        for life in lives:
            life.cancel()
        ends = await asyncio.gather(*lives, return_exceptions=True)
    assert [end for end in ends if not isinstance(end, asyncio.CancelledError)] == []


# --- the watch by itself ------------------------------------------------------------------------------


@pytest.fixture
async def store(tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    await store.events.append(Acceptance(source="shop", change=Register(worker_id="w1")))
    yield store
    await store.close()


async def sweep_at(watch, clock, *moments):
    """Sweep after each of these waits; return the wait after which the worker was offline, or None."""
    for seconds in moments:
        clock.advance(seconds)
        await watch.sweep()
        if watch._store.workers.count("shop", "OFFLINE"):
            return seconds
    return None


async def test_a_silent_worker_is_found_by_the_first_sweep_past_its_deadline(store, clock):
    watch = Watch(store, clock, 10.0)
    await sweep_at(watch, clock, 0)
    assert await sweep_at(watch, clock, *[10] * 9) is None
    assert await sweep_at(watch, clock, 1) == 1


async def test_the_first_sweep_after_a_start_marks_no_worker(store, clock):
    assert await sweep_at(Watch(store, clock, 10.0), clock, 3600, *[10] * 9) is None


async def test_a_long_overdue_sweep_extends_all_deadlines(store, clock):
    watch = Watch(store, clock, 10.0)
    assert await sweep_at(watch, clock, 0, 10, 3600, *[10] * 9) is None
    assert await sweep_at(watch, clock, 11) == 11


async def test_after_a_standstill_waiting_heartbeats_are_read_before_a_worker_is_marked(store, clock):
    watch = Watch(store, clock, 10.0)
    assert await sweep_at(watch, clock, *[10] * 7, 29) is None
    await store.events.append(
        Acceptance(source="shop", change=Heartbeat(worker_id="w1"))
    )  # it had been sent in time
    assert await sweep_at(watch, clock, *[10] * 9) is None


async def test_the_sweep_after_a_late_one_marks_silent_workers(store, clock):
    watch = Watch(store, clock, 10.0)
    assert await sweep_at(watch, clock, *[10] * 7, 29, 7) == 7


async def test_the_sweep_after_a_failed_one_marks_silent_workers(store, clock):
    watch = Watch(store, clock, 50.0)
    await watch.sweep()
    clock.advance(91)
    full = StorageUnavailableError("the disk is full")
    with patch.object(store.workers, "sweep", side_effect=full), pytest.raises(StorageUnavailableError):
        await watch.sweep()
    assert await sweep_at(watch, clock, 0, 1) == 1


async def test_a_shorter_interval_does_not_make_the_sweep_look_overdue(store, clock):
    watch = Watch(store, clock, 60.0)
    await sweep_at(watch, clock, 0, 60, 20)
    watch.change_interval(60.0)
    clock.advance(8)
    watch.change_interval(1.0)
    assert await sweep_at(watch, clock, 1, 1) is None
    assert await sweep_at(watch, clock, 1) == 1


async def test_a_changed_interval_does_not_hide_an_overdue_sweep(store, clock):
    watch = Watch(store, clock, 10.0)
    await sweep_at(watch, clock, 0)
    clock.advance(3600)
    watch.change_interval(20.0)
    assert await sweep_at(watch, clock, 0, *[10] * 9) is None


# --- under the real scheduler -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", [timedelta(hours=1), timedelta(hours=-1), timedelta(days=1), timedelta(days=-1)]
)
async def test_a_clock_step_neither_marks_nor_hides_an_offline_worker(tmp_path, monkeypatch, step):
    """The limits of 20 s are for a busy machine: each step is longer."""
    clock = SteppedClock(monkeypatch)
    patient = '[workers.ids]\n"alive-*" = { offline_after = "20s" }\n'
    usual = rules(offline_after=0.6, check_every=0.1, startup_hold=0)
    config = write_config(tmp_path, SOURCES, usual, patient)
    alive = [f"alive-{number}" for number in range(5)]
    async with running(config, clock=clock) as relay, beating(relay.addresses.public, alive, 0.1):
        died = clock.steady()
        await relay.exchange(beat("dead"))
        clock.by = step
        await until(lambda: relay.app.store.workers.count("whatsapp", "OFFLINE"))
        assert 0.6 <= (clock.steady() - died) / 1e6 < 20
        await relay.exchange(beat("dead"))  # and once more, on the stepped clock
        await until(lambda: relay.app.store.workers.count("whatsapp", "OFFLINE") == 0)
        await until(lambda: relay.app.store.workers.count("whatsapp", "OFFLINE"))
        events = [row for row in await relay.rows() if row["type"] == "whatsapp.worker.offline"]
    assert [row["subject"] for row in events] == ["dead", "dead"]


@pytest.mark.parametrize("seconds", [0.55, 1.0])
async def test_after_a_standstill_no_worker_is_offline(tmp_path, seconds):
    config = write_config(tmp_path, SOURCES, rules(offline_after=0.5, check_every=0.2, startup_hold=0))
    alive = [f"alive-{number}" for number in range(10)]
    async with Daemon(config) as daemon, beating(daemon.url, alive, 0.05):
        for _ in range(2):
            await exchange(daemon.url, beat("dead"))
            daemon.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)  # the standstill
            daemon.process.send_signal(signal.SIGCONT)
            async with asyncio.timeout(30):
                while (await daemon.operator("GET", DEAD))["status"] != "OFFLINE":
                    pass
        events = (await daemon.operator("GET", OFFLINE))["items"]
    assert [row["subject"] for row in events] == ["dead"] * 2
