"""An event as filters see it: the envelope of the standard format, read only as far as someone asks."""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Final, final

import msgspec

from relay.base.clock import rfc3339
from relay.base.json_text import read
from relay.model import StoredEvent

TEXTS = ("id", "type", "timestamp", "source", "subject")
"""The envelope's fields that are plain text and end a path."""

TREES = ("data", "context")
"""The envelope's fields that hold any JSON value, into which a path may lead."""

_SEGMENT = re.compile(r""""(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^."']+)""")
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}", re.ASCII)
_decode = msgspec.json.Decoder().decode


@final
class _Absent:
    """What a path finds where there is nothing; equal to no JSON value."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()


class Path(msgspec.Struct, frozen=True):
    """Where to look in an envelope, as in `data.items.0.sku` or `data."a.b".c`.

    Segments are separated by dots; one in quotes may hold dots itself. Digits without quotes are the
    index of a list, counted from 0, and in an object a key like any other.
    """

    text: str
    head: str  # one of TEXTS or TREES
    steps: tuple[tuple[str, int | None], ...]  # key, and the index that it would be in a list

    @classmethod
    def parse(cls, text: str) -> "Path":
        """Read a path.

        Raises:
            ValueError: it is malformed, or leads nowhere in an envelope.
        """
        steps: list[tuple[str, int | None]] = []
        end = -1
        while end < len(text):
            match = _SEGMENT.match(text, end + 1)
            if match is None or text[match.end() : match.end() + 1] not in ("", "."):
                raise ValueError(f'"{text}" is no path such as "data.items.0.sku" or "data.\'a.b\'.c"')
            bare, end = match["bare"], match.end()
            steps.append(
                (match[match.lastgroup or ""], int(bare) if bare and _INDEX.fullmatch(bare) else None)
            )
        head = steps.pop(0)[0]
        if head in TEXTS and steps:
            raise ValueError(f'"{text}": {head} is text, nothing lies within it')
        if head not in (*TEXTS, *TREES):
            fields = (*TEXTS, *TREES)
            near = get_close_matches(head, fields, 1)
            meant = near[0] + text[len(head) :] if near else f"data.{text}"
            raise ValueError(f'"{text}": a path starts with {", ".join(fields)}; did you mean "{meant}"?')
        return cls(text, head, tuple(steps))


class EnvelopeView:
    """One event, shared by the filters of all its destinations: each part is decoded at most once."""

    __slots__ = ("_parts", "event")

    def __init__(self, event: StoredEvent) -> None:
        self.event = event
        self._parts: dict[str, Any] = {}

    def find(self, path: Path) -> Any:
        """Return the JSON value at a path; ABSENT where there is none or it is null."""
        value = self._part(path.head)
        for key, index in path.steps:
            if type(value) is dict:
                value = value.get(key)
            elif type(value) is list and index is not None and index < len(value):
                value = value[index]
            else:
                return ABSENT
        return ABSENT if value is None else value

    def _part(self, head: str) -> Any:
        if head not in self._parts:
            self._parts[head] = _READ[head](self.event)
        return self._parts[head]


_READ: Mapping[str, Callable[[StoredEvent], Any]] = {
    "id": lambda event: event.public_id,
    "type": lambda event: event.type,
    "timestamp": lambda event: rfc3339(event.received_at),
    "source": lambda event: event.source,
    "subject": lambda event: event.subject,
    "data": lambda event: _value(event.data),
    "context": lambda event: _value(event.context),
}


def _value(raw: bytes) -> Any:
    """Decode JSON; ABSENT when it cannot be, for one sender's oddity must not fail the others' events."""
    try:
        return _decode(raw)
    except RecursionError:
        return ABSENT
    except (msgspec.DecodeError, UnicodeDecodeError):
        # The rest of a document is none the worse for one value that msgspec refuses.
        try:
            return read(raw)
        except (ValueError, RecursionError):
            return ABSENT
