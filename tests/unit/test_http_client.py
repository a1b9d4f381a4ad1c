"""The client and misbehaving receivers: labelled results, in time, with flat memory and a silent log."""

import asyncio
import time
import tracemalloc

import pytest
import receivers
from aiohttp.abc import AbstractResolver
from client import AMPLE, GRACE, SHORT, Stopwatch, send

from relay.delivery.http.response import KEEP_LIMIT

pytestmark = pytest.mark.usefixtures("silence")


def name(value):
    """Return the name of a case: that of its receiver."""
    return getattr(value, "__name__", "")


ENDS = [
    # receiver, result, status, part of the error
    (receivers.hang, "timeout", None, "no response within 200ms"),
    (receivers.never_reads, "timeout", None, "no response within"),
    (receivers.hang_in_head, "timeout", None, "no response within"),
    (receivers.drip_head, "timeout", None, "no response within"),
    (receivers.hang_in_body, "ok", 200, "the body was incomplete after 200ms"),
    (receivers.drip_body, "5xx", 500, "the body was incomplete after"),
]


@pytest.mark.parametrize(("make", "result", "status", "error"), ENDS, ids=name)
async def test_a_stalling_receiver_ends_at_the_total_timeout(client_for, make, result, status, error):
    async with make() as receiver, Stopwatch() as watch:
        client, started = client_for(SHORT), time.perf_counter()
        answer = await send(client, receiver.url)
        lasted, ours = time.perf_counter() - started, watch.seconds
        assert (answer.result, answer.status) == (result, status)
        assert error in answer.error
        assert lasted > SHORT * 0.9  # uvloop's clock ticks in milliseconds
        assert ours < SHORT + GRACE
        assert SHORT * 900 < answer.duration_ms <= lasted * 1000


async def test_an_upload_that_the_receiver_does_not_read_ends_at_the_total_timeout(client_for):
    client = client_for(SHORT)
    async with receivers.never_reads() as receiver, Stopwatch() as lasted:
        answer = await send(client, receiver.url, body=bytes(32 * 2**20))
        assert answer.result == "timeout"
        assert lasted.seconds < SHORT + GRACE


async def test_a_hanging_connect_ends_at_the_connect_timeout(client_for, certificates):
    client = client_for(AMPLE, connect_timeout=SHORT, ca_file=certificates.ca)
    async with receivers.never_reads(scheme="https") as receiver, Stopwatch() as lasted:
        answer = await send(client, receiver.url)  # it accepts TCP and never responds to TLS
        assert (answer.result, answer.error) == ("timeout", "no connection to 127.0.0.1 within 200ms")
        assert lasted.seconds < SHORT + GRACE


class Cancelled(AbstractResolver):
    """A resolver whose look-up is cancelled by its own code."""

    async def resolve(self, host, port=0, family=0):
        raise asyncio.CancelledError

    async def close(self):
        """Nothing is open."""


async def test_a_cancellation_of_something_within_a_request_is_not_its_timeout(client_for):
    client = client_for(resolver=Cancelled())
    with pytest.raises(asyncio.CancelledError):
        await send(client, "http://receiver.example/")
    assert asyncio.current_task().cancelling() == 0


@pytest.mark.parametrize("earlier", [0, 1])
async def test_a_timeout_in_a_task_that_was_cancelled_before_is_a_timeout(client_for, earlier):
    """As with `asyncio.timeout`, only cancellations after the beginning of the request count."""
    async with receivers.hang() as receiver:
        task = asyncio.current_task()
        for _ in range(earlier):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(0)
        assert (await send(client_for(SHORT), receiver.url)).result == "timeout"
        assert task.cancelling() == earlier
        for _ in range(earlier):
            task.uncancel()


@pytest.mark.parametrize(
    "cancelled_after", [None, 0.75 * SHORT, 1.25 * SHORT], ids=["alone", "before the timeout", "after it"]
)
async def test_a_caller_that_cancels_a_request_is_obeyed_even_at_the_moment_of_its_timeout(
    client_for, cancelled_after
):
    """As with `asyncio.timeout`, which is no `TimeoutError` if the task was cancelled as well."""
    loop = asyncio.get_running_loop()
    async with receivers.hang() as receiver:
        client = client_for(AMPLE if cancelled_after is None else SHORT)
        sending = asyncio.create_task(send(client, receiver.url))
        if cancelled_after is None:
            await receiver.until(requests=1)
            sending.cancel()
        else:  # the loop is blocked until both are due, and runs both before the task continues
            loop.call_later(cancelled_after, sending.cancel)
            loop.call_later(SHORT / 2, time.sleep, SHORT)
        await asyncio.wait([sending])
        assert sending.cancelled()
        assert sending.cancelling() == 1


TOO_MUCH = [
    # receiver, result, status, part of the error
    (receivers.endless_headers, "ok", 200, "the response is too large"),
    (receivers.informational_flood, "protocol", None, "the response is too large"),
    (receivers.many_headers, "ok", 200, "the response is too large"),
    (receivers.huge_header, "ok", 200, "the response is too large"),
    (receivers.huge_status_line, "protocol", None, "more than 8190 bytes"),
    (receivers.huge_body, "ok", 200, None),
    (receivers.endless_chunks, "ok", 200, None),
    (receivers.endless_chunk_extension, "ok", 200, "the response is too large"),
    (receivers.endless_trailers, "ok", 200, "the response is too large"),
    (receivers.gzip_bomb, "ok", 200, None),
]


@pytest.mark.parametrize(("make", "result", "status", "error"), TOO_MUCH, ids=name)
async def test_a_receiver_that_sends_too_much_costs_neither_time_nor_memory(
    client_for, make, result, status, error
):
    async with make() as receiver:
        client = client_for()
        await send(client, receiver.url)  # fills caches, so that they are not counted
        before_sent = receiver.sent
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            answer = await send(client, receiver.url)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert (answer.result, answer.status, answer.truncated) == (result, status, result == "ok")
        assert error is answer.error is None or error in answer.error
        assert len(answer.body) <= KEEP_LIMIT
        assert peak - before < 2**20
        assert answer.duration_ms < 2000
        assert receiver.sent - before_sent < 30 * 2**20  # mostly socket buffers of loopback


@pytest.mark.parametrize("nonsense", receivers.NONSENSE)
async def test_bytes_that_are_not_a_response_are_a_protocol_failure(client_for, nonsense):
    async with receivers.sends(answer=receivers.NONSENSE[nonsense]) as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.result == "protocol"
        assert answer.error.isprintable()
        assert 10 < len(answer.error) <= 300
        assert len(receiver.requests) == 1


@pytest.mark.parametrize("broken", receivers.BROKEN_BODIES)
async def test_a_2xx_stays_a_success_when_the_body_breaks_off(client_for, broken):
    async with receivers.breaks_its_body(answer=receivers.BROKEN_BODIES[broken]) as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status, answer.truncated) == ("ok", 200, True)
        assert answer.error.startswith("HTTP 200 OK; ")
        assert answer.duration_ms < 1000


@pytest.mark.parametrize(
    ("make", "result", "error"),
    [
        (receivers.closes_unanswered, "protocol", "closed the connection without a response"),
        (receivers.resets, "connect", "Connection reset by peer"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_a_new_connection_that_dies_is_a_failure_without_a_second_try(
    client_for, make, result, error, method
):
    async with make() as receiver:
        answer = await send(client_for(method=method), receiver.url)
        assert (answer.result, answer.status) == (result, None)
        assert error in answer.error
        assert receiver.connections == 1


async def test_a_connection_closed_before_the_request_is_a_failure_without_a_second_try(client_for):
    async with receivers.closes_at_once() as receiver:
        answer = await send(client_for(), receiver.url)
        assert answer.result in (
            "connect",
            "protocol",
        )  # depends on whether the write or the read fails first
        assert receiver.connections == 1


async def test_a_2xx_before_a_reset_stays_a_success(client_for):
    async with receivers.resets_in_body() as receiver:
        answer = await send(client_for(), receiver.url)
        assert (answer.result, answer.status, answer.body, answer.truncated) == ("ok", 200, b"begun", True)


async def test_a_closed_port_is_a_connect_failure(client_for):
    answer = await send(client_for(), f"http://127.0.0.1:{receivers.unused_port()}/")
    assert (answer.result, answer.status) == ("connect", None)
    assert answer.error.endswith("Connection refused")
