"""Confirmation, and following a replay, on a terminal."""

import io
import itertools

import click
import pytest

from relay.cli import selection
from relay.cli.main import CommandError
from relay.cli.output import print_table
from relay.cli.selection import confirm, follow_replay

RUNNING = {
    "id": "rpl_1", "state": "running", "count": 1204, "done": 400, "created": 400, "skipped": 0,
    "per_second": 100.0, "eta_seconds": 8.04, "reached": "2026-01-31T12:00:00.000Z", "ended_at": None,
    "error": None,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Scripted:
    """Returns one answer per request; raises those that are exceptions."""

    def __init__(self, *looks):
        self.looks = iter(looks)

    def get(self, *path):
        if path == ("destinations",):  # asked at the end, for destinations that are held
            return {"items": []}
        assert path == ("replays", "rpl_1")
        look = next(self.looks)
        if isinstance(look, BaseException):
            raise look
        return {**RUNNING, **look}

    def delete(self, *path):
        return {**RUNNING, "done": 500, "state": "cancelling"}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(selection, "POLL_EVERY", 0)


def test_progress_has_count_rate_and_remaining_time(monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    follow_replay(
        Scripted({"done": 1204, "created": 1204, "ended_at": "now", "state": "done"}), RUNNING, as_json=False
    )
    assert "400 of 1 204 events, 100/s, 8s left" in screen.getvalue()
    assert screen.getvalue().endswith("\r\033[K")
    assert capsys.readouterr().out == "1 204 of 1 204 events: 1 204 deliveries\n"


def test_ctrl_c_cancels_a_replay_and_prints_how_to_continue(capsys):
    with pytest.raises(CommandError) as result:
        follow_replay(Scripted({}, KeyboardInterrupt()), RUNNING, as_json=False)
    assert result.value.code == 130
    assert result.value.message.startswith("cancelled after 500 of 1 204 events")
    assert result.value.hint.endswith("--since 2026-01-31T12:00:00.000Z")


def test_a_failed_replay_exits_with_1_and_prints_how_to_continue():
    with pytest.raises(CommandError) as result:
        follow_replay(
            Scripted({"ended_at": "now", "state": "failed", "error": "the disk is full"}),
            RUNNING,
            as_json=True,
        )
    assert (result.value.code, result.value.message) == (1, "the replay stopped early: the disk is full")
    assert result.value.hint == "to continue, run the same command with --since 2026-01-31T12:00:00.000Z"


@pytest.mark.parametrize("answer", ["y\n", "n\n"])
def test_on_a_terminal_the_question_has_the_count(monkeypatch, capsys, answer):
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    if answer == "y\n":
        confirm("Replay 1 204 events?", yes=False)
    else:
        with pytest.raises(CommandError, match="nothing was changed"):
            confirm("Replay 1 204 events?", yes=False)
    assert capsys.readouterr().out.startswith("Replay 1 204 events? [y/N]: ")


def test_yes_skips_the_question(monkeypatch):
    monkeypatch.setattr("sys.stdin", itertools.repeat(None))
    confirm("Replay 1 204 events?", yes=True)


def test_without_a_terminal_yes_is_required(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(click.UsageError, match="Add --yes"):
        confirm("Replay 1 204 events?", yes=False)


def test_a_table_on_a_terminal_is_aligned_under_headings(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    print_table(("id", "type"), [("1", "a"), ("1234", "b\nc")])
    assert screen.getvalue() == "ID    TYPE\n1     a\n1234  b c\n"
