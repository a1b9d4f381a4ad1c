"""Two hundred workers on a virtual clock, and a relay that is killed: one event per change of status.

The expected events follow from the gaps in the schedule of heartbeats. No gap ends close to a
deadline, so the order of sweeps and heartbeats does not matter.
"""

import asyncio
import contextlib
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from daemons import SOURCES, Recorder, destination, write_config
from stores import rows_of
from support import until
from wire import Wire, request

from relay.base.clock import SECOND

DRIVER = Path(__file__).parents[1] / "drivers" / "virtual.py"
TOKEN = {"Authorization": "Bearer worker-secret-token-12345"}
EPOCH = 1_700_000_000
KILLED, BACK, END = 420, 540, 780  # seconds; the relay is down for two minutes
STEP, SWEEP, PATIENCE = 5, 10, 90  # seconds
CLOSE = (PATIENCE - 10, PATIENCE + SWEEP + 10)  # gaps with an uncertain result


class Relay:
    """A process of the real relay on a virtual clock, and connections to it."""

    def __init__(self, config, now):
        self._config = config
        self._now = now

    async def __aenter__(self):
        with (self._config.parent / "relay.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, DRIVER, self._config, str((EPOCH + self._now) * SECOND),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip
        url = await self._line()
        assert url, (self._config.parent / "relay.log").read_text()
        self._wires = [await Wire.open(url) for _ in range(8)]
        return self

    async def __aexit__(self, *_):
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        for wire in self._wires:
            await wire.hang_up()

    async def live(self, start, end, due):
        """Send the due requests, and sweep when due."""
        for now in range(start, end + 1, STEP):
            await self.command(f"to {(EPOCH + now) * SECOND}")
            await self.send(due[now])
            if now % SWEEP == 0:
                await self.command("sweep")

    async def command(self, line):
        self.process.stdin.write(f"{line}\n".encode())
        assert await self._line() == "done"

    async def send(self, raws):
        """Send requests over all connections at once."""

        async def over(wire, mine):
            for raw in mine:
                await wire.send(raw)
                assert (await wire.answer()).status == 200

        await asyncio.gather(*(over(wire, raws[n :: len(self._wires)]) for n, wire in enumerate(self._wires)))

    async def die(self, now, due):
        """Kill the relay during a sweep and the due requests."""
        await self.command(f"to {(EPOCH + now) * SECOND}")
        self.process.stdin.write(b"sweep\n")
        sending = asyncio.create_task(self.send(due[now]))
        await asyncio.wait([sending], timeout=0.005)
        self.process.kill()
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await sending

    async def _line(self):
        async with asyncio.timeout(60):
            return (await self.process.stdout.readline()).decode().strip()


def schedule(rand):
    """Draw the times of each worker's heartbeats; the first one is its registration."""
    beats = {}
    for number in range(200):
        silences = []
        if number < 20:  # dies; the sweep at the kill finds the first four
            silences = [(KILLED - PATIENCE - 3 if number < 4 else rand.uniform(60, 560), END)]
        elif number < 30:  # flaps
            silences = [(start := rand.uniform(60, 90), start + 150), (280, 400), (600, 720)]
        elif number < 35:  # is suspended, five of them for so long
            start = rand.uniform(60, 100)
            silences = [(start, start + (20, 25, 150, 200, 250)[number - 30])]
        moments, now = [], rand.uniform(0, 30)
        while now < END:
            if not any(start < now < end for start, end in silences):
                moments.append(now)
            now += 30 + rand.uniform(-3, 3)
        beats[f"worker-{number:03}"] = moments
    return beats


def heard(moments):
    """Return the times at which the relay reads heartbeats: every few seconds, except while it is down."""
    at = [int(-(-moment // STEP) * STEP) for moment in moments]
    return [moment for moment in at if moment <= KILLED or BACK < moment <= END]


def expected_events(moments):
    """Return the expected events of a worker, from its gaps."""
    story, online = ["registered"], True
    for last, following in zip(moments, [*moments[1:], None], strict=True):
        until_ = END if following is None else following
        across = last <= KILLED < until_  # the deadline restarts when the relay is back
        for gap in [KILLED - last, until_ - BACK] if across else [until_ - last]:
            assert following is None or not CLOSE[0] < gap < CLOSE[1]
            if online and gap > PATIENCE + SWEEP:
                story.append("offline")
                online = False
        if following is not None and not online:
            story.append("online")
            online = True
    return story


def beat(worker, moment, rand):
    body = {"status": "ONLINE", "cpuUsage": rand.random(), "uptime": moment, "messageCount": moment}
    return request("PUT", f"/api/v1/workers/{worker}/heartbeat", body=json.dumps(body).encode(), **TOKEN)


def register(worker):
    body = {"workerId": worker, "endpoint": f"http://{worker}:8001", "status": "ONLINE"}
    return request("POST", "/api/v1/workers/register", body=json.dumps(body).encode(), **TOKEN)


@pytest.mark.parametrize("seed", [20_240_115])
async def test_every_status_change_of_200_workers_is_one_event_across_a_kill(tmp_path, seed):
    rand = random.Random(seed)
    beats = {worker: heard(moments) for worker, moments in schedule(rand).items()}
    due = defaultdict(list)
    for worker, moments in beats.items():
        due[moments[0]].append(register(worker))
        for moment in moments[1:]:
            due[moment].append(beat(worker, moment, rand))
    expected = {worker: expected_events(moments) for worker, moments in beats.items()}
    assert sum(story[-1] == "offline" for story in expected.values()) == 20
    assert sum(len(story) > 2 for story in expected.values()) == 13

    async with Recorder() as recorder:
        config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
        async with Relay(config, 0) as relay:
            await relay.live(0, KILLED - STEP, due)
            await relay.die(KILLED, due)
        async with Relay(config, BACK) as relay:
            await relay.live(BACK + STEP, END, due)
            events = rows_of(config, "SELECT public_id, type, subject FROM events ORDER BY id")
            stories = defaultdict(list)
            for _, type_, worker in events:
                stories[worker].append(type_.removeprefix("whatsapp.worker."))
            assert stories == expected
            await until(lambda: set(recorder.ids) == {event[0] for event in events})
