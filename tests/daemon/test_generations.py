"""Every generation of WhatsApp workers through its whole life, with its recorded requests."""

from dataclasses import dataclass
from http import HTTPStatus

import pytest
from daemons import SOURCES, Recorder, destination, running, write_config
from samples import ROOT, read_sample
from support import FakeClock, until

SESSION = "user123-session1"
LISTED = {"user124-session1": "QR_REQUIRED", "user125-session1": "LOGGED_OUT"}


@dataclass(frozen=True)
class Life:
    """Recorded requests in their order, and the sessions that the registry knows before the silence."""

    first: str
    beat: str
    last: str
    sessions: dict[str, str]


LIVES = {
    "v1": Life(
        first="v1-register v1-event-worker-started v1-event-session-created v1-session-status"
        " v1-session-connected v1-heartbeat-flat v1-event-message-sent v1-message-status",
        beat="v1-heartbeat-nested",
        last="v1-event-worker-stopping v1-unregister",
        sessions={SESSION: "connected"},
    ),
    "v1b": Life(
        first="v1-register v1b-session-status v1-heartbeat-nested v1b-message-status"
        " v1b-session-disconnected",
        beat="v1-heartbeat-nested",
        last="v1-unregister",
        sessions={},  # neither its events nor its heartbeats name the worker of the sessions
    ),
    "early v2": Life(
        first="v2-register early-v2-heartbeat v2-session-qr-required v2-session-connected",
        beat="early-v2-heartbeat",
        last="early-v2-unregister",
        sessions={},  # likewise
    ),
    "v2": Life(
        first="v2-register v2-assigned-sessions v2-session-qr-required v2-heartbeat v2-recovery-status"
        " v2-session-logged-out",
        beat="v2-heartbeat",
        last="v2-sessions-preserved v2-unregister",
        sessions={SESSION: "LOGGED_OUT", **LISTED},
    ),
    "v3": Life(
        first="v3-register v3-assigned-sessions v3-session-status-in-path v3-heartbeat v3-recovery-status"
        " v3-event v3-message-status v3-session-status",
        beat="v3-heartbeat",
        last="v3-sessions-preserved v3-unregister",
        sessions={SESSION: "CONNECTED", **LISTED},
    ),
}
WORKER = "/api/workers/whatsapp/worker-001"


def types_of(cases):
    """Return the types of the events that recorded requests create."""
    events = [read_sample(ROOT / "whatsapp" / case).expect.event for case in cases]
    return [event.type.removeprefix("whatsapp.") for event in events if event is not None]


@pytest.mark.parametrize("generation", LIVES)
async def test_the_whole_life_of_a_worker_is_stored_and_delivered(tmp_path, generation):
    life, clock = LIVES[generation], FakeClock()
    first, last = life.first.split(), life.last.split()

    async with Recorder() as recorder:
        config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
        async with running(config, clock=clock) as relay:

            async def send(*cases):
                for case in cases:
                    answer = await relay.exchange(read_sample(ROOT / "whatsapp" / case).request)
                    assert (answer.status, answer.json["success"]) == (HTTPStatus.OK, True), case

            await send(*first)
            row = await relay.operator("GET", WORKER)
            assert (row["status"], row["version"], row["max_sessions"]) == ("ONLINE", "1.0.0", 50)
            assert (row["cpu"], row["memory"], row["uptime"], row["message_count"]) == (
                45.5,
                67.8,
                3600,
                1250,
            )
            assert {session["id"]: session["status"] for session in row["sessions"]} == life.sessions

            for _ in range(10):
                clock.advance(10)
                await relay.app.watch.sweep()
            assert (await relay.operator("GET", WORKER))["status"] == "OFFLINE"

            await send(life.beat)
            assert (await relay.operator("GET", WORKER))["status"] == "ONLINE"
            await send(*last, life.beat)  # its last heartbeat may overlap its unregister request
            assert (await relay.operator("GET", "/api/workers"))["items"] == []

            stored = [row["type"].removeprefix("whatsapp.") for row in await relay.rows()]
            assert stored == [
                "worker.registered", *types_of(first), "worker.offline", "worker.online", *types_of(last),
                "worker.unregistered",
            ]  # fmt: skip
            await until(lambda: len(set(recorder.ids)) == len(stored))
