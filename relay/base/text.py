"""What people see: colour where they want it, and no control character that a sender has put into a name."""

import os
from collections.abc import Mapping
from typing import Literal, TextIO

Colour = Literal["red", "yellow", "green", "cyan", "dim"]

_CODES: Mapping[Colour, str] = {"red": "31", "yellow": "33", "green": "32", "cyan": "36", "dim": "2"}


def wants_colour(stream: TextIO) -> bool:
    """Say whether what goes there may have colour: on terminals, unless the environment decides.

    NO_COLOR (https://no-color.org) comes first, then FORCE_COLOR, which also holds where it is piped,
    then TERM=dumb; the first two count unless they are empty. That is the order of Python itself.
    """
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, colour: Colour | None) -> str:
    """Return a text in a colour; None: as it is."""
    return text if colour is None else f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def printable(text: str) -> str:
    r"""Write line ends, control characters and the like as Python would: one line stays one.

    >>> printable("one\ntwo\x1b[2J")
    'one\\ntwo\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
