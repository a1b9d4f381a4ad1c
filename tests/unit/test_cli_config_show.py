"""`relay config`: the effective configuration, and a starter file."""

import tomllib
from pathlib import Path

from commands import run
from daemons import SOURCES, destination, write_config

SECRET = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MORE = """\
order_by = "subject"
ttl = "6h"
rate_limit = "50/s"
where = [{ "data.sale" = true }, { "data.total" = { gte = 5 } }]
headers = { "X-Key" = "a header of mine" }
"""


def test_the_effective_configuration_is_toml_with_defaults_and_without_secrets(tmp_path):
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/", MORE))
    result = run("config", "show", "-c", config)
    for secret in (SECRET, "test-token", "dev-token", "worker-secret", "a header of mine"):
        assert secret not in result.out
    shown = tomllib.loads(result.out)
    assert shown == run("config", "show", "-c", config, "--json").json
    assert shown["server"]["max_body"] == "2 MiB"
    assert shown["server"]["shutdown_grace"] == "5s"
    assert shown["sources"]["compozy"]["tokens"] == ["<secret>"] * 2
    assert shown["sources"]["adorn"]["workers"]["offline_after"] == "1m30s"
    crm = shown["destinations"]["crm"]
    assert (crm["ttl"], crm["rate_limit"], crm["timeout"]) == ("6h", "50/s", "15s")
    assert crm["headers"] == {"X-Key": "<secret>"}
    assert crm["where"] == [{"data.sale": True}, {"data.total": {"gte": 5}}]
    assert crm["retry"]["schedule"] == ["100ms"] * 4
    assert "proxy" not in crm


def test_the_reference_configuration_is_shown_unchanged(monkeypatch):
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    file = Path(__file__).parents[2] / "config.toml"
    result, shown = tomllib.loads(file.read_text()), run("config", "show", "-c", file, "--json").json
    for table in ("server", "storage", "retention", "log"):
        for key, value in result[table].items():
            assert shown[table][key] == value, (table, key)


def test_a_starter_configuration_is_valid_once_its_secrets_are_set(tmp_path, monkeypatch):
    monkeypatch.setenv("LAZYCHAT_TOKEN", "t")
    monkeypatch.setenv("CRM_WEBHOOK_SECRET", f"whsec_{SECRET}")
    file = tmp_path / "config.toml"
    assert f"`relay check-config {file}`" in run("config", "init", file).out
    result = run("check-config", file)
    assert result.out == f"{file}: ok (1 source, 1 destination)\n"
    assert result.err == ""


def test_an_existing_configuration_is_never_overwritten(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text("mine = 1")
    assert run("config", "init", file, code=1).err.startswith(f"{file} already exists\n")
    assert file.read_text() == "mine = 1"
    result = run("config", "init", tmp_path / "none" / "config.toml", code=1)
    assert "cannot write" in result.err
