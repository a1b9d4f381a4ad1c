"""Lanes and config changes: new, changed, removed and returning destinations; attempts in flight."""

import asyncio
import logging

import msgspec
import pytest
from lanes import CLOCK, Receiver, destination, dispatcher_for, ended, route, send, send_many
from stores import hooks
from support import until

from relay.base.clock import SECOND
from relay.base.units import Rate
from relay.config.schema import CircuitConfig, RetryConfig
from relay.config.secrets import Secret, Url
from relay.errors import RelayError
from relay.model import DestinationState

LASTING = CircuitConfig(failures=3, probe=3600.0, max_probe=3600.0)
LATER = RetryConfig(schedule=(3600.0,) * 9)


@pytest.fixture
async def other():
    """Another receiver."""
    async with Receiver().serve() as other:
        yield other


async def change(dispatcher, store, *destinations):
    """Apply other destinations, as a reload does."""
    plan = await dispatcher.plan({config.name: config for config in destinations})
    hooks(store).route = route(destinations)
    dispatcher.adopt(plan)


async def unaccounted(store):
    return {name: counts.unaccounted for name, counts in (await store.ledger.audit()).items()}


async def test_an_unchanged_destination_keeps_lane_circuit_and_bucket(store, receiver):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, concurrency=1, circuit=LASTING, rate_limit=Rate(100, 1))
    async with dispatcher_for(store, crm) as dispatcher:
        await send_many(store, 5)
        await until(lambda: dispatcher.lanes["crm"].held == "circuit open")
        lane = dispatcher.lanes["crm"]
        kept = lane._rate, lane._runner, lane.health.circuit
        await change(dispatcher, store, msgspec.structs.replace(crm))
        assert dispatcher.lanes == {"crm": lane}
        assert (lane._rate, lane._runner, lane.health.circuit) == kept
        assert lane.held == "circuit open"


async def test_a_destination_that_the_config_pauses_is_held_until_a_reload(store, receiver):
    crm = destination("crm", receiver.url, paused=True)
    async with dispatcher_for(store, crm) as dispatcher:
        lane = dispatcher.lanes["crm"]
        sent = await send(store)
        assert (lane.held, lane.health.paused_by) == ("paused in config.toml", "config")
        await lane.set_state(DestinationState(name="crm"))  # resuming does not help
        assert (lane.held, lane.health.paused_by) == ("paused in config.toml", "config")
        await change(dispatcher, store, msgspec.structs.replace(crm, paused=False))
        assert (await ended(store))[0]["attempts"] == 1
        assert (lane.held, receiver.ids) == (None, [sent])
        await change(dispatcher, store, crm)
        await send(store)
        assert lane.held == "paused in config.toml"
        assert len(await store.queries.find("deliveries", limit=9, state="pending")) == 1


async def test_a_changed_url_is_used_at_once_while_an_attempt_hangs_at_the_old_one(store, receiver, other):
    receiver.gate.clear()
    crm = destination("crm", receiver.url, concurrency=2)
    async with dispatcher_for(store, crm) as dispatcher:
        first = await send(store)
        await until(lambda: receiver.busy == 1)
        await change(dispatcher, store, msgspec.structs.replace(crm, url=Url(other.url)))
        second = await send(store)
        await until(lambda: other.ids == [second])
        receiver.gate.set()
        rows = await ended(store, 2)
        await until(lambda: not dispatcher.lanes["crm"]._replaced)
    assert receiver.ids == [first]
    assert {row["state"] for row in rows} == {"delivered"}
    assert await unaccounted(store) == {"crm": 0}


@pytest.mark.parametrize("answer", [(410, {}), (500, {"webhook-delivery": "disable"})])
async def test_a_410_of_the_former_url_disables_nothing(store, receiver, other, answer):
    receiver.gate.clear()
    receiver.usual = answer
    crm = destination("crm", receiver.url)
    async with dispatcher_for(store, crm) as dispatcher:
        event = await send(store)
        await until(lambda: receiver.busy == 1)
        await change(dispatcher, store, msgspec.structs.replace(crm, url=Url(other.url)))
        receiver.gate.set()
        [row] = await ended(store)
        assert dispatcher.lanes["crm"].held is None
    assert (other.ids, row["state"], row["attempts"]) == ([event], "delivered", 1)
    assert (await store.queries.destination_states()).get("crm") is None


async def test_an_attempt_that_fails_at_the_former_url_is_retried_at_the_new_one(store, receiver, other):
    receiver.gate.clear()
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url)
    async with dispatcher_for(store, crm) as dispatcher:
        event = await send(store)
        await until(lambda: receiver.busy == 1)
        await change(dispatcher, store, msgspec.structs.replace(crm, url=Url(other.url)))
        receiver.gate.set()
        [row] = await ended(store)
    assert (receiver.ids, other.ids) == ([event], [event])
    assert (row["state"], row["attempts"]) == ("delivered", 2)


async def test_a_failed_probe_of_the_former_url_does_not_count_and_is_due_at_once(store, receiver, other):
    receiver.usual = (500, {})
    probing = CircuitConfig(failures=1, probe=0.05, max_probe=0.05)
    crm = destination("crm", receiver.url, circuit=probing, retry=LATER)
    async with dispatcher_for(store, crm) as dispatcher:
        first = await send(store)
        await until(lambda: dispatcher.lanes["crm"].health.circuit.is_open)
        receiver.gate.clear()
        second = await send(store)
        await until(lambda: receiver.busy == 1)
        assert receiver.ids[-1] == second
        await change(dispatcher, store, msgspec.structs.replace(crm, url=Url(other.url)))
        receiver.gate.set()
        [row] = await ended(store)
        assert (row["event_id"], row["attempts"]) == (second, 1)
        assert first not in other.ids


async def test_a_changed_dead_destination_is_probed_at_once_and_ramps_up(store, receiver, other):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, circuit=LASTING, retry=LATER, concurrency=4)
    async with dispatcher_for(store, crm) as dispatcher:
        await send_many(store, 4)
        await until(lambda: dispatcher.lanes["crm"].held == "circuit open")
        waiting = await send_many(store, 10)
        assert dispatcher.lanes["crm"].health.state.failing_since is not None
        await change(dispatcher, store, msgspec.structs.replace(crm, url=Url(other.url)))
        await ended(store, 10)
        assert sorted(other.ids) == sorted(waiting)
        assert dispatcher.lanes["crm"].health.state.failing_since is None
        assert other.most_busy <= 4
    assert (await store.queries.destination_states())["crm"].failing_since is None


async def test_the_time_of_failing_restarts_with_a_change(store, receiver, other):
    receiver.usual = other.usual = (500, {})
    crm = destination("crm", receiver.url, retry=LATER)
    async with dispatcher_for(store, crm) as dispatcher:
        await send(store)
        await until(lambda: dispatcher.lanes["crm"].health.state.failing_since is not None)
        await until(lambda: not dispatcher.lanes["crm"].in_flight)
        moment = CLOCK.steady()
        await change(dispatcher, store, msgspec.structs.replace(crm, url=Url(other.url)))
        await send(store)
        await until(lambda: len(other.ids) == 1)
        await until(lambda: not dispatcher.lanes["crm"].in_flight)
    assert (await store.queries.destination_states())["crm"].failing_since > moment


async def test_a_removed_destination_shows_no_open_circuit(store, receiver):
    receiver.usual = (500, {})
    crm = destination("crm", receiver.url, circuit=LASTING, retry=LATER)
    async with dispatcher_for(store, crm) as dispatcher:
        await send_many(store, 4)
        await until(lambda: dispatcher.lanes["crm"].held == "circuit open")
        shown = dispatcher.lanes["crm"].health._metrics.registry.get_sample_value
        circuit = ("relay_destination_circuit_open", {"destination": "crm"})
        assert shown(*circuit) == 1
        await change(dispatcher, store)
        assert shown(*circuit) == 0
        assert dispatcher.lanes == {}


async def test_a_refused_address_is_dialled_at_once_when_a_change_permits_it(store, receiver):
    crm = destination("crm", receiver.url, allow_private=False)
    async with dispatcher_for(store, crm) as dispatcher:
        await send(store)
        await until(lambda: dispatcher.lanes["crm"].held == "resting")
        await change(dispatcher, store, msgspec.structs.replace(crm, allow_private=True))
        fresh = await send(store)
        await until(lambda: receiver.ids == [fresh])  # the refused one waits for its own retry


async def test_a_new_secret_signs_later_attempts(store, receiver):
    crm = destination("crm", receiver.url)
    async with dispatcher_for(store, crm) as dispatcher:
        await send(store)
        await ended(store)
        rotated = (Secret("whsec_bm90IGEgc2VjcmV0LCBmb3IgZGV2ZWxvcG1lbnQ="), *crm.secrets)
        await change(dispatcher, store, msgspec.structs.replace(crm, secrets=rotated))
        await send(store)
        await ended(store, 2)
    signatures = [headers["webhook-signature"].split() for headers, _ in receiver.requests]
    assert [len(each) for each in signatures] == [1, 2]


async def test_concurrency_and_rate_limit_change_with_the_config(store, receiver):
    receiver.gate.clear()
    crm = destination("crm", receiver.url, concurrency=1)
    async with dispatcher_for(store, crm) as dispatcher:
        await send_many(store, 8)
        await until(lambda: receiver.busy == 1)
        await change(dispatcher, store, msgspec.structs.replace(crm, concurrency=4))
        await until(lambda: receiver.busy == 4)
        receiver.gate.set()
        await ended(store, 8)
        limited = msgspec.structs.replace(crm, concurrency=4, rate_limit=Rate(1, 3600))
        await change(dispatcher, store, limited)
        await send_many(store, 2)
        await ended(store, 9)
        await until(lambda: not dispatcher.lanes["crm"].in_flight)
        assert len(receiver.requests) == 9
        await change(dispatcher, store, msgspec.structs.replace(limited, rate_limit=None))
        await ended(store, 10)


async def test_a_pause_survives_a_change(store, receiver, other):
    crm = destination("crm", receiver.url)
    async with dispatcher_for(store, crm) as dispatcher:
        lane = dispatcher.lanes["crm"]
        await lane.set_state(msgspec.structs.replace(lane.health.state, paused=True))
        await send(store)
        await change(dispatcher, store, msgspec.structs.replace(crm, url=Url(other.url)))
        assert dispatcher.lanes["crm"].held == "paused"
        await lane.set_state(msgspec.structs.replace(lane.health.state, paused=False))
        await ended(store)
    assert (len(receiver.ids), len(other.ids)) == (0, 1)


async def test_a_new_destination_gets_no_past_events(store, receiver, other):
    crm = destination("crm", receiver.url)
    async with dispatcher_for(store, crm) as dispatcher:
        await send_many(store, 3)
        await ended(store, 3)
        await change(dispatcher, store, crm, destination("audit", other.url))
        fresh = await send(store)
        await ended(store, 1, destination="audit")
    assert other.ids == [fresh]


async def test_a_removed_destination_keeps_its_deliveries_and_gets_them_when_it_returns(
    store, receiver, other
):
    other.usual = (500, {})
    crm, gone = destination("crm", receiver.url), destination("gone", other.url, retry=LATER)
    async with dispatcher_for(store, crm, gone) as dispatcher:
        owed = await send_many(store, 5)
        await until(lambda: len(other.ids) == 5)
        lane = dispatcher.lanes["gone"]
        await lane.set_state(msgspec.structs.replace(lane.health.state, paused=True))
        owed += await send_many(store, 5)
        await lane.set_state(msgspec.structs.replace(lane.health.state, paused=False))
        await change(dispatcher, store, crm)
        await send_many(store, 2)
        await ended(store, 12, destination="crm")
        assert (await store.ledger.audit())["gone"].pending == 10
        other.usual = (200, {})
        await store.deliveries.make_due(
            [row["row"] for row in await store.queries.find("deliveries", destination="gone")]
        )
        await change(dispatcher, store, crm, gone)
        await ended(store, 10, destination="gone")
    assert set(other.ids) == set(owed)
    assert await unaccounted(store) == {"crm": 0, "gone": 0}


async def test_an_attempt_at_a_removed_destination_is_not_repeated_when_it_returns(store, receiver, other):
    other.gate.clear()
    crm, gone = destination("crm", receiver.url), destination("gone", other.url)
    async with dispatcher_for(store, crm, gone) as dispatcher:
        event = await send(store)
        await until(lambda: other.busy == 1)
        await change(dispatcher, store, crm)
        assert dispatcher.in_flight("gone") == 1
        await change(dispatcher, store, crm, gone)
        assert dispatcher.in_flight("gone") == 1
        other.gate.set()
        await ended(store, 1, destination="gone")
        await until(lambda: dispatcher.in_flight("gone") == 0)
    assert other.ids == [event]


async def test_an_attempt_that_fails_at_a_removed_destination_is_retried_when_it_returns(
    store, receiver, other
):
    other.gate.clear()
    other.answers.append((410, {}))
    crm, gone = destination("crm", receiver.url), destination("gone", other.url)
    async with dispatcher_for(store, crm, gone) as dispatcher:
        event = await send(store)
        await until(lambda: other.busy == 1)
        await change(dispatcher, store, crm)
        await change(dispatcher, store, crm, gone)
        other.gate.set()
        await ended(store, 1, destination="gone")
        assert dispatcher.lanes["gone"].held is None
    assert other.ids == [event, event]
    assert await store.queries.destination_states() == {}


async def test_a_stop_ends_removed_lanes_and_replaced_runners(store, receiver, other, caplog):
    for each in (receiver, other):
        each.gate.clear()
    crm, gone = destination("crm", receiver.url), destination("gone", other.url)
    async with dispatcher_for(store, crm, gone) as dispatcher:
        await send(store)
        await until(lambda: receiver.busy == other.busy == 1)
        await change(dispatcher, store, msgspec.structs.replace(crm, timeout=9.0))
        await dispatcher.stop(0.0)
        assert dispatcher.in_flight("crm") == dispatcher.in_flight("gone") == 0
        assert not [task for task in asyncio.all_tasks() if "Lane" in repr(task.get_coro())]
    cut_off = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(line.partition(":")[0] for line in cut_off) == ["crm", "gone"]


async def test_renewed_certificates_get_a_new_client_and_change_nothing_else(store, receiver, certificates):
    crm = destination("crm", receiver.url, ca_file=certificates.ca)
    async with dispatcher_for(store, crm) as dispatcher:
        lane = dispatcher.lanes["crm"]
        sender, circuit = lane._runner, lane.health.circuit
        lane.health.rest(60 * SECOND)
        await change(dispatcher, store, crm)
        assert lane._runner is not sender
        assert (lane.health.circuit, lane.held) == (circuit, "resting")


async def test_a_failed_plan_leaves_nothing_open_and_changes_nothing(store, receiver, tmp_path):
    broken = tmp_path / "ca.pem"
    broken.write_text("no certificate")
    crm = destination("crm", receiver.url)
    async with dispatcher_for(store, crm) as dispatcher:
        before = dict(dispatcher.lanes)
        audit = destination("audit", receiver.url)
        with pytest.raises(RelayError, match=r"ca\.pem cannot be used"):
            await change(dispatcher, store, audit, destination("tls", receiver.url, ca_file=broken))
        assert dispatcher.lanes == before
        await send(store)
        await ended(store)
