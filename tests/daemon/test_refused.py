"""Refused requests: kept without tokens, listed, shown and retried."""

import asyncio
import hmac
import json
import threading
from types import SimpleNamespace

import pytest
from commands import Commands
from daemons import SOURCES, destination, running, write_config
from multidict import CIMultiDict, CIMultiDictProxy
from wire import exchange, request

from relay.base.clock import SECOND
from relay.errors import Unavailable
from relay.ingest.refused import MASK, MOST_DIAGNOSED

SHOP = """
[sources.shop]
plugin = "generic"
path = "/hooks/shop/{region}"
secrets = ["the-token"]
verify = "bearer"
type = "order"
subject = "{body:id}"
data = "{body:order}"

[sources.keyed]
plugin = "generic"
path = "/hooks/keyed"
secrets = ["query-token"]
verify = { api_key = { query = "pass" } }
type = "{body:kind}"

[sources.signed]
plugin = "generic"
path = "/hooks/signed"
secrets = ["signing-key"]
verify = { hmac = { header = "X-Sig", algorithm = "sha256" } }
type = "{body:kind}"

[sources.silent]
plugin = "generic"
path = "/hooks/silent"
verify = "none"
type = "{body:kind}"
keep_refused = false
"""
SHOP_PATH = "/hooks/shop/eu?batch=1"
INVALID = b'{"id": 7}'  # lacks `order`


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, SOURCES, SHOP, destination("crm", "http://127.0.0.1:9/x", "paused = true"))


async def send(relay, path=SHOP_PATH, body=INVALID, token="the-token", method="POST", **headers):
    raw = request(method, path, body, authorization=f"Bearer {token}", x_request_id="req-1", **headers)
    return (await relay.exchange(raw)).status


async def listed(commands, *options):
    return (await commands("refused", "list", "--json", *options)).json["items"]


async def shown(commands, id_):
    return (await commands("refused", "show", id_, "--json")).json


async def test_a_verified_request_is_kept_whole_but_its_token(relay, commands):
    assert await send(relay, cookie="session=1", x_trace="the-token", x_shop="42") == 400
    [item] = await listed(commands)
    assert (item["source"], item["reason"], item["status"]) == ("shop", "invalid", 400)
    assert (item["method"], item["target"], item["size"]) == ("POST", SHOP_PATH, len(INVALID))
    assert "order" in item["problem"]
    found = await shown(commands, item["id"][:20])
    assert found["can_retry"]
    assert found["body"].encode() == INVALID
    headers = dict(found["headers"])
    assert headers["X-Shop"] == "42"
    assert {headers["Authorization"], headers["Cookie"], headers["X-Trace"]} == {MASK}
    assert "the-token" not in json.dumps(found)


async def test_of_a_stranger_only_the_head_is_kept(relay, commands):
    assert await send(relay, "/hooks/shop/eu?key=close-to-the-token&empty=", token="wrong-token") == 401
    [item] = await listed(commands)
    assert (item["reason"], item["target"]) == ("auth", f"/hooks/shop/eu?key={MASK}&empty=")
    found = await shown(commands, item["id"])
    assert (found["body"], found["can_retry"]) == (None, False)
    assert "wrong-token" not in json.dumps(found)
    assert "close-to-the-token" not in json.dumps(found)
    failed = await commands("refused", "retry", item["id"], code=1)
    assert "was kept without its body" in failed.err
    assert "not kept" in (await commands("refused", "show", item["id"])).out


def signature(body):
    return hmac.new(b"signing-key", body, "sha256").hexdigest()


KIND = b'{"kind": "x"}'
BEARER = "header Authorization"
DIAGNOSES = {
    "another form of the token": ((SHOP_PATH, INVALID, {"token": '"the-token"'}), (BEARER, "is in quotes")),
    "a token of another source": (
        (SHOP_PATH, INVALID, {"token": "query-token-of-nobody"}), (BEARER, "unknown token of 21 characters"),
    ),
    "a changed body": (
        ("/hooks/signed", KIND + b"\n", {"x_sig": signature(KIND)}),
        ('plugin "generic"', "signed the body without the line ending that was added to it"),
    ),
    "another key": (
        ("/hooks/signed", KIND, {"x_sig": "0" * 64}), ('plugin "generic"', "no configured key matches"),
    ),
    "a body that is too large to compare": (
        ("/hooks/signed", KIND + b" " * MOST_DIAGNOSED, {"x_sig": signature(KIND)}), None,
    ),
    "broken JSON": ((SHOP_PATH, b"{'id': 7}", {}), ("body", "single quotes")),
    "an extra slash": (
        ("/hooks/shop/eu/", INVALID, {}), ("request line", "did you mean /hooks/shop/eu?"),
    ),
    "a misspelt path": (
        ("/hooks/signet", INVALID, {}),
        ("request line", "unknown path; did you mean /hooks/signed?"),
    ),
    "an unknown path of a source": (
        ("/v1/Events", b"{}", {}), ("request line", "the path has capital letters"),
    ),
    "a path like no other": (("/", INVALID, {}), ("request line", "no source has a similar one")),
    "another method": ((SHOP_PATH, b"", {"method": "PUT"}), ("request line", "PUT is not allowed")),
}  # fmt: skip
"""A request, and the place and the fault that its diagnosis names."""


async def test_the_diagnosis_names_the_fault_without_a_secret(relay, commands):
    for name, ((path, body, changes), expected) in DIAGNOSES.items():
        assert await send(relay, path, body, **changes) >= 400, name
        item = (await listed(commands))[0]
        findings = item["findings"]
        if expected is None:
            assert findings == [], name
            continue
        where, what = expected
        assert [each for each in findings if each["where"] == where and what in each["what"]], (name, item)
        assert all(each["do"] for each in findings)
        text = json.dumps(findings)
        assert not [secret for secret in ("the-token", "query-token", "signing-key") if secret in text], name
    shown = (await commands("refused", "show", item["id"])).out
    assert (
        "\nfinding\troute\trequest line\tPUT is not allowed on this path\thave the sender use POST\n" in shown
    )


async def test_a_diagnosis_that_fails_or_hangs_loses_no_request(relay, commands, monkeypatch, caplog):
    kept = relay.app.ingest.refused
    monkeypatch.setattr(kept, "_explain", lambda _cases: 1 / 0)
    assert await send(relay, body=b"{") == 400
    assert [each["findings"] for each in await listed(commands)] == [[]]
    assert "the diagnosis of refused requests failed" in caplog.text
    ended, threads = threading.Event(), []

    def hang(_cases):
        threads.append(threading.current_thread())
        ended.wait(30)

    monkeypatch.setattr(kept, "_explain", hang)
    monkeypatch.setattr("relay.ingest.refused.PATIENCE", 0.1)
    assert await send(relay, body=b"{") == 400
    assert len(await listed(commands)) == 2
    ended.set()
    assert threads[0].daemon  # the process ends without it
    assert "restart the daemon to enable it again" in caplog.text


async def test_the_bodies_of_strangers_take_no_room_of_those_that_are_kept(relay, commands, monkeypatch):
    monkeypatch.setattr("relay.ingest.refused.MOST_WAITING_BYTES", 605)
    for _ in range(3):
        assert await send(relay, "/hooks/signed", b"x" * 600, x_sig="0" * 64) == 401
    assert await send(relay) == 400
    assert (await shown(commands, (await listed(commands))[0]["id"]))["can_retry"]


async def test_a_source_that_is_open_to_everyone_keeps_heads_only(relay, commands):
    assert (await relay.exchange(request("POST", "/v1/events", b"{"))).status == 400
    [item] = await listed(commands, "--source", "adorn")
    assert (await shown(commands, item["id"]))["body"] is None


async def test_a_token_in_the_query_is_masked(relay, commands):
    raw = request("POST", "/hooks/keyed?pass=query-token&page=2", b"{}")
    assert (await relay.exchange(raw)).status == 400
    [item] = await listed(commands)
    assert item["target"] == f"/hooks/keyed?pass={MASK}&page=2"


async def test_a_path_without_a_source_is_kept(relay, commands):
    assert await send(relay, "/hooks/shopp/eu") == 404
    assert (await relay.exchange(request("GET", "/health"))).status == 200
    [item] = await listed(commands)
    assert (item["source"], item["reason"], item["problem"]) == (None, "path", "no source owns this path")
    assert (await shown(commands, item["id"]))["body"] is None
    assert "none owns this path" not in (await commands("refused", "list")).out


async def test_requests_that_senders_repeat_are_not_kept(relay, commands):
    await commands("sources", "pause", "shop")
    assert await send(relay, body=b'{"id": 7, "order": {}}') == 503
    head = SimpleNamespace(method="POST", target="/x", headers=CIMultiDictProxy(CIMultiDict()))
    head.content_length = 0
    relay.app.ingest.refused.note(None, head, Unavailable("of a plugin"), 503, remote="192.0.2.1")
    assert await listed(commands) == []
    assert (await commands("refused", "list", "--reason", "auth")).err == ""
    assert "--grep refused`" in (await commands("refused", "list", "--reason", "paused")).err


async def test_a_source_may_keep_none(relay, commands):
    assert (await relay.exchange(request("POST", "/hooks/silent", b"{}"))).status == 400
    assert await listed(commands) == []


async def test_filters_and_pages(relay, commands):
    for number in range(3):
        assert await send(relay, f"/hooks/shop/{number}") == 400
    assert await send(relay, token="wrong") == 401
    assert [each["reason"] for each in await listed(commands)] == ["auth", "invalid", "invalid", "invalid"]
    assert len(await listed(commands, "--reason", "invalid", "--since", "1h")) == 3
    assert await listed(commands, "--until", "1h") == []
    first = (await commands("refused", "list", "--json", "--limit", "3")).json
    rest = (await commands("refused", "list", "--json", "--cursor", first["next_cursor"])).json
    assert [each["target"] for each in rest["items"]] == ["/hooks/shop/0"]
    assert "unknown source" in (await commands("refused", "list", "--source", "shopp", code=4)).err
    assert (await commands("refused", "list", "-q")).out.count("ref_") == 4


async def test_a_kept_request_becomes_an_event_once_the_configuration_is_right(relay, commands, config):
    assert await send(relay, idempotency_key="k-1") == 400
    [item] = await listed(commands)
    failed = await commands("refused", "retry", item["id"], code=1)
    assert "refused again with 400, invalid" in failed.err
    assert (await shown(commands, item["id"]))["retried_at"] is not None
    config.write_text(config.read_text().replace('data = "{body:order}"', 'data = "{body}"'))
    await commands("reload")
    done = (await commands("refused", "retry", item["id"], "--json")).json
    assert done["status"] == 200
    event = (await commands("events", "show", done["event_id"], "--json")).json
    assert (event["type"], event["subject"], event["payload"]) == ("shop.order", "7", INVALID.decode())
    assert event["owed"][0]["destination"] == "crm"
    assert (await shown(commands, item["id"]))["event_id"] == done["event_id"]
    again = await commands("refused", "retry", item["id"], code=1)
    assert f"relay events show {done['event_id']}" in again.err
    assert await send(relay, idempotency_key="k-1") == 200  # the sender's own retry is a duplicate
    stored = (await commands("events", "list", "--source", "shop", "--json")).json["items"]
    assert [each["id"] for each in stored] == [done["event_id"]]


async def test_several_requests_are_retried_oldest_first_and_named(relay, commands, config):
    for number in (1, 2, 3):
        assert await send(relay, body=b'{"id": %d}' % number) == 400
    assert await send(relay, token="wrong") == 401
    stranger, *kept = [each["id"] for each in await listed(commands)]
    counted = json.dumps({"ids": [stranger, *kept], "dry_run": True}).encode()
    answer = await exchange(relay.addresses.socket, request("POST", "/api/refused/retry", counted))
    assert answer.json == {"count": 3}
    config.write_text(config.read_text().replace("{body:order}", "{body:id}"))
    await commands("reload")
    newest, *others = kept
    done = await commands("refused", "retry", newest, stranger, *others, code=1)
    lines = done.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [*reversed(kept), stranger]
    assert ["accepted, event evt_" in line for line in lines] == [True, True, True, False]
    assert "was kept without its body" in lines[-1]
    subjects = [each["subject"] for each in (await relay.operator("GET", "/api/events"))["items"]]
    assert subjects == ["3", "2", "1"]
    again = (await commands("refused", "retry", *kept, "--json", code=1)).json
    assert (again["accepted"], again["refused"]) == (0, 3)
    assert all("was already retried" in each["error"] for each in again["items"])


async def test_retries_at_the_same_time_create_one_event(relay, commands, config):
    assert await send(relay) == 400
    [item] = await listed(commands)
    config.write_text(config.read_text().replace("{body:order}", "{body:id}"))
    await commands("reload")
    several = json.dumps({"ids": [item["id"], item["id"][:-1]]}).encode()
    raw = request("POST", "/api/refused/retry", several), request("POST", f"/api/refused/{item['id']}/retry")
    answers = await asyncio.gather(*(exchange(relay.addresses.socket, each) for each in raw * 2))
    assert sum(b"was already retried" in each.body for each in answers) == 3
    assert len((await relay.operator("GET", "/api/events"))["items"]) == 1


async def test_a_path_that_is_gone_cannot_be_retried(relay, commands, config):
    assert await send(relay) == 400
    [item] = await listed(commands)
    config.write_text(config.read_text().replace("/hooks/shop/", "/hooks/moved/"))
    await commands("reload")
    failed = await commands("refused", "retry", item["id"], code=1)
    assert "refused again with 404, not_found" in failed.err


async def test_refused_requests_survive_a_restart(config):
    async with running(config) as relay:
        assert await send(relay) == 400
    async with running(config) as relay:
        [item] = await listed(Commands(relay.addresses.socket))
        assert item["source"] == "shop"


async def test_requests_that_are_diagnosed_while_the_daemon_stops_are_kept(config, monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    def explain(cases):
        if not begun.is_set():
            begun.set()
            ended.wait(30)
        return [()] * len(cases)

    async with running(config) as relay:
        monkeypatch.setattr(relay.app.ingest.refused, "_explain", explain)
        assert await send(relay) == 400
        assert await asyncio.to_thread(begun.wait, 30)
    ended.set()
    async with running(config) as relay:
        assert [each["reason"] for each in await listed(Commands(relay.addresses.socket))] == ["invalid"]


async def test_old_requests_and_those_beyond_the_limit_are_deleted(relay, commands):
    refused = relay.app.ingest.refused
    for number in range(4):
        assert await send(relay, f"/hooks/shop/{number}") == 400
    assert len(await listed(commands)) == 4
    store, wall = relay.app.store.refused, relay.app.store._clock.wall()
    assert await store.prune(wall - SECOND * 3600, 10**6) == 0
    sizes = [len(json.dumps(await shown(commands, each["id"]))) for each in await listed(commands)]
    assert await store.prune(0, sizes[0] + sizes[1]) >= 1
    kept = [each["target"] for each in await listed(commands)]
    assert kept[0] == "/hooks/shop/3"  # the oldest went
    assert "/hooks/shop/0" not in kept
    assert await store.prune(wall + 3600 * SECOND, 10**6) == len(kept)
    assert await listed(commands) == []
    assert refused._bytes == 0


async def test_repeated_mistakes_are_kept_a_few_times_a_minute(relay, commands):
    for _ in range(15):
        assert await send(relay, token="wrong") == 401
    assert len(await listed(commands)) == 10


async def test_a_full_disk_keeps_none(relay, commands):
    relay.app.ingest.admission.disk_full = True
    assert await send(relay, token="wrong") == 401
    relay.app.ingest.admission.disk_full = False
    assert await listed(commands) == []


async def test_names_of_unknown_and_ambiguous_ids(relay, commands):
    assert "unknown refused request" in (await commands("refused", "show", "ref_0000", code=4)).err
    assert "not a valid id" in (await commands("refused", "show", "nonsense", code=1)).err
    for number in range(2):
        await send(relay, f"/hooks/shop/{number}")
    [first, _] = await listed(commands)
    ambiguous = await commands("refused", "show", first["id"][:10], code=1)
    assert f"; matches: {first['id'][:10]}" in ambiguous.err


async def test_a_body_of_bytes_and_a_large_one(relay, commands):
    assert await send(relay, body=b"\xff\x00") == 400
    [item] = await listed(commands)
    assert (await shown(commands, item["id"]))["body"] == "\ufffd\x00"
    relay.app.ingest.refused._config = type(relay.app.ingest.refused._config)(max_size=80)
    assert await send(relay) == 400  # an eighth of 80 bytes
    assert (await shown(commands, (await listed(commands))[0]["id"]))["can_retry"] is True
    assert await send(relay, body=INVALID + b" " * 8) == 400
    assert (await shown(commands, (await listed(commands))[0]["id"]))["can_retry"] is False
