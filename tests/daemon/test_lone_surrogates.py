r"""Half an emoji in an event, as Node writes it (`"Bob \ud83d"`): no source loses the event."""

import json

import msgspec
import pytest
import pytest_asyncio
from commands import Commands
from daemons import SOURCES, Recorder, destination, running, write_config
from support import until
from wire import request

DEV, WORKER, COMPOZY = (
    {"Authorization": f"Bearer {token}"} for token in ("dev-token", "worker-secret-token-12345", "test-token")
)
FORMATS = ("standard", "cloudevents", "raw", "slack", "discord")
BOB = rb'"Bob \ud83d"'
CARELESS = r'''
import json
from relay.hookspecs import hookimpl
from relay.source import Accepted, Event, Heartbeat, Session, Source, route

class Careless(Source, kind="careless", owns=("/careless",)):
    """Reads JSON by itself, so that its strings hold lone surrogates."""

    @route("POST", "/careless")
    def event(self, incoming):
        sent = json.loads(incoming.body)
        name = sent["name"]
        event = Event(type=f"a.{name}", subject=name, data=sent, context={"name": name}, key=name)
        return Accepted(event=event, reply={"name": name})

    @route("PUT", "/careless/{worker}")
    def beat(self, incoming):
        name = json.loads(incoming.body)["name"]
        sessions = (Session(id=name, name=name),)
        worker = incoming.params["worker"]
        change = Heartbeat(worker_id=worker, version=name, counts={name: 1}, sessions=sessions)
        return Accepted(worker=change, reply={"name": name})

@hookimpl
def relay_sources():
    return [Careless]
'''


def config_of(folder, *parts):
    (folder / "plugins.d").mkdir(exist_ok=True)
    (folder / "plugins.d" / "careless.py").write_text(CARELESS)
    more = '[sources.careless]\nplugin = "careless"\n[plugins]\ndirs = ["plugins.d"]\n'
    return write_config(folder, SOURCES, more, *parts)


@pytest.fixture
async def receivers():
    """One receiver per format, which keeps bytes."""

    class Bytes(Recorder):
        def note(self, event_id, body):
            self.arrived.append((event_id, body))

    found = {name: Bytes() for name in FORMATS}
    for each in found.values():
        await each.__aenter__()
    yield found
    for each in found.values():
        await each.__aexit__(None, None, None)


@pytest.fixture
def config(tmp_path, receivers):
    more = 'format = "{}"\norder_by = "data.name"\nlatest_by = "data.tags"\n'
    return config_of(
        tmp_path,
        *(
            destination(name, each.url, more.format(name) + SETTINGS.get(name, ""))
            for name, each in receivers.items()
        ),
    )


SETTINGS = {
    "telegram": 'message = { chat_id = "1" }',
    "ntfy": 'message = { topic = "t" }',
    "pagerduty": 'message = { routing_key = "k" }',
}
DATA = rb'{"name": %b, "tags": [%b, {%b: "\uDE00 \ud83d\ude00 \\ud83d"}], "price": 45000.00}' % (
    BOB,
    BOB,
    BOB,
)
EVENTS = {
    "adorn": request(
        "POST",
        "/v1/events",
        b'{"event_type":"a","session_id":%b,"store_id":%b,"payload":%b}' % (BOB, BOB, DATA),
    ),
    "adorn, in its type": request(
        "POST", "/v1/events", b'{"event_type":%b,"session_id":"s","payload":%b}' % (BOB, DATA)
    ),
    "adorn, where nobody looks": request(
        "POST",
        "/v1/events",
        b'{"event_type":"a","session_id":"s","payload":%b,"more":%b,%b:1}' % (DATA, BOB, BOB),
    ),
    "compozy": request("POST", "/api/v1/events", b'{"name":%b,"payload":%b}' % (BOB, DATA), **COMPOZY),
    "lazychat": request(
        "POST",
        "/api/woocommerce-plugin/events",
        b'{"event_type":"a","event_data":%b,"site_info":{"site_name":%b}}' % (DATA, BOB),
        **DEV,
    ),
    "moddy": request(
        "POST",
        "/internal/event/notify",
        b'{"event_type":"command_used","discord_id":%b,"metadata":%b}' % (BOB, DATA),
        **DEV,
    ),
    "whatsapp": request(
        "POST",
        "/api/v1/webhooks/session-status",
        b'{"event":"qr_ready","sessionId":%b,"workerId":%b,"timestamp":%b,"data":%b}' % (BOB, BOB, BOB, DATA),
        **WORKER,
    ),
    "whatsapp, of a worker": request(
        "POST", "/api/workers/w1/events", b'{"event":%b,"timestamp":"x","data":%b}' % (BOB, DATA), **WORKER
    ),
}


@pytest.mark.parametrize("raw", EVENTS.values(), ids=EVENTS)
async def test_an_event_with_a_lone_surrogate_is_kept_and_delivered_in_every_format(relay, receivers, raw):
    answer = await relay.exchange(raw)
    assert answer.status < 300, answer.body
    [row] = await relay.rows()
    event = await relay.event(row["id"])
    assert (event.body, event.data) == (raw.partition(b"\r\n\r\n")[2], DATA)
    assert (
        await relay.exchange(raw)
    ).status < 300  # and nothing that it left behind is in the way of the next
    for name, each in receivers.items():
        await until(lambda each=each: each.arrived)
        id_, body = each.arrived[0]
        assert id_ == event.public_id
        shown = json.loads(body)
        if name == "raw":
            assert body == event.body
        elif name in ("standard", "cloudevents"):
            assert b'"data":' + DATA in body
            assert msgspec.json.decode(json.dumps(shown["type"])) == event.type
        else:
            assert b"Bob" in body
            assert b"ud83d" in body  # the escape as text


async def test_flat_session_events_of_a_worker_are_kept_whole(relay):
    body = (
        rb'{"sessionId":"s1","workerId":"w1","status":"CONNECTED","displayName":"Bob \ud83d","timestamp":"t"}'
    )
    raw = request("POST", "/api/webhooks/session-status", body, **WORKER)
    assert (await relay.exchange(raw)).status == 200
    [row] = await relay.rows()
    assert (await relay.event(row["id"])).data == body


@pytest.fixture
async def event(relay, receivers):
    """The id of a delivered event with half an emoji in every place that can contain it."""
    assert (await relay.exchange(EVENTS["adorn"])).status == 200
    for each in receivers.values():
        await until(lambda each=each: each.arrived)
    [row] = await relay.rows()
    return row["id"]


async def test_commands_and_lists_show_a_lone_surrogate_as_an_escape(relay, commands, event):
    assert (await commands("events", "list")).rows[0][3] == r"Bob \ud83d"
    assert (await commands("events", "list", "--subject", r"Bob \ud83d", "--json")).json["items"][0][
        "id"
    ] == event
    found = await commands("events", "list", "--where", r'data.name="Bob \\ud83d"', "--quiet")
    assert found.out.split() == [event]
    assert (await commands("events", "show", event, "--json")).json["subject"] == r"Bob \ud83d"
    assert r"Bob \ud83d" in (await commands("events", "show", event)).out
    assert json.loads((await commands("events", "body", event)).out)["session_id"] == "Bob \ud83d"
    assert (
        json.loads((await commands("events", "body", event, "--json")).json["body"])["store_id"]
        == "Bob \ud83d"
    )
    assert (await relay.operator("GET", f"/api/events/{event}"))["subject"] == r"Bob \ud83d"
    assert len((await commands("deliveries", "list", "--json")).json["items"]) == len(FORMATS)
    assert (await commands("explain", event, "--json")).json


async def test_an_event_with_a_lone_surrogate_is_replayed_exported_and_imported(
    tmp_path, relay, commands, receivers, event
):
    stored = await relay.event(event)
    await commands("events", "replay", event, "--to", "standard", "--yes")
    await until(lambda: len(receivers["standard"].arrived) == 2)
    assert receivers["standard"].arrived[0] == receivers["standard"].arrived[1]
    await commands("events", "export", "-o", tmp_path / "out.jsonl")
    (tmp_path / "other").mkdir()
    async with running(config_of(tmp_path / "other")) as other:
        assert (await relay.rows())[0]["id"] == event
        await Commands(other.addresses.socket)("events", "import", tmp_path / "out.jsonl")
        again = await other.event(event)
    assert (again.body, again.data, again.context) == (stored.body, stored.data, stored.context)


async def test_a_plugin_that_decodes_json_itself_loses_no_event(relay, receivers):
    for number in range(2):  # the second repeats the first by its key
        answer = await relay.exchange(request("POST", "/careless", b'{"name":%b,"n":1}' % BOB))
        assert answer.status == 200, (number, answer.body)
        assert answer.json == {"name": r"Bob \ud83d"}
    [row] = await relay.rows()
    assert (row["type"], row["subject"]) == (r"careless.a.Bob \ud83d", r"Bob \ud83d")
    event = await relay.event(row["id"])
    assert msgspec.json.decode(event.data) == {"name": r"Bob \ud83d", "n": 1}
    await until(lambda: receivers["standard"].arrived)


async def test_a_worker_with_a_lone_surrogate_does_not_break_the_registry(tmp_path):
    config = config_of(tmp_path)
    async with running(config) as relay:
        for path in ("/careless/w1", "/careless/w2"):
            for _ in range(2):
                assert (await relay.exchange(request("PUT", path, b'{"name":%b}' % BOB))).status == 200
        await relay.app.store.workers.flush()
        listed = (await relay.operator("GET", "/api/workers"))["items"]
        assert [item["version"] for item in listed] == [r"Bob \ud83d"] * 2
    async with running(config) as relay:
        assert [worker.version for worker in relay.app.store.workers.all()] == [r"Bob \ud83d"] * 2


@pytest.mark.parametrize(
    "place",
    [
        b'{"cpuUsage":5,%b:1}',
        b'{"cpuUsage":5,"note":%b}',
        b'{"cpuUsage":5,"version":%b}',
        b'{"cpuUsage":5,"sessions":[{"sessionId":"s1","displayName":%b}]}',
        b'{"cpuUsage":5,"sessions":{%b:1}}',
    ],
)
async def test_a_heartbeat_with_a_lone_surrogate_counts(relay, place):
    raw = request("PUT", "/api/workers/w1/heartbeat", place % BOB, **WORKER)
    assert (await relay.exchange(raw)).status == 200
    [worker] = relay.app.store.workers.all()
    assert worker.cpu == 5
    body = b'{"workerId":"w2","endpoint":"x","description":%b}' % BOB
    assert (await relay.exchange(request("POST", "/api/workers/register", body, **WORKER))).status == 200


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory):
    async with running(config_of(tmp_path_factory.mktemp("relay"))) as relay:
        yield relay


@pytest.mark.parametrize("text", [b"NaN", b"-Infinity", b'"\xff"', b'"\xed\xa0\xbd"', b'"\\ud8"'])
@pytest.mark.parametrize("name", ["adorn", "compozy", "lazychat", "moddy", "whatsapp"])
@pytest.mark.asyncio(loop_scope="module")
async def test_invalid_json_is_still_refused(shared, name, text):
    head, _, body = EVENTS[name].partition(b"\r\n\r\n")
    body = body.replace(b"45000.00", text)
    line = f"Content-Length: {len(body)}".encode()
    lines = [line if each.startswith(b"Content-Length:") else each for each in head.split(b"\r\n")]
    assert (await shared.exchange(b"\r\n".join(lines) + b"\r\n\r\n" + body)).status in (400, 422)
    assert not await shared.rows()


async def test_a_schema_checks_a_payload_with_a_lone_surrogate(tmp_path):
    (tmp_path / "user.json").write_text('{"required": ["email"]}')
    schema = '[sources.compozy.schemas]\n"user.created" = "user.json"\n'
    async with running(write_config(tmp_path, SOURCES, schema)) as relay:
        for payload, status in ((b'{"email":%b}' % BOB, 202), (b'{"mail":%b}' % BOB, 400)):
            body = b'{"name":"user.created","payload":%b}' % payload
            assert (await relay.exchange(request("POST", "/api/v1/events", body, **COMPOZY))).status == status


async def test_every_source_checks_schemas_in_its_own_envelope(tmp_path):
    (tmp_path / "never.json").write_text('{"not": {}}')
    tables = "".join(f'[sources.{name}.schemas]\n"*" = "never.json"\n' for name in ("compozy", "moddy"))
    async with running(write_config(tmp_path, SOURCES, tables)) as relay:
        body = b'{"event_type":"member_joined","discord_id":"1","metadata":{}}'
        sent = request("POST", "/internal/event/notify", body, authorization="Bearer dev-token")
        answer = await relay.exchange(sent)
        assert (answer.status, answer.json["detail"][0]["loc"]) == (422, ["body", "data"])
        body = b'{"name":"user.created","payload":{}}'
        answer = await relay.exchange(request("POST", "/api/v1/events", body, **COMPOZY))
        assert (answer.status, answer.json["error"]["details"]["field"]) == (400, "payload")
        assert not await relay.rows()
