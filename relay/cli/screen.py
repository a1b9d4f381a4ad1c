"""One screen that is drawn anew in place, and leaves the terminal as it was."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

_ENTER = "\x1b[?1049h\x1b[?25l"  # a screen of our own, without a cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_PIECES = re.compile(r"\x1b\[[0-9;]*m|.")


class Screen:
    """Shows lines, as many and as much of them as there is room for."""

    def draw(self, lines: Callable[[int], list[str]]) -> None:
        """Draw what `lines` makes for a number of rows."""
        columns, rows = shutil.get_terminal_size()
        shown = [clip(line, columns) + _END_OF_LINE for line in lines(rows)[:rows]]
        click.echo(_HOME + "\n".join(shown) + _BELOW, nl=False, color=True)


def is_there() -> bool:
    """Say whether there is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def screen() -> Iterator[Screen]:
    """Take the terminal over, until the block ends however it does."""
    before = signal.signal(signal.SIGTERM, _end)
    try:
        click.echo(_ENTER, nl=False, color=True)
        yield Screen()
    finally:
        click.echo(_LEAVE, nl=False, color=True)
        signal.signal(signal.SIGTERM, before)


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)  # as shells have it


def clip(line: str, width: int) -> str:
    r"""Cut a line that may be painted; what paints it takes no room.

    >>> clip("\x1b[31mdead\x1b[0m, and more", 6)
    '\x1b[31mdead\x1b[0m, '
    """
    kept, room = [], width
    for piece in _PIECES.findall(line):
        if not piece.startswith("\x1b"):
            room -= 1
        elif room < 0:
            kept.append(piece)
            continue
        if room >= 0:
            kept.append(piece)
    return "".join(kept)
