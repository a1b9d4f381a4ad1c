"""Names and scopes of `[admin] tokens`, and the host names of the admin listener."""

import json
import logging
import re
from pathlib import Path

import pytest
from daemons import SOURCES, destination, running, write_config
from wire import exchange, request

from relay.api.app import describe
from relay.config.effective import as_toml, effective
from relay.config.problems import ConfigError
from relay.plugin_loading.loader import load

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
TOKENS = """[
  { secret = "looks", name = "grafana", scope = "read" },
  { secret = "acts", name = "on-call", scope = "operate" },
  "everything",
]"""
SCOPES = {"looks": "read", "acts": "operate", "everything": "admin"}
RANKS = ["read", "operate", "admin"]
NEEDED = {
    (method.upper(), path): operation["security"][0]["token"][0]
    for path, methods in describe()["paths"].items()
    for method, operation in methods.items()
    if operation["security"]
}
"""The scope of each endpoint, by method and path, from the OpenAPI document."""


@pytest.fixture
def config(tmp_path):
    path = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/x"))
    added = f'[admin]\nhosts = ["relay.example.org"]\ntokens = {TOKENS}'
    path.write_text(path.read_text().replace("[admin]", added))
    return path


async def ask(relay, method, path, *, token, host="localhost", body=b"{}"):
    body = None if method == "GET" else body
    raw = request(method, path, body, authorization=f"Bearer {token}", host=host)
    answer = await exchange(relay.addresses.admin, raw)
    return answer.status, answer.json


async def test_each_endpoint_refuses_tokens_of_lower_scopes(relay):
    asked = 0
    for (method, path), needed in NEEDED.items():
        filled = re.sub(r"{(\w+)}", lambda name: {"verb": "resume"}.get(name[1], "unknown"), path)
        for token, scope in SCOPES.items():
            if RANKS.index(scope) < RANKS.index(needed):
                status, answer = await ask(relay, method, filled, token=token)
                assert (status, answer["error"]["code"]) == (403, "forbidden"), (method, path, token)
                assert f'scope "{scope}"' in answer["error"]["message"]
                assert f'needs "{needed}"' in answer["error"]["message"]
                asked += 1
    assert asked > len(RANKS) * 5


@pytest.mark.parametrize(
    ("method", "path", "least"),
    [
        ("GET", "/api/destinations", "read"),
        ("POST", "/api/destinations/crm/pause", "operate"),
        ("POST", "/api/reload", "admin"),
    ],
)
async def test_tokens_of_sufficient_scope_are_accepted(relay, method, path, least):
    for token, scope in SCOPES.items():
        status, _ = await ask(relay, method, path, token=token)
        assert status == (200 if RANKS.index(scope) >= RANKS.index(least) else 403)


def test_the_page_lists_the_endpoints_that_need_admin():
    row = next(line for line in API.splitlines() if line.startswith("| `admin` |"))
    listed = set(re.findall(r"`(GET|POST|DELETE) (/\S+)`", row))
    assert listed == {each for each, scope in NEEDED.items() if scope == "admin"}
    assert {method for (method, _), scope in NEEDED.items() if scope == "read"} == {"GET"}
    assert "GET" not in {method for (method, _), scope in NEEDED.items() if scope != "read"}


async def test_the_audit_log_names_the_token(relay, caplog):
    with caplog.at_level(logging.INFO, "relay.audit"):
        await ask(relay, "POST", "/api/destinations/crm/pause", token="acts")
        await ask(relay, "POST", "/api/destinations/crm/resume", token="everything")
        await ask(relay, "POST", "/api/destinations/crm/resume", token="looks")
        await ask(relay, "POST", "/api/destinations/crm/resume", token="unknown")
    lines = [each.getMessage() for each in caplog.records if each.name == "relay.audit"]
    assert [line.partition(",")[0] for line in lines] == ["token on-call", "token 3", "token grafana"]
    assert lines[2].endswith(": 403")


async def test_a_request_may_name_a_configured_host_only(relay):
    for host in ("relay.example.org", "RELAY.example.org:443", "localhost", "127.0.0.1:1"):
        assert (await ask(relay, "GET", "/api/status", token="looks", host=host))[0] == 200
    for host in ("other.example.org", "example.org", "relay.example.org.evil.example"):
        status, answer = await ask(relay, "GET", "/api/status", token="looks", host=host)
        assert (status, answer["error"]["code"]) == (403, "forbidden")
        assert "[admin] hosts" in answer["error"]["hint"]


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ('tokens = [{ env = "NOT_SET" }]', "admin.tokens[0]", "NOT_SET is not set"),
        ('tokens = ["a", { secret = { env = "NOT_SET" } }]', "admin.tokens[1].secret", "NOT_SET is not set"),
        ('tokens = [{ secret = "a", scope = "root" }]', "admin.tokens[0].scope", 'or "admin", got "root"'),
        ('tokens = [{ name = "a" }]', "admin.tokens[0].secret", "missing"),
        ('tokens = [{ secret = "a", scopes = ["read"] }]', "admin.tokens[0].scopes", '"scope"'),
        ("tokens = [1]", "admin.tokens[0]", "expected"),
        ('hosts = ["https://relay.example.org"]', "admin.hosts[0]", "without scheme and port"),
        ('hosts = ["relay.example.org:443"]', "admin.hosts[0]", "without scheme and port"),
    ],
)
def test_wrong_tokens_and_hosts_are_reported_at_their_keys(config, text, key, problem):
    given = re.sub(r"hosts = .*?\n\]\n", f"{text}\n", config.read_text(), count=1, flags=re.DOTALL)
    config.write_text(given)
    with pytest.raises(ConfigError) as error:
        load(config)
    [found] = error.value.problems
    assert found.key == key
    assert problem in found.problem
    assert found.line == given[: given.index(text)].count("\n") + 1


def test_the_effective_configuration_shows_names_and_scopes_but_no_token(config):
    shown = effective(load(config).config)["admin"]
    assert shown["tokens"] == [
        {"secret": "<secret>", "name": "grafana", "scope": "read"},
        {"secret": "<secret>", "name": "on-call", "scope": "operate"},
        "<secret>",
    ]
    assert shown["hosts"] == ["relay.example.org"]
    text = "\n".join(as_toml({"admin": shown}))
    assert 'name = "grafana"' in text
    assert not any(token in json.dumps(shown) + text for token in ("looks", "acts", "everything"))


async def test_a_name_is_a_label_of_the_metrics_of_its_token(config):
    async with running(config) as relay:
        await ask(relay, "GET", "/api/status", token="looks")
        await relay.app.jobs.run("tokens")
        answer = await exchange(relay.addresses.admin, request("GET", "/metrics"))
    assert 'relay_token_uses_total{source="",token="grafana"} 1.0' in answer.body.decode()
