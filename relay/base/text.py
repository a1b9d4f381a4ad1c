"""Text for terminals: colour, and escaped control characters in text from senders."""

import os
from collections.abc import Mapping
from typing import Literal, TextIO

Colour = Literal["red", "yellow", "green", "cyan", "dim"]

_CODES: Mapping[Colour, str] = {"red": "31", "yellow": "33", "green": "32", "cyan": "36", "dim": "2"}


def wants_colour(stream: TextIO) -> bool:
    """Return whether output to a stream may use colour: on terminals, unless the environment decides.

    NO_COLOR (https://no-color.org) has priority, then FORCE_COLOR (for pipes, too), then TERM=dumb. The first
    two count unless they are empty. Python uses the same order.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, colour: Colour | None) -> str:
    """Return a text in a colour, or unchanged if the colour is None."""
    return text if colour is None else f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def printable(text: str) -> str:
    r"""Escape line ends and control characters as Python does, so that one line stays one line.

    >>> printable("one\ntwo\x1b[2J")
    'one\\ntwo\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
