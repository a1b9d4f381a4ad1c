"""A wait that is cancelled ends, even if the awaited thing happens at the same moment.

`asyncio.wait_for` of Python 3.11 returns instead, and the cancelled task continues.
"""

import asyncio
import signal
from types import SimpleNamespace

import pytest

from relay.api.stream import CountingFollower, Follower, Group
from relay.api.top import TopApi
from relay.delivery.owner import Owner
from relay.demo.cluster import Node
from relay.ingest.server import Server


async def nothing(*_):
    return None


def stream():
    follower = Follower(Group(None), 10, lambda: None, seam=None, pause=60)
    return follower.wait(60), lambda: follower.put(b"item")


def gathering():
    follower = Follower(Group(None), 10, lambda: None, seam=None, pause=60)
    return follower.gather(), follower.end


def counting_stream():
    follower = CountingFollower(Group(None), 10, lambda: None, seam=None, pause=60)
    return follower.wait(60), lambda: follower.group.count("events", None)


def shutdown():
    server = Server(nothing, implementation="aiohttp")
    server.under_way = 1
    return server.finish(60), server.idle.set


def figures_for_another_node():
    nodes = SimpleNamespace(handle=lambda *_: None, alone=True)
    metrics = SimpleNamespace(read=nothing)
    context = SimpleNamespace(
        clock=SimpleNamespace(steady=int), store=SimpleNamespace(nodes=nodes), metrics=metrics
    )
    api = TopApi(context)
    api._ticking = asyncio.get_running_loop().create_future()
    return api._show_here("node", None), api._computed.set


def end_of_a_process():
    node = object.__new__(Node)
    ended = asyncio.Event()
    node.process = SimpleNamespace(
        returncode=None, send_signal=lambda _: None, kill=ended.set, wait=ended.wait
    )
    return node.end(signal.SIGTERM), ended.set


def renewal_of_leases():
    owner = Owner(SimpleNamespace(lanes={}), SimpleNamespace(), set)
    owner._try_to_renew = nothing
    return owner._renew_for_ever(), owner.renew_soon


@pytest.mark.parametrize(
    "wait",
    [
        stream,
        gathering,
        counting_stream,
        shutdown,
        figures_for_another_node,
        end_of_a_process,
        renewal_of_leases,
    ],
)
async def test_a_cancelled_wait_ends_when_the_awaited_thing_happens_at_once(wait):
    coroutine, happen = wait()
    task = asyncio.create_task(coroutine)
    for _ in range(5):  # it waits now
        await asyncio.sleep(0)
    happen()
    task.cancel()
    done, _ = await asyncio.wait((task,), timeout=10)
    assert done
    assert task.cancelled()
