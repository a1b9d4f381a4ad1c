"""The benchmarks run. Their figures are judged by people, on an idle machine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from postgres import database_of, needs_postgres
from stores import make_store

from bench import claims, cluster, dashboard, heartbeats, layouts, lists, memory, retention, startup
from bench.report import table
from bench.rounds import Comparison, Plan
from relay.base.clock import SystemClock
from relay.config.schema import Retention
from relay.store.retention_policy import Policy
from relay.ui.app import SCREENS

ROOT = Path(__file__).parents[2]
SHORT = ("--rounds", "2", "--requests", "20", "--connections", "4")
SIDES = (
    ("ingest", "relay", "bare aiohttp handler"),
    ("relay", "relay", "bare aiohttp proxy"),
    ("generic", "generic, HMAC", "moddy, token"),
)


def bench(*arguments):
    command = [sys.executable, "-m", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def printed(capsys):
    """Run the command of a benchmark in this process; return its lines."""

    def call(command, *arguments):
        command.main([str(each) for each in arguments], standalone_mode=False)
        return capsys.readouterr().out.splitlines()

    return call


def test_without_a_name_bench_lists_the_benchmarks():
    assert [line.split()[0] for line in bench().splitlines()] == [
        "ingest", "relay", "generic", "zoo", "cluster",
    ]  # fmt: skip


def test_a_misspelt_name_is_refused():
    command = [sys.executable, "-m", "bench", "ingets"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "'ingest', 'relay', 'generic', 'zoo', 'cluster'" in done.stderr


def test_a_short_run_has_every_round_of_both_versions_their_ratio_and_the_target():
    made = json.loads(bench(*(name for name, *_ in SIDES), "--json", *SHORT))
    for (name, us, rival), comparison in zip(SIDES, made, strict=True):
        for side in ("ours", "theirs"):
            assert len(comparison[side]) == 2
            assert all(each["events"] == 20 and each["seconds"] > 0 for each in comparison[side])
        assert 0 < comparison["rate"]["ratio"]["least"] <= comparison["rate"]["ratio"]["most"]
        shown = table(msgspec.convert(comparison, Comparison))
        title, heads, ours, theirs, ratio, target = shown.splitlines()
        assert title.startswith(f"{name}: ")
        assert "events/s" in heads
        assert ours.strip().startswith(us)
        assert theirs.strip().startswith(rival)
        assert float(ratio.split()[1]) > 0
        assert target.startswith(("  target for the ratio: 0.", "  target for the ratio of CPU: 0.80"))


def test_broken_receivers_beside_a_healthy_one_cost_measured_throughput_and_p99():
    _, heads, crowded, alone, ratio, target = bench("zoo", *SHORT, "--rounds", "1").splitlines()
    assert "events/s" in heads
    assert "p99 ms" in heads
    assert crowded.strip().startswith("with broken receivers")
    assert alone.strip().startswith("without")
    assert all(float(each) > 0 for each in ratio.replace("(", " ").split()[1::2])
    assert target.startswith("  target for the ratio: 0.83")


@needs_postgres
async def test_nodes_on_postgresql_are_measured_beside_sqlite_and_deliver_bursts_at_once(
    tmp_path, monkeypatch
):
    """Without an announcement, a lane finds deliveries only when it polls, every 30 s."""
    monkeypatch.setattr(cluster, "LEASE", 3)
    monkeypatch.setattr(cluster, "PACED", 0.5)
    plan = Plan(rounds=1, requests=500, connections=64)
    found = await cluster.run(plan, nodes=(2,), url=database_of(tmp_path))
    assert [each.name for each in found] == [
        "store-total", "store-own", "cluster-2-total", "cluster-2-own", "cluster-limit",
        "cluster-2-latency",
    ]  # fmt: skip
    for each in found:
        [ratio] = [line.split() for line in table(each).splitlines() if line.startswith("  ratio")]
        assert (float(ratio[1]) > 0, float(ratio[3]) > 0) == (True, True)
    assert max(each.seconds for each in found[2].ours) < 15
    [main], [process] = found[4].ours, found[4].theirs
    assert 0 < main.cpu < process.cpu
    assert max(each.p99 for each in found[5].ours) < 10_000


@needs_postgres
def test_claims_are_timed_without_and_with_an_old_snapshot(printed, tmp_path):
    title, *parts, target = printed(claims.main, database_of(tmp_path), "--pending", 1000, "--seconds", 0.1)
    assert title == "1,000 pending deliveries, 128 in a claim"
    assert [part.split(",")[0].strip() for part in parts] == ["no snapshot"] * 5 + ["a held snapshot"] * 5
    assert target.startswith("target 5 ms for p99: ")


async def test_sweeps_are_measured_with_their_delay_of_the_event_loop(capsys, monkeypatch):
    monkeypatch.setattr(heartbeats, "WORKERS", 1000)
    await heartbeats.sweeps()
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "sweeps over 1,000 workers"
    assert len(lines) == 7
    assert all(
        re.fullmatch(r"  .+ [0-9.]+ ms, event loop blocked for at most [0-9.]+ ms", each) for each in lines
    )


def test_start_up_times_of_commands_are_printed_with_their_limit(capsys, monkeypatch):
    monkeypatch.setattr(startup, "COMMANDS", startup.COMMANDS[:2])
    startup.main(1)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("CPU per command")
    assert [line.split("  ")[1] for line in lines] == ["python -c pass", "relay --help", "relay --version"]
    assert all(re.search(r" [0-9]+ ms \([0-9]+-[0-9]+\)", line) for line in lines)
    assert "limit 120 ms" in lines[1]


def test_scrapes_are_timed_at_rest_and_under_load():
    command = [sys.executable, "-m", "bench.scrape", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    title, *lines, result = done.stdout.splitlines()
    assert title.startswith("2 scrapes of 50 destinations")
    assert [line.split(" ms: ")[0].rsplit(maxsplit=2)[0].strip() for line in lines] == [
        "at rest", "under load", "without scrapes", "during scrapes",
    ]  # fmt: skip
    assert "target for the medians: 50 ms" in result


def test_pages_of_the_dashboard_are_measured_and_small_enough(printed):
    title, files, heads, *lines = printed(dashboard.main, "pages", "--events", 300, "--visits", 2)
    rows = [line for line in lines if line.startswith("  /")]
    sizes = lines[len(rows)]
    assert title == "pages, with 300 events"
    assert files.count("(target met)") == 2
    assert heads.split()[:3] == ["page", "rows", "bytes"]
    assert [row.split()[0] for row in rows] == list(SCREENS)
    assert {row.split()[0] for row in rows if row.split()[1] == "50"} >= {
        "/events",
        "/deliveries",
        "/attempts",
    }
    assert sizes.count("(target met)") == 2


async def test_the_retention_benchmark_makes_valid_events_and_deletes_them(tmp_path):
    await retention.fill(tmp_path / "relay.db", 50)
    store = make_store(tmp_path / "relay.db", SystemClock(), kind="sqlite")
    await store.open()
    assert [check for check in await store.upkeep.examine() if not check.ok] == []
    assert (await store.ledger.audit())["gone"].delivered == 50
    assert (await store.upkeep.prune(Policy(Retention()))).events == 50
    await store.close()


def test_lists_are_measured_with_every_filter_and_their_plans_are_checked(printed, monkeypatch):
    """There are too few events for meaningful figures."""
    monkeypatch.setattr(lists, "RUNS", 1)
    lines = printed(lists.main, "--events", 100)
    out = "\n".join(lines)
    assert "100 events, 300 deliveries" in out
    assert re.findall(r"^(\w+): \d+ queries, median [0-9.]+ ms, maximum [0-9.]+ ms", out, re.MULTILINE) == [
        "events",
        "deliveries",
        "attempts",
    ]
    assert "scans or sorts a table" not in out
    assert re.search(r"^  +[0-9.]+ ms  ledger totals of all destinations", out, re.MULTILINE)
    assert lines[-1].startswith("target 50 ms per page: ")


async def test_resident_memory_is_printed_with_its_target(capsys, monkeypatch):
    monkeypatch.setattr(memory, "ROWS", memory.ROWS[-1:])
    await memory.main(0.002)
    title, *rows, result = capsys.readouterr().out.splitlines()
    assert title.startswith("resident memory after large events")
    assert [row.split(" KB")[0].split() for row in rows] == [["3", "x", "400"]]
    assert all(re.search(r" [0-9]+ MB, peak +[0-9]+ MB, +[0-9]+ us CPU per event", row) for row in rows)
    assert result == "target 200 MB after each row: met"


def test_events_during_floods_are_timed_and_compared_with_the_target():
    command = [sys.executable, "-m", "bench.flood", "0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    head, *rows, target = done.stdout.splitlines()
    assert head.split() == ["flood", "events", "p50", "ms", "p99", "ms", "max", "ms", "responses/s"]
    assert [row.split("  ")[1] for row in rows] == [
        "none",
        *(f"{kind}, {count} connections" for kind in ("heartbeats", "404s", "401s") for count in (1, 8)),
    ]
    assert all(re.search(r" (met|missed)$", row) for row in rows)
    assert target == "  target for p99: 50 ms"


def test_both_layouts_of_deliveries_are_measured_and_compared(printed, monkeypatch):
    """With too few rows for the figures to mean anything; the lists of both layouts are compared as well."""
    for name, few in {"GROUPS": 2, "CLAIMS": 2, "PLACES": 4}.items():
        monkeypatch.setattr(layouts, name, few)
    _, one, queue, head, *rows, result = printed(layouts.main, "--rows", 2000, "--rounds", 1)
    assert [re.sub(r"[0-9]+([.][0-9]+)?", "N", line) for line in (one, queue)] == [
        "one table: filled in N s, N MiB",
        "queue table: filled in N s, N MiB",
    ]
    assert head.split() == [
        "median",
        "CPU,",
        "microseconds",
        "one",
        "table",
        "queue",
        "table",
        "ratio",
        "(min-max)",
    ]
    assert [row.split("  ")[0] for row in rows] == [
        *(f"event with 1 delivery: {what}" for what in ("append", "settle", "both")),
        *(f"event with 3 deliveries: {what}" for what in ("append", "settle", "both")),
        "claim of 128",
        "settle a claimed delivery",
        "list: deliveries",
        "list: destination=crm",
        "list: destination=crm state=delivered",
        "list: destination=crm state=dead",
        "list: destination=erp state=pending",
        "list: destination=late state=pending",
        "list: events with counts by state",
        "list: events state=dead",
        "lists together",
        "delete an old event",
    ]  # fmt: skip
    assert all(re.search(r" [0-9,]+ +[0-9,]+ +[0-9.]+ \([0-9.]+-[0-9.]+\)$", row) for row in rows)
    assert result.startswith("more than 3% slower with the queue table: ")
