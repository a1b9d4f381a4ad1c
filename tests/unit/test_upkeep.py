"""The pass of each minute, with a real store and real lanes: holds, expiry and log lines."""

import logging

import pytest
from stores import accept, hooks, make_store

from relay.config.schema import DestinationConfig, Retention
from relay.config.secrets import Url
from relay.delivery.dispatcher import Dispatcher
from relay.jobs.retention import Upkeep
from relay.metrics import Metrics
from relay.model import DestinationState, Target
from relay.store.retention_policy import Policy

DAY = 86_400.0
DESTINATIONS = {
    name: DestinationConfig(name=name, url=Url("http://127.0.0.1:9/")) for name in ("paused", "dead", "well")
}


@pytest.fixture
async def store(tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    yield store
    for name, books in (await store.ledger.audit()).items():
        assert books.unaccounted == 0, name
    await store.close()


@pytest.fixture
async def dispatcher(store, clock):
    """Lanes of which one is paused and one waits for an answer to its probe."""
    dispatcher = Dispatcher(DESTINATIONS, store=store, clock=clock, metrics=Metrics({}, DESTINATIONS))
    await dispatcher.start()
    await dispatcher.lanes["paused"].set_state(DestinationState(name="paused", paused=True))
    circuit = dispatcher.lanes["dead"].health.circuit
    while not circuit.is_open:
        circuit.record("connect", clock.steady(), circuit.openings)
    yield dispatcher
    await dispatcher.stop(0)


async def send(store, clock, *names):
    hooks(store).route = lambda event: () if event.source == "relay" else tuple(map(Target, names))
    await store.events.append(accept(clock, subject=None))


async def test_held_deliveries_expire_even_with_a_probe_or_without_a_destination(
    store, dispatcher, clock, caplog
):
    for _ in range(2):
        await send(store, clock, "paused", "dead", "well", "not in the config")
    upkeep = Upkeep(store, dispatcher, Policy(Retention()))
    await upkeep.run()
    clock.advance(30 * DAY)
    assert dispatcher.lanes["dead"].held is None  # its probe is due
    caplog.clear()
    await upkeep.run()
    found = {(row["destination"], row["state"]) for row in await store.queries.find("deliveries")}
    expired = {(name, "expired") for name in ("paused", "dead", "not in the config")}
    assert found == {*expired, ("well", "pending")}
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        "6 deliveries expired: held longer than [retention] held"
    ]


async def test_the_retention_job_logs_only_if_it_deleted_something(store, dispatcher, clock, caplog):
    caplog.set_level(logging.INFO, "relay.upkeep")
    await send(store, clock)
    upkeep = Upkeep(store, dispatcher, Policy(Retention()))
    await upkeep.run()
    assert caplog.messages == []
    clock.advance(14 * DAY)
    await upkeep.run()
    [line] = caplog.messages
    assert line.startswith("retention: deleted 1 events and 0 attempts, freed 0 pages in ")
