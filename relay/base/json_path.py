"""Paths into JSON values: `order.items.0.sku`, `'a.b'.c`."""

import re
from typing import Any

Steps = tuple[tuple[str, int | None], ...]
"""The segments of a path: the key of an object, and the index into a list if the segment is one."""

_SEGMENT = re.compile(r""""(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^."']+)""")
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)


def parse_path(text: str) -> Steps:
    """Parse a path. Dots separate segments; a quoted segment may contain dots.

    Digits without quotes are an index into a list, from 0, and an ordinary key of an object.

    Raises:
        ValueError: it is empty or malformed.

    >>> parse_path("items.0.'a.b'")
    (('items', None), ('0', 0), ('a.b', None))
    """
    steps: list[tuple[str, int | None]] = []
    end = -1
    while end < len(text):
        match = _SEGMENT.match(text, end + 1)
        if match is None or text[match.end() : match.end() + 1] not in ("", "."):
            raise ValueError(f'"{text}" is not a path')
        bare, end = match["bare"], match.end()
        steps.append((match[match.lastgroup or ""], int(bare) if bare and _INDEX.fullmatch(bare) else None))
    return tuple(steps)


def find(value: Any, steps: Steps) -> Any:
    """Return the value at a path; None if the value is absent or null."""
    for key, index in steps:
        if type(value) is dict:
            value = value.get(key)
        elif type(value) is list and index is not None and index < len(value):
            value = value[index]
        else:
            return None
    return value
