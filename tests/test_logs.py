"""Log lines that a sender can cause are few, whatever it sends."""

import json
import logging

import pytest
from support import FakeClock

from relay.logs import JsonLines, Sparing, TextLines

LOG = logging.getLogger("relay.test")


def record(text, *values, level=logging.INFO, error=None):
    return LOG.makeRecord(LOG.name, level, "file", 1, text, values, error)


def test_a_line_is_written_once_in_ten_seconds_and_counts_what_it_swallowed(caplog):
    caplog.set_level(logging.INFO)
    clock = FakeClock()
    sparing = Sparing(LOG, clock)
    for _ in range(5):
        sparing.info("auth", "refused: auth")
    sparing.info("other", "refused: other")
    clock.advance(9.9)
    sparing.info("auth", "refused: auth")
    assert caplog.messages == ["refused: auth", "refused: other"]
    clock.advance(0.1)
    sparing.info("auth", "refused: auth")
    sparing.info("auth", "refused: auth")
    assert caplog.messages[2:] == ["refused: auth (5 more like it)"]


def test_a_failure_is_written_with_its_traceback_as_sparingly(caplog):
    sparing = Sparing(LOG, FakeClock())
    for number in range(3):
        sparing.error("failed", "shop: failed", KeyError(number))
    [line] = caplog.records
    assert (line.levelname, line.getMessage(), str(line.exc_info[1])) == ("ERROR", "shop: failed", "0")


def test_json_is_one_object_per_line():
    text = JsonLines().format(record("%s is dead:\n%s", "crm", "é"))
    assert "\n" not in text
    line = json.loads(text)
    assert line.pop("time").endswith("Z")
    assert line == {"level": "info", "logger": "relay.test", "message": "crm is dead:\né"}


def test_json_holds_a_traceback_in_the_same_line():
    error = KeyError("lost")
    text = JsonLines().format(record("failed", error=(KeyError, error, None)))
    assert "\n" not in text
    assert "KeyError: 'lost'" in json.loads(text)["exception"]


@pytest.mark.parametrize(("level", "prefix"), [(logging.INFO, "<6>"), (logging.ERROR, "<3>")])
def test_journald_gets_the_priority_before_each_line(level, prefix):
    text = TextLines(journald=True).format(record("one\ntwo", level=level))
    assert text.splitlines() == [f"{prefix}relay.test: one", f"{prefix}relay.test: two"]


def test_colour_is_for_terminals_only():
    assert "\x1b[" in TextLines(colour=True).format(record("hello"))
    assert "\x1b[" not in TextLines().format(record("hello"))
