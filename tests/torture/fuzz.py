"""Mutated requests at the running daemon: each is answered in JSON, and what it acknowledges is delivered.

Run `python -m tests.torture.fuzz --requests 1000000`. Each request follows from the seed and its number, and
is sent in one of two ways:

* *framed*: head lines and body are mutated, but the request stays one that must be answered. It goes over a
  kept connection, and a heartbeat with a new worker id follows, whose answer must name that worker. So
  an answer that is missing, one too many, or another request's is detected.
* *broken*: any bytes are mutated. The sender then closes its side and reads until the daemon does: after any
bytes, the connection must end.

`--variant hangs` and `--variant corrupts` put a proxy in between that spoils one answer in 20; both must be
found.
"""

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import random
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from daemons import SERVE, SOURCES, Daemon, destination, write_config
from samples import read_samples
from stores import rows_of
from wire import CONTINUE, Answer, Wire, exchange, request

CONNECTIONS = 32
FILLING = 50  # events of 1.5 MB: SQLite caches up to 64 MiB of pages, which does not count as growth
SETTLED = (
    20_000  # requests, or a tenth of all: then code is loaded and caches are full, and memory is measured
)
PATIENCE = 10.0  # seconds for an answer, or an end
MOST_LOG = 2**20  # bytes
MOST_GROWTH = 16 * 2**20  # bytes
LONGEST = 4000  # bytes of a sample worth mutating: the few larger ones are about size alone
DRAIN = 120.0  # seconds for the last pending deliveries
PROBES = 97  # worker ids that take turns, so that an answer to another request shows
TOKEN = {"authorization": "Bearer worker-secret-token-12345"}
SECRET = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")  # of `daemon.destination`

ODDITIES = (
    b"\x00", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"%00", b"%ff",
    b"NaN", b"-1", b"1e999", b"18446744073709551616", b'"', b"{", b"[" * 50, b"}", b"\\ud800", b"null",
    b"../", b"//", b"?", b"HTTP/1.1", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Content-Encoding: gzip\r\n", b"Expect: 100-continue\r\n", b"Authorization: Bearer x\r\n",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
)  # fmt: skip

Mutation = Callable[[random.Random, bytes], bytes]


def flip(rand: random.Random, raw: bytes) -> bytes:
    """Change one byte."""
    at = rand.randrange(len(raw))
    return raw[:at] + bytes([rand.randrange(256)]) + raw[at + 1 :]


def cut(rand: random.Random, raw: bytes) -> bytes:
    """Remove a piece."""
    at = rand.randrange(len(raw))
    return raw[:at] + raw[at + rand.randrange(40) :]


def end(rand: random.Random, raw: bytes) -> bytes:
    """Cut off the end."""
    return raw[: rand.randrange(1, len(raw) + 1)]


def double(rand: random.Random, raw: bytes) -> bytes:
    """Repeat a piece."""
    at, size = rand.randrange(len(raw)), rand.randrange(200)
    return raw[: at + size] + raw[at:]


def insert(rand: random.Random, raw: bytes) -> bytes:
    """Insert odd bytes."""
    at = rand.randrange(len(raw))
    return raw[:at] + rand.choice(ODDITIES) + raw[at:]


def lengthen(rand: random.Random, raw: bytes) -> bytes:
    """Announce another length."""
    number = str(rand.choice((0, 1, rand.randrange(5000), 2**21 + 1, 2**64))).encode()
    return re.sub(rb"(?i)(content-length: *)[0-9]+", rb"\g<1>" + number, raw, count=1)


MUTATIONS: tuple[Mutation, ...] = (flip, flip, cut, end, double, insert, insert, lengthen)


def mutate(seed: int, number: int, samples: list[bytes]) -> bytes:
    """Return the request with this number."""
    rand = random.Random(f"{seed}:{number}")
    raw = rand.choice(samples)
    if rand.random() < 0.1:  # the head of one with the body of another
        raw = raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" + rand.choice(samples).partition(b"\r\n\r\n")[2]
    for _ in range(rand.choice((1, 1, 1, 2, 3, 8))):
        raw = rand.choice(MUTATIONS)(rand, raw) or b"\n"
    return raw


GENERIC = """
[sources.batch]
plugin = "generic"
path = "/fuzz/batch/{shop}"
verify = "none"
events = "{body:items}"
type = "item.{item:kind}"
subject = "{path:shop}"
key = "{item:id}"
context = { at = "{item:at}" }
max_body = "64 KiB"
handshakes = [
  { method = "GET", when = { "{query:mode}" = "on" }, reply = { json = { got = "{query:challenge}" } } },
]
[sources.form]
plugin = "generic"
path = "/fuzz/form"
verify = "none"
form_field = "payload"
type = "{body:event}"
reply = { json = { id = "{body:id}", event_id = "{event_id}" } }
"""
"""Sources of batches, handshakes and forms, which also take compressed bodies; the five kinds do not."""


def generic_samples() -> list[bytes]:
    """Return requests to the sources of `GENERIC`."""
    items = [{"kind": "sold", "id": f"i{number}", "at": 45000.0, "n": number} for number in range(20)]
    batches = [json.dumps({"items": items[:count]}).encode() for count in (0, 1, 3, 20)]
    boundary = "multipart/form-data; boundary=b"
    part = b'--b\r\nContent-Disposition: form-data; name="payload"\r\n\r\n{"event": "a", "id": 1}\r\n--b--'
    deflated = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    raw = deflated.compress(batches[2]) + deflated.flush()
    path, text = "/fuzz/batch/s1", "payload=%7B%22event%22%3A%22paid%22%2C%22id%22%3A1e2%7D&x=1"
    form = "application/x-www-form-urlencoded"
    return [
        *(request("POST", path, batch) for batch in batches),
        request("POST", path, gzip.compress(batches[3], mtime=0), content_encoding="gzip"),
        request("POST", path, zlib.compress(batches[3]), content_encoding="deflate"),
        request("POST", path, raw, content_encoding="deflate"),
        request("POST", path, gzip.compress(b" " * 65_530 + b"{}", mtime=0), content_encoding="gzip"),
        request("POST", path, gzip.compress(b" " * 100_000, mtime=0), content_encoding="gzip"),
        request("GET", f"{path}?mode=on&challenge=%C3%A91"),
        request("POST", "/fuzz/form", text.encode(), content_type=form),
        request("POST", "/fuzz/form", part, content_type=boundary),
        request("POST", "/fuzz/form", b'{"event": "json", "id": "x"}'),
    ]


HEADERS = (
    b"Expect: 100-continue", b"Connection: close", b"Connection: Upgrade\r\nUpgrade: h2c",
    b"Content-Encoding: gzip", b"Idempotency-Key: k", b"X-Request-Id: a b", b"Origin: null",
    b"X-Forwarded-For: 1.2.3.4:5, [::1]", b"X: \xff",
)  # fmt: skip


def framed(seed: int, number: int, samples: list[bytes]) -> bytes:
    """Return the request with this number, mutated within its lines and its body only."""
    rand = random.Random(f"{seed}:{number}")
    start, _, rest = rand.choice(samples).partition(b"\r\n")
    head, _, body = rest.partition(b"\r\n\r\n")
    if rand.random() < 0.1:
        body = rand.choice(samples).partition(b"\r\n\r\n")[2]
    lines = [
        line for line in head.split(b"\r\n") if not re.match(rb"(?i)content-length|transfer-enc|expect", line)
    ]
    for _ in range(rand.choice((0, 1, 1, 2))):
        at = rand.randrange(len(lines))
        lines[at] = _in_line(rand.choice(MUTATIONS)(rand, lines[at] or b"x"))
    for _ in range(rand.choice((0, 1, 1, 2, 3))):
        body = rand.choice(MUTATIONS)(rand, body or b"{}")
    if rand.random() < 0.2:
        method, target, version = start.split(b" ", 2)
        start = b" ".join(
            (method, _in_line(rand.choice(MUTATIONS)(rand, target)).replace(b" ", b""), version)
        )
    if rand.random() < 0.2:
        lines.append(rand.choice(HEADERS))
    if rand.random() < 0.05:
        lines.append(b"Content-Encoding: gzip")
        body = gzip.compress(body, mtime=0)
        if rand.random() < 0.5:
            body = rand.choice(MUTATIONS)(rand, body)
    if rand.random() < 0.1:
        lines.append(b"Transfer-Encoding: chunked")
        size = rand.randrange(1, 50)
        chunks = [body[at : at + size] for at in range(0, len(body), size)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
    else:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([start, *filter(None, lines), b"", body])


def _in_line(text: bytes) -> bytes:
    return re.sub(rb"[\r\n]", b"", text)


@dataclass
class Findings:
    """The results."""

    requests: int = 0
    answers: Counter[int] = field(default_factory=Counter)  # by status; 0: none came
    faults: list[str] = field(default_factory=list)  # each fault with the request that caused it
    acknowledged: set[str] = field(default_factory=set)  # events, as far as the answer names them
    arrived: Counter[str] = field(default_factory=Counter)  # events at the receiver
    stored: int = 0  # events
    logged: int = 0  # bytes
    growth: int = 0  # bytes of resident memory since it had settled

    @property
    def fine(self) -> bool:
        """Return whether there is no fault."""
        return not self.faults and self.logged < MOST_LOG and self.growth < MOST_GROWTH

    def fault(self, what: str, raw: bytes) -> None:
        """Note a fault; the first thousand are enough."""
        if len(self.faults) < 1000:
            self.faults.append(f"{what}, in answer to {raw!r}")

    def __str__(self) -> str:
        answers = ", ".join(f"{status or 'none'}: {count}" for status, count in sorted(self.answers.items()))
        return (
            f"{self.requests} requests ({answers}), {self.stored} events stored, {len(self.arrived)}"
            f" delivered, log {self.logged} bytes, memory {self.growth / 2**20:+.1f} MiB,"
            f" {len(self.faults)} faults"
        )


class Receiver(asyncio.Protocol):
    """A destination that checks each delivery: its signature, and that its body is JSON."""

    def __init__(self, found: Findings) -> None:
        self._found = found
        self._received = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Check a request once it is whole; the relay sends one at a time."""
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        fields = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
        }
        if not end or len(body) < int(fields["content-length"]):
            return
        self._received = b""
        event = fields["webhook-id"]
        self._found.arrived[event] += 1
        signed = f"{event}.{fields['webhook-timestamp']}.".encode() + body
        wanted = base64.b64encode(hmac.digest(SECRET, signed, hashlib.sha256)).decode()
        try:
            json.loads(body)
        except ValueError:
            self._found.fault("a delivery that is not JSON", body)
        if fields["webhook-signature"] != f"v1,{wanted}":
            self._found.fault("a delivery with a wrong signature", body)
        self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")


class Meddler:
    """A proxy before the daemon that holds back or spoils a share of the answers: both must be found."""

    def __init__(self, url: str, *, hangs: float = 0.0, corrupts: float = 0.0, seed: int = 1) -> None:
        self._address = url.removeprefix("http://").split(":")
        self._hangs, self._corrupts = hangs, corrupts
        self._rand = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, stack: AsyncExitStack) -> str:
        """Listen until the stack ends; return the address."""
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0)
        stack.push_async_callback(self._stop, server)
        host, port = server.sockets[0].getsockname()
        return f"http://{host}:{port}"

    async def _stop(self, server: asyncio.Server) -> None:
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._address)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass(reader, back))
                both.create_task(self._pass(there, writer, meddles=True))
        finally:
            for end in (writer, back):
                end.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, meddles: bool = False
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                if meddles and self._rand.random() < self._hangs:
                    await asyncio.Event().wait()  # until the end
                if meddles and self._rand.random() < self._corrupts:
                    at = self._rand.randrange(len(data))
                    data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                writer.write(data)
                await writer.drain()
            writer.write_eof()


class Fuzzer:
    """Sends requests on one connection, one after another."""

    def __init__(self, url: str, found: Findings, samples: list[bytes], seed: int, patience: float) -> None:
        self._url, self._found, self._samples, self._seed = url, found, samples, seed
        self._patience = patience
        self._wire: Wire | None = None  # kept from one framed request to the next

    async def send(self, number: int) -> None:
        """Send the request with this number, framed or broken."""
        if number % 2:
            await self._send_framed(number, framed(self._seed, number, self._samples))
        else:
            await self._send_broken(mutate(self._seed, number, self._samples))

    async def close(self) -> None:
        """Hang up."""
        if self._wire is not None:
            await self._wire.hang_up()
            self._wire = None

    async def _send_framed(self, number: int, raw: bytes) -> None:
        """Send a request that must be answered once, then a heartbeat whose answer must be its own."""
        try:
            async with asyncio.timeout(self._patience):
                answer = await self._ask(raw)
                if self._goes_on(answer):
                    worker = f"probe-{number % PROBES}"
                    beat = request("PUT", f"/api/v1/workers/{worker}/heartbeat", b"{}", **TOKEN)
                    answer = await self._ask(beat)
                    if answer.status != 200 or answer.json["data"]["workerId"] != worker:
                        self._found.fault(f"{worker} was answered with {answer}", raw)
                if not self._goes_on(answer):
                    await self.close()
        except TimeoutError:
            await self._fail("no answer", raw)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            await self._fail(f"{error!r} instead of an answer", raw)
        except (AssertionError, KeyError, ValueError, asyncio.LimitOverrunError) as error:
            await self._fail(f"{error!r} in the answer", raw)

    @staticmethod
    def _goes_on(answer: Answer) -> bool:
        return answer.headers.get("connection") != "close"

    async def _fail(self, what: str, raw: bytes) -> None:
        self._found.answers[0] += 1
        self._found.fault(what, raw)
        await self.close()

    async def _ask(self, raw: bytes) -> Answer:
        if self._wire is None:
            self._wire = await Wire.open(self._url)
        await self._wire.send(raw)
        while (answer := await self._wire.answer(bodiless=raw.startswith(b"HEAD "))).status == CONTINUE:
            pass
        self._judge(answer, raw)
        return answer

    async def _send_broken(self, raw: bytes) -> None:
        """Send anything, close this side, and read until the daemon closes its own."""
        received, answers = b"", 0
        try:
            async with asyncio.timeout(self._patience), await Wire.open(self._url) as wire:
                await wire.send(raw)
                wire.writer.write_eof()
                while data := await wire.reader.read(65_536):
                    received += data
        except TimeoutError:
            self._found.fault("no end", raw)
        except OSError:
            pass  # the daemon closed while bytes that it does not want were on their way
        else:
            answers = await self._judge_all(received, raw)
        self._found.answers[0] += not answers

    async def _judge_all(self, received: bytes, raw: bytes) -> int:
        """Judge the answers in all that the daemon sent until it closed; return how many there are."""
        reader, answers = asyncio.StreamReader(), 0
        reader.feed_data(received)
        reader.feed_eof()
        try:
            while not reader.at_eof():
                answer = await Wire(reader, None).answer(bodiless=raw.lstrip().startswith(b"HEAD"))
                answers += 1
                self._judge(answer, raw)
        except (AssertionError, KeyError, ValueError, EOFError, asyncio.LimitOverrunError) as error:
            self._found.fault(f"{error!r} in the answer", raw)
        return answers

    def _judge(self, answer: Answer, raw: bytes) -> None:
        self._found.answers[answer.status] += 1
        if answer.status >= 500 and answer.status != 503:
            self._found.fault(f"{answer.status}", raw)
        if answer.status not in KNOWN:
            self._found.fault(f"a status {answer.status}", raw)
        if not answer.body:
            return
        body = json.loads(answer.body)
        if answer.status in (200, 202) and isinstance(body, dict):
            event = body.get("event_id")
            if isinstance(event, str) and event:  # "" of an empty batch
                self._found.acknowledged.add(f"evt_{event.removeprefix('evt_')}")


KNOWN = {100, 200, 202, 204, 400, 401, 403, 404, 405, 408, 409, 413, 415, 417, 422, 429, 500, 503}


async def torture(
    folder: Path,
    requests: int,
    *,
    seed: int,
    patience: float = PATIENCE,
    report: Callable[[Findings], None] = lambda _found: None,
    **meddling: float,
) -> Findings:
    """Send `requests` mutated requests to a daemon with a destination, and check the daemon.

    `meddling` is that of a `Meddler` between them.
    """
    samples = [sample.request for sample in read_samples() if len(sample.request) < LONGEST]
    samples += 5 * generic_samples()
    found = Findings()
    async with AsyncExitStack() as stack:
        loop = asyncio.get_running_loop()
        receiver = await loop.create_server(lambda: Receiver(found), "127.0.0.1", 0)
        stack.callback(receiver.close)
        host, port = receiver.sockets[0].getsockname()
        config = write_config(folder, SOURCES, GENERIC, destination("crm", f"http://{host}:{port}/hook"))
        daemon = await stack.enter_async_context(Daemon(config, SERVE))
        url = await Meddler(daemon.url, **meddling).serve(stack) if meddling else daemon.url
        if requests > SETTLED:
            for number in range(FILLING):
                body = json.dumps(
                    {"event_type": "fill", "session_id": f"{number}", "payload": {"x": "x" * 1_500_000}}
                )
                answer = await exchange(daemon.url, request("POST", "/v1/events", body.encode()))
                found.acknowledged.add(answer.json["event_id"])
        numbers = iter(range(requests))
        resident = 0

        async def work() -> None:
            nonlocal resident
            fuzzer = Fuzzer(url, found, samples, seed, patience)
            for number in numbers:
                await fuzzer.send(number)
                found.requests += 1
                if found.requests == min(SETTLED, max(1, requests // 10)):
                    resident = daemon.resident()
                if found.requests % 100 == 0:
                    found.growth = daemon.resident() - resident if resident else 0
                    found.logged = daemon.logged
                report(found)
            await fuzzer.close()

        await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
        await _reckon(daemon, found, resident)
    return found


async def _reckon(daemon: Daemon, found: Findings, resident: int) -> None:
    """Wait until nothing is pending, stop the daemon, and compare acknowledged and arrived events."""
    async with asyncio.timeout(DRAIN):
        pending = "/api/deliveries?state=pending&limit=1"
        while (await daemon.operator("GET", pending))["items"]:  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.1)
    found.growth, found.logged = daemon.resident() - resident, daemon.logged
    if "Traceback" in daemon.output or '"exception"' in daemon.output:
        found.faults.append(f"a traceback in the log:\n{daemon.output}")
    if (code := await daemon.stop()) != 0:
        found.faults.append(f"exit code {code}")
    stored = {row[0] for row in rows_of(daemon.config, "SELECT public_id FROM events")}
    found.stored = len(stored)
    for what, missing in (
        ("acknowledged and not stored", found.acknowledged - stored),
        ("stored and not delivered", stored - found.arrived.keys()),
        ("delivered and not stored", found.arrived.keys() - stored),
    ):
        if missing:
            found.faults.append(f"{len(missing)} events were {what}: {sorted(missing)[:3]}")


VARIANTS = {"honest": {}, "hangs": {"hangs": 0.05}, "corrupts": {"corrupts": 0.05}}


@click.command()
@click.option("--requests", default=1_000_000, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--variant", type=click.Choice(list(VARIANTS)), default="honest", show_default=True)
def main(requests: int, seed: int, variant: str) -> None:
    """Start a daemon and send mutated requests to it."""

    def report(found: Findings) -> None:
        if found.requests % 10_000 == 0:
            click.echo(found)

    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(torture(Path(folder), requests, seed=seed, report=report, **VARIANTS[variant]))
    click.echo(found)
    for fault in found.faults[:20]:
        click.echo(fault)
    sys.exit(0 if found.fine else 1)


if __name__ == "__main__":
    main()
