"""The life of the daemon as a real process: start, stop, crash, and its messages for operators."""

import asyncio
import json
import re
import signal
import sys

from daemons import HEAD, SOURCES, Daemon, adorn, destination, write_config
from stores import faults_of
from stores import rows_of as rows
from support import until
from wire import Wire, exchange, request

ADORN = "/v1/events"
CHECK_CONFIG = (sys.executable, "-c", "from relay.cli import main; main()", "check-config")


async def send(daemon, session="s"):
    """Send one event and return its id."""
    answer = await exchange(daemon.url, request("POST", ADORN, adorn(session)))
    assert answer.status == 200, answer
    return answer.json["event_id"]


async def fails(config, *command, code=1):
    """Run a daemon that cannot start, and return its output."""
    daemon = Daemon(config, *command)
    await daemon.start()
    try:
        assert await daemon.exit() == code
    finally:
        await daemon.end()
    return daemon.output


async def test_a_stop_finishes_requests_and_attempts_and_exits_0(tmp_path, recorder):
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
    async with Daemon(config, fresh=True) as daemon:
        recorder.open.clear()
        first = await send(daemon, "in flight")
        await until(lambda: recorder.busy == 1)
        raw = request("POST", ADORN, adorn("under way"), expect="100-continue")
        async with await Wire.open(daemon.url) as slow:
            await slow.send(raw[:-10])
            assert (await slow.answer()).status == 100
            daemon.process.send_signal(signal.SIGTERM)
            await until(lambda: "draining" in daemon.output)
            refused = await until_refused(daemon)
            await slow.send(raw[-10:])
            answer = await slow.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await slow.closed()
        recorder.open.set()
        assert await daemon.exit() == 0
    assert refused
    states = rows(config, "SELECT e.public_id, d.state FROM deliveries d JOIN events e ON e.id = d.event_id")
    assert states[0] == (first, "delivered")
    assert [id_ for id_, _ in states] == [first, answer.json["event_id"]]
    sql = "SELECT result FROM attempts WHERE delivery_id = (SELECT min(id) FROM deliveries)"
    assert rows(config, sql) == [("ok",)]


async def test_a_stop_cuts_off_slow_attempts_and_keeps_their_deliveries(tmp_path, recorder):
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
    config.write_text(config.read_text().replace('shutdown_grace = "5s"', 'shutdown_grace = "0.5s"'))
    async with Daemon(config) as daemon:
        recorder.open.clear()
        await send(daemon)
        await until(lambda: recorder.busy == 1)
        assert await daemon.stop() == 0
    assert "cancelled 1 attempts" in daemon.output
    assert rows(config, "SELECT state, attempts FROM deliveries") == [("pending", 0)]


async def until_refused(daemon):
    """Wait until the listener is closed: the daemon no longer accepts connections."""
    async with asyncio.timeout(30):
        while True:
            try:
                wire = await Wire.open(daemon.url)
            except ConnectionRefusedError:
                return True
            except ConnectionResetError:  # the listener was closed at this moment
                continue
            await wire.hang_up()


async def test_a_second_daemon_on_the_same_state_refuses_and_names_the_first(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with Daemon(config) as daemon:
        output = await fails(config)
        assert f"pid {daemon.process.pid}" in output
        assert "state_dir" in output
        assert "Traceback" not in output
        await send(daemon)


async def test_a_socket_left_behind_by_a_crash_is_replaced(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with Daemon(config) as daemon:
        await daemon.end()
    assert (tmp_path / "state" / "relay.sock").exists()
    async with Daemon(config) as daemon:
        assert (await daemon.operator("GET", "/api/status"))["ready"] is True
        assert await daemon.stop() == 0
    assert not (tmp_path / "state" / "relay.sock").exists()


async def test_a_port_in_use_is_reported_in_a_sentence(tmp_path, recorder):
    port = int(recorder.url.split(":")[2].partition("/")[0])
    output = await fails(write_config(tmp_path, SOURCES, port=port))
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in output
    assert "[server] listen" in output
    assert "Traceback" not in output


async def test_an_invalid_config_is_reported_as_by_check_config(tmp_path):
    broken = SOURCES.replace('plugin = "adorn"', 'plugin = "adron"') + '[servre]\nlisten = "x"\n'
    config = write_config(tmp_path, broken)
    served = await fails(config, code=78)
    checked = await asyncio.create_subprocess_exec(
        *CHECK_CONFIG, str(config), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    _, output = await checked.communicate()
    assert checked.returncode == 1
    assert 'no plugin offers the kind "adron"' in served
    served, hint = served.rstrip().rsplit("\n", 1)
    assert hint == f"  correct it, then run `relay check-config {config}`"
    assert re.sub(r"\n\d+ problems; .*", "", output.decode()).rstrip() == served


async def test_a_development_secret_without_development_stops_the_start(tmp_path):
    config = write_config(tmp_path, SOURCES)
    config.write_text(config.read_text().replace("development = true\n", ""))
    output = await fails(config, code=78)
    assert "sources.moddy.tokens" in output
    assert "dev-token" not in output
    assert "development" in HEAD


async def test_deliveries_interrupted_by_a_crash_are_sent_after_the_restart(tmp_path, recorder):
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url, "concurrency = 2"))
    recorder.open.clear()
    async with Daemon(config, fresh=True) as daemon:
        ids = [await send(daemon, f"session {number}") for number in range(5)]
        await until(lambda: recorder.busy == 2)
        await daemon.end()
    recorder.open.set()
    async with Daemon(config, fresh=True) as daemon:
        await until(lambda: set(recorder.ids) == set(ids))
        await until(
            lambda: rows(config, "SELECT count(*) FROM deliveries WHERE state = 'delivered'") == [(5,)]
        )
        assert await daemon.stop() == 0
    assert len(recorder.ids) <= len(ids) + 2
    assert faults_of(config) == []


async def test_a_cancellation_during_an_attempt_survives_a_crash(tmp_path, recorder):
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
    recorder.open.clear()
    async with Daemon(config) as daemon:
        await send(daemon)
        await until(lambda: recorder.busy == 1)
        body = json.dumps({"filter": {"destination": "crm"}}).encode()
        asked = request("POST", "/api/deliveries/cancel", body)
        answer = await exchange(config.parent / "state" / "relay.sock", asked)
        assert answer.json == {"cancelled": 0, "in_flight": 1}
        assert (await daemon.operator("GET", "/api/destinations/crm"))["expires_next"] is None
        await daemon.end()
    recorder.open.set()
    async with Daemon(config) as daemon:
        await send(daemon, "later")
        sql = "SELECT state, reason FROM deliveries ORDER BY id"
        await until(lambda: "pending" not in dict(rows(config, sql)))
        assert await daemon.stop() == 0
    assert rows(config, sql) == [("cancelled", "operator"), ("delivered", None)]
    assert len(recorder.arrived) == 2  # before the crash, and the later event


async def test_the_daemon_stores_events_of_senders_that_disconnect_early(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with Daemon(config) as daemon:
        for number in range(200):
            padding = "x" * (300_000 if number % 20 == 0 else 10)
            async with await Wire.open(daemon.url) as wire:
                body = adorn(f"session {number}", payload={"text": padding})
                await wire.send(request("POST", ADORN, body, connection="close"))
        await until(lambda: rows(config, "SELECT count(DISTINCT subject) FROM events") == [(200,)])


async def test_the_log_is_json_without_secrets(tmp_path):
    config = write_config(tmp_path, SOURCES)
    async with Daemon(config) as daemon:
        await exchange(daemon.url, request("POST", "/internal/event/notify?token=dev-token", b"{}"))
        wrong = request("POST", "/internal/event/notify", b"{}", authorization="Bearer guessed-token")
        await exchange(daemon.url, wrong)
        assert await daemon.stop() == 0
    assert all(line.startswith('{"time": "') for line in daemon.lines)
    assert "refused with 403" in daemon.output
    assert "dev-token" not in daemon.output
    assert "guessed-token" not in daemon.output
