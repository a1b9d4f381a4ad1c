"""The envelope of an event for conditions; each part is decoded only if a path needs it."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, Final, final

import msgspec

from relay.base.clock import rfc3339
from relay.base.json_path import Steps, find, parse_path
from relay.base.json_text import read
from relay.model import StoredEvent

TEXTS = ("id", "type", "timestamp", "source", "subject")
"""The envelope's text fields; a path ends there."""

TREES = ("data", "context")
"""The envelope's fields with a JSON value; a path may lead into it."""

_decode = msgspec.json.Decoder().decode


@final
class _Absent:
    """Marks a missing value; not equal to any JSON value."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: Final = _Absent()


class Path(msgspec.Struct, frozen=True):
    """A path to a value in an envelope, such as `data.items.0.sku` or `data."a.b".c`.

    Dots separate segments; a quoted segment may contain dots. Digits without quotes are an index into a list,
    from 0, and an ordinary key of an object.
    """

    text: str
    head: str  # one of TEXTS or TREES
    steps: Steps  # within data or context

    @classmethod
    def parse(cls, text: str) -> "Path":
        """Parse a path.

        Raises:
            ValueError: it is malformed, or does not begin with a field of the envelope.
        """
        try:
            (head, _), *steps = parse_path(text)
        except ValueError as error:
            raise ValueError(f'{error} such as "data.items.0.sku" or "data.\'a.b\'.c"') from None
        if head in TEXTS and steps:
            raise ValueError(f'"{text}": {head} is text and has no fields')
        if head not in (*TEXTS, *TREES):
            fields = (*TEXTS, *TREES)
            near = get_close_matches(head, fields, 1)
            suggestion = near[0] + text[len(head) :] if near else f"data.{text}"
            known = ", ".join(fields)
            raise ValueError(f'"{text}": a path starts with {known}; did you mean "{suggestion}"?')
        return cls(text, head, tuple(steps))


class EnvelopeView:
    """One event for the conditions of all destinations: each part is decoded at most once."""

    __slots__ = ("_parts", "event")

    def __init__(self, event: StoredEvent) -> None:
        self.event = event
        self._parts: dict[str, Any] = {}

    def find(self, path: Path) -> Any:
        """Return the JSON value at a path; ABSENT if there is no value or it is null."""
        value = find(self._part(path.head), path.steps)
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
    """Decode JSON; return ABSENT if that fails, so that invalid data affects only its own event."""
    try:
        return _decode(raw)
    except RecursionError:
        return ABSENT
    except (msgspec.DecodeError, UnicodeDecodeError):
        # msgspec refuses the whole document for one value; the slower reader keeps the rest.
        try:
            return read(raw)
        except (ValueError, RecursionError):
            return ABSENT
