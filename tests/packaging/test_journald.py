"""A running relay and a real journald, which has its own /run in a mount namespace."""

import asyncio
import json
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from daemons import SOURCES, Daemon, Recorder, adorn, destination, write_config
from machines import needs, needs_root
from support import until
from wire import exchange, request

JOURNALD = Path("/lib/systemd/systemd-journald")
pytestmark = [
    needs_root,
    needs("unshare", "journalctl"),
    pytest.mark.skipif(not JOURNALD.exists(), reason="needs systemd-journald, not installed here"),
]

NAMESPACE = f"""\
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal /run/log/journal && exec {JOURNALD}
"""

SERVICE = """\
import os
status = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"  # as systemd sets it
from relay.process import journal
journal.SOCKET = os.environ["TEST_JOURNAL"]
from relay.cli import main
main()
"""


class Journal:
    """The journal of one journald."""

    def __init__(self, process):
        self.run = Path(f"/proc/{process.pid}/root/run")

    async def find(self, *matches):
        command = ("journalctl", "--directory", self.run / "log" / "journal", "-o", "json", *matches)
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        return [json.loads(line) for line in done.stdout.splitlines()]


@asynccontextmanager
async def journald():
    process = await asyncio.create_subprocess_exec(
        "unshare", "--mount", "--propagation", "private", "bash", "-c", NAMESPACE,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        journal = Journal(process)
        for _ in range(200):
            if process.returncode is not None:
                pytest.skip(f"journald does not run here: {(await process.stderr.read()).decode()}")
            if (journal.run / "systemd" / "journal" / "stdout").exists():
                break
            await asyncio.sleep(0.05)
        yield journal
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_journalctl_finds_the_entries_of_a_destination(tmp_path, monkeypatch):
    config = write_config(tmp_path, SOURCES)
    async with Recorder() as recorder, journald() as journal:
        write_config(tmp_path, SOURCES, destination("crm", recorder.url), destination("erp", recorder.url))
        config.write_text(config.read_text().replace('format = "json"', 'format = "auto"'))
        monkeypatch.setenv("TEST_JOURNAL", str(journal.run / "systemd" / "journal" / "socket"))
        recorder.answers += [(500, {})] * 4
        daemon = Daemon(config, (sys.executable, "-c", SERVICE, "serve"))
        await daemon.start()
        try:
            [listens] = await until_found(journal, "LOGGER=relay", text="listens on")
            assert listens["PRIORITY"] == "6"
            assert listens["SYSLOG_IDENTIFIER"] == "relay"
            public = listens["MESSAGE"].partition("listens on ")[2].partition(",")[0]
            answer = await exchange(public, request("POST", "/v1/events", adorn("s-1")))
            event_id = answer.json["event_id"]
            await until(lambda: len(recorder.ids) >= 4)
            found = await until_found(journal, "DESTINATION=crm", "RESULT=5xx")
            assert {entry["DESTINATION"] for entry in found} == {"crm"}
            assert {entry["EVENT_ID"] for entry in found} == {event_id}
            assert found[0]["STATUS"] == "500"
            assert found[0]["MESSAGE"].startswith("relay.delivery: crm: attempt 1 failed")
            both = {
                entry["DESTINATION"] for entry in await until_found(journal, f"EVENT_ID={event_id}", least=2)
            }
            assert both == {"crm", "erp"}
        finally:
            await daemon.stop()
        assert daemon.output == ""  # nothing went to stderr
        [ended] = await until_found(journal, "LOGGER=relay", text="stopped, no events lost")
        assert int(ended["_PID"]) == daemon.process.pid


async def until_found(journal, *matches, text="", least=1):
    """Return the entries that match, once there are some; journald writes them a little later."""
    found = []
    async with asyncio.timeout(30):
        while len(found) < least:
            found = [entry for entry in await journal.find(*matches) if text in entry["MESSAGE"]]
    return found
