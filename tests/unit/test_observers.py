"""Plugins get the stored records, and nothing waits for them."""

import asyncio
import logging
import threading

import pytest
from stores import make_event
from support import FakeClock, until

from relay.metrics import Metrics
from relay.model import Attempt, Delivery, News, Outcome, StoredEvent
from relay.plugin_loading.observers import RECORD, Observers
from relay.plugin_loading.offered import Observer


class Hook:
    """A hook that records its arguments, once its gate is open."""

    def __init__(self, notes=None):
        self.notes = [] if notes is None else notes
        self.gate = threading.Event()
        self.gate.set()
        self.error = None

    def __call__(self, records):
        self.notes.append(
            [record.public_id if isinstance(record, StoredEvent) else record for record in records]
        )
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error


@pytest.fixture
async def observers():
    """Make running observers of one plugin, which are stopped at the end."""
    made, gates = [], []

    def make(room=1_000_000, **hooks):
        metrics = Metrics()
        observers = Observers(
            [Observer(plugin="audit", **hooks)], clock=FakeClock(), metrics=metrics, room=room
        )
        observers.failures = lambda: metrics.registry.get_sample_value(
            "relay_plugin_errors_total", {"plugin": "audit"}
        )
        observers.start()
        made.append(observers)
        gates.extend(hook.gate for hook in hooks.values())
        return observers

    yield make
    for gate in gates:
        gate.set()
    for each in made:
        await each.stop(10)


def event(name, size=0):
    return make_event(body=b"x" * size, data=b"{}", id=1, public_id=name)


def stored(*names, size=0):
    return News(events=[event(name, size) for name in names])


def outcome(*, attempt=True):
    delivery = Delivery(
        id=1, public_id="dlv", event_id=1, destination="crm", attempts=0, created_at=0, size=10
    )
    made = Attempt(started_at=0, duration_ms=1.0, result="ok") if attempt else None
    return Outcome(delivery=delivery, attempt=made, state="delivered")


async def test_records_that_arrive_while_a_hook_runs_are_passed_together_in_order(observers):
    hook = Hook()
    hook.gate.clear()
    each = observers(events_stored=hook)
    each.listen(stored("a"))
    await until(lambda: hook.notes)
    each.listen(stored("b"))
    each.listen(stored("c", "d"))
    hook.gate.set()
    await until(lambda: hook.notes == [["a"], ["b", "c", "d"]])
    assert each.failures() == 0


async def test_an_attempt_is_passed_after_its_event_and_never_concurrently(observers):
    notes = []
    first, second = Hook(notes), Hook(notes)
    first.gate.clear()
    each = observers(events_stored=first, attempts_recorded=second)
    made = outcome()
    each.listen(stored("a"))
    await until(lambda: notes)
    each.listen(News(outcomes=[made]))
    each.listen(stored("b"))
    assert notes == [["a"]]
    first.gate.set()
    await until(lambda: notes == [["a"], ["b"], [made]])


async def test_a_plugin_gets_only_the_records_of_its_hooks(observers):
    hook = Hook()
    each = observers(attempts_recorded=hook)
    made = outcome()
    each.listen(stored("a"))
    each.listen(News(outcomes=[outcome(attempt=False)]))  # it expired, nothing was attempted
    each.listen(News(woken={"crm"}))
    each.listen(News(outcomes=[outcome(attempt=False), made]))
    await each.stop(10)
    assert hook.notes == [[made]]


@pytest.mark.parametrize("error", [KeyError("nothing"), SystemExit(3)])
async def test_a_hook_that_raises_is_counted_and_called_again(observers, caplog, error):
    hook = Hook()
    hook.error = error
    each = observers(events_stored=hook)
    for count, name in enumerate("abc", 1):
        each.listen(stored(name))
        await until(lambda count=count: each.failures() == count)
    [record] = caplog.records
    assert (record.levelno, record.exc_info[1]) == (logging.ERROR, error)
    assert record.getMessage() == "plugin audit raised an exception in a hook"


async def test_the_queue_of_a_hanging_hook_is_bounded_in_bytes(observers, caplog):
    hook = Hook()
    hook.gate.clear()
    each = observers(room=3 * (RECORD + 100), events_stored=hook)
    each.listen(stored("a", size=100))
    await until(lambda: hook.notes)
    each.listen(stored("b", "c", size=100))
    each.listen(stored("d"))
    assert each.failures() == 1
    assert caplog.messages == ["plugin audit is too slow: 1 records were dropped"]
    hook.gate.set()
    await until(lambda: hook.notes == [["a"], ["b", "c"]])

    def told_again():
        each.listen(stored("e"))
        return hook.notes[2:]

    await until(told_again)


async def test_a_commit_larger_than_the_queue_is_passed_on(observers):
    hook = Hook()
    each = observers(room=1, events_stored=hook)
    each.listen(stored("a", "b"))
    await until(lambda: hook.notes == [["a", "b"]])
    assert each.failures() == 0


async def test_a_stop_passes_on_queued_records(observers, caplog):
    hook = Hook()
    hook.gate.clear()
    each = observers(events_stored=hook)
    each.listen(stored("a"))
    await until(lambda: hook.notes)
    each.listen(stored("b"))
    asyncio.get_running_loop().call_later(0.05, hook.gate.set)
    await each.stop(10)
    assert hook.notes == [["a"], ["b"]]
    assert caplog.messages == []


async def test_a_stop_abandons_a_hanging_hook_and_logs_it(observers, caplog):
    hook = Hook()
    hook.gate.clear()
    each = observers(events_stored=hook)
    each.listen(stored("a"))
    await until(lambda: hook.notes)
    each.listen(stored("b", "c"))
    began = asyncio.get_running_loop().time()
    await each.stop(0.05)
    assert asyncio.get_running_loop().time() - began < 5
    assert caplog.messages == ["plugin audit: 3 records were dropped at the stop"]
    hook.gate.set()
    await each.stop(10)
    assert hook.notes == [["a"]]


async def test_a_stop_without_observers_is_at_once():
    await Observers([], clock=FakeClock(), metrics=Metrics()).stop(0.0)
