"""The OpenAPI document is compared with routes, parameters, bodies and real answers."""

import asyncio
import json
import re

import msgspec
import pytest
from daemons import SOURCES, adorn, destination, running, write_config
from jsonschema import Draft202012Validator
from stores import KINDS
from support import until
from wire import exchange, following, request

import relay as package
from relay.api import deliveries, events, query_params, replays, top
from relay.api.app import describe
from relay.api.auth import is_page
from relay.api.stream import frame
from relay.store.queries.filters import FILTERS

DOCUMENT = describe()
COMPONENTS = DOCUMENT["components"]
OPERATIONS = {
    (method.upper(), path): operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}

STREAMS = {("GET", "/api/tail"), ("GET", "/api/top")}
"""Streams do not end, so another test covers them."""
REFUSED = {("POST", f"/api/db/{verb}") for verb in ("backup", "compact") if KINDS[0] == "postgres"}
"""Operations that PostgreSQL leaves to its own tools."""

NAMES = {
    "event": "/TailEvent", "attempt": "/TailAttempt", "count": "/NewItems", "lost": "/Lost", "top": "/Top",
}  # fmt: skip
"""The schema of each server-sent event."""


@pytest.fixture
async def relay(tmp_path, recorder):
    config = write_config(
        tmp_path, SOURCES, destination("crm", recorder.url), destination("idle", recorder.url)
    )
    async with running(config) as relay:
        yield relay


def checks(schema, value):
    """Return every way in which a value violates a schema."""
    whole = {"$ref": schema["$ref"]} if "$ref" in schema else schema
    validator = Draft202012Validator({**whole, "components": COMPONENTS})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]


def query_of(operation):
    return {each["name"] for each in operation.get("parameters", ()) if each["in"] == "query"}


def template(path):
    """Return the path of the document that a real path matches."""
    path = path.partition("?")[0]
    found = [each for each in DOCUMENT["paths"] if re.fullmatch(re.sub(r"{\w+}", "[^/]+", each), path)]
    return min(found, key=lambda each: each.count("{"))


async def test_the_document_has_exactly_the_routes(relay):
    routes = {(each.method, each.resource.canonical) for each in relay.app.api.socket_app().router.routes()}
    documented = {(method, path) for method, path in routes if method != "HEAD" and not is_page(path)}
    assert OPERATIONS.keys() == documented


async def test_the_daemon_serves_the_document(relay):
    answer = await exchange(relay.addresses.socket, request("GET", "/api/openapi.json"))
    assert answer.json == DOCUMENT
    assert DOCUMENT["info"]["version"] == package.__version__


def test_every_reference_resolves_and_every_component_is_used():
    used = set(re.findall(r'"#/components/(\w+/\w+)"', json.dumps(DOCUMENT)))
    there = {
        f"{kind}/{name}"
        for kind in ("responses", "schemas")
        for name in COMPONENTS[kind]
    }  # fmt: skip
    assert used == there


def test_every_schema_is_valid_and_every_operation_has_a_unique_name_and_summary():
    for schema in COMPONENTS["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for key in ("operationId", "summary"):
        values = [operation[key] for operation in OPERATIONS.values()]
        assert len(set(values)) == len(values), key
    assert all(operation["summary"].endswith(".") for operation in OPERATIONS.values())


def test_every_path_parameter_is_described():
    for (_, path), operation in OPERATIONS.items():
        described = {each["name"] for each in operation.get("parameters", ()) if each.get("in") == "path"}
        assert described == set(re.findall(r"{(\w+)}", path)), path


def test_every_list_has_the_filters_of_the_store():
    for kind in ("events", "deliveries", "attempts"):
        assert {each.name for each in query_params.filters_of(kind)} == set(FILTERS[kind]), kind


def test_every_list_has_its_filters():
    for kind in ("events", "deliveries", "attempts", "workers", "stats"):
        fields = set(query_params.LISTS[kind].__struct_fields__)
        assert fields > {"limit", "cursor"}
        assert query_of(OPERATIONS["GET", f"/api/{kind}"]) == fields, kind
    assert query_of(OPERATIONS["GET", "/api/tail"]) == set(query_params.TailQuery.__struct_fields__)
    assert query_of(OPERATIONS["GET", "/api/export"]) == set(query_params.ExportQuery.__struct_fields__)
    fields = set(query_params.Filter.__struct_fields__)
    assert set(COMPONENTS["schemas"]["Filter"]["properties"]) == fields


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/replays", replays.ReplayBody),
        ("/api/deliveries/retry", deliveries.RetryBody),
        ("/api/deliveries/cancel", deliveries.CancelBody),
        ("/api/events/delete", events.DeletionBody),
    ],
)
def test_every_body_has_its_fields(path, body):
    [content] = OPERATIONS["POST", path]["requestBody"]["content"].values()
    schema = COMPONENTS["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
    assert set(schema["properties"]) == set(body.__struct_fields__)


class Asking:
    """Sends requests and compares request and answer with the document."""

    def __init__(self, relay):
        self.relay = relay
        self.asked = set()

    async def __call__(self, method, path, body=None, *, status=None):
        raw = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        answer = await exchange(self.relay.addresses.socket, request(method, path, raw))
        place = template(path)
        operation = OPERATIONS[method, place]
        assert status in (None, answer.status), (path, answer)
        if answer.status < 400:
            self.asked.add((method, place))
        self.hold(path, operation, raw, answer)
        return answer

    def hold(self, path, operation, raw, answer):
        responses = operation["responses"]
        described = responses.get(str(answer.status))
        if described is None:
            assert answer.status >= 400, f"{path} answers {answer.status}, which is not described"
            described = COMPONENTS["responses"]["Error"]
        kind = answer.headers["content-type"].partition(";")[0]
        if kind == "application/json" and kind not in described["content"]:
            [content] = described["content"].values()  # one line of JSON is a JSON document
        else:
            content = described["content"][kind]
        values = {
            "application/json": lambda: [json.loads(answer.body)],
            "application/x-ndjson": lambda: [json.loads(line) for line in answer.body.splitlines()],
        }.get(kind, lambda: [answer.body.decode()])()
        for value in values:
            assert checks(content["schema"], value) == [], (path, value)
        if raw is not None and answer.status < 400 and "requestBody" in operation:
            [(kind, content)] = operation["requestBody"]["content"].items()
            if kind == "application/json":
                assert checks(content["schema"], json.loads(raw)) == [], path


async def populate(relay, recorder):
    """Create an event, deliveries in several states and a worker with sessions."""
    recorder.answers.extend([(500, {}), (200, {})])
    id_ = (await relay.exchange(request("POST", "/v1/events", adorn("s-1")))).json["event_id"]
    done = "relay_deliveries_finished_total"
    for name in ("crm", "idle"):
        await until(lambda: relay.counted(done, destination=name, outcome="delivered"))  # noqa: B023 - waited for
    headers = {"authorization": "Bearer worker-secret-token-12345"}
    register = json.dumps({"workerId": "w1", "endpoint": "http://w1:8001"}).encode()
    beat = json.dumps(
        {
            "sessions": [
                {"sessionId": "s", "status": "CONNECTED", "phoneNumber": None, "lastActivity": "now"}
            ],
            "metrics": {"cpuUsage": 1.5, "memoryUsage": 2, "uptime": 3, "messageCount": 4},
        }
    ).encode()
    await relay.exchange(request("POST", "/api/v1/workers/register", register, **headers))
    await relay.exchange(request("PUT", "/api/v1/workers/w1/heartbeat", beat, **headers))
    await relay.app.store.workers.flush()
    return id_


async def ask_about_refused(ask, relay):
    """Ask for a refused request, and for retries of it and of a valid one."""
    await relay.exchange(request("POST", "/api/v1/events", b"{}", authorization="Bearer test-token"))
    kept = (await ask("GET", "/api/refused?source=compozy&since=1h")).json["items"][0]["id"]
    shown = (await ask("GET", f"/api/refused/{kept}")).json
    await ask("POST", f"/api/refused/{kept}/retry", status=400)
    [request_] = (await relay.app.store.refused.page(limit=1))[0]
    valid = msgspec.structs.replace(request_, id=f"{kept[:-4]}ffff", body=b'{"name": "a", "payload": {}}')
    await relay.app.store.refused.add([valid])
    await ask("POST", f"/api/refused/{valid.id}/retry", status=200)
    assert shown["can_retry"]
    for dry_run in (True, False):
        await ask("POST", "/api/refused/retry", {"ids": [kept], "dry_run": dry_run})


async def test_every_response_matches_its_schema(relay, recorder):
    ask, worker = Asking(relay), "/api/workers/whatsapp/w1"
    id_ = await populate(relay, recorder)
    for path in ("/health", "/ready", "/metrics", "/api/openapi.json", "/api/status", "/api/config"):
        await ask("GET", path)
    for path in (
        "plugins",
        "jobs",
        "nodes",
        "db",
        "doctor",
        "stats",
        "types?since=1h",
        "sources",
        "sources/adorn",
        "destinations",
    ):
        await ask("GET", f"/api/{path}")
    for path in ("destinations/crm", "events", "deliveries", "attempts", "workers"):
        assert (await ask("GET", f"/api/{path}")).json != {"items": [], "next_cursor": None}
    for path in (f"/api/events/{id_}", f"/api/events/{id_}/body", f"/api/events/{id_}/explain"):
        await ask("GET", path)
    delivery = (await ask("GET", "/api/deliveries?limit=1&state=delivered")).json["items"][0]["id"]
    for path in ("", "/request"):
        await ask("GET", f"/api/deliveries/{delivery}{path}")
    await ask("GET", "/api/history?minutes=5&periods=3")
    await ask_about_refused(ask, relay)
    await ask("GET", "/api/names?kind=event&prefix=evt_")
    assert (await ask("GET", "/api/names", status=400)).json["error"]["message"] == (
        'the parameter "kind" is missing'
    )
    await ask("POST", "/api/reload")
    for verb in ("pause", "resume", "disable", "enable", "test"):
        await ask("POST", f"/api/destinations/idle/{verb}")
    for verb in ("pause", "resume"):
        await ask("POST", f"/api/sources/moddy/{verb}")

    await ask("POST", f"{worker}/commands", {"command": {"type": "restart"}, "ttl": "5m"}, status=201)
    [command] = (await ask("GET", f"{worker}/commands")).json["items"]
    await ask("GET", worker)
    await ask("DELETE", f"{worker}/commands/{command['id']}")
    await ask("POST", f"{worker}/maintenance", {"on": True})
    await ask("POST", "/api/workers/maintenance", {"on": True, "pattern": "w*", "for": "1h"})
    await ask("DELETE", worker)

    await ask("POST", "/api/replays", {"events": [id_], "dry_run": True}, status=200)
    replay = (
        await ask("POST", "/api/replays", {"filter": {"source": "adorn"}, "rate": "50/s"}, status=201)
    ).json
    async with asyncio.timeout(30):
        while (await ask("GET", f"/api/replays/{replay['id']}")).json["ended_at"] is None:
            pass
    await ask("GET", "/api/replays")
    await ask("DELETE", f"/api/replays/{replay['id']}")
    await ask("POST", "/api/deliveries/retry", {"ids": [delivery]})
    await ask("POST", "/api/deliveries/retry", {"filter": {"state": "delivered"}}, status=201)
    await ask("POST", "/api/deliveries/cancel", {"filter": {"source": "adorn"}})

    for path in ("jobs/ledger/run", "db/backup", "db/compact"):
        await ask("POST", f"/api/{path}")
    await ask("POST", "/api/logins", {"scope": "read"})
    await ask("DELETE", "/api/logins")
    assert len((await ask("GET", "/api/audit?since=1h&limit=3")).json["items"]) == 3
    exported = (await ask("GET", "/api/export?deliveries=1")).body
    await ask("GET", "/api/export?dry_run=1")
    await ask("POST", "/api/events/delete", {"events": [id_], "dry_run": True})
    await ask("POST", "/api/events/delete", {"filter": {"source": "adorn"}})
    await ask("POST", "/api/import?deliver=1", exported)
    assert ask.asked == OPERATIONS.keys() - STREAMS - REFUSED


async def test_every_item_of_a_stream_matches_its_schema(relay, recorder, monkeypatch):
    monkeypatch.setattr(top, "EVERY", 0.05)
    socket, seen = relay.addresses.socket, set()
    async with (
        following(socket, "/api/tail") as tailed,
        following(socket, "/api/tail?count=1") as counted,
        following(socket, "/api/top") as topped,
    ):
        await populate(relay, recorder)
        follower = next(iter(relay.app.api._tail._followers))
        follower.put(frame("lost", {"count": 1}))
        relay.app.api._tail.end()
        items = [("/api/tail", item) for reader in (tailed, counted) for item in await reader.rest()]
        items += [("/api/top", await topped.next()) for _ in range(2)]
    for path, (name, data) in items:
        seen.add(name)
        [content] = OPERATIONS["GET", path]["responses"]["200"]["content"].values()
        [schema] = [each for each in content["schema"]["anyOf"] if each["$ref"].endswith(NAMES[name])]
        assert checks(schema, data) == [], (name, data)
    assert seen == NAMES.keys()


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/events?limit=0", None),
        ("GET", "/api/events/evt_0", None),
        ("GET", "/api/tail?source=adron", None),
        ("GET", "/api/destinations/none", None),
        ("POST", "/api/replays", {}),
        ("POST", "/api/jobs/none/run", None),
        ("POST", "/api/events/delete", {"filter": {}}),
        ("POST", "/api/import", b"{}\n"),
        ("DELETE", "/api/replays/none", None),
    ],
)
async def test_every_error_matches_its_schema(relay, method, path, body):
    answer = await Asking(relay)(method, path, body)
    assert answer.status >= 400
    assert answer.json["error"]["hint"]


async def test_the_problems_of_a_config_match_their_schema(relay, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(file.read_text() + "\n[retention]\nevnts = 3\n")
    answer = await Asking(relay)("POST", "/api/reload", status=400)
    assert answer.json["error"]["problems"][0]["key"].startswith("retention.")
