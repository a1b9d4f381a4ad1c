"""From the listener to receivers that fail, hang and disconnect; and restarts that no sender notices."""

import asyncio
import itertools

from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from support import until
from wire import Wire, request

from relay.process.sockets import bind

ADORN = "/v1/events"
RESTARTS = 8


async def send(relay, session="s"):
    answer = await relay.exchange(request("POST", ADORN, adorn(session)))
    return answer.json["event_id"]


def delivered(relay, name):
    return relay.counted("relay_deliveries_finished_total", destination=name, outcome="delivered")


async def test_a_receiver_that_fails_three_times_gets_the_event_again_under_the_same_id(tmp_path, recorder):
    recorder.answers.extend([(500, {})] * 3)
    async with running(write_config(tmp_path, SOURCES, destination("crm", recorder.url))) as relay:
        event_id = await send(relay)
        await until(lambda: delivered(relay, "crm") == 1)
        attempts = await relay.operator("GET", "/api/attempts")
        [delivery] = (await relay.operator("GET", "/api/deliveries"))["items"]
    assert recorder.ids == [event_id] * 4
    assert [attempt["status"] for attempt in attempts["items"]] == [200, 500, 500, 500]
    assert (delivery["state"], delivery["attempts"]) == ("delivered", 4)


async def test_the_receiver_gets_the_sent_bytes(tmp_path, recorder):
    async with running(write_config(tmp_path, SOURCES, destination("crm", recorder.url))) as relay:
        event_id = await send(relay, "whole")
        await until(lambda: recorder.arrived)
    [(webhook_id, envelope)] = recorder.arrived
    assert webhook_id == envelope["id"] == event_id
    assert (envelope["type"], envelope["subject"]) == ("adorn.session.started", "whole")


async def test_a_hanging_receiver_delays_no_other(tmp_path, recorder):
    async with Recorder() as hanging:
        hanging.open.clear()
        both = destination("slow", hanging.url), destination("crm", recorder.url)
        async with running(write_config(tmp_path, SOURCES, *both)) as relay:
            for number in range(50):
                await send(relay, f"session {number}")
            await until(lambda: delivered(relay, "crm") == 50)
            assert delivered(relay, "slow") == 0
            assert hanging.busy > 0
            hanging.open.set()
            await until(lambda: delivered(relay, "slow") == 50)


async def test_a_receiver_that_is_gone_is_disabled_until_an_operator_enables_it(tmp_path, recorder):
    recorder.answers.append((410, {}))
    crm = destination("crm", recorder.url, "concurrency = 1")
    async with running(write_config(tmp_path, SOURCES, crm)) as relay:
        first = await send(relay)
        await until(lambda: relay.counted("relay_destination_disabled", destination="crm") == 1)
        second = await send(relay, "while disabled")
        pending = await relay.rows("deliveries", destination="crm", state="pending")
        assert [row["event_id"] for row in pending] == [first, second]
        assert recorder.ids == [first]
        await relay.operator("POST", "/api/destinations/crm/enable")
        await until(lambda: delivered(relay, "crm") == 2)
    assert sorted(recorder.ids[1:]) == sorted([first, second])


async def test_disabled_survives_a_restart(tmp_path, recorder):
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
    async with running(config) as relay:
        await relay.operator("POST", "/api/destinations/crm/disable")
        event_id = await send(relay)
    async with running(config) as relay:
        [crm] = (await relay.operator("GET", "/api/destinations"))["items"]
        assert crm["held"] == "disabled: operator"
        assert recorder.ids == []
        await relay.operator("POST", "/api/destinations/crm/enable")
        await until(lambda: recorder.ids == [event_id])


# --- restarts under load ------------------------------------------------------------------------------


class Sender:
    """Keeps a connection, and switches to the other address after a 503 or a refused connection."""

    def __init__(self, url):
        self.url = url
        self.acknowledged = []
        self.failures = []

    async def run(self, number, enough):
        """Send one event after the other until stopped."""
        wire = None
        for count in itertools.count():
            if enough.is_set():
                break
            wire = await self.send(wire, request("POST", ADORN, adorn(f"{number}.{count}")))
        if wire is not None:
            await wire.hang_up()

    async def send(self, wire, raw):
        while True:
            try:
                wire = wire or await Wire.open(self.url)
                await wire.send(raw)
                answer = await wire.answer()
            except ConnectionRefusedError:
                await asyncio.sleep(0.005)  # as a sender does before it retries
                continue
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                self.failures.append(repr(error))
                return None
            if answer.headers.get("connection") == "close":
                await wire.hang_up()
                wire = None
            if answer.status == 200:
                self.acknowledged.append(answer.json["event_id"])
                return wire
            if answer.status != 503:
                self.failures.append(answer)
                return wire


async def test_restarts_under_load_fail_no_request_of_a_sender_that_retries(tmp_path, recorder):
    sock = bind("127.0.0.1:0", "listen")
    port = sock.getsockname()[1]
    sock.close()
    config = write_config(tmp_path, SOURCES, destination("crm", recorder.url), port=port)
    sender, enough = Sender(f"http://127.0.0.1:{port}"), asyncio.Event()
    senders = [asyncio.create_task(sender.run(number, enough)) for number in range(4)]
    try:
        for life in range(1, RESTARTS + 1):
            async with running(config, settle=0.05):
                await until(lambda goal=life * 20: len(sender.acknowledged) >= goal or sender.failures)
    finally:
        enough.set()
        async with running(config) as relay:
            await asyncio.gather(*senders)
            await until(lambda: set(sender.acknowledged) <= set(recorder.ids))
            stored = {row["id"] for row in await relay.rows()}
    assert sender.failures == []
    assert stored == set(sender.acknowledged)
