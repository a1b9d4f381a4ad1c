"""Kept connections, and how connections end."""

import asyncio

import pytest
import receivers
from client import AMPLE, GRACE, SHORT, Stopwatch, send

pytestmark = pytest.mark.usefixtures("silence")


async def test_connections_are_kept_for_the_next_request(client_for):
    async with receivers.answers(body=b"fine") as receiver:
        client = client_for()
        for _ in range(5):
            assert (await send(client, receiver.url)).body == b"fine"
        assert (receiver.connections, len(receiver.requests)) == (1, 5)


@pytest.mark.parametrize("make", [receivers.closes_kept_alive, receivers.resets_kept_alive])
async def test_a_kept_connection_that_dies_is_replaced_within_the_attempt(client_for, make):
    async with make() as receiver:
        client = client_for()
        results = [(await send(client, receiver.url)).result for _ in range(5)]
        assert results == ["ok"] * 5
        assert len(receiver.requests) == 5


async def test_a_pool_full_of_dead_connections_fails_no_request(client_for):
    async with receivers.closes_kept_alive() as receiver:
        client = client_for()
        for _ in range(2):
            answers = await asyncio.gather(*(send(client, receiver.url) for _ in range(8)))
            assert [answer.result for answer in answers] == ["ok"] * 8


async def test_a_dead_connection_is_never_replaced_by_another_dead_one(client_for):
    async with receivers.closes_kept_alive() as receiver:
        client = client_for()
        await asyncio.gather(*(send(client, receiver.url) for _ in range(4)))
        assert [(await send(client, receiver.url)).result for _ in range(4)] == ["ok"] * 4


async def test_a_dead_connection_is_replaced_once_only(client_for):
    async with receivers.answers_once() as receiver:
        client = client_for()
        assert (await send(client, receiver.url)).result == "ok"
        assert (await send(client, receiver.url)).result == "protocol"
        assert receiver.connections == 2


async def test_a_response_that_has_begun_is_not_requested_again(client_for):
    async with receivers.breaks_off_kept_alive() as receiver:
        client = client_for()
        assert (await send(client, receiver.url)).result == "ok"
        assert (await send(client, receiver.url)).result == "protocol"
        assert (receiver.connections, len(receiver.requests)) == (1, 2)


async def test_the_replacement_shares_the_total_timeout(client_for):
    async with receivers.answers() as receiver:
        client = client_for(SHORT)
        await send(client, receiver.url)
        receiver.habit = receivers.hang().habit  # for the next connection
        for task in receiver._tasks:
            task.cancel()
        async with Stopwatch() as lasted:
            assert (await send(client, receiver.url)).result == "timeout"
            assert lasted.seconds < SHORT + GRACE


@pytest.mark.parametrize("make", [receivers.answers_before_reading, receivers.sends_more_than_its_length])
async def test_a_connection_in_an_unclear_state_is_not_reused(client_for, make):
    async with make() as receiver:
        client = client_for()
        first, second = [await send(client, receiver.url, body=bytes(4 * 2**20)) for _ in range(2)]
        assert first.result == second.result != "5xx"
        assert receiver.connections == 2


async def test_a_cancelled_send_closes_its_connection(client_for):
    async with receivers.hang() as receiver:
        client = client_for()
        sending = asyncio.create_task(send(client, receiver.url))
        async with asyncio.timeout(30):
            await receiver.until(requests=1)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            await receiver.ended.wait()
        assert not client._pooled._acquired


async def test_hanging_receivers_do_not_delay_others(client_for):
    async with receivers.hang() as hanging, receivers.answers() as healthy:
        waiting = [asyncio.create_task(send(client_for(), hanging.url)) for _ in range(20)]
        async with asyncio.timeout(0.8 * AMPLE):
            await hanging.until(requests=20)
            assert (await send(client_for(), healthy.url)).result == "ok"
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def test_a_client_closes_its_connections(client_for):
    async with receivers.answers() as receiver:
        client = client_for()
        await send(client, receiver.url)
        await client.close()
        await asyncio.wait_for(receiver.ended.wait(), 1)
