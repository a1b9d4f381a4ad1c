"""docs/workers.md against the code: events and their data, reasons, settings, requests."""

import json
import re
from pathlib import Path

import pytest
from daemons import HEAD

from relay.app import App
from relay.base.clock import SECOND
from relay.config.maintenance import MaintenanceWindow
from relay.config.schema import WorkerRules
from relay.model import Worker
from relay.plugin_loading.loader import load
from relay.workers import rules
from relay.workers.rules import shown
from relay.workers.watch import Rulebook

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "workers.md").read_text()
TABLES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
RULES = (ROOT / "relay" / "workers" / "rules.py").read_text()


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.setenv("WHATSAPP_WORKER_TOKEN", "worker-secret-token-12345")
    path = tmp_path / "config.toml"
    path.write_text(HEAD.format(port=0) + TABLES[0])
    return load(path)


def test_the_windows_on_the_page_are_valid(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(HEAD.format(port=0) + TABLES[1])
    windows = load(path).config.workers.maintenance
    assert [each.ids for each in windows] == ["batch-*", "*"]
    keys = set(re.findall(r"^\| (`\w+`(?:, `\w+`)?) \| .* \| .* \|$", PAGE, re.MULTILINE))
    assert {key for each in keys for key in re.findall(r"\w+", each)} >= set(
        MaintenanceWindow.__struct_fields__
    )


def test_the_page_has_exactly_the_events_of_the_rules():
    generated = set(re.findall(r'_generate\("(\w+)"', RULES))
    assert generated == set(re.findall(r"\| `worker\.(\w+)`", PAGE))


def test_the_page_has_exactly_the_reasons():
    given = set(re.findall(r'_generate\("\w+", .*?, "(\w+)"\)', RULES))
    [named] = re.findall(r"`reason` one of (.*?)\.", " ".join(PAGE.split()))
    assert given == set(re.findall(r"`(\w+)`", named))


def test_the_data_of_an_event_match_the_page():
    [block] = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    data = json.loads(block)
    row = Worker(source="whatsapp", id="w")
    assert data.keys() == rules.silent(row, rules.Now(wall=0, steady=1))[1].data.keys()
    assert data["worker"].keys() == shown(row).keys()


def test_the_settings_on_the_page_have_the_described_effect(setup):
    rulebook = Rulebook(setup.config.workers, {"whatsapp": setup.config.sources["whatsapp"].workers})
    assert rulebook.of("whatsapp", "worker-001").recover_after == 3
    assert rulebook.of("whatsapp", "batch-7").offline_after == 600.0
    defaults = WorkerRules()
    assert (defaults.offline_after, defaults.check_every) == (90.0, 10.0)


def test_the_times_on_the_page_are_those_of_the_rules():
    assert f"within {rules.TOMBSTONE // SECOND} s after it" in PAGE
    assert f"{rules.FORMER // SECOND} s at least" in PAGE
    assert f"by more than {rules.RESTARTED:.0f} s" in PAGE
    assert f"most {rules.MOST_SESSIONS:,} sessions are kept per worker" in PAGE


def test_every_request_on_the_page_exists(setup):
    app = App(setup)
    routes = {(route.method, route.resource.canonical) for route in app.api.socket_app().router.routes()}
    for path, rest in re.findall(r"^api ('?[/?]\S+)(.*)$", PAGE, re.MULTILINE):
        method = "DELETE" if "-X DELETE" in rest else "POST" if " -d " in rest else "GET"
        route = re.sub(r"^/whatsapp/worker-001", "/{source}/{id}", path.strip("'").partition("?")[0])
        assert (method, f"/api/workers{route}") in routes
