"""Every error on a source's paths is in that source's own JSON, and nothing is stored."""

import json
import re
import runpy
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from daemons import PLUGINS, SOURCES, Relay, running, write_config
from stores import refuse_writes
from support import until
from wire import Answer, Wire, exchange, request

from relay.errors import StorageError, StorageUnavailableError
from relay.ingest.body import Patience
from relay.store import DiskSpace

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("adorn", "compozy", "lazychat", "moddy", "whatsapp")
AUTHORIZED = {
    "adorn": {},
    "compozy": {"authorization": "Bearer test-token"},
    "lazychat": {"authorization": "Bearer dev-token"},
    "moddy": {"authorization": "Bearer dev-token"},
    "whatsapp": {"authorization": "Bearer worker-secret-token-12345"},
}
PATHS = {
    "adorn": "/v1/events",
    "compozy": "/api/v1/events",
    "lazychat": "/api/woocommerce-plugin/events",
    "moddy": "/internal/event/notify",
    "whatsapp": "/api/v1/webhooks/session-status",
}
BODIES = {
    "adorn": b'{"event_type":"session.started","session_id":"s"}',
    "compozy": b'{"name":"user.created"}',
    "lazychat": b'{"event_type":"plugin.updated"}',
    "moddy": b'{"event_type":"member_left","discord_id":"1"}',
    "whatsapp": b'{"sessionId":"s","status":"CONNECTED"}',
}


def mounted(prefix: str, kind: str, more: str = "") -> str:
    """Mount all five once more, below a prefix."""
    tables = SOURCES.replace("[sources.", f"[sources.{prefix}_").replace('plugin = "', f'plugin = "{kind}')
    return re.sub(r"^plugin.*$", rf'\g<0>\nprefix = "/{prefix}"\n{more}', tables, flags=re.MULTILINE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory, listener):
    config = write_config(
        tmp_path_factory.mktemp("relay"),
        PLUGINS,
        SOURCES,
        mounted("failing", "failing_"),
        mounted("limited", "", 'rate_limit = "1/h"'),
    )
    async with running(config) as relay:
        relay.app.ingest.patience = Patience(0.05)
        yield relay


def is_its_own(name: str, body: dict) -> bool:
    """Return whether an error has the shape that the sender expects, and a text."""
    match name, body:
        case "adorn", {"status": "error", "message": str(text), **rest}:
            shape = set()
        case "compozy", {"success": False, "error": {"code": str(), "message": str(text), **rest}}:
            shape = {"details"}
        case "lazychat", {"success": False, "error": str(text), **rest}:
            shape = set()
        case "moddy", {"error": str(text), **rest}:
            shape = set()
        case "moddy", {
            "detail": str(text) | [{"loc": ["body", *_], "msg": str(text), "type": str()}],
            **rest,
        }:
            shape = set()
        case "whatsapp", {"success": False, "error": str(text), **rest}:
            shape = {"code"}
        case _:
            return False
    return bool(text) and rest.keys() == shape


def good(name: str, *, prefix: str = "", **headers: str) -> bytes:
    """Render a request that the source accepts."""
    return request("POST", prefix + PATHS[name], BODIES[name], **AUTHORIZED[name], **headers)


# --- every kind of refusal ----------------------------------------------------------------------------

Trouble = Callable[..., Awaitable[Answer]]
TROUBLES: dict[tuple[str, int], Trouble] = {}


def trouble(reason: str, status: int) -> Callable[[Trouble], Trouble]:
    """Register a function that causes a refusal with this reason (the metric's label)."""

    def note(provoke: Trouble) -> Trouble:
        TROUBLES[reason, status] = provoke
        return provoke

    return note


@trouble("malformed", 400)
async def broken_json(relay, name, **headers):
    return await relay.exchange(request("POST", PATHS[name], b"{", **AUTHORIZED[name], **headers))


@trouble("auth", 401)
async def no_token(relay, name, **headers):
    return await relay.exchange(good(name, prefix="/failing", x_fail="auth", **headers))


@trouble("forbidden", 403)
async def not_allowed(relay, name, **headers):
    return await relay.exchange(good(name, prefix="/failing", x_fail="forbidden", **headers))


@trouble("not_found", 404)
async def no_such_path(relay, name, **headers):
    return await relay.exchange(
        request("POST", f"{PATHS[name].rpartition('/')[0]}/no/such", b"{}", **headers)
    )


@trouble("method", 405)
async def wrong_method(relay, name, **headers):
    answer = await relay.exchange(request("PATCH", PATHS[name], b"{}", **headers))
    assert answer.headers["allow"] == "POST"
    return answer


@trouble("timeout", 408)
async def body_never_comes(relay, name, **headers):
    async with await Wire.open(relay.addresses.public) as wire:
        await wire.send(good(name, **headers)[:-1])
        return await wire.answer()


@trouble("too_large", 413)
async def announced_too_large(relay, name, **headers):
    head = request("POST", PATHS[name], content_length="3000000", **AUTHORIZED[name], **headers)
    return await relay.exchange(head)


@trouble("encoding", 415)
async def compressed(relay, name, **headers):
    return await relay.exchange(good(name, content_encoding="gzip", **headers))


@trouble("rate_limit", 429)
async def too_often(relay, name, **headers):
    await relay.exchange(good(name, prefix="/limited"))
    return await relay.exchange(good(name, prefix="/limited", **headers))


@trouble("plugin_error", 500)
async def plugin_raises(relay, name, **headers):
    return await relay.exchange(good(name, prefix="/failing", x_fail="crash", **headers))


@trouble("paused", 503)
async def source_paused(relay, name, **headers):
    await relay.operator("POST", f"/api/sources/{name}/pause")
    try:
        return await relay.exchange(good(name, **headers))
    finally:
        await relay.operator("POST", f"/api/sources/{name}/resume")


@trouble("draining", 503)
async def about_to_stop(relay, name, **headers):
    relay.app.ingest.admission.draining = True
    try:
        return await relay.exchange(good(name, **headers))
    finally:
        relay.app.ingest.admission.draining = False


@trouble("disk", 503)
async def disk_full(relay, name, **headers):
    async def check_disk():
        return DiskSpace(folder=Path("state"), free=0, floor=1, is_full=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relay.app.store.upkeep, "check_disk", check_disk)
        await relay.app._check_disk()
        answer = await relay.exchange(good(name, **headers))
    relay.app.ingest.admission.disk_full = False
    return answer


@trouble("storage", 503)
async def disk_fails(relay, name, **headers):
    return await with_store_raising(relay, good(name, **headers), StorageUnavailableError("disk I/O error"))


@trouble("overload", 503)
async def too_much_at_once(relay, name, **headers):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relay.app.ingest._budget, "limit", 1)
        return await relay.exchange(good(name, **headers))


async def with_store_raising(relay, raw, error):
    async def append(_acceptance):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relay.app.store.events, "append", append)
        return await relay.exchange(raw)


MODDY = {"auth": 403}
"""Statuses that differ from the other sources: docs/contracts/moddy.md#authentication."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("reason", "status"), TROUBLES, ids=str)
async def test_every_refusal_has_the_form_of_its_source(relay: Relay, name, reason, status):
    provoke = TROUBLES[reason, status]
    before = len(await relay.rows())
    prefix = {"auth": "failing_", "forbidden": "failing_", "plugin_error": "failing_"}.get(reason, "")
    prefix = "limited_" if reason == "rate_limit" else prefix
    labels = {"source": prefix + name, "reason": reason}
    counted = relay.counted("relay_events_rejected_total", **labels)

    answer = await provoke(relay, name)

    assert answer.status == (MODDY.get(reason, status) if name == "moddy" else status)
    assert is_its_own(name, answer.json), answer.json
    assert relay.counted("relay_events_rejected_total", **labels) >= counted + 1
    assert int(answer.headers.get("retry-after", 0)) > 0 or status not in (429, 503)
    accepted = len(await relay.rows()) - before
    assert accepted <= (reason == "rate_limit")


@pytest.mark.parametrize("name", NAMES)
async def test_a_request_that_alone_cannot_be_stored_gets_500_in_the_form_of_its_source(relay: Relay, name):
    answer = await with_store_raising(relay, good(name), StorageError("string or blob too big"))
    assert answer.status == 500
    assert is_its_own(name, answer.json), answer.json


@pytest.mark.parametrize("name", NAMES)
async def test_an_accepted_request_is_not_an_error_in_the_form_of_its_source(relay: Relay, name):
    answer = await relay.exchange(good(name))
    assert answer.status < 300
    assert not is_its_own(name, answer.json)


@pytest.mark.parametrize(("reason", "status"), TROUBLES, ids=str)
async def test_a_probe_of_a_known_shop_gets_200_through_every_temporary_failure(relay: Relay, reason, status):
    answer = await TROUBLES[reason, status](relay, "lazychat", x_event_type="settings.checking_connection")
    if status in (408, 429) or status >= 500:
        assert (answer.status, answer.json) == (200, {"success": True})
    else:
        assert (answer.status, answer.json["success"]) == (status, False)


async def test_a_probe_of_an_unknown_shop_is_refused_through_every_failure(relay: Relay):
    probe = request(
        "POST",
        PATHS["lazychat"],
        b"{}",
        authorization="Bearer x",
        x_event_type="settings.checking_connection",
    )
    relay.app.ingest.admission.draining = True
    try:
        answer = await relay.exchange(probe)
    finally:
        relay.app.ingest.admission.draining = False
    assert answer.status == 401


async def test_a_store_that_accepts_no_writes_gives_503_and_recovers_by_itself(relay: Relay, monkeypatch):
    """A real SQLITE_FULL, because the file may not grow; or a PostgreSQL session that only reads."""
    monkeypatch.setattr(relay.app.ingest, "patience", Patience(30))
    big = json.dumps({"name": "big", "payload": {"text": "x" * 1_000_000}}).encode()
    raw = request("POST", PATHS["compozy"], big, **AUTHORIZED["compozy"])
    await relay.exchange(good("compozy"))
    await refuse_writes(relay.app.store, now=True)
    refused = await relay.exchange(raw)
    await refuse_writes(relay.app.store, now=False)
    assert refused.status == 503
    assert refused.json["error"]["code"] == "unavailable"
    await until(lambda: relay.app.store.failure is None)
    assert (await relay.exchange(raw)).status == 202


OUTSIDE = [
    ("GET", "/", 404), ("POST", "/v2/events", 404), ("GET", "/v1events", 404), ("GET", "/favicon.ico", 404),
    ("POST", "//v1/events", 404), ("GET", "/internals", 404), ("OPTIONS", "*", 404), ("POST", "/health", 404),
    ("GET", "/../../etc/passwd", 404), ("GET", "/metrics", 404), ("GET", "/api/events", 404),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path", "status"), OUTSIDE)
async def test_an_error_outside_all_sources_is_plain_json(relay: Relay, method, path, status):
    answer = await relay.exchange(request(method, path, b"{}"))
    assert answer.status == status
    assert answer.json == {"error": {"code": "not_found", "message": "No such path"}}


async def test_health_needs_no_token(relay: Relay):
    answer = await relay.exchange(request("GET", "/health"))
    assert answer.status == 200
    assert answer.json == {"status": "ok"}  # no version, because anybody may ask
    head = await relay.exchange(request("HEAD", "/health"), bodiless=True)
    assert head.status == 200


ANSWERS = runpy.run_path(str(Path(__file__).parents[1] / "plugins" / "failing.py"))["ANSWERS"]
FLAWS = ["verify", "handler", "no answer", "bare reply", "type", "data", "reply", "reply value",
         "reply status", "reply header", "exit", "interrupt", "generator", "cancelled", "base", "reply exit",
         *(flaw for flaw in ANSWERS if flaw.startswith(("status ", "raw ")))]  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def flawed(tmp_path_factory):
    table = '[sources.flawed]\nplugin = "flawed"\n'
    async with running(write_config(tmp_path_factory.mktemp("flawed"), PLUGINS, table, SOURCES)) as relay:
        yield relay


@pytest.mark.parametrize("flaw", FLAWS)
async def test_a_failing_plugin_gives_500_and_nothing_is_stored(flawed: Relay, flaw):
    before = flawed.counted("relay_plugin_errors_total", plugin="flawed")
    answer = await flawed.exchange(request("POST", "/flawed/events", b"{}", x_fail=flaw))
    assert (answer.status, answer.json) == (500, {"flawed": "internal_error"})
    assert "x-injected" not in answer.headers
    assert await flawed.rows() == []
    assert flawed.counted("relay_plugin_errors_total", plugin="flawed") == before + 1
    other = await exchange(flawed.addresses.public, request("GET", "/internal/health", **AUTHORIZED["moddy"]))
    assert other.status == 200


async def test_a_failing_plugin_is_logged_once_with_its_place(tmp_path, caplog):
    table = '[sources.flawed]\nplugin = "flawed"\n'
    async with running(write_config(tmp_path, PLUGINS, table)) as relay:
        for flaw in ("handler", "handler", "refuse", "no answer"):
            await relay.exchange(request("POST", "/flawed/events", b"{}", x_fail=flaw))
    [line] = [record for record in caplog.records if record.exc_info]
    assert line.getMessage() == "flawed: POST /flawed/events failed"
    assert line.exc_info[2].tb_next.tb_frame.f_code.co_name == "event"


async def test_a_refusal_that_the_plugin_cannot_render_is_plain_json(flawed: Relay):
    answer = await flawed.exchange(request("POST", "/flawed/events", b"{}", x_fail="refuse"))
    assert answer.status == 400
    assert answer.json == {"error": {"code": "validation_error", "message": "The body is not valid"}}


async def test_without_its_fault_the_faulty_plugin_works(flawed: Relay):
    answer = await flawed.exchange(request("POST", "/flawed/events", b"{}"))
    assert (answer.status, answer.json) == (200, {"fine": True})
    [row] = await flawed.rows()
    assert row["type"] == "flawed.a"


@pytest.mark.parametrize("flaw", ["refuse exit", "refuse status", "refusal"])
async def test_a_refusal_with_an_invalid_reply_is_plain_json(flawed: Relay, flaw):
    """Whether the relay refuses the request or the plugin."""
    more = {} if flaw == "refusal" else {"content_length": "99999999"}
    answer = await flawed.exchange(request("POST", "/flawed/events", b"{}", x_fail=flaw, **more))
    assert answer.status == (500 if flaw == "refusal" else 413)
    assert answer.json["error"]["code"] == ("odd" if flaw == "refusal" else "payload_too_large")


async def test_an_unknown_reason_of_a_plugin_creates_no_metric_series(flawed: Relay):
    await flawed.exchange(request("POST", "/flawed/events", b"{}", x_fail="refusal"))
    labels = {"source": "flawed", "reason": "a reason of its own"}
    assert flawed.app.metrics.registry.get_sample_value("relay_events_rejected_total", labels) is None
