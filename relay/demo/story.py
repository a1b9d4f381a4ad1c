"""The demo: sends one sample after the other, from the public listener to the receiver."""

import asyncio
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Self, TextIO

import aiohttp
import msgspec

from relay import __version__
from relay.base.json_text import decode
from relay.config.schema import Config, SourceConfig
from relay.config.secrets import Secret
from relay.demo.receiver import Received, Receiver
from relay.demo.samples import accept
from relay.source import Accepted, Incoming, Register, Unregister, WorkerChange

TOKEN = "dev-token"  # noqa: S105 - opens only the demo, on loopback
OFFLINE_AFTER = 2
"""Seconds of silence after which the demo's worker is offline."""

PATIENCE = 10.0
"""Seconds that an event may take to arrive."""

_BOLD, _DIM, _GREEN, _RED = "1", "2", "32", "31"
_WIDTH = 96  # characters of a detail in a pipe; the rest is cut off
_BESIDE = 21  # columns beside a detail


class _Envelope(msgspec.Struct):
    """The fields of the standard format that the demo shows."""

    type: str
    timestamp: datetime  # when the relay received the event
    subject: str | None = None


_envelope = msgspec.json.Decoder(_Envelope)


class Step(msgspec.Struct, frozen=True):
    """One sample, and the events that the relay creates for it."""

    sample: Incoming
    types: tuple[str, ...]  # full types; empty for a heartbeat
    worker: WorkerChange | None


def steps_of(source: SourceConfig) -> list[Step]:
    """Return a step for each sample of a source."""
    steps = []
    for sample in source.settings.samples():
        accepted = accept(source.settings, sample) or Accepted(reply=None)
        types = [event.type for event in (accepted.event, *accepted.events) if event is not None]
        if isinstance(accepted.worker, Register):
            types.append("worker.registered")
        elif isinstance(accepted.worker, Unregister):
            types.append("worker.unregistered")
        steps.append(Step(sample, tuple(f"{source.name}.{type_}" for type_ in types), accepted.worker))
    return steps


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery, as the receiver got it."""

    type: str  # full type
    subject: str | None
    milliseconds: float  # since the relay received the event
    problem: str | None  # why the signature is invalid, None for a valid one


class DemoReceiver:
    """Runs a `Receiver` in a thread while entered, and queues the deliveries."""

    def __init__(self, secret: Secret) -> None:
        self.arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self._secret = secret

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._server = Receiver((self._secret,), self._receive)
        self.url = self._server.url
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._server.shutdown)
        self._thread.join()
        self._server.server_close()

    def _receive(self, received: Received) -> None:
        envelope = decode(_envelope, received.body)
        waited = datetime.now(UTC) - envelope.timestamp
        arrival = Arrival(
            type=envelope.type,
            subject=envelope.subject,
            milliseconds=waited.total_seconds() * 1000,
            problem=received.problem,
        )
        self._loop.call_soon_threadsafe(self.arrivals.put_nowait, arrival)


class Narrator:
    """Prints the demo's lines; with colour only on a terminal."""

    def __init__(self, stream: TextIO, environ: Mapping[str, str]) -> None:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the terminal may not show every event type
        self._stream = stream
        plain = "NO_COLOR" in environ or environ.get("TERM") == "dumb" or not stream.isatty()
        self._colour = "FORCE_COLOR" in environ or not plain
        self._is_terminal = stream.isatty()

    def open(self, *, relay: str, admin: str, receiver: str, folder: Path) -> None:
        """Print the addresses and the folder of the demo."""
        self._line(self._paint(_BOLD, f"hookferry {__version__}") + " demo")
        self._line()
        self._line(f"  relay     {relay}")
        self._line(f"  metrics   {admin}/metrics")
        self._line(f"  receiver  {receiver}, verifies every signature")
        self._line(f"  state     {folder}, deleted at the end")
        self._line()

    def step(self, source: str, what: str, detail: str) -> None:
        """Print one step; `source` is empty except in a source's first step."""
        self._print(source, what, _cut(detail, self._room))

    def arrived(self, arrival: Arrival) -> None:
        """Print a delivery and whether its signature is valid."""
        about = f"{arrival.type} ({arrival.subject})" if arrival.subject else arrival.type
        if arrival.problem:
            self._print("", "refused", f"{about}, {self._paint(_RED, arrival.problem)}")
            return
        valid, took = "signature valid", f"{arrival.milliseconds:.0f} ms"
        if self._is_terminal:
            about = _cut(about, self._room - len(f", {valid}, {took}"))
        self._print("", "delivered", f"{about}, {self._paint(_GREEN, valid)}, {took}")

    def print_result(self, delivered: int, problems: Sequence[str]) -> None:
        """Print the result."""
        self._line()
        for problem in problems:
            self._line(self._paint(_RED, problem))
        if not problems:
            self._line(self._paint(_GREEN, f"{delivered} events delivered, every signature valid."))

    def print_request(self, relay: str, socket: Path) -> None:
        """Print a request to paste, and the command that opens the dashboard."""
        self._line("Send an event yourself; its delivery is shown here. Ctrl-C ends the demo.")
        self._line()
        self._line(
            f"curl -i {relay}/api/v1/events -H 'Authorization: Bearer {TOKEN}' "
            """-H 'Content-Type: application/json' -d '{"name":"hello.world","payload":{"from":"curl"}}'"""
        )
        self._line(f"relay ui --socket {socket}")
        self._line()

    @property
    def _room(self) -> int:
        """Characters of a detail; on a terminal, no line wraps."""
        return shutil.get_terminal_size().columns - _BESIDE if self._is_terminal else _WIDTH

    def _print(self, source: str, what: str, detail: str) -> None:
        self._line(f"{self._paint(_BOLD, f'{source:<10}')}{self._paint(_DIM, f'{what:<11}')}{detail}")

    def _paint(self, colour: str, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self._colour else text

    def _line(self, text: str = "") -> None:
        print(text, file=self._stream, flush=True)


def _cut(text: str, room: int) -> str:
    room = max(room, len("..."))
    return text if len(text) <= room else f"{text[: room - 3]}..."


class Story:
    """Sends each sample, waits for its delivery, and prints every step."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        narrator: Narrator,
        arrivals: asyncio.Queue[Arrival],
        config: Config,
        relay: str,
    ) -> None:
        self.delivered = 0  # deliveries with a valid signature
        self._session = session
        self._narrator = narrator
        self._arrivals = arrivals
        self._config = config
        self._relay = relay  # URL

    async def run(self) -> list[str]:
        """Send every sample once; return the problems, a sentence each.

        A worker is silent until it is offline, before it unregisters.
        """
        problems = []
        for name, source in self._config.sources.items():
            alive = False  # whether a worker has registered
            for step in steps_of(source):
                if alive and isinstance(step.worker, Unregister):
                    silence = f"no more heartbeats: offline after {OFFLINE_AFTER} s"
                    self._narrator.step(name, "silent", silence)
                    problems += await self._expect(f"{name}.worker.offline")
                alive |= isinstance(step.worker, Register)
                problems += await self._send(name, source, step)
        return problems

    async def watch(self) -> None:
        """Print deliveries until cancelled."""
        while True:
            self._show(await self._arrivals.get())

    async def _send(self, name: str, source: SourceConfig, step: Step) -> list[str]:
        sample = step.sample
        self._narrator.step(name, "sent", f"{sample.method} {sample.path}")
        query = f"?{sample.query}" if sample.query else ""
        request = msgspec.structs.replace(
            sample, target=sample.path + query, received_at=time.time_ns() // 1000
        )
        signed = source.settings.sign(request.with_headers({"Authorization": f"Bearer {TOKEN}"}))
        url = self._relay + signed.target
        try:
            async with self._session.request(
                signed.method, url, data=signed.body, headers=signed.headers
            ) as response:
                text = await response.text()
        except aiohttp.ClientError as error:
            return [f"{name}: cannot send {sample.path}: {error}"]
        self._narrator.step("", "response", f"{response.status} {text}")
        if not response.ok:
            return [f"{name}: {sample.path} returned {response.status}"]
        return [problem for type_ in step.types for problem in await self._expect(type_)]

    async def _expect(self, type_: str) -> list[str]:
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    arrival = await self._arrivals.get()
                    self._show(arrival)
                    if arrival.type == type_:
                        return [f"{type_}: {arrival.problem}"] if arrival.problem else []
        except TimeoutError:
            return [f"{type_} did not arrive within {PATIENCE:g} s"]

    def _show(self, arrival: Arrival) -> None:
        self.delivered += arrival.problem is None
        self._narrator.arrived(arrival)
