"""An event's life in the log of a real daemon: refused, accepted, tried, delivered, linked by ids."""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import sys

import pytest
from daemons import SERVE, SOURCES, Daemon, adorn, destination, running, write_config
from stores import only_sqlite
from support import until
from wire import Wire, exchange, request

PATH = "/internal/event/notify"
SECRET = "s3cret-in-the-body"
BODY = json.dumps({"event_type": "member_joined", "discord_id": "1", "metadata": {"note": SECRET}}).encode()


def configured(folder, recorder, level, more=""):
    config = write_config(folder, SOURCES, destination("crm", f"{recorder.url}?key=s3cret-in-the-url", more))
    config.write_text(config.read_text().replace("[log]", f'[log]\nlevel = "{level}"'))
    return config


def lines(daemon):
    return [json.loads(line) for line in daemon.lines]


def of(daemon, logger, text):
    return [line for line in lines(daemon) if line["logger"] == logger and text in line["message"]]


async def notify(daemon, body=BODY, token="dev-token", **headers):
    fields = {"authorization": f"Bearer {token}", **headers}
    return await exchange(daemon.url, request("POST", f"{PATH}?token=s3cret-in-the-query", body, **fields))


async def test_at_debug_every_step_of_an_event_logs_a_line_with_its_ids(tmp_path, recorder):
    recorder.answers.append((503, {}))
    async with Daemon(configured(tmp_path, recorder, "debug")) as daemon:
        assert (await notify(daemon, token="guessed-token")).status == 403
        assert (await notify(daemon, x_request_id="caller-42.a_b")).status == 200
        await until(lambda: of(daemon, "relay.delivery", "succeeded"))
        assert await daemon.stop() == 0
    [refused] = of(daemon, "relay.ingest", "refused with 403")
    [accepted] = of(daemon, "relay.ingest", "moddy: accepted")
    [failed] = of(daemon, "relay.delivery", "crm: attempt 1 failed")
    [delivered] = of(daemon, "relay.delivery", "crm: attempt 2 succeeded")
    assert refused["request_id"].startswith("req_")
    assert (refused["source"], refused["status"], refused["reason"]) == ("moddy", 403, "auth")
    assert "event_id" not in refused
    assert accepted["request_id"] == failed["request_id"] == "caller-42.a_b"
    assert accepted["event_id"] == failed["event_id"] == delivered["event_id"] == recorder.ids[0]
    assert accepted["type"] == "moddy.member_joined"
    assert accepted["status"] == 200
    assert accepted["duration_ms"] >= 0
    assert failed["delivery_id"] == delivered["delivery_id"]
    assert (failed["level"], failed["destination"], failed["attempt"]) == ("info", "crm", 1)
    assert (failed["result"], failed["status"]) == ("5xx", 503)
    assert (delivered["level"], delivered["attempt"], delivered["status"]) == ("debug", 2, 200)
    assert delivered["duration_ms"] > 0
    assert {line["logger"].partition(".")[0] for line in lines(daemon)} <= {"relay", "asyncio"}
    for secret in ("s3cret", "dev-token", "guessed-token"):
        assert secret not in daemon.output


async def test_at_info_successful_steps_log_nothing(tmp_path, recorder):
    recorder.answers.append((503, {}))
    config = configured(tmp_path, recorder, "info")
    async with Daemon(config) as daemon:
        await notify(daemon, x_request_id="caller-42")
        await notify(daemon)
        await until(lambda: len(recorder.ids) == 3)
        assert await daemon.stop() == 0
    [failed] = of(daemon, "relay.delivery", "")
    assert failed["event_id"] in recorder.ids
    assert of(daemon, "relay.ingest", "accepted") == []


async def test_a_failed_delivery_and_an_open_circuit_log_a_line(tmp_path, recorder):
    more = "circuit = { failures = 2 }"
    recorder.answers += [(503, {}), (500, {}), (500, {"webhook-delivery": "abort-message"})]
    async with Daemon(configured(tmp_path, recorder, "info", more)) as daemon:
        await notify(daemon)
        [opened] = await until(lambda: of(daemon, "relay.delivery", "circuit opened"))
        assert (opened["destination"], opened["level"]) == ("crm", "warning")
        assert (await exchange_operator(daemon, "pause")).status == 200
        assert (await exchange_operator(daemon, "resume")).status == 200
        [dead] = await until(lambda: of(daemon, "relay.delivery", "is dead"))
        assert await daemon.stop() == 0
    assert (dead["state"], dead["reason"], dead["destination"]) == ("dead", "aborted", "crm")
    assert dead["event_id"] == opened["event_id"] == recorder.ids[0]
    assert [line["message"] for line in of(daemon, "relay.delivery", "by an operator")] == [
        "crm: paused by an operator",
        "crm: resumed by an operator",
    ]


async def exchange_operator(daemon, verb, **headers):
    socket = daemon.config.parent / "state" / "relay.sock"
    return await exchange(socket, request("POST", f"/api/destinations/crm/{verb}", **headers))


async def test_a_change_of_an_operator_has_its_request_id_in_response_and_log(tmp_path, recorder):
    async with Daemon(configured(tmp_path, recorder, "info")) as daemon:
        made = await exchange_operator(daemon, "pause")
        given = await exchange_operator(daemon, "resume", x_request_id="ticket-7")
        strange = await exchange_operator(daemon, "pause", x_request_id="a b")
        unknown = await exchange_operator(daemon, "resum")
        assert await daemon.stop() == 0
    logged = [line["request_id"] for line in of(daemon, "relay.audit", "/api/destinations/crm/")]
    shown = [answer.headers["x-request-id"] for answer in (made, given, strange, unknown)]
    assert logged == shown
    assert shown[1] == "ticket-7"
    assert all(id_.startswith("req_") for id_ in (shown[0], shown[2], shown[3]))


async def test_senders_get_no_header_that_their_contract_does_not_have(tmp_path, recorder):
    async with running(configured(tmp_path, recorder, "info")) as relay:
        fields = {"authorization": "Bearer dev-token", "x_request_id": "caller-42"}
        answer = await relay.exchange(request("POST", PATH, BODY, **fields))
    assert sorted(answer.headers) == ["content-length", "content-type", "date"]


@pytest.mark.parametrize("given", ["a b", "x" * 129, "é", "a;b"])
async def test_an_invalid_request_id_is_replaced(tmp_path, recorder, given):
    async with Daemon(configured(tmp_path, recorder, "debug")) as daemon:
        await notify(daemon, x_request_id=given)
        [accepted] = await until(lambda: of(daemon, "relay.ingest", "accepted"))
        assert accepted["request_id"].startswith("req_")
        assert await daemon.stop() == 0


async def test_a_repetition_and_a_heartbeat_log_an_accepted_line(tmp_path, recorder):
    async with Daemon(configured(tmp_path, recorder, "debug")) as daemon:
        for number in range(2):
            await notify(daemon, idempotency_key="k", x_request_id=f"r{number}")
        body = b'{"worker_id": "w\\nforged", "worker_endpoint": "http://w"}'
        token = {"authorization": "Bearer worker-secret-token-12345"}
        answer = await exchange(daemon.url, request("POST", "/api/v1/workers/register", body, **token))
        assert await daemon.stop() == 0
    [first] = [line for line in of(daemon, "relay.ingest", "") if line["message"] == "moddy: accepted"]
    [again] = of(daemon, "relay.ingest", "moddy: accepted again")
    assert first["event_id"] == again["event_id"]
    assert (first["request_id"], again["request_id"]) == ("r0", "r1")
    logged = of(daemon, "relay.ingest", "whatsapp: ")
    assert [line["status"] for line in logged] == [answer.status]


async def test_deliveries_dead_at_creation_are_logged_at_a_limited_rate(tmp_path, recorder):
    async with Daemon(configured(tmp_path, recorder, "info", "max_pending = 1")) as daemon:
        await exchange_operator(daemon, "pause")
        for _ in range(3):
            await notify(daemon)
        [line] = await until(lambda: of(daemon, "relay.delivery", "are dead without an attempt"))
        assert (line["destination"], line["state"], line["count"]) == ("crm", "dead", 1)
        assert await daemon.stop() == 0


@pytest.mark.parametrize("kind", ["pipe", "pipe that never waits", "terminal"])
async def test_a_log_without_a_reader_delays_no_sender_and_lost_lines_are_counted(tmp_path, kind):
    config = write_config(tmp_path, SOURCES)
    config.write_text(config.read_text().replace("[log]", '[log]\nlevel = "debug"'))
    reader, writer = os.openpty() if kind == "terminal" else os.pipe()
    if kind != "terminal":
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
    os.set_blocking(writer, kind != "pipe that never waits")
    script = "from relay.process import logs; logs.MOST_QUEUED = 10_000; from relay.cli import main; main()"
    command = [sys.executable, "-c", script, "serve", "-c", str(config)]
    process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    try:
        output = b""
        while not (found := re.search(rb"listens on (http://[^\s,\"]+), admin (http://[^\s,\"]+)", output)):
            output += await asyncio.to_thread(os.read, reader, 65_536)
        public, admin = found[1].decode(), found[2].decode()
        raw = request("POST", "/v1/events", adorn("unread"), x_request_id="x" * 128)
        async with asyncio.timeout(60), await Wire.open(public) as wire:
            for _ in range(300):  # 400 bytes of lines each
                await wire.send(raw)
                assert (await wire.answer()).status == 200
        metrics = (await exchange(admin, request("GET", "/metrics"))).body.decode()
        [dropped] = re.findall(r"^relay_log_lines_dropped_total (\S+)$", metrics, re.MULTILINE)
        assert float(dropped) > 0
        process.terminate()
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(reader)


@only_sqlite("a folder in the place of its file")
@pytest.mark.parametrize("is_read", [True, False])
async def test_a_daemon_stops_even_if_nobody_reads_its_log(tmp_path, is_read):
    (tmp_path / "state" / "relay.db").mkdir(parents=True)
    config = write_config(tmp_path, SOURCES)
    reader, writer = os.pipe()
    if not is_read:
        os.set_blocking(writer, False)
        for size in (4096, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(writer, bytes(size))
        os.set_blocking(writer, True)
    process = await asyncio.create_subprocess_exec(
        *SERVE, "-c", str(config), stdin=asyncio.subprocess.DEVNULL, stderr=writer
    )
    os.close(writer)
    try:
        async with asyncio.timeout(60):
            assert await process.wait() == 1
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        output = os.read(reader, 65_536)
        os.close(reader)
    assert (b"relay.db" in output) == is_read
