"""`relay jobs`, and long work on a terminal."""

import re
from pathlib import Path

import pytest
from daemons import SOURCES, running, write_config
from stores import KINDS

from relay.cli import api_client, output
from relay.cli.api_client import run_operation
from relay.cli.main import CommandError
from relay.cli.output import Meter

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


@pytest.fixture
async def relay(tmp_path):
    async with running(write_config(tmp_path, SOURCES)) as relay:
        yield relay


async def test_jobs_are_listed_with_their_results(relay, commands):
    names = (await commands("jobs", "list", "-q")).out.split()
    server = ["database"] if KINDS[0] == "postgres" else []
    assert names == [
        "activity",
        "backup",
        *server,
        "disk",
        "expire",
        "flush",
        "forget",
        "history",
        "ledger",
        "refused",
        "retention",
        "sweep",
        "tokens",
    ]
    section = OPERATING.read_text().partition("## Jobs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+)[^|]* \|", section, re.MULTILINE)
    listed = [(row[0], row[1]) for row in (await commands("jobs", "list")).rows]
    assert rows == [each for each in listed if each[0] not in server]
    [retention] = [row for row in (await commands("jobs", "list")).rows if row[0] == "retention"]
    assert (retention[1], retention[4], retention[5]) == ("1m", "0", "0")
    assert retention[6].endswith("Z")


async def test_a_job_runs_and_its_result_prints(commands):
    finished = await commands("jobs", "run", "retention")
    assert finished.out.startswith("retention: done in ")
    assert (await commands("jobs", "run", "retention", "--json")).json["runs"] == 2


async def test_a_failed_job_exits_with_1(relay, commands):
    async def fail():
        raise KeyError("nothing")

    relay.app.jobs.add("shop.fail", 3600, fail)
    finished = await commands("jobs", "run", "shop.fail", code=1)
    assert finished.out.startswith("shop.fail: KeyError: 'nothing' in ")
    assert finished.err == "job shop.fail failed\n  the daemon's log has the traceback\n"


async def test_an_unknown_job_exits_with_4(commands):
    finished = await commands("jobs", "run", "swep", code=4)
    assert finished.err.startswith('unknown job "swep", did you mean "sweep"?\n  jobs: activity, backup, ')


class Scripted:
    """A relay that answers with these lines."""

    def __init__(self, *lines):
        self._lines = lines

    def lines(self, _method, *_path, body):
        for line in self._lines:
            if isinstance(line, BaseException):
                raise line
            yield line


def run_with(*lines):
    return run_operation(
        Scripted(*lines), "backup", describe=lambda at: f"{at['bytes']} bytes", stopped="nothing is left"
    )


def test_progress_is_shown_and_cleared_at_the_end(monkeypatch):
    shown = []
    monkeypatch.setattr(api_client, "show_progress", shown.append)
    assert run_with({"progress": {"bytes": 1}}, {"progress": {"bytes": 2}}, {"result": {"bytes": 3}}) == {
        "bytes": 3
    }
    assert shown == ["1 bytes", "2 bytes", ""]


@pytest.mark.parametrize(
    ("last", "code", "message"),
    [
        ({"error": {"message": "the disk is full", "hint": "make room"}}, 1, "the disk is full\n  make room"),
        (KeyboardInterrupt(), 130, "interrupted: nothing is left"),
        ({"progress": {"bytes": 2}}, 1, "the daemon stopped before the operation finished\n  check its log"),
    ],
)
def test_an_operation_without_a_result_has_an_error(last, code, message):
    with pytest.raises(CommandError) as raised:
        run_with({"progress": {"bytes": 1}}, last)
    assert raised.value.code == code
    assert str(raised.value).startswith(message)


def test_a_meter_has_count_rate_and_remaining_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    meter = Meter(1204, "event")
    now[0] += 4
    assert meter.text(400) == "400 of 1 204 events, 100/s, 8s left"
    assert Meter(10, "event").text(0) == "0 of 10 events, 0/s"
