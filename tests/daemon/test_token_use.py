"""Which tokens senders use: in `relay sources show`, the API and the metrics."""

import base64
import hmac
import json
import time

import pytest
from commands import Commands
from daemons import running, write_config
from wire import exchange, request

from relay.base.clock import rfc3339
from relay.config.secrets import Secret
from relay.signing import sign_standard_webhooks

CONFIG = """
[sources.moddy]
plugin = "moddy"
rate_limit = "1000/s"
tokens = [{ env = "MODDY_OLD" }, { secret = "second", name = "bot 2" }, "third"]
[sources.repo]
plugin = "generic"
path = "/hooks/repo"
secrets = ["hmac-old", { env = "HMAC_NEW" }]
verify = { hmac = { header = "X-Signature" } }
type = "push"
[sources.basic]
plugin = "generic"
path = "/hooks/basic"
secrets = ["basic-old", { env = "BASIC_NEW" }]
verify = { basic = { user = "u" } }
type = "push"
[sources.key]
plugin = "generic"
path = "/hooks/key"
secrets = ["key-old", { env = "KEY_NEW" }]
verify = { api_key = { header = "X-Key" } }
type = "push"
[sources.standard]
plugin = "generic"
path = "/hooks/standard"
secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", { env = "STANDARD_NEW" }]
verify = "standard-webhooks"
type = "push"
verify_tokens = ["hello"]
handshakes = [
  { method = "GET", token = "{query:token}", verified = false, reply = { empty = true } },
]
[sources.open]
plugin = "adorn"
"""
STANDARD_NEW = "whsec_" + base64.b64encode(b"n" * 32).decode()
VARIABLES = {
    "MODDY_OLD": "first", "HMAC_NEW": "hmac-new", "BASIC_NEW": "basic-new", "KEY_NEW": "key-new",
    "STANDARD_NEW": STANDARD_NEW,
}  # fmt: skip
EVENT = json.dumps({"type": "event", "event_type": "member_joined", "discord_id": "1"}).encode()


@pytest.fixture
async def relay(tmp_path, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    config = write_config(tmp_path, CONFIG)
    text = config.read_text().replace(
        '[admin]\nlisten = "127.0.0.1:0"', '[admin]\nlisten = "127.0.0.1:0"\ntokens = ["admin-1", "admin-2"]'
    )
    config.write_text(text)
    async with running(config) as relay:
        yield relay


async def moddy(relay, token, body=EVENT):
    raw = request("POST", "/internal/event/notify", body, authorization=f"Bearer {token}")
    return (await relay.exchange(raw)).status


async def shown(commands, source):
    """Return uses of each token of a source, by name."""
    found = (await commands("sources", "show", source, "--json")).json["tokens"]
    assert all((each["last_used"] is None) == (each["uses"] == 0) for each in found)
    return {each["name"]: each["uses"] for each in found}


def in_metrics(relay, source, token):
    return relay.counted("relay_token_uses_total", source=source, token=token)


async def test_uses_of_tokens_are_counted_by_name(relay, commands):
    assert await shown(commands, "moddy") == {"MODDY_OLD": 0, "bot 2": 0, "tokens[2]": 0}
    before = rfc3339(time.time_ns() // 1000)
    for token, status in (("first", 200), ("second", 200), ("first", 200), ("wrong", 403)):
        assert await moddy(relay, token) == status
    assert await moddy(relay, "first", b"{") == 400  # the sender is known, even if its event is invalid
    assert await shown(commands, "moddy") == {"MODDY_OLD": 3, "bot 2": 1, "tokens[2]": 0}

    tokens = {
        each["name"]: each for each in (await commands("sources", "show", "moddy", "--json")).json["tokens"]
    }
    assert before <= tokens["MODDY_OLD"]["last_used"] <= rfc3339(time.time_ns() // 1000)
    assert tokens["MODDY_OLD"]["key"] == "tokens[0]"
    assert tokens["MODDY_OLD"]["since"] <= before
    result = await commands("sources", "show", "moddy")
    assert ["MODDY_OLD", "3", tokens["MODDY_OLD"]["last_used"]] in result.rows
    assert ["tokens[2]", "0", ""] in result.rows
    assert f"uses are counted since {tokens['MODDY_OLD']['since']}" in result.err
    assert "first" not in result.out
    assert (await commands("sources", "show", "open", "--json")).json["tokens"] == []


async def test_the_metrics_follow_by_a_job(relay):
    assert relay.counted("relay_token_last_used_timestamp_seconds", source="moddy", token="bot 2") == 0
    before = time.time()
    await moddy(relay, "second")
    assert in_metrics(relay, "moddy", "bot 2") == 0
    await relay.app.jobs.run("tokens")
    assert in_metrics(relay, "moddy", "bot 2") == 1
    used = relay.counted("relay_token_last_used_timestamp_seconds", source="moddy", token="bot 2")
    assert before <= used <= time.time()
    await relay.app.jobs.run("tokens")
    assert in_metrics(relay, "moddy", "bot 2") == 1


async def test_every_kind_of_secret_counts(relay, commands):
    body = b'{"a": 1}'

    async def send(path, **headers):
        answer = await relay.exchange(request("POST", path, body, **headers))
        assert answer.status == 200, answer

    await send("/hooks/repo", x_signature=hmac.digest(b"hmac-new", body, "sha256").hex())
    await send("/hooks/basic", authorization="Basic " + base64.b64encode(b"u:basic-new").decode())
    await send("/hooks/key", x_key="key-new")
    now = int(time.time())
    signed = sign_standard_webhooks((Secret(STANDARD_NEW),), "msg_1", now, body)
    await send("/hooks/standard", **{name.replace("-", "_"): value for name, value in signed.items()})
    assert (await relay.exchange(request("GET", "/hooks/standard?token=hello"))).status == 200
    assert await shown(commands, "repo") == {"secrets[0]": 0, "HMAC_NEW": 1}
    assert await shown(commands, "basic") == {"secrets[0]": 0, "BASIC_NEW": 1}
    assert await shown(commands, "key") == {"secrets[0]": 0, "KEY_NEW": 1}
    assert await shown(commands, "standard") == {"secrets[0]": 0, "STANDARD_NEW": 1, "verify_tokens[0]": 1}


async def test_tokens_of_the_admin_api_count_without_a_source(relay):
    raw = request("GET", "/api/status", authorization="Bearer admin-2", host="localhost")
    assert (await exchange(relay.addresses.admin, raw)).status == 200
    await relay.app.jobs.run("tokens")
    assert (in_metrics(relay, "", "tokens[0]"), in_metrics(relay, "", "tokens[1]")) == (0, 1)


async def test_counts_survive_reloads_and_end_with_their_token(relay, commands):
    file = relay.app.config.path
    text = file.read_text()
    await moddy(relay, "first")
    await moddy(relay, "third")
    file.write_text(text.replace('{ env = "MODDY_OLD" }, ', '{ env = "HMAC_NEW" }, { env = "MODDY_OLD" }, '))
    assert (await commands("reload")).out.splitlines()[0].endswith("changed sources.moddy")
    assert await shown(commands, "moddy") == {"HMAC_NEW": 0, "MODDY_OLD": 1, "bot 2": 0, "tokens[3]": 0}
    await moddy(relay, "first")
    await moddy(relay, "hmac-new")
    file.write_text(text.replace('{ env = "MODDY_OLD" }, ', '{ env = "HMAC_NEW" }, '))
    await commands("reload")
    assert await shown(commands, "moddy") == {"HMAC_NEW": 1, "bot 2": 0, "tokens[2]": 0}
    assert in_metrics(relay, "moddy", "HMAC_NEW") == 1
    series = {
        sample.labels["token"]
        for family in relay.app.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "relay_token_uses_total" and sample.labels["source"] == "moddy"
    }
    assert series == {"HMAC_NEW", "bot 2", "tokens[2]"}
    file.write_text(text.replace("[sources.moddy]", "[sources.moddy2]"))
    await commands("reload")
    assert in_metrics(relay, "moddy", "HMAC_NEW") == 0
    assert await shown(commands, "moddy2") == {"MODDY_OLD": 0, "bot 2": 0, "tokens[2]": 0}


async def test_two_tokens_with_one_name_are_distinguished_by_their_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("SAME", "first")
    tokens = '[{ env = "SAME" }, { secret = "second", name = "SAME" }]'
    async with running(
        write_config(tmp_path, f'[sources.moddy]\nplugin = "moddy"\ntokens = {tokens}')
    ) as relay:
        await moddy(relay, "second")
        commands = Commands(relay.addresses.socket)
        assert await shown(commands, "moddy") == {"SAME": 0, "SAME (tokens[1])": 1}
