"""Hostile bodies and headers at generic sources: every kind of mapping, template, reply and signature.

Run `python -m tests.torture.generic --cases 10000`. Each case follows from the seed and its number. It is
judged twice: by the source's functions in this process, and by a running relay, which must answer with the
same status.

* No request is answered with a 5xx, and no exception other than a refusal leaves the source.
* The envelope of an accepted event has each of its fields once, whatever the body contains. Its type, key and
  data are those that a second, simple implementation finds in the request.
* Text from a request is never read as a template, and a header that no template names appears nowhere.
* A signed request that was changed afterwards is refused.
"""

import asyncio
import base64
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import click
import msgspec
from daemons import running, write_config
from multidict import CIMultiDict, CIMultiDictProxy
from wire import Wire

from relay.errors import MethodNotAllowed, PluginFailed, Refusal
from relay.formats import FORMATS
from relay.ingest.event import make_event
from relay.ingest.replies import answer
from relay.ingest.routes import Routes, mounts_of
from relay.model import Receipt
from relay.plugin_loading.loader import load
from relay.source import Accepted, Incoming, Reply

CANARY = "canary-5f1d"  # the value of a header that no template names
SECRET = "s3cret-91c4"
KEY = "whsec_" + base64.b64encode(b"k" * 32).decode()
FIELDS = ["id", "type", "timestamp", "source", "subject", "data", "context"]
MOST_BODY = 64 * 1024

CONFIG = f"""
[server]
max_body = "64 KiB"
[sources.mapped]
plugin = "generic"
path = ["/mapped/{{store}}", "/mapped"]
verify = "none"
type = "{{header:X-Topic}}.{{body:action}}"
subject = "{{path:store}}/{{query:s}}"
key = "{{body:id}}"
timestamp = "{{body:at}}"
context = {{ store = "{{path:store}}", deep = "{{body:a.0.'b.c'}}", text = "<{{body:id}}> {{method}}", q = "{{query:q}}" }}
data = "{{body:payload}}"
reply = {{ status = 202, json = {{ echo = "{{body:action}}", "{{body:id}}" = ["{{header:X-Topic}}", "{{event_id}}", "a {{body:id}}"] }} }}
[sources.filtered]
plugin = "generic"
path = "/filtered"
verify = "none"
type = "{{body:action|lower|truncate:9|default:none}}"
subject = "{{body:at|date:%Y-%m-%d}}"
context = {{ json = "{{body:payload|json|truncate:40}}", up = "{{header:X-Topic|upper}}" }}
reply = {{ text = "{{body:action}} {{header:X-Topic}}", headers = {{ X-Echo = "{{header:X-Topic}}{{body:id}}" }} }}
[sources.batch]
plugin = "generic"
path = "/batch"
verify = "none"
events = "{{body:items}}"
type = "{{body:action}}-{{item:action}}"
subject = "{{item:id}}"
key = "{{item:id}}.{{header:X-Topic}}"
max_events = 20
[sources.form]
plugin = "generic"
path = "/form"
verify = "none"
form_field = "payload"
type = "{{form:action|default:none}}.{{body:action|default:none}}"
key = "{{form:id}}"
first_of_list = ["form:id"]
[sources.text]
plugin = "generic"
path = "/text"
verify = "none"
body = "text"
type = "text"
subject = "{{body|truncate:20}}"
[sources.raw]
plugin = "generic"
path = "/raw"
verify = "none"
body = "raw"
type = "raw.{{body:content_type|truncate:30}}"
[sources.query]
plugin = "generic"
path = "/query/{{rest:path}}"
methods = ["GET", "POST", "DELETE"]
verify = "none"
type = "q.{{query:action}}"
subject = "{{path:rest|truncate:99}}"
data = "{{query:q|default:-}}"
[sources.signed]
plugin = "generic"
path = "/signed/{{store}}"
public_url = "https://hooks.example"
secrets = ["{SECRET}", "another"]
type = "signed.{{body:action|default:none|truncate:99}}"
[sources.signed.verify.hmac]
header = "X-Sign"
separator = ","
prefix = "v1="
timestamp_field = "t="
tolerance = "1h"
signed = "{{method}}{{url}}{{timestamp}}.{{header:X-Topic}}.{{path:store}}.{{body}}"
[sources.twilio]
plugin = "generic"
path = "/twilio"
public_url = "https://hooks.example"
secrets = ["{SECRET}"]
type = "twilio"
verify = {{ hmac = {{ header = "X-Sign", algorithm = "sha1", encoding = "base64", signed = "{{url}}{{form:sorted}}", body_sha256 = "h" }} }}
[sources.standard]
plugin = "generic"
path = "/standard"
secrets = ["{KEY}"]
verify = "standard-webhooks"
type = "standard"
[sources.basic]
plugin = "generic"
path = "/basic"
secrets = ["{SECRET}"]
verify = {{ basic = {{ user = "u" }} }}
type = "basic"
[sources.token]
plugin = "generic"
path = "/token"
secrets = ["{SECRET}"]
verify = {{ api_key = {{ value = "{{item:token}}" }} }}
events = "{{body:items}}"
type = "token"
data = "{{item:id|default:-}}"
[sources.greeting]
plugin = "generic"
path = "/greeting"
secrets = ["{SECRET}"]
verify = {{ hmac = {{ header = "X-Sign" }} }}
type = "greeting"
verify_tokens = ["{SECRET}"]
handshakes = [
  {{ method = "GET", when = {{ "{{query:s}}" = "subscribe" }}, token = "{{query:action}}", verified = false, reply = {{ text = "{{query:q}}" }} }},
  {{ method = "POST", when = {{ "{{body:action}}" = "*" }}, reply = {{ json = {{ challenge = "{{body:id}}", mac = "{{body:action|hmac}}" }} }} }},
  {{ method = "HEAD", verified = false, reply = {{ empty = true }} }},
]
"""  # noqa: E501 - lines of TOML
PATHS = {
    "mapped": ("/mapped/berlin", "/mapped", "/mapped/%7Bbody%3Aid%7D", "/mapped/%FF"),
    "query": ("/query/a", "/query/a/b/c", "/query/%7B%7D", "/query/a%2F..%2Fb"),
    "signed": ("/signed/berlin", "/signed/%E2%82%AC"),
}
FORM = "application/x-www-form-urlencoded"
CONTENT_TYPES = (
    "application/json", FORM, f"{FORM}; charset=utf-8", "multipart/form-data; boundary=b", "text/plain",
    "{x}", "", "multipart/form-data", "a" * 300,
)  # fmt: skip
TEXTS = (
    "push", "opened", "", " ", "é", "{body:id}", "{{", "}}", "{header:X-Canary}", "${7*7}", "%s%n",
    "{item:id}", "\x00", "a\r\nX-Evil: 1", '","type":"forged', '"}', "\\", "\u2028", "\U0001d54f" * 70,
    "x" * 300, "subscribe", "../..", "{event_id}", "\x7f", "NaN", "null", "1700000000",
    "2026-01-02T03:04:05Z", SECRET,
)  # fmt: skip
ODD = (
    b'{"type":"forged"}', b',"type":"forged","id":"forged"', b"\\ud83d", b"\\u0000", b"\xff",
    b"\xef\xbb\xbf", b"NaN", b"1e999", b"9" * 400, b"[" * 2000, b"null", b'"', b"}", b"{", b"&payload=1",
    b"%00", b"%FF", b"\r\n--b--\r\n", b"\x1f\x8b", b"{body:id}",
)  # fmt: skip


def some_value(rand: random.Random, depth: int = 0) -> bytes:
    """Return a JSON value, sometimes a hostile one."""
    kind = rand.randrange(10 if depth < 3 else 6)
    if kind < 3:
        return json.dumps(rand.choice(TEXTS), ensure_ascii=rand.random() < 0.5).encode()
    if kind == 3:
        return rand.choice(
            (b"1", b"-0", b"1.50", b"1e400", b"9" * 400, b"1700000000", b"12345678901234567890")
        )
    if kind == 4:
        return rand.choice((b"true", b"false", b"null", b'"Bob \\ud83d"', b'"\\u0000"'))
    if kind < 8:
        return b"[%b]" % b",".join(some_value(rand, depth + 1) for _ in range(rand.randrange(4)))
    return some_object(rand, depth + 1)


def some_object(rand: random.Random, depth: int = 0) -> bytes:
    """Return an object with the keys that the templates name, some of them twice or with other keys."""
    names = ["action", "id", "at", "payload", "a", "items", "token", "type", "data", "{body:id}", "b.c", "é"]
    parts = []
    usual = ["token"] if depth and rand.random() < 0.6 else []
    usual += [name for name in ("action", "id", "payload", "items") if not depth and rand.random() < 0.8]
    for name in usual + rand.choices(names, k=rand.randrange(5)):
        value = some_value(rand, depth + 1)
        if name == "items" and rand.random() < 0.8:
            items = (
                [some_object(rand, depth + 1) for _ in range(rand.choice((0, 1, 2, 3, 21)))]
                if depth < 2
                else []
            )
            value = b"[%b]" % b",".join(items)
        if name in ("action", "id") and rand.random() < 0.6:
            value = json.dumps(rand.choice((*TEXTS[:11], 7, 1.5, True, None))).encode()
        if name == "a" and rand.random() < 0.5:
            value = b'[{"b.c": %b}]' % value
        if name == "token" and rand.random() < 0.9:
            value = json.dumps(SECRET).encode()
        parts.append(json.dumps(name).encode() + b": " + value)
    return b"{%b}" % b", ".join(parts)


def some_form(rand: random.Random) -> bytes:
    """Return a form with the fields that the templates name."""
    fields = []
    for _ in range(rand.randrange(6)):
        name = rand.choice(("payload", "id", "action", "x", "%FF"))
        value = some_object(rand) if name == "payload" else rand.choice(TEXTS).encode()
        fields.append(name.encode() + b"=" + b"".join(b"%%%02X" % byte for byte in value))
    return b"&".join(fields)


def mutated(rand: random.Random, body: bytes) -> bytes:
    """Return a body with some bytes changed, lost, doubled or added."""
    for _ in range(rand.choice((0, 0, 1, 1, 3))):
        at = rand.randrange(len(body) + 1)
        change = rand.randrange(4)
        if change == 0:
            body = body[:at] + bytes([rand.randrange(256)]) + body[at + 1 :]
        elif change == 1:
            body = body[:at] + body[at + rand.randrange(30) :]
        else:
            body = body[:at] + rand.choice(ODD) + body[at:]
    return body[:MOST_BODY]


@dataclass
class Case:
    """One request, and whether it was changed after it was signed."""

    source: str
    incoming: Incoming
    changed: bool = False

    @property
    def wire(self) -> bytes:
        """The bytes of the request."""
        request = self.incoming
        lines = [f"{request.method} {request.target} HTTP/1.1", "Host: relay.test"]
        lines += [f"{name}: {value}" for name, value in request.headers.items()]
        head = "\r\n".join([*lines, f"Content-Length: {len(request.body)}", "", ""])
        return head.encode("utf-8", "surrogateescape") + request.body


def make_case(rand: random.Random, sources: dict, routes: Routes) -> Case:
    """Return a case."""
    name = rand.choice(sorted(sources))
    path = rand.choice(PATHS.get(name, (f"/{name}",)))
    method = (
        "POST"
        if name not in ("query", "greeting") or rand.random() < 0.1
        else rand.choice(("GET", "HEAD", "POST"))
    )
    body = b"" if method in ("GET", "HEAD") else some_object(rand)
    headers: list[tuple[str, str]] = [("X-Canary", CANARY)]
    content_type = rand.choice(CONTENT_TYPES) if rand.random() < 0.3 else "application/json"
    if name in ("form", "twilio") and rand.random() < 0.8 and body:
        body, content_type = some_form(rand), FORM
    if content_type:
        headers.append(("Content-Type", content_type))
    topics = rand.choices(TEXTS, k=rand.choice((0, 1, 1, 1, 1, 2)))
    headers += [("X-Topic", _header(topic, rand)) for topic in topics]
    query = "&".join(
        f"{rand.choice(('s', 'q', 'action', 'h') * 9 + ('%FF',))}={_percent(rand.choice(TEXTS))}{_raw(rand)}"
        for _ in range(rand.choice((0, 1, 2, 3)))
    )
    if rand.random() < 0.5:
        body = mutated(rand, body) if method not in ("GET", "HEAD") else body
    request = Incoming(
        method=method,
        path=path,
        headers=CIMultiDictProxy(CIMultiDict(headers)),
        body=body,
        query=query,
        target=f"{path}?{query}" if query else path,
        received_at=time.time_ns() // 1000,
        find_remote=lambda: "127.0.0.1",
    )
    case = Case(name, request)
    if sources[name].verification != "none" and rand.random() < 0.9:
        with suppress(Refusal):  # a part of what is signed may be missing
            case.incoming = sources[name].sign(_routed(routes, request))
            if rand.random() < 0.4:
                other = mutated(rand, case.incoming.body)
                case.changed = other != case.incoming.body and name in ("signed", "standard", "greeting")
                case.incoming = msgspec.structs.replace(case.incoming, body=other)
    return case


def _routed(routes: Routes, request: Incoming) -> Incoming:
    """Return a request with the values of its path."""
    with suppress(Refusal):
        return msgspec.structs.replace(request, params=routes.find(request.path, request.method).params)
    return request


def _header(text: str, rand: random.Random) -> str:
    clean = "".join(each for each in text if each >= " " and each != "\x7f").strip()
    return clean + ("\udcff" if rand.random() < 0.05 else "")


def _raw(rand: random.Random) -> str:
    """Return, in some cases, a byte that a URL must not contain."""
    return rand.choice(("\udcff", "\u00e9")) if rand.random() < 0.03 else ""


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


# --- the judgement in this process ------------------------------------------------------------------------


@dataclass
class Verdict:
    """The result of the source's functions for a case."""

    status: int
    events: list = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def judge(case: Case, routes: Routes) -> Verdict:
    """Run the functions of a source as the relay does."""
    try:
        match = routes.find(case.incoming.path, case.incoming.method)
        incoming = case.incoming = msgspec.structs.replace(case.incoming, params=match.params)
        handler = match.handlers.get(incoming.method)
        if handler is None:
            return Verdict(MethodNotAllowed.status)
        source = match.mount.source
        source.screen(incoming)
        head = incoming if source.needs_body() else msgspec.structs.replace(incoming, body=b"")
        reply = source.handshake(head)
        if reply is None:
            source.verify(head)
            reply = handler(incoming)
        accepted = Accepted(reply=reply) if isinstance(reply, Reply) else reply
        events = [accepted.event] if accepted.event is not None else list(accepted.events)
        stored = [
            make_event(match.mount, each, incoming, incoming.received_at, is_item=accepted.event is None)
            for each in events
        ]
        receipt = Receipt(event_id=stored[0].public_id) if stored else Receipt()
        response = answer(accepted, receipt)
        verdict = Verdict(response.status, list(zip(events, stored, strict=True)))
        if CANARY.encode() in response.body or CANARY in str(dict(response.headers)):
            verdict.faults.append("the reply contains a header that no template names")
    except PluginFailed as error:
        return Verdict(500, faults=[f"plugin failed: {error.__cause__!r}"])
    except Refusal as refusal:
        return Verdict(refusal.status)
    except Exception as error:  # noqa: BLE001 - that is the question
        return Verdict(500, faults=[f"raised {error!r}"])
    if case.changed and verdict.events:
        verdict.faults.append("a changed body was accepted")
    for event, record in verdict.events:
        verdict.faults += envelope_faults(case, event, record)
    verdict.faults += [*mapping_faults(case, verdict)]
    return verdict


def envelope_faults(case: Case, event, record):
    """Yield the faults of an event's envelope."""
    pairs = json.loads(
        FORMATS["standard"].render(record), object_pairs_hook=list, parse_int=str, parse_float=str
    )
    if [name for name, _ in pairs] != FIELDS:
        yield f"the envelope has the fields {[name for name, _ in pairs]}"
    envelope = dict(pairs)
    if envelope["id"] != record.public_id or envelope["source"] != case.source:
        yield "the envelope's id or source is forged"
    if not envelope["type"].startswith(f"{case.source}.") or not envelope["type"].isprintable():
        yield f"the type is {envelope['type']!r}"
    context = json.dumps(envelope["context"])
    if CANARY in f"{envelope['type']}{envelope['subject']}{context}{event.key}":
        yield "an event contains a header that no template names"
    if event.key == "":
        yield "an empty key"


def mapping_faults(case: Case, verdict: Verdict):
    """Yield the differences between the events of `mapped` and `batch` and the result of a simple reader."""
    if case.source not in ("mapped", "batch") or b"\\ud" in case.incoming.body.lower() or not verdict.events:
        return
    body = json.loads(case.incoming.body, parse_int=Number, parse_float=Number)
    topic = case.incoming.header("X-Topic")
    action = text_of(body.get("action") if isinstance(body, dict) else None)
    if case.source == "mapped":
        [(event, record)] = verdict.events
        expected = ".".join(part for part in (topic, action) if part)
        if event.type != expected:
            yield f"type {event.type!r}, expected {expected!r}"
        if json.loads(record.data, parse_int=Number, parse_float=Number) != body["payload"]:
            yield "other data than in the body"
        if (event.key or "") != text_of(body.get("id")).strip() and text_of(body.get("id")).strip():
            yield f"key {event.key!r}, expected {text_of(body.get('id'))!r}"
        return
    for (event, record), item in zip(verdict.events, body["items"], strict=True):
        if json.loads(record.data, parse_int=Number, parse_float=Number) != item:
            yield "an item's data differ"
        own = text_of(item.get("id") if isinstance(item, dict) else None)
        if event.key != (f"{own}.{topic}" if own and topic else None):
            yield f"key {event.key!r} of an item with id {own!r} and topic {topic!r}"


class Number(str):
    """A number as written."""

    __slots__ = ()


def text_of(value) -> str:
    """Return a JSON value inside text."""
    if isinstance(value, str):
        return str(value)
    return {None: "", True: "true", False: "false"}[value]


# --- all cases --------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """The result."""

    faults: list[str] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    accepted: Counter = field(default_factory=Counter)  # events by source


async def torture(folder: Path, cases: int, *, seed: int = 1) -> Findings:
    """Judge `cases` cases, in this process and by a running relay."""
    path = write_config(folder, CONFIG.replace('[server]\nmax_body = "64 KiB"\n', ""))
    setup = load(path)
    found = Findings()
    async with running(path) as relay:
        sources = {name: each.settings for name, each in setup.config.sources.items()}
        routes = Routes(mounts_of(setup.config.sources))
        wire = await Wire.open(relay.addresses.public)
        for number in range(cases):
            rand = random.Random(f"{seed}:{number}")
            case = make_case(rand, sources, routes)
            verdict = judge(case, routes)
            found.statuses[verdict.status] += 1
            found.accepted[case.source] += len(verdict.events)
            found.faults += [f"case {number} ({case.source}): {fault}" for fault in verdict.faults]
            await wire.send(case.wire)
            try:
                reply = await asyncio.wait_for(wire.answer(bodiless=case.incoming.method == "HEAD"), 30)
            except (asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
                found.faults.append(f"case {number} ({case.source}): no answer: {error!r}")
                wire = await Wire.open(relay.addresses.public)
                continue
            expected = verdict.status if case.incoming.target.isascii() else 400  # by the listener
            if reply.status >= 500 or reply.status != expected:
                text = f"status {reply.status}, expected {expected}: {reply.body[:200]!r}"
                found.faults.append(f"case {number} ({case.source}): {text}")
            if reply.headers.get("connection") == "close":
                await wire.hang_up()
                wire = await Wire.open(relay.addresses.public)
        await wire.hang_up()
    return found


@click.command()
@click.option("--cases", default=10_000, show_default=True, help="Requests to judge.")
@click.option("--seed", default=1, show_default=True, help="Other requests with another seed.")
def main(cases: int, seed: int) -> None:
    """Send hostile bodies and headers to generic sources."""
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(torture(Path(folder), cases, seed=seed))
    for fault in found.faults[:50]:
        click.echo(fault)
    click.echo(
        f"{cases} cases, statuses {dict(sorted(found.statuses.items()))}, events {dict(found.accepted)}"
    )
    sys.exit(bool(found.faults))


if __name__ == "__main__":
    main()
