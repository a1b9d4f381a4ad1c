"""`relay destinations test`: one ping through the real client; nothing is stored."""

import asyncio
import json
import re

import pytest
import receivers
from commands import Commands
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from support import until
from wire import exchange, request

from relay.api.words import held_text
from relay.base.clock import SECOND, rfc3339
from relay.config.schema import DestinationConfig
from relay.config.secrets import Secret, Url
from relay.delivery import ping
from relay.delivery.http.result import HttpResult
from relay.delivery.ping import explain
from relay.delivery.retry import Verdict
from relay.demo.story import DemoReceiver

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NOTHING = {"events": [], "deliveries": [], "attempts": []}


async def kept(relay):
    return {kind: await relay.rows(kind) for kind in NOTHING}


@pytest.fixture
async def crm(tmp_path):
    async with (
        Recorder() as recorder,
        running(write_config(tmp_path, SOURCES, destination("crm", recorder.url))) as relay,
    ):
        yield relay, recorder


async def post(relay, name="crm"):
    return await exchange(relay.addresses.socket, request("POST", f"/api/destinations/{name}/test", b""))


async def test_a_ping_is_signed_names_its_purpose_and_is_not_stored(tmp_path):
    async with (
        DemoReceiver(Secret(SECRET)) as receiver,
        running(write_config(tmp_path, destination("crm", receiver.url))) as relay,
    ):
        output = (await Commands(relay.addresses.socket)("destinations", "test", "crm", "--json")).json
        arrival = receiver.arrivals.get_nowait()
        assert (arrival.type, arrival.subject, arrival.problem) == ("relay.ping", "crm", None)
        assert (output["ok"], output["status"], output["result"]) == (True, 204, "ok")
        assert (output["held"], output["signatures"], output["hint"]) == (None, 1, "")
        assert output["verdict"] == "would be delivered"
        assert await kept(relay) == NOTHING
        [books] = (await relay.operator("GET", "/api/destinations"))["items"]
        assert (books["created"], books["in_flight"]) == (0, 0)
        assert relay.counted("relay_delivery_attempts_total", destination="crm", result="ok") == 0


async def test_the_output_for_people_has_one_fact_per_line(crm):
    relay, _ = crm
    output = await Commands(relay.addresses.socket)("destinations", "test", "crm")
    rows = dict(output.rows)
    assert (rows["destination"], rows["status"], rows["signatures"]) == ("crm", "200", "1")
    assert re.fullmatch(r"[0-9.]+ ms \(dns [0-9.]+ ms, connect .+, first byte .+\)", rows["duration"])
    assert "tls" not in rows["duration"]
    assert output.err == ""


@pytest.mark.parametrize(("verb", "held"), [("pause", "paused"), ("disable", "disabled: operator")])
async def test_a_destination_that_is_held_can_be_tested_and_stays_held(crm, verb, held):
    relay, recorder = crm
    commands = Commands(relay.addresses.socket)
    await commands("destinations", verb, "crm")
    output = await commands("destinations", "test", "crm")
    assert ["held", held] in output.rows
    assert len(recorder.ids) == 1
    assert relay.app.dispatcher.lanes["crm"].held == held


async def test_a_ping_does_not_change_the_circuit(tmp_path):
    async with Recorder() as recorder:
        more = 'circuit = { failures = 1, probe = "1h", max_probe = "1h" }'
        async with running(write_config(tmp_path, SOURCES, destination("crm", recorder.url, more))) as relay:
            lane = relay.app.dispatcher.lanes["crm"]
            recorder.answers.append((500, {}))
            commands = Commands(relay.addresses.socket)
            await commands("destinations", "test", "crm", code=1)
            assert lane.held is None
            recorder.answers.append((500, {}))
            await relay.exchange(request("POST", "/v1/events", adorn()))
            await until(lambda: lane.held == "circuit open")
            output = (await commands("destinations", "test", "crm", "--json")).json
            assert (output["ok"], output["held"]) == (True, "circuit open")
            assert lane.held == "circuit open"
            await until(
                lambda: relay.counted("relay_delivery_attempts_total", destination="crm", result="5xx")
            )
            [attempt] = await relay.rows("attempts")
            assert attempt["status"] == 500
            explained = await relay.operator("GET", f"/api/events/{attempt['event_id']}/explain")
            held = explained["destinations"][0]["held"]
            assert held == f"circuit open until {rfc3339(lane.health.held_until)}"
            page = await exchange(relay.addresses.socket, request("GET", f"/ui/events/{attempt['event_id']}"))
            assert b"circuit open</strong>, next probe <time" in page.body


HELD_LONG = 'circuit = { failures = 1, probe = "1h", max_probe = "1h" }'


async def open_circuit(relay, recorder):
    """Let the first delivery fail, and return the lane."""
    recorder.answers.append((500, {}))
    await relay.exchange(request("POST", "/v1/events", adorn("first")))
    lane = relay.app.dispatcher.lanes["crm"]
    await until(lambda: lane.held == "circuit open")
    return lane


def delivered(relay):
    return relay.counted("relay_deliveries_finished_total", destination="crm", outcome="delivered")


async def test_a_successful_test_closes_the_circuit_on_request(tmp_path):
    async with (
        Recorder() as recorder,
        Recorder() as other,
        running(
            write_config(
                tmp_path,
                SOURCES,
                destination("crm", recorder.url, HELD_LONG),
                destination("watch", other.url).replace('events = ["*"]', 'events = ["relay.*"]'),
            )
        ) as relay,
    ):
        commands = Commands(relay.addresses.socket)
        lane = await open_circuit(relay, recorder)
        for session in ("second", "third"):
            await relay.exchange(request("POST", "/v1/events", adorn(session)))

        output = await commands("destinations", "show", "crm")
        assert "`relay destinations test crm --close-circuit`" in output.err
        output = await commands("destinations", "resume", "crm")
        assert output.out == "crm: circuit open\n"
        assert "`relay destinations test crm --close-circuit`" in output.err
        retry = ("deliveries", "retry", "--destination", "crm", "--state", "pending", "--yes")
        output = await commands(*retry, code=6)
        assert "crm is held: circuit open; next attempt in " in output.err
        waiting = (await relay.rows("deliveries", destination="crm", state="pending"))[0]
        output = await commands("deliveries", "show", waiting["id"])
        assert "crm is held: circuit open; next attempt in " in output.err
        assert "`relay destinations test crm --close-circuit`" in output.err
        output = await commands("events", "show", waiting["event_id"])
        assert "`relay destinations show crm`" in output.err

        recorder.answers.append((503, {}))
        output = await commands("destinations", "test", "crm", "--close-circuit", code=1)
        assert ["held", "circuit open"] in output.rows
        assert "circuit closed" not in output.err
        assert lane.held == "circuit open"

        output = await commands("destinations", "test", "crm")  # changes nothing, but shows the next command
        assert "`relay destinations test crm --close-circuit`" in output.err
        assert lane.held == "circuit open"
        assert delivered(relay) == 0

        output = await commands("destinations", "test", "crm", "--close-circuit")
        assert ["held", ""] in output.rows
        assert output.err.startswith("circuit closed; due deliveries are sent, one at a time at first.")
        assert "`relay deliveries retry --destination crm --state pending`" in output.err
        await until(lambda: delivered(relay) == 3)
        assert relay.counted("relay_destination_circuit_open", destination="crm") == 0
        await until(lambda: len(other.arrived) == 2)
        assert [each["type"] for _, each in other.arrived] == [
            "relay.destination.circuit_opened",
            "relay.destination.recovered",
        ]
        assert other.arrived[1][1]["data"]["reason"] == "an operator's test succeeded"

        output = await commands("destinations", "test", "crm", "--close-circuit")
        assert output.err == "the circuit was not open; nothing was changed\n"


@pytest.mark.parametrize("close", [False, True])
async def test_a_successful_test_ends_a_pause_that_the_receiver_requested_on_request(tmp_path, close):
    async with (
        Recorder() as recorder,
        running(write_config(tmp_path, SOURCES, destination("crm", recorder.url))) as relay,
    ):
        lane = relay.app.dispatcher.lanes["crm"]
        recorder.answers.append((503, {"Retry-After": "3600"}))
        await relay.exchange(request("POST", "/v1/events", adorn("first")))
        await until(lambda: lane.held == "resting")
        await relay.exchange(request("POST", "/v1/events", adorn("second")))
        answer = await exchange(
            relay.addresses.socket,
            request("POST", "/api/destinations/crm/test", json.dumps({"close_circuit": close}).encode()),
        )
        assert (answer.json["ok"], answer.json["circuit_closed"]) == (True, close)
        assert answer.json["held"] == (None if close else "resting")
        if close:
            await until(lambda: delivered(relay) == 1)  # the first one waits for its retry


@pytest.mark.parametrize(
    ("verb", "held", "next_"), [("pause", "paused", "resume"), ("disable", "disabled: operator", "enable")]
)
async def test_closing_the_circuit_ends_no_pause_or_disabled_state_by_an_operator(
    tmp_path, verb, held, next_
):
    async with (
        Recorder() as recorder,
        running(write_config(tmp_path, SOURCES, destination("crm", recorder.url, HELD_LONG))) as relay,
    ):
        commands = Commands(relay.addresses.socket)
        lane = await open_circuit(relay, recorder)
        await commands("destinations", verb, "crm")
        output = await commands("destinations", "test", "crm", "--close-circuit")
        assert ["held", held] in output.rows
        assert output.err.startswith(f"crm is still held: {held_text(held)}\n")
        assert f"`relay destinations {next_} crm`" in output.err
        assert lane.held == held
        assert not lane.health.circuit.is_open
        await commands("destinations", next_, "crm")
        assert lane.held is None


async def test_a_410_to_a_ping_disables_nothing_and_warns_about_deliveries(crm):
    relay, recorder = crm
    recorder.answers.append((410, {}))
    output = await Commands(relay.addresses.socket)("destinations", "test", "crm", code=1)
    assert ["status", "410"] in output.rows
    assert "result\twould disable the destination and be held: 410 Gone" in output.out
    assert relay.app.dispatcher.lanes["crm"].held is None


async def test_a_private_address_is_not_dialled_and_the_hint_names_the_key(tmp_path):
    async with Recorder() as recorder:
        config = write_config(tmp_path, destination("crm", recorder.url).replace("allow_private = true", ""))
        async with running(config) as relay:
            output = await Commands(relay.addresses.socket)("destinations", "test", "crm", code=1)
    assert ["error", "not connected: 127.0.0.1 is a loopback address"] in output.rows
    assert output.err == "if the address is right, set `allow_private = true` in [destinations.crm]\n"
    assert recorder.ids == []


async def test_the_relay_does_not_ping_itself(tmp_path):
    async with running(write_config(tmp_path, destination("crm", "http://127.0.0.1:9"))) as relay:
        file = write_config(tmp_path, destination("crm", relay.addresses.public))
        assert file.exists()
        await relay.operator("POST", "/api/reload")
        output = await Commands(relay.addresses.socket)("destinations", "test", "crm", code=1)
    assert output.err == "the relay never sends to itself: correct its `url`\n"


async def test_tls_is_timed_and_every_ping_connects_anew_and_reads_the_certificate(tmp_path, certificates):
    async with receivers.answers(tls=certificates.server("good"), body=b"a" * 2000) as receiver:
        more = f'ca_file = "{certificates.ca}"'
        async with running(write_config(tmp_path, destination("crm", receiver.url, more))) as relay:
            commands = Commands(relay.addresses.socket)
            for number in (1, 2):
                output = (await commands("destinations", "test", "crm", "--json")).json
                assert receiver.connections == number
            assert all(ms is not None and ms >= 0 for ms in output["timing_ms"].values())
            assert sum(output["timing_ms"].values()) <= output["duration_ms"] + 0.5
            assert (output["answer"], output["truncated"]) == ("a" * 1024, True)
            metric = "relay_destination_certificate_expiry_timestamp_seconds"
            await until(lambda: relay.counted(metric, destination="crm"))
            ends = certificates.ends("good")
            assert relay.counted(metric, destination="crm") == ends / SECOND
            [shown] = (await relay.operator("GET", "/api/destinations"))["items"]
            assert shown["certificate_expires"] == rfc3339(ends)


async def test_a_step_that_was_not_reached_has_no_time(tmp_path):
    url = f"http://127.0.0.1:{receivers.unused_port()}/"
    async with running(write_config(tmp_path, destination("crm", url))) as relay:
        output = (
            await Commands(relay.addresses.socket)("destinations", "test", "crm", "--json", code=1)
        ).json
    assert output["timing_ms"]["dns"] is not None
    assert [output["timing_ms"][step] for step in ("connect", "tls", "first_byte")] == [None] * 3
    assert output["hint"] == "check that the receiver listens on this address, and that no firewall blocks it"


async def test_one_ping_runs_at_a_time(crm):
    relay, recorder = crm
    recorder.open.clear()
    first = asyncio.create_task(post(relay))
    await until(lambda: recorder.busy)
    second = await post(relay)
    assert (second.status, second.json["error"]["code"]) == (409, "busy")
    output = await Commands(relay.addresses.socket)("destinations", "test", "crm", code=1)
    assert output.err == "a test of 'crm' is already running\n  wait for its result, then try again\n"
    recorder.open.set()
    assert (await first).json["ok"]
    assert (await post(relay)).json["ok"]


async def test_a_ping_ends_before_the_timeout_of_commands(crm, monkeypatch):
    monkeypatch.setattr(ping, "MAX_SECONDS", 0.05)
    relay, recorder = crm
    recorder.open.clear()
    output = (await post(relay)).json
    assert (output["ok"], output["result"]) == (False, "timeout")
    assert output["error"] == "no response within 50ms, the longest time that a test waits"


async def test_a_reload_during_a_ping_does_not_change_it(crm, tmp_path):
    relay, recorder = crm
    recorder.open.clear()
    pinging = asyncio.create_task(post(relay))
    await until(lambda: recorder.busy)
    write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/"))
    await relay.operator("POST", "/api/reload")
    recorder.open.set()
    assert (await pinging).json["status"] == 200


async def test_the_destination_s_own_format_is_used(tmp_path):
    async with receivers.answers() as receiver:
        config = write_config(tmp_path, destination("crm", receiver.url, 'format = "slack"'))
        async with running(config) as relay:
            assert (await post(relay)).json["ok"]
        [arrived] = receiver.requests
    assert json.loads(arrived.body)["text"].startswith("🔵 Test of crm\n")


async def test_a_ping_of_an_unknown_destination_gets_404(crm):
    relay, _ = crm
    output = await Commands(relay.addresses.socket)("destinations", "test", "crn", code=4)
    assert output.err == 'unknown destination "crn", did you mean "crm"?\n  known: crm\n'


@pytest.mark.parametrize(
    ("answer", "meaning", "verdict", "hint"),
    [
        ({"result": "3xx", "status": 301}, {}, "retried according to the schedule", "are never followed"),
        ({"result": "4xx", "status": 401}, {}, "retried", "relay verify --destination crm --request"),
        ({"result": "4xx", "status": 404}, {}, "retried", "that it accepts POST"),
        ({"result": "4xx", "status": 418}, {}, "retried", "look for the cause in the receiver's log"),
        ({"result": "5xx", "status": 503}, {"pause": 60.0}, "destination would pause for 1m", "Retry-After"),
        ({"result": "4xx", "status": 400}, {"kind": "abort"},
         "`webhook-delivery: abort-message`", "the receiver's log"),
        ({"result": "4xx", "status": 400}, {"kind": "abort", "reason": "final_status"},
         "dead at once: 400 is in its `final_statuses`", "the receiver's log"),
        ({"result": "4xx", "status": 400}, {"kind": "disable", "reason": "asked"},
         "`webhook-delivery: disable`", "`url`"),
        ({"result": "dns"}, {}, "retried", "DNS"),
        ({"result": "timeout"}, {}, "retried", "raise `timeout`"),
        ({"result": "tls"}, {}, "retried", "`ca_file`"),
        ({"result": "protocol"}, {}, "retried", "has the right scheme"),
        ({"result": "format"}, {}, "retried", "the format standard"),
        ({"result": "blocked", "error": "not connected: 0.0.0.0 is a unspecified addres"}, {"kind": "hold"},
         "nothing was sent", "correct its `url`"),
    ],
)  # fmt: skip
def test_the_meaning_of_a_response_is_explained(answer, meaning, verdict, hint):
    config = DestinationConfig(name="crm", url=Url("http://crm.example"))
    output = explain(config, HttpResult(**answer), Verdict(**{"kind": "retry", **meaning}))
    assert verdict in output[0]
    assert hint in output[1]
