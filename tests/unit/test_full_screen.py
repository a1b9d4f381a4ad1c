"""A full screen gives the terminal back: at its end, after a crash, and while it is suspended."""

import io
import os
import select
import signal
import termios
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from relay.cli.full_screen import FullScreen


@pytest.fixture
def terminal():
    """One side of a pseudo-terminal; `streams` makes its other side stdin and stdout."""
    ours, theirs = os.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@contextmanager
def streams(terminal):
    """Make a pseudo-terminal stdin and stdout."""
    with os.fdopen(os.dup(terminal[1]), "rb+", buffering=0) as file:
        stream = io.TextIOWrapper(file, write_through=True)
        with patch("sys.stdin", stream), patch("sys.stdout", stream):
            yield
        stream.detach()


def is_raw(terminal):
    return not termios.tcgetattr(terminal[0])[3] & (termios.ICANON | termios.ECHO)


def shown(terminal):
    """Return the text written to the terminal since the last call."""
    ready, _, _ = select.select([terminal[0]], [], [], 10)
    assert ready, "nothing was written"
    return os.read(terminal[0], 65_536).decode()


def crash(terminal):
    with FullScreen():
        assert is_raw(terminal)
        assert shown(terminal) == "\x1b[?1049h\x1b[?25l"
        raise RuntimeError


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGWINCH, signal.SIGTSTP)]


def test_a_crash_restores_the_terminal_and_the_signals(terminal):
    before, unchanged = termios.tcgetattr(terminal[0]), handlers()
    with streams(terminal), pytest.raises(RuntimeError):
        crash(terminal)
    assert shown(terminal) == "\x1b[?25h\x1b[?1049l"
    assert termios.tcgetattr(terminal[0]) == before
    assert handlers() == unchanged


def test_a_suspended_command_gives_the_terminal_back_until_it_continues(terminal, monkeypatch):
    seen = []
    with streams(terminal), FullScreen() as screen:
        shown(terminal)
        monkeypatch.setattr("os.kill", lambda *_: seen.append((is_raw(terminal), shown(terminal))))
        screen._suspend(signal.SIGTSTP, None)
        assert is_raw(terminal)
        assert shown(terminal) == "\x1b[?1049h\x1b[?25l"
        assert list(screen.wait()) == []  # it draws again
    assert seen == [(False, "\x1b[?25h\x1b[?1049l")]


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        (b"q", ["q"]),
        (b"/a\xc3\xa9\r", ["/", "a", "é", "\n"]),  # the terminal turns a carriage return into a newline
        (b"\x1b[A\x1b[6~\x1bOB", ["up", "page down", "down"]),
        (b"\x1b", ["\x1b"]),
        (b"\x1b[15~\x1b[1;5Cx", ["x"]),  # F5, Ctrl-Right
    ],
)
def test_keys_are_characters_or_names(terminal, typed, keys):
    with streams(terminal), FullScreen() as screen:
        os.write(terminal[0], typed)
        assert list(screen.wait()) == keys


def test_a_change_of_the_size_ends_the_wait(terminal):
    with streams(terminal), FullScreen() as screen:
        os.kill(os.getpid(), signal.SIGWINCH)
        assert list(screen.wait()) == []
