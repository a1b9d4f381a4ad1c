"""The native protocol of the journal: entries with fields, large ones, and a journald that does not read."""

import array
import json
import logging
import os
import socket
import time

import pytest

from relay.process import journal, logs
from relay.process.logs import MOST_QUEUED, JournalLines, configure, fields, on_drop

LOG = logging.getLogger("relay.test")


def decode(data):
    """Return the fields of an entry, by the description of the protocol."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, is_text, value = line.partition(b"=")
        if not is_text:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        found[name.decode()] = value.decode()
        data = rest
    return found


class Journald:
    """Receives entries at a path, as journald does."""

    def __init__(self, path):
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(10)
        self.in_memory = 0

    def receive(self):
        data, ancillary, _, _ = self.socket.recvmsg(2**20, socket.CMSG_SPACE(4))
        for _, kind, rights in ancillary:
            assert (kind, data) == (socket.SCM_RIGHTS, b"")
            file, *_ = array.array("i", rights)
            with open(file, "rb", buffering=0) as memory:  # noqa: PTH123 - a descriptor
                with pytest.raises(PermissionError):
                    os.write(file, b"x")  # sealed, so journald can read it in place
                memory.seek(0)
                data = memory.read()
            self.in_memory += 1
        return decode(data)


@pytest.fixture
def journald(tmp_path):
    journald = Journald(tmp_path / "socket")
    yield journald
    journald.socket.close()


@pytest.fixture
def handler(journald):
    handler = JournalLines(journal.Journal(journald.path))
    yield handler
    handler.close()


def record(text, level=logging.INFO, error=None, **named):
    return LOG.makeRecord(LOG.name, level, "/app/file.py", 7, text, (), error, "run", fields(**named))


def test_fields_of_a_line_are_fields_of_the_entry(journald, handler):
    handler.handle(record("crm: failed", logging.WARNING, destination="crm", attempt=2, event_id="evt_1"))
    assert journald.receive() == {
        "MESSAGE": "relay.test: crm: failed destination=crm attempt=2 event_id=evt_1",
        "PRIORITY": "4", "SYSLOG_IDENTIFIER": "relay", "LOGGER": "relay.test",
        "CODE_FILE": "/app/file.py", "CODE_LINE": "7", "CODE_FUNC": "run",
        "DESTINATION": "crm", "ATTEMPT": "2", "EVENT_ID": "evt_1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("level", "priority"),
    [("DEBUG", "7"), ("INFO", "6"), ("WARNING", "4"), ("ERROR", "3"), ("CRITICAL", "2")],
)
def test_levels_are_priorities(journald, handler, level, priority):
    handler.handle(record("x", getattr(logging, level)))
    assert journald.receive()["PRIORITY"] == priority


def test_a_traceback_is_one_entry_and_text_from_senders_adds_no_field(journald, handler):
    try:
        _ = {}["a\nFORGED=1"]
    except KeyError as error:
        raised = KeyError, error, error.__traceback__
    handler.handle(record("failed\nFORGED=2", error=raised, source="a\nb\x1b"))
    entry = journald.receive()
    first, *traceback = entry["MESSAGE"].splitlines()
    assert first == "relay.test: failed\\nFORGED=2 source=a\\nb\\x1b"
    assert traceback[0] == "Traceback (most recent call last):"
    assert entry["SOURCE"] == "a\\nb\\x1b"
    assert "FORGED" not in entry


@pytest.mark.parametrize("size", [100, 100_000, 5_000_000])
def test_an_entry_of_any_size_arrives_whole(journald, handler, size):
    handler.handle(record("x" * size, worker_id="w"))
    entry = journald.receive()
    assert (len(entry["MESSAGE"]), entry["WORKER_ID"]) == (len("relay.test:  worker_id=w") + size, "w")
    assert journald.in_memory == (size > 1_000_000)


def test_names_that_the_journal_does_not_permit_are_left_out():
    entry = {"_PID": "1", "1A": "1", "a": "1", "A B": "1", "": "1", "X" * 65: "1", "MESSAGE": "é", "A_1": ""}
    assert decode(journal.encode(entry)) == {"MESSAGE": "é", "A_1": ""}
    assert journal.encode({"MESSAGE": "\ud83d"}) == b"MESSAGE=\\ud83d\n"


def test_a_journald_that_does_not_read_delays_nothing(journald, handler):
    began, count = time.monotonic(), 6000
    for number in range(count):
        handler.handle(record(f"line {number} {'x' * 400}"))
    assert time.monotonic() - began < 5
    assert 0 < handler.dropped < count
    assert handler._size <= MOST_QUEUED
    entries = []
    while not entries or "COUNT" not in entries[-1]:
        entries.append(journald.receive())
    assert [int(entry["MESSAGE"].split()[2]) for entry in entries[:-1]] == list(
        range(count - handler.dropped)
    )
    assert entries[-1]["COUNT"] == str(handler.dropped)
    assert entries[-1]["PRIORITY"] == "4"


def test_a_journald_that_restarts_is_found_again(tmp_path, journald, handler):
    journald.socket.close()
    handler.handle(record("lost"))
    assert handler.dropped == 1
    os.unlink(journald.path)  # noqa: PTH108 - a text
    handler.handle(record("lost"))
    again = Journald(journald.path)
    handler.handle(record("found"))
    assert again.receive()["MESSAGE"] == "relay.test: found"
    again.socket.close()


# --- the choice of the journal ------------------------------------------------------------------------


@pytest.fixture
def stderr(tmp_path, monkeypatch):
    """A file that becomes stderr when a test calls `connected`."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    with (tmp_path / "stderr").open("w+") as stream:
        yield stream
        for handler in root.handlers:
            if handler not in before:
                handler.close()
    root.handlers[:] = before
    root.setLevel(level)


def connected(stream, monkeypatch):
    """Make a file stderr, which is connected to the journal, as far as a process can see."""
    monkeypatch.setattr("sys.stderr", stream)
    status = os.fstat(stream.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")


def text_of(stream):
    stream.seek(0)
    return stream.read()


@pytest.mark.parametrize("format_", ["auto", "journald"])
def test_a_service_logs_to_the_journal_s_socket(journald, stderr, monkeypatch, format_):
    connected(stderr, monkeypatch)
    monkeypatch.setattr(journal, "SOCKET", journald.path)
    configure("info", format_, under_systemd=logs.under_systemd())
    LOG.info("hello", extra=fields(source="shop"))
    assert journald.receive()["SOURCE"] == "shop"
    assert text_of(stderr) == ""


def test_without_the_socket_a_service_logs_lines_with_priorities(stderr, tmp_path, monkeypatch):
    connected(stderr, monkeypatch)
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path / "absent"))
    configure("info", "auto", under_systemd=logs.under_systemd())
    LOG.info("hello", extra=fields(source="shop"))
    assert text_of(stderr) == "<6>relay.test: hello source=shop\n"


@pytest.mark.parametrize("stream", ["", "1:2"])
def test_a_redirected_stderr_does_not_go_to_the_journal(journald, stderr, monkeypatch, stream):
    connected(stderr, monkeypatch)
    monkeypatch.setattr(journal, "SOCKET", journald.path)
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    configure("info", "auto", under_systemd=logs.under_systemd())
    LOG.info("hello")
    assert json.loads(text_of(stderr))["message"] == "hello"


def test_skipped_runs_of_a_job_that_waits_for_the_database_are_not_logged(stderr, monkeypatch):
    monkeypatch.setattr("sys.stderr", stderr)
    configure("info", "text", under_systemd=False)
    logging.getLogger("apscheduler.scheduler").warning("Execution of job expire skipped")
    LOG.warning("hello")
    assert "hello" in text_of(stderr)
    assert "skipped" not in text_of(stderr)


def test_another_format_after_a_reload_keeps_the_count_of_dropped_lines(journald, stderr, monkeypatch):
    connected(stderr, monkeypatch)
    monkeypatch.setattr(journal, "SOCKET", journald.path)
    counted = []
    configure("info", "auto", under_systemd=True)
    on_drop(lambda: counted.append(1))
    configure("debug", "auto", under_systemd=True)
    journald.socket.close()
    LOG.debug("lost")
    assert counted == [1]
