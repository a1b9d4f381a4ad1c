"""Every recorded sample, replayed without a socket: request bytes in, reply and effects out."""

import re
from typing import Any

import msgspec
import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from samples import ROOT, Sample, like, read_samples, sources

from relay.base.ids import EVENT, new_id
from relay.base.json_text import read
from relay.config.schema import SourceConfig, WorkerRules
from relay.errors import MethodNotAllowed, Refusal, TooLarge, UnsupportedEncoding
from relay.ingest.routes import Mount, Routes
from relay.model import Receipt, SessionSeen, Unregister, WorkerChange
from relay.source import Accepted, Event, Incoming, Reply, check_type
from relay.workers.rules import Now, apply

SAMPLES = read_samples()
NOW = 1_700_000_000_000_000
MOUNTS = tuple(
    Mount(name=kind, source=source, config=SourceConfig(name=kind, plugin=kind))
    for kind, source in sources().items()
)
ROUTES = Routes(MOUNTS)


def parse(raw: bytes) -> Incoming:
    """Read a request the way the server does: header values may hold surrogates."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("utf-8", "surrogateescape").split("\r\n")
    method, target, version = first.split(" ")
    assert version == "HTTP/1.1"
    headers: CIMultiDict[str] = CIMultiDict()
    for line in lines:
        name, _, value = line.partition(":")
        headers.add(name, value.strip())
    path, _, query = target.partition("?")
    return Incoming(method=method, path=path, headers=CIMultiDictProxy(headers), body=body, query=query)


def serve(incoming: Incoming) -> Accepted | Reply:
    """Do the steps between the socket and the store."""
    match = ROUTES.find(incoming.path, incoming.method)
    handler = match.handlers.get(incoming.method)
    if handler is None:
        raise MethodNotAllowed(allow=tuple(sorted(match.handlers)))
    if incoming.header("Content-Encoding"):
        raise UnsupportedEncoding
    if len(incoming.body) > match.mount.config.max_body:
        raise TooLarge
    incoming = msgspec.structs.replace(incoming, params=match.params)
    match.mount.source.verify(incoming)
    accepted = handler(incoming)
    if isinstance(accepted, Accepted) and accepted.event is not None:
        check_type(accepted.event.type)
    return accepted


def replay(incoming: Incoming) -> tuple[Reply, Event | None, WorkerChange | None]:
    try:
        accepted = serve(incoming)
    except Refusal as refusal:
        mount = ROUTES.owner(incoming.path)
        assert mount is not None
        reply = mount.source.refuse(refusal, incoming)
        if isinstance(refusal, MethodNotAllowed):
            reply = msgspec.structs.replace(reply, headers={"Allow": ", ".join(refusal.allow)})
        return reply, None, None
    if isinstance(accepted, Reply):
        return accepted, None, None
    receipt = Receipt(event_id=new_id(EVENT, NOW) if accepted.event else "")
    reply = accepted.reply(receipt) if callable(accepted.reply) else accepted.reply
    return reply if isinstance(reply, Reply) else Reply(body=reply), accepted.event, accepted.worker


def as_json(value: Any) -> Any:
    return read(msgspec.json.encode(value))


def worker_of(change: WorkerChange, asked: dict[str, Any]) -> dict[str, Any]:
    """Return a worker's row after a change to an empty registry, with the fields of the sample."""
    found = {"change": msgspec.to_builtins(change)["type"], "id": change.worker_id}
    if isinstance(change, Unregister):
        return found
    row = apply(None, change, "whatsapp", Now(wall=NOW, steady=NOW), WorkerRules()).worker
    return {**{name: as_json(getattr(row, name)) for name in asked if name != "change"}, **found}


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_recorded_request_gets_its_recorded_reply_and_event(sample: Sample):
    expect = sample.expect
    reply, event, change = replay(parse(sample.request))
    assert (reply.status, dict(reply.headers)) == (expect.status, expect.headers)
    assert like(as_json(reply.body), expect.body), as_json(reply.body)
    if expect.event is None:
        assert event is None
    else:
        assert event is not None
        assert f"{sample.kind}.{event.type}" == expect.event.type
        assert event.subject == expect.event.subject
        assert like(as_json(event.data), expect.event.data), as_json(event.data)
        assert like(as_json(event.context), expect.event.context), as_json(event.context)
    if expect.worker is None:  # a session's event changes a worker's row, and makes none
        assert change is None or isinstance(change, SessionSeen)
    else:
        assert change is not None
        assert worker_of(change, expect.worker) == expect.worker


@pytest.mark.parametrize("mount", MOUNTS, ids=lambda mount: mount.name)
def test_every_route_has_a_sample_that_it_accepts(mount: Mount):
    reached = []
    for sample in SAMPLES:
        if sample.expect.status < 300:
            incoming = parse(sample.request)
            handler = ROUTES.find(incoming.path).handlers[incoming.method]
            reached.append((incoming.method, incoming.path, handler))
    for method, template, name in mount.source.routes():
        path = re.compile(re.sub(r"\{[\w:]+\}", "[^/]+", template))
        handler = getattr(mount.source, name)
        assert any((m, h) == (method, handler) and path.fullmatch(p) for m, p, h in reached), template


def test_every_sample_belongs_to_a_source_and_has_a_reason():
    assert {folder.name for folder in ROOT.iterdir()} == set(sources())
    assert all(sample.expect.why for sample in SAMPLES)


@pytest.mark.parametrize("mount", MOUNTS, ids=lambda mount: mount.name)
def test_the_documented_samples_of_a_source_are_accepted(mount: Mount):
    assert mount.source.samples()
    for incoming in mount.source.samples():
        assert incoming.header("Authorization") == ""
        match = ROUTES.find(incoming.path)
        assert match.mount is mount
        assert match.params == incoming.params
        assert isinstance(match.handlers[incoming.method](incoming), Accepted)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ("evt_1", "<event_id>"),
        ("evt_1", "<uuid>"),
        (1, True),
        (1.0, 1),
        ({"a": 1, "b": 2}, {"a": 1}),
        ("<uuid>", "<uuid>"),
    ],
)
def test_the_comparison_of_samples_can_fail(actual: Any, expected: Any):
    assert not like(actual, expected)
