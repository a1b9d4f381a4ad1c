"""Long work over the admin API: lines of progress, results, errors and disconnects."""

import asyncio
import json
from contextlib import suppress

import pytest
from daemons import SOURCES, running, write_config
from support import until
from wire import Wire, exchange, request

from relay.api import responses
from relay.errors import RelayError
from relay.jobs.scheduler import Past

PATH = "/api/jobs/slow/run"


class Work:
    """A job that the test controls."""

    def __init__(self):
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.cancelled = False

    async def __call__(self):
        self.begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@pytest.fixture
async def relay(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        yield relay


@pytest.fixture
def work(relay, monkeypatch):
    monkeypatch.setattr(responses, "EVERY", 0.01)
    work = Work()
    relay.app.jobs.add("slow", 3600, work)
    return work


@pytest.fixture
async def lines(relay, work):
    """Start the job and read its lines."""
    async with Wire(*await asyncio.open_unix_connection(relay.addresses.socket)) as wire:
        await wire.send(request("POST", PATH))
        head = await wire.reader.readuntil(b"\r\n\r\n")
        assert b"Content-Type: application/x-ndjson" in head

        chunks = wire.chunks()

        async def line():
            return json.loads(await anext(chunks))

        line.wire = wire
        yield line


async def test_progress_is_sent_until_the_work_is_done(work, lines):
    assert await lines() == {"progress": {}}
    work.go_on.set()
    while "progress" in (last := await lines()):
        pass
    assert (last["result"]["name"], last["result"]["runs"], last["result"]["error"]) == ("slow", 1, None)


async def test_fast_work_is_answered_with_one_line(relay, work):
    work.go_on.set()
    answer = await exchange(relay.addresses.socket, request("POST", PATH))
    assert (answer.status, answer.headers["content-type"].partition(";")[0]) == (200, responses.LINES)
    assert json.loads(answer.body)["result"]["runs"] == 1


async def test_a_disconnect_cancels_the_work(relay, work, lines):
    await lines()
    await lines.wire.hang_up()
    await until(lambda: work.cancelled)
    [slow] = [past for past in relay.app.jobs.all() if past.name == "slow"]
    await until(lambda: slow.error == "cancelled")


async def test_a_late_failure_is_the_last_line(relay, work, lines, monkeypatch):
    async def fail(_name):
        raise RelayError("it broke", hint="mend it")

    async def run(name) -> Past:
        await work()
        return await fail(name)

    monkeypatch.setattr(relay.app.jobs, "run", run)
    async with Wire(*await asyncio.open_unix_connection(relay.addresses.socket)) as wire:
        await wire.send(request("POST", PATH))
        await wire.reader.readuntil(b"\r\n\r\n")
        work.go_on.set()
        *_, last = [chunk async for chunk in wire.chunks()]
    assert json.loads(last) == {"error": {"code": "bad_request", "message": "it broke", "hint": "mend it"}}


async def test_an_immediate_failure_is_an_ordinary_error(relay):
    answer = await exchange(relay.addresses.socket, request("POST", "/api/jobs/swep/run"))
    assert (answer.status, answer.json["error"]["code"]) == (404, "not_found")
    assert answer.json["error"]["message"] == 'unknown job "swep", did you mean "sweep"?'


async def test_a_bug_is_answered_with_500_and_its_traceback_logged(relay, work, monkeypatch, caplog):
    async def run(_name):
        raise ZeroDivisionError

    monkeypatch.setattr(relay.app.jobs, "run", run)
    answer = await exchange(relay.addresses.socket, request("POST", PATH))
    assert (answer.status, answer.json["error"]["code"]) == (500, "internal_error")
    [record] = [record for record in caplog.records if record.name == "relay.api"]
    assert record.exc_info[0] is ZeroDivisionError


async def test_a_bug_after_the_first_line_cuts_the_response_off(relay, work, lines, monkeypatch, caplog):
    def fail(_name):
        raise ZeroDivisionError

    assert await lines() == {"progress": {}}
    monkeypatch.setattr(relay.app.jobs, "next_run", fail)
    work.go_on.set()
    rest = b""
    with suppress(ConnectionError):
        rest = await lines.wire.reader.read()
    assert b"HTTP/1.1" not in rest
    assert not rest.endswith(b"0\r\n\r\n")
    await until(
        lambda: any(
            "failed after the response had started" in record.getMessage() for record in caplog.records
        )
    )


async def test_a_stop_of_the_daemon_cancels_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(responses, "EVERY", 0.01)
    work = Work()
    async with running(write_config(tmp_path, SOURCES)) as relay:
        relay.app.jobs.add("slow", 3600, work)
        wire = await Wire.open(relay.addresses.socket)
        await wire.send(request("POST", PATH))
        await work.begun.wait()
    assert work.cancelled
    with suppress(ConnectionError):
        await wire.hang_up()
