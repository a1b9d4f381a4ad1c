"""The metrics, and the alerts and the dashboard for Prometheus and Grafana."""

import asyncio
import json
import re
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from commands import parse
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from machines import needs
from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from stores import KINDS, is_postgres, watch_statements
from support import until
from wire import exchange, request

from relay import __version__
from relay.api.scrape import STRETCH, Scrape
from relay.base.clock import SECOND
from relay.delivery.http.http_client import Certificate
from relay.jobs.activity import PATIENCE
from relay.metrics import Metrics, declared

SHIPPED = Path(__file__).parents[2] / "systemd" / "prometheus"
ALERTS = (SHIPPED / "alerts.yml").read_text()
TESTS = (SHIPPED / "alerts_test.yml").read_text()
DASHBOARD = json.loads((SHIPPED / "dashboard.json").read_text())
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
needs_promtool = needs("promtool")  # of the package prometheus


def promtool(*arguments, cwd=SHIPPED, given=""):
    command = ("promtool", *arguments)
    return subprocess.run(command, cwd=cwd, input=given, capture_output=True, text=True, check=False)


def expressions():
    """Return every shipped expression by the alert or panel that has it."""
    alerts = dict(re.findall(r"- alert: (\w+)\n +expr: (.+)", ALERTS))
    return {**alerts, **{f"{panel['title']} {ref}": expr for panel, ref, expr in of_dashboard()}}


def of_dashboard():
    """Yield every expression of the dashboard with its panel."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):  # a row has none
            yield panel, target["refId"], target["expr"]


def filled_in(expression, job=".+", instance=".+"):
    """Return an expression of the dashboard with its variables filled in, as Grafana does."""
    values = {"$job": job, "$instance": instance, "$__rate_interval": "5m"}
    return re.sub(r"\$\w+", lambda match: values[match[0]], expression)


async def scrape(relay, accept="text/plain"):
    answer = await exchange(relay.addresses.admin, request("GET", "/metrics", accept=accept))
    assert answer.status == 200
    return answer.body.decode()


@needs_promtool
async def test_promtool_accepts_a_scrape(tmp_path):
    async with running(write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/x"))) as relay:
        text = await scrape(relay)
    checked = promtool("check", "metrics", given=text)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert promtool("check", "metrics", given=text.replace("_total", "")).returncode != 0


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "--lint=all", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
        ("check", "config", "scrape.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_the_shipped_files(arguments):
    checked = promtool(*arguments)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@needs_promtool
def test_an_alert_that_fires_late_is_detected(tmp_path):
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True)
    (tmp_path / "alerts.yml").write_text(ALERTS.replace("for: 1m", "for: 9m"))
    head, first, *_ = TESTS.split("\n  - name: ")  # all of them take seconds
    (tmp_path / "alerts_test.yml").write_text(f"{head}\n  - name: {first}\n")
    assert promtool("test", "rules", "alerts_test.yml", cwd=tmp_path).returncode != 0


def test_every_alert_is_tested_and_ends_with_a_command():
    names = re.findall(r"- alert: (\w+)", ALERTS)
    tested = re.findall(r"^  - name: (\w+)", TESTS, re.MULTILINE)
    assert tested == names
    for name, test in zip(names, TESTS.split("\n  - name: ")[1:], strict=True):
        cases = test.split(f"- alertname: {name}\n")[1:]
        fires = ["exp_alerts:" in case for case in cases]
        assert len(set(fires)) == 2, f"{name}: one test must fire, another must not"
    commands = re.findall(r'description: ".*: ([^:"]+)"$', ALERTS, re.MULTILINE)
    assert len(commands) == len(names)
    ours = [re.sub(r"{{ \$labels\.(\w+) }}", r"\1", each) for each in commands if each.startswith("relay ")]
    assert len(ours) > len(names) / 2
    for command in ours:
        parse(command.replace("--reason reason", "--reason auth").split()[1:])


def test_alerts_have_the_limits_of_the_program():
    assert f"silence_seconds > {PATIENCE} * (relay_source_usual_gap_seconds" in ALERTS
    assert "certificate_lifetime_seconds / 4, 1209600)" in ALERTS
    day = 86_400 * SECOND
    for valid in (6, 90):
        certificate = Certificate(0, valid * day)
        assert certificate.ends - certificate.renewal_overdue == min(valid * day / 4, 1_209_600 * SECOND)


def test_every_metric_is_on_the_dashboard():
    shown = {name for *_, expression in of_dashboard() for name in re.findall(r"relay_\w+", expression)}
    shown = {re.sub(r"_(total|bucket|sum|count|info)$", "", name) for name in shown}
    assert {each.name for each in declared().values()} - shown == {"relay_plugin_info"} - shown
    assert "relay_build" in shown


def test_every_panel_selects_the_relay_by_job_and_instance():
    variables = {each["name"]: each.get("query", "") for each in DASHBOARD["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance"]
    assert "relay_build_info" in variables["job"]
    assert '{job=~"$job"}' in variables["instance"]
    for panel, _, expression in of_dashboard():
        metrics = re.findall(r"(?:relay|process)_\w+(\{[^}]*\})?", expression)
        assert metrics, panel["title"]
        assert all('job=~"$job", instance=~"$instance"' in labels for labels in metrics), expression
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    taken = [
        (at["x"] + right, at["y"] + below)
        for at in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for right in range(at["w"])
        for below in range(at["h"])
    ]
    assert len(taken) == len(set(taken))  # no panel covers another one


def test_rates_that_may_be_low_are_shown_per_minute_or_per_hour():
    for panel, _, expression in of_dashboard():
        if "rate(" in expression and "histogram_quantile" not in expression:
            factor = {"per minute": "60 * ", "hour": "3600 * "}
            [wanted] = [text for words, text in factor.items() if panel["title"].endswith(words)] or [""]
            assert expression.startswith(wanted), panel["title"]
            assert wanted or panel["title"] in {
                "Size of received bodies per second",
                "Requests per commit",
                "CPU",
            }


@needs_promtool
def test_promtool_parses_every_panel_and_those_of_the_process_show_only_the_relay(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": filled_in(expression)}
        for number, (*_, expression) in enumerate(of_dashboard())
    ]
    (tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    checked = promtool("check", "rules", "panels.yml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    relay, other = (f'{{job="{job}", instance="{job}:1"}}' for job in ("relay", "prometheus"))
    series = {"process_resident_memory_bytes": "7x10", "process_cpu_seconds_total": "0+60x10"}
    cases = [
        {"expr": filled_in(expression, "relay", "relay:1"), "eval_time": "8m", "exp_samples": samples}
        for panel, _, expression in of_dashboard()
        for samples in {
            "Memory": [{"labels": f"process_resident_memory_bytes{relay}", "value": 7}],
            "CPU": [{"labels": relay, "value": 1}],
        }.get(panel["title"], ())
        for samples in ([samples],)
    ]
    assert len(cases) == 2
    given = [
        {"series": f"{name}{labels}", "values": values}
        for name, values in series.items()
        for labels in (relay, other)
    ]
    test = {"interval": "1m", "input_series": given, "promql_expr_test": cases}
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": [], "tests": [test]}))
    checked = promtool("test", "rules", "test.yml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr


async def test_every_expression_uses_exported_metrics(tmp_path):
    async with running(write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/x"))) as relay:
        text = await scrape(relay)
    exported = {"up", *re.findall(r"^(\w+)[{ ]", text, re.MULTILINE)}
    named = {
        where: set(re.findall(r"\b((?:relay|process)_\w+|up)\b", expression))
        for where, expression in expressions().items()
    }
    assert [where for where, names in named.items() if not names] == []
    assert {where: names - exported for where, names in named.items() if names - exported} == {}


async def test_a_scrape_equals_the_output_of_prometheus_client(aiohttp_client):
    metrics = Metrics(["moddy"], [f"d{number}" for number in range(50)])
    metrics.latency.labels("d7").observe(0.2, {"event_id": "evt_7"})
    metrics.received.labels("moddy").inc(3)
    app = web.Application()
    app.router.add_get("/metrics", Scrape(metrics.registry).answer)
    client = await aiohttp_client(app)

    def steady(text):
        return [line for line in text.decode().splitlines() if not line.startswith("process_")]

    for accept, render in (
        (OPENMETRICS, openmetrics.generate_latest),
        ("text/plain;version=1.0.0", generate_latest),
        ("*/*", generate_latest),
    ):
        answer = await client.get("/metrics", headers={"Accept": accept})
        assert answer.content_type == accept.partition(";")[0].replace("*/*", "text/plain")
        assert steady(await answer.read()) == steady(render(metrics.registry))
    answer = await client.get("/metrics", params={"name[]": "relay_events_received_total"})
    assert (await answer.text()).splitlines()[2:] == ['relay_events_received_total{source="moddy"} 3.0']


async def test_other_tasks_run_during_a_scrape():
    metrics = Metrics([], [f"d{number}" for number in range(50)])
    samples = [len(family.samples) for family in metrics.registry.collect()]
    turns = 0

    async def take_turns():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    others = asyncio.create_task(take_turns())
    await Scrape(metrics.registry).answer(make_mocked_request("GET", "/metrics"))
    others.cancel()
    assert turns >= sum(samples) // (STRETCH + max(samples)) > 1


async def test_a_scrape_reads_no_table(tmp_path, monkeypatch):
    connect = sqlite3.connect

    def connecting(*args, **named):
        asked.append("a new connection")
        return connect(*args, **named)

    async with running(write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/x"))) as relay:
        await relay.operator("POST", "/api/destinations/crm/pause")
        await relay.exchange(request("POST", "/v1/events", adorn()))
        relay.app.jobs.stop()  # jobs may read tables
        monkeypatch.setattr(sqlite3, "connect", connecting)
        store = relay.app.store
        asked = await watch_statements(store)
        if not is_postgres(store):
            await store.database.counter.set_trace_callback(asked.append)
        async with asyncio.timeout(30):
            while True:  # the lane, and on PostgreSQL the leases, may read at the same moment
                asked.clear()
                for accept in ("text/plain", OPENMETRICS):
                    assert 'relay_deliveries_pending{destination="crm"' in await scrape(relay, accept)
                if not asked:
                    break
                await asyncio.sleep(0.1)
        await relay.app.ledger_check.check()
        assert any("deliveries" in text or "ledger" in text for text in asked)


async def test_a_latency_has_an_exemplar_with_its_event(tmp_path):
    """At least the slowest events of each second."""
    async with Recorder() as receiver:
        config = write_config(tmp_path, SOURCES, destination("crm", receiver.url))
        async with running(config) as relay:
            for number in range(2):
                relay.app.dispatcher.lanes["crm"]._slowest = relay.app.ingest.counters["adorn"].slowest = 0
                await relay.exchange(request("POST", "/v1/events", adorn()))
                await until(
                    lambda number=number: (
                        relay.counted("relay_delivery_latency_seconds_count", destination="crm") == number + 1
                    )
                )
                text = await scrape(relay, OPENMETRICS)
                for name in (
                    "relay_ingest_duration_seconds",
                    "relay_delivery_latency_seconds",
                    "relay_delivery_attempt_duration_seconds",
                ):
                    found = rf'^{name}_bucket.* # {{event_id="{receiver.ids[number]}"}}'
                    assert re.search(found, text, re.MULTILINE)
    assert text.endswith("# EOF\n")


async def test_pending_deliveries_are_counted_by_state(tmp_path):
    async with Recorder() as receiver:
        receiver.answers.append((500, {}))
        config = write_config(
            tmp_path,
            SOURCES,
            destination("held", receiver.url),
            destination("retried", receiver.url).replace("0.1s", "1h"),
        )
        async with running(config) as relay:

            def pending(name):
                states = ("due", "waiting", "in_flight", "held")
                return {
                    state: relay.counted("relay_deliveries_pending", destination=name, state=state)
                    for state in states
                }

            def oldest(name):
                return relay.counted("relay_delivery_oldest_pending_timestamp_seconds", destination=name)

            await relay.operator("POST", "/api/destinations/held/pause")
            before = time.time()
            await relay.exchange(request("POST", "/v1/events", adorn()))
            await until(
                lambda: relay.counted("relay_delivery_attempts_total", destination="retried", result="5xx")
            )
            await relay.app.ledger_check.check()
            assert pending("held") == {"due": 0, "waiting": 0, "in_flight": 0, "held": 1}
            assert pending("retried") == {"due": 0, "waiting": 1, "in_flight": 0, "held": 0}
            assert before - 1 < oldest("held") < time.time() + 1
            await relay.operator("POST", "/api/destinations/held/resume")
            await until(lambda: relay.counted("relay_delivery_latency_seconds_count", destination="held"))
            await relay.app.ledger_check.check()
            assert sum(pending("held").values()) == 0
            assert oldest("held") == 0


async def test_jobs_and_commits_are_counted(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        await relay.exchange(request("POST", "/v1/events", adorn()))
        assert relay.counted("relay_storage_commit_duration_seconds_count") >= 1
        assert relay.counted("relay_storage_commit_events_sum") >= 1
        file = "main" if KINDS[0] == "sqlite" else "database"
        await until(lambda: relay.counted("relay_storage_size_bytes", file=file))
        await until(lambda: relay.counted("relay_job_runs_total", job_name="disk", outcome="ok"))
        assert relay.counted("relay_job_last_success_timestamp_seconds", job_name="disk") > 1_700_000_000
        assert relay.counted("relay_plugin_info", plugin="adorn", version=__version__) == 1
