"""Log lines: their fields and formats; and lines that senders cause are few, and one line each."""

import ast
import fcntl
import io
import json
import logging
import os
import re
import threading
import time
from pathlib import Path

import pytest
from support import FakeClock

from relay.errors import RelayError
from relay.process.logs import (
    MOST_QUEUED,
    JsonLines,
    Lines,
    RateLimitedLog,
    TextLines,
    configure,
    fields,
    in_one_line,
)

LOG = logging.getLogger("relay.test")
ROOT = Path(__file__).parents[2]


def record(text, *values, level=logging.INFO, error=None, **named):
    return LOG.makeRecord(LOG.name, level, "file", 1, text, values, error, extra=fields(**named))


def test_a_repeated_line_is_written_once_in_ten_seconds_with_a_count(caplog):
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    limited = RateLimitedLog(LOG, clock)
    for _ in range(5):
        limited.info("auth", "refused: auth")
    limited.info("other", "refused: other")
    clock.advance(9.9)
    limited.info("auth", "refused: auth")
    assert caplog.messages == ["refused: auth", "refused: other"]
    clock.advance(0.1)
    limited.info("auth", "refused: auth")
    limited.info("auth", "refused: auth")
    assert caplog.messages[2:] == ["refused: auth (5 more like it)"]


def test_a_line_that_keeps_repeating_is_written_less_and_less_often(caplog):
    caplog.set_level(logging.INFO)
    clock, written = FakeClock(), []
    limited = RateLimitedLog(LOG, clock, most=60.0)
    for second in range(400):
        limited.info("auth", "refused")
        if len(caplog.messages) > len(written):
            written.append(second)
        clock.advance(1)
    assert written == [0, 10, 30, 70, 130, 190, 250, 310, 370]
    assert caplog.messages[-1] == "refused (59 more like it)"
    clock.advance(60)  # no line for the length of the pause: then the short pause applies again
    for _ in range(2):
        limited.info("auth", "refused")
        clock.advance(60)
    before = len(caplog.messages)
    for _ in range(11):
        limited.info("auth", "refused")
        clock.advance(1)
    assert len(caplog.messages) == before + 2


def test_a_traceback_is_limited_in_the_same_way(caplog):
    limited = RateLimitedLog(LOG, FakeClock())
    for number in range(3):
        limited.error("failed", "shop: failed", KeyError(number))
    [line] = caplog.records
    assert (line.levelname, line.getMessage(), str(line.exc_info[1])) == ("ERROR", "shop: failed", "0")


def test_json_is_one_object_per_line():
    text = JsonLines().format(record("%s is dead:\n%s", "crm", "é"))
    assert "\n" not in text
    line = json.loads(text)
    assert line.pop("time").endswith("Z")
    assert line == {"level": "info", "logger": "relay.test", "message": "crm is dead:\né"}


def test_json_has_a_traceback_in_the_same_line():
    error = KeyError("lost")
    text = JsonLines().format(record("failed", error=(KeyError, error, None)))
    assert "\n" not in text
    assert "KeyError: 'lost'" in json.loads(text)["exception"]


@pytest.mark.parametrize(("level", "prefix"), [(logging.INFO, "<6>"), (logging.ERROR, "<3>")])
def test_journald_gets_the_priority_before_each_line_of_a_traceback(level, prefix):
    error = KeyError("one\ntwo")
    text = TextLines(journald=True).format(record("failed", level=level, error=(KeyError, error, None)))
    assert text.splitlines() == [f"{prefix}relay.test: failed", f"{prefix}relay.test: KeyError: 'one\\ntwo'"]


HOSTILE = "one\ntwo\r\x1b[2J\u2028<0>kernel: panic \x9b31m"


@pytest.mark.parametrize("formatter", [TextLines(), TextLines(journald=True), TextLines(colour=True)])
def test_line_ends_and_control_characters_of_a_sender_are_escaped(formatter):
    text = formatter.format(record("refused: %s", HOSTILE, subject=HOSTILE))
    assert len(text.splitlines()) == 1
    plain = re.sub(r"\x1b\[\d*m", "", text)  # our own colours
    assert plain.isprintable()
    assert r"refused: one\ntwo\r\x1b[2J\u2028<0>kernel" in plain
    assert r'subject="one\ntwo\r\u001b[2J\u2028<0>kernel: panic \x9b31m"' in plain


def test_a_hostile_field_stays_within_one_line_of_json():
    text = JsonLines().format(record("refused", subject="one\ntwo\x1b[2J"))
    assert "\n" not in text
    assert "\x1b" not in text
    assert json.loads(text)["subject"] == "one\ntwo\x1b[2J"


def test_fields_are_keys_in_json_and_pairs_in_text():
    made = record("crm: attempt 1 failed", delivery_id="dlv_1", status=503, duration_ms=1.5, request_id=None)
    line = json.loads(JsonLines().format(made))
    assert {name: line[name] for name in ("delivery_id", "status", "duration_ms")} == {
        "delivery_id": "dlv_1", "status": 503, "duration_ms": 1.5,
    }  # fmt: skip
    assert "request_id" not in line
    pairs = "crm: attempt 1 failed delivery_id=dlv_1 status=503 duration_ms=1.5"
    assert TextLines(journald=True).format(made) == f"<6>relay.test: {pairs}"
    assert TextLines().format(made).endswith(f" relay.test: {pairs}")


@pytest.mark.parametrize(
    ("value", "written"),
    [("a b", '"a b"'), ('say "x"', r'"say \"x\""'), ("a=b", '"a=b"'), ("", '""'), ("é", "é"), (0, "0")],
)
def test_a_value_in_text_cannot_be_mistaken_for_the_next_field(value, written):
    assert TextLines(journald=True).format(record("x", given=value)).endswith(f" given={written}")


def test_a_field_that_json_cannot_write_is_written_as_text():
    assert json.loads(JsonLines().format(record("x", path=Path("/a"))))["path"] == "/a"


def test_a_rate_limited_line_has_its_fields(caplog):
    caplog.set_level(logging.INFO)
    RateLimitedLog(LOG, FakeClock()).info("auth", "refused", request_id="req_1")
    assert caplog.records[0].fields == {"request_id": "req_1"}


def test_an_error_of_several_lines_is_logged_in_one():
    assert in_one_line(RelayError("no such storage", hint="write url")) == "no such storage; write url"


@pytest.mark.parametrize(
    ("format_", "goes", "environ", "expected"),
    [
        ("auto", {"systemd"}, {}, "<6>relay.test: hello a=1"),
        ("auto", {"systemd", "terminal"}, {}, "<6>relay.test: hello a=1"),
        ("auto", set(), {}, "{"),
        ("auto", {"terminal"}, {}, "\x1b[36minfo"),
        ("auto", {"terminal"}, {"NO_COLOR": "1"}, " info    relay.test: hello a=1"),
        ("text", set(), {}, " info    relay.test: hello a=1"),
        ("text", set(), {"FORCE_COLOR": "1"}, "\x1b[36minfo"),
        ("journald", {"terminal"}, {}, "<6>relay.test: hello a=1"),
        ("json", {"systemd", "terminal"}, {}, "{"),
    ],
)
def test_the_format_auto_depends_on_the_destination_of_the_log(monkeypatch, format_, goes, environ, expected):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: "terminal" in goes
    monkeypatch.setattr("sys.stderr", stream)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        configure("info", format_, under_systemd="systemd" in goes)
        LOG.info("hello", extra=fields(a=1))
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert expected in stream.getvalue()


def test_colour_is_for_terminals_only():
    assert "\x1b[" in TextLines(colour=True).format(record("hello"))
    assert "\x1b[" not in TextLines().format(record("hello"))


def test_the_documentation_lists_exactly_the_fields_of_log_lines():
    keywords = set()
    for file in (ROOT / "relay").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            match node.func:
                case ast.Name(id="fields" | "delivery_fields"):
                    keywords |= {keyword.arg for keyword in node.keywords}
                case ast.Attribute(value=ast.Attribute(attr="_log"), attr="info" | "warning" | "error"):
                    keywords |= {keyword.arg for keyword in node.keywords}
    section = (ROOT / "docs" / "operating.md").read_text().partition("## Logs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| [^|]+ \| [^|]+ \|$", section, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == keywords - {None}


# --- a reader that does not read ----------------------------------------------------------------------


@pytest.fixture
def unread():
    """A handler that writes to a pipe, the pipe's other end, and the bytes that the pipe takes."""
    reader, writer = os.pipe()
    size = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
    with open(writer, "w") as stream, open(reader, "rb", buffering=0) as pipe:  # noqa: PTH123 - descriptors
        yield Lines(stream), pipe, size
        os.set_blocking(reader, False)
        while pipe.read(2**20):  # what a thread still writes
            time.sleep(0.01)


def read_until(pipe, text):
    """Read whole lines until one has this text."""
    found = b""
    while text.encode() not in found or not found.endswith(b"\n"):
        found += pipe.read(65_536)
    return found.decode().splitlines()


def test_lines_are_written_at_once_while_the_reader_reads(unread):
    handler, pipe, _ = unread
    for number in range(5):
        handler.handle(record("line %d", number))
        assert pipe.read(100) == f"line {number}\n".encode()
    assert handler._thread is None


def test_a_stalled_log_reader_delays_nothing_and_gets_the_number_of_lost_lines(unread):
    handler, pipe, _ = unread
    drops = []
    handler.on_drop = lambda: drops.append(True)
    handler.setFormatter(JsonLines())
    count, began = 4000, time.monotonic()
    for number in range(count):
        handler.handle(record("line %d %s", number, "x" * 400))
    assert time.monotonic() - began < 5
    assert 0 < handler.dropped < count
    assert len(drops) == handler.dropped
    assert handler._size <= MOST_QUEUED
    lines = [json.loads(line) for line in read_until(pipe, "nobody read the log")]
    assert [line["message"].split()[1] for line in lines[:-1]] == [
        str(number) for number in range(count - handler.dropped)
    ]
    assert (lines[-1]["level"], lines[-1]["count"]) == ("warning", handler.dropped)
    handler.handle(record("line %s", "after"))
    assert json.loads(read_until(pipe, "after")[0])["message"] == "line after"
    assert handler._unreported == 0


def test_a_line_longer_than_the_pipe_is_written_whole_without_blocking(unread):
    handler, pipe, size = unread
    handler.handle(record("%s end", "x" * 10 * size))
    handler.handle(record("next"))
    assert [len(line) for line in read_until(pipe, "next")] == [10 * size + 4, 4]


def test_a_stop_waits_for_a_stalled_reader_only_briefly(unread):
    handler, pipe, size = unread
    handler.handle(record("x" * 3 * size))
    began = time.monotonic()
    handler.flush()
    assert 0.3 < time.monotonic() - began < 5
    thread = threading.Thread(target=read_until, args=(pipe, "\n"))
    thread.start()
    began = time.monotonic()
    handler.flush()
    thread.join()
    assert handler._size == 0


def test_a_closed_log_pipe_fails_nothing():
    reader, writer = os.pipe()
    with open(writer, "w") as stream:  # noqa: PTH123 - a descriptor
        handler = Lines(stream)
        os.close(reader)
        for size in (10, 10_000):
            handler.handle(record("x" * size))
        handler.flush()
        assert handler.dropped == 2


def test_a_line_that_cannot_be_formatted_fails_nothing(unread, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    handler, pipe, _ = unread
    handler.handle(record("%d", "no number"))
    handler.handle(record("next"))
    assert pipe.read(100) == b"next\n"
