"""A full terminal screen: redrawn in place, controlled by single keys, and adapted to changes of its size.

The terminal gets back its state at the end of the block, also after an exception, Ctrl-C or SIGTERM, and
while the command is suspended by Ctrl-Z.
"""

import codecs
import os
import re
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, Self

import click

from relay.cli.screen import clip

_ENTER = "\x1b[?1049h\x1b[?25l"  # alternate screen, hidden cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_SEQUENCES: Mapping[str, str] = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1b[5~": "page up", "\x1b[6~": "page down",
    "\x1bOA": "up", "\x1bOB": "down",
}  # fmt: skip
_KEYS = re.compile(r"\x1b[\[O][0-9;]*[~A-Za-z]|\x1b|.", re.DOTALL)  # arrows and function keys are sequences


class FullScreen:
    """The terminal of stdout, and the keys of stdin if it is a terminal, too."""

    def __init__(self) -> None:
        self.has_keys = sys.stdin.isatty()
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._decoder = codecs.getincrementaldecoder("utf-8")("ignore")
        self._saved: list[Any] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._handlers = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, _exit),
            signal.SIGHUP: signal.signal(signal.SIGHUP, _exit),
            signal.SIGWINCH: signal.signal(signal.SIGWINCH, lambda *_: self.wake()),
            signal.SIGTSTP: signal.signal(signal.SIGTSTP, self._suspend),
        }
        try:
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._woken)
        os.close(self._waker)

    def _take(self) -> None:
        if self.has_keys:
            self._saved = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)  # single keys without echo; Ctrl-C and Ctrl-Z stay signals
        click.echo(_ENTER, nl=False, color=True)

    def _restore(self) -> None:
        try:
            click.echo(_LEAVE, nl=False, color=True)
        finally:
            if self._saved is not None:
                with suppress(termios.error):  # the terminal was closed
                    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._saved)

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        """Give the terminal back while the command is suspended."""
        self._restore()
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns after SIGCONT
        signal.signal(signal.SIGTSTP, ours)
        self._take()
        self.wake()

    def size(self) -> tuple[int, int]:
        """Return the numbers of columns and rows."""
        return os.get_terminal_size(sys.stdout.fileno())

    def draw(self, lines: Callable[[int, int], list[str]]) -> None:
        """Draw the lines that `lines` returns for the numbers of columns and rows; cut off the excess."""
        columns, rows = self.size()
        shown = [clip(line, columns) + _END_OF_LINE for line in lines(columns, rows)[:rows]]
        click.echo(_HOME + "\n".join(shown) + _BELOW, nl=False, color=True)

    def wake(self) -> None:
        """End the current or the next `wait`; may be called in any thread."""
        with suppress(BlockingIOError, OSError):  # it is woken already, or closed
            os.write(self._waker, b"\0")

    def wait(self) -> Iterator[str]:
        """Wait for keys, a change of the size, or `wake`; yield the keys.

        A key is its character, or "up", "down", "page up" or "page down".
        """
        watched = [self._woken, *([sys.stdin.fileno()] if self.has_keys else [])]
        ready, _, _ = select.select(watched, [], [])
        if self._woken in ready:
            os.read(self._woken, 4096)
        if len(ready) > 1 or self._woken not in ready:
            typed = os.read(sys.stdin.fileno(), 4096)
            if not typed:  # the terminal was closed
                self.has_keys = False
            for key in _KEYS.findall(self._decoder.decode(typed)):
                if len(key) == 1 or key in _SEQUENCES:
                    yield _SEQUENCES.get(key, key)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # the code that shells use
