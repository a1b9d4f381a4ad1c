"""`relay.base.threads`: results, failures, and work that nobody waits for."""

import asyncio
import gc
import threading
import weakref
from contextlib import suppress

import pytest
from support import until

from relay.base.threads import in_thread


async def test_the_result_of_a_daemon_thread_is_returned():
    thread = await in_thread("worker", threading.current_thread)
    assert (thread.name, thread.daemon) == ("worker", True)
    assert await in_thread("sum", sum, (1, 2), 3) == 6


@pytest.mark.parametrize(
    ("error", "raised"),
    [(OSError, OSError), (TimeoutError, TimeoutError), (StopIteration, RuntimeError),
     (SystemExit, RuntimeError), (KeyboardInterrupt, RuntimeError), (asyncio.CancelledError, RuntimeError)],
)  # fmt: skip
async def test_a_failure_is_raised_and_does_not_end_the_event_loop(error, raised):
    def fail():
        raise error("why")

    with pytest.raises(raised, match="why") as found:
        await in_thread("fails", fail)
    assert found.type is raised
    assert raised is error or isinstance(found.value.__cause__, error)


async def test_a_cancelled_future_ignores_the_result(caplog):
    let_go = threading.Event()
    work = in_thread("slow", let_go.wait, 30)
    work.cancel()
    let_go.set()
    await until(lambda: "slow" not in {each.name for each in threading.enumerate()})
    await asyncio.sleep(0)
    assert work.cancelled()
    assert not caplog.records


def test_a_thread_may_outlive_its_event_loop(monkeypatch):
    let_go, failures = threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", failures.append)

    async def start():
        in_thread("outlives", let_go.wait, 30)

    asyncio.run(start())
    [thread] = [each for each in threading.enumerate() if each.name == "outlives"]
    let_go.set()
    thread.join(30)
    assert not failures


@pytest.mark.parametrize("error", [ValueError, SystemExit])
async def test_a_failure_keeps_no_argument_in_memory(error):
    class Body:
        pass

    def fail(_body):
        raise error

    body = Body()
    kept = weakref.ref(body)
    gc.disable()
    try:
        with suppress(ValueError, RuntimeError):
            await in_thread("fails", fail, body)
        del body
        await until(lambda: kept() is None, 10)
    finally:
        gc.enable()
