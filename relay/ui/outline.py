"""The tree of a JSON body, with the sender's order of keys and the sender's digits.

One pass reads the text token by token and keeps only the values that a page shows, so large and deep bodies
take little memory. Other tasks run between the tokens.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from relay.base.turns import Turns

MOST_TEXT = 2**20
"""Maximum number of characters of a text."""

MOST_DEPTH = 1000
"""Maximum depth of nesting of a text."""

MOST_LEVELS = 12
"""Maximum number of levels on a page."""

MOST_CHILDREN = 100
"""Maximum number of children of one object or array on a page."""

MOST_VALUES = 200
"""Maximum number of values below the first level on a page."""

MOST_SHOWN = 8_000
"""Maximum number of characters of these values and their keys."""

LONGEST = 160
"""Characters of a key or value after which it is cut off."""

LONGEST_FOUND = 64 * 1024
"""Maximum length of a string whose escapes a search decodes."""

MOST_FOUND = 50
"""Maximum number of matches of a search on a page."""

MOST_STEPS = 8
"""Maximum number of keys of a path; the last ones are shown."""

_TURN = 64  # tokens after which other tasks run
_PART = 2048  # parts of a string or of hidden text that one match of a pattern reads
_RUN = 512  # values of an array that are counted at once

_CHARACTERS = rf'(?:[^"\\\x00-\x1f]++|\\.){{0,{_PART}}}+'
_SPACE = r"[ \t\n\r]*+"
_TOKEN = re.compile(
    rf"""{_SPACE}(?:
      ("{_CHARACTERS})(")?
    | ([{{\[]) | ([}}\]]) | (:) | (,)
    | (-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?+[0-9]++)?+|true|false|null)
    | (\Z))""",
    re.VERBOSE,
)
_BEGUN, _TEXT, _OPEN, _CLOSE, _COLON, _COMMA, _SCALAR, _END = range(1, 9)  # groups of the pattern
_REST_OF_STRING = re.compile(f'{_CHARACTERS}(")?')
_NO_BRACKETS = re.compile(rf'(?:[^"{{}}\[\]]++|"{_CHARACTERS}"){{0,{_PART}}}+')
_SCALARS = re.compile(rf'(?:{_SPACE}(?:"{_CHARACTERS}"|[^ \t\n\r"{{}}\[\],:]++){_SPACE},){{{_RUN}}}')
_VALUE, _FIRST_VALUE, _KEY, _FIRST_KEY, _BEFORE_COLON, _AFTER_VALUE = range(
    6
)  # states, by the token that may follow
_CLOSING = {"{": "}", "[": "]"}
_BRACKETS = "{}[]"


class NotReadableError(ValueError):
    """The text is not JSON, or larger or deeper than this module reads."""

    @classmethod
    def at(cls, place: int) -> "NotReadableError":
        """Return the error for text that stops being JSON at a position."""
        return cls(f"not valid JSON from character {place + 1:,} on")


@dataclass(slots=True)
class Value:
    """A value of the tree. Only an object or array has a place and children: those on the page."""

    key: str | None  # as written; None: an item of an array, or the root
    text: str  # as written; of an object or array, its first character
    place: int = -1  # where an object or array begins
    first: int = 0  # index of the first child on the page
    count: int = 0  # of all children
    children: "list[Value]" = field(default_factory=list)


@dataclass(slots=True)
class Found:
    """A match of a search."""

    path: str
    text: str  # of the value, as written; of an object or array, its first character
    place: int  # of the object or array around it


@dataclass(slots=True)
class Outline:
    """The part of a text that a page shows."""

    root: Value
    path: str  # of the root; empty for the whole text
    found: list[Found]
    matches: int  # of a search; more than `found` if not all are shown


@dataclass(slots=True)
class _Frame:
    """An object or array that has not ended."""

    kind: str
    place: int
    value: Value | None  # None: hidden
    level: int  # below the shown root
    key: str | None = None  # the latest
    count: int = 0
    next_run: int = 1  # count at which `count_run` is tried again


class _Reading:
    """The state of one pass over a text."""

    def __init__(self, at: int, skip: int, find: str) -> None:
        self.frames: list[_Frame] = []
        self.root: Value | None = None
        self.path = ""
        self.found: list[Found] = []
        self.matches = 0
        self.state = _VALUE
        self._at, self._skip, self._find = at, skip, find.lower()
        self._values = self._shown = 0

    def name(self, text: str, _place: int) -> None:
        """Note a key."""
        self.frames[-1].key = text
        self.state = _BEFORE_COLON

    def colon(self, _text: str, _place: int) -> None:
        """Expect the value of a key."""
        self.state = _VALUE

    def comma(self, _text: str, place: int) -> None:
        """Expect another child of the innermost object or array."""
        if not self.frames:
            raise NotReadableError.at(place)
        self.state = _KEY if self.frames[-1].kind == "{" else _VALUE

    def scalar(self, text: str, _place: int) -> None:
        """Note a string, a number or a literal."""
        self.add(text, -1)
        self.state = _AFTER_VALUE

    def begin(self, kind: str, place: int) -> None:
        """Note the beginning of an object or array."""
        value = self.add(kind, place)
        level = self.frames[-1].level + 1 if self.frames and value is not self.root else 0
        if len(self.frames) >= MOST_DEPTH:
            raise NotReadableError(f"nested deeper than {MOST_DEPTH:,} levels")
        self.frames.append(_Frame(kind, place, value, level))
        self.state = _FIRST_KEY if kind == "{" else _FIRST_VALUE

    def end(self, kind: str, place: int) -> None:
        """Note the end of the innermost object or array."""
        if not self.frames or _CLOSING[self.frames[-1].kind] != kind:
            raise NotReadableError.at(place)
        frame = self.frames.pop()
        if frame.value is not None:
            frame.value.count = frame.count
        self.state = _AFTER_VALUE

    def add(self, text: str, place: int) -> Value | None:
        """Note a value, and return it if the page shows it; `place` is -1 unless it is an object or array."""
        above = self.frames[-1] if self.frames else None
        value = Value(None, text, place) if self._is_root(above, place) else None
        if value is not None:
            value.first = self._skip
            self.root, self.path = value, self._path() if above is not None else ""
        elif above is not None and above.value is not None and self._has_room(above, text):
            value = Value(above.key, text, place)
            above.value.children.append(value)
        if above is not None:
            if self._find and (_has(above.key, self._find) or (place < 0 and _has(text, self._find))):
                self.matches += 1
                if len(self.found) < MOST_FOUND:
                    self.found.append(Found(self._path(), text, above.place))
            above.count += 1
        return value

    @property
    def is_hidden(self) -> bool:
        """Whether the innermost object or array can be skipped."""
        return bool(self.frames and self.frames[-1].value is None and self.root and not self._find)

    def count_run(self, text: str, place: int) -> int:
        """Count a run of hidden values in an array; return the position after it."""
        frame = self.frames[-1] if self.frames else None
        if frame is None or self.state != _VALUE or frame.count < frame.next_run or self._find:
            return place
        first = self._skip if frame.value is self.root else 0
        is_shown = first < frame.count + _RUN and frame.count < first + MOST_CHILDREN
        run = None if frame.kind != "[" or is_shown or self.root is None else _SCALARS.match(text, place)
        if run is None:
            frame.next_run = frame.count + _RUN
            return place
        frame.count += _RUN
        return run.end()

    def _is_root(self, above: _Frame | None, place: int) -> bool:
        return self.root is None and (place == self._at if self._at >= 0 else above is None)

    def _has_room(self, above: _Frame, text: str) -> bool:
        first = self._skip if above.value is self.root else 0
        if not first <= above.count < first + MOST_CHILDREN:
            return False
        if above.level == 0:
            return True
        if above.level >= MOST_LEVELS or self._values >= MOST_VALUES or self._shown >= MOST_SHOWN:
            return False
        self._values += 1
        self._shown += min(len(text), LONGEST) + min(len(above.key or ""), LONGEST)
        return True

    def _path(self) -> str:
        """Return the path of the next value."""
        steps = []
        for frame in self.frames[-MOST_STEPS:]:
            index = frame.count - (frame is not self.frames[-1])  # outer frames have counted the open child
            steps.append(f"[{index}]" if frame.key is None else f".{plain(frame.key)[:LONGEST]}")
        path = "".join(steps).removeprefix(".")
        return path if len(self.frames) <= MOST_STEPS else f"…{path}"


_STEPS: Mapping[tuple[int, int], Callable[[_Reading, str, int], None]] = {
    **{(state, kind): _Reading.scalar for state in (_VALUE, _FIRST_VALUE) for kind in (_TEXT, _SCALAR)},
    (_VALUE, _OPEN): _Reading.begin,
    (_FIRST_VALUE, _OPEN): _Reading.begin,
    (_FIRST_VALUE, _CLOSE): _Reading.end,
    (_KEY, _TEXT): _Reading.name,
    (_FIRST_KEY, _TEXT): _Reading.name,
    (_FIRST_KEY, _CLOSE): _Reading.end,
    (_BEFORE_COLON, _COLON): _Reading.colon,
    (_AFTER_VALUE, _COMMA): _Reading.comma,
    (_AFTER_VALUE, _CLOSE): _Reading.end,
}
"""The method for each state and token that may follow it."""


def _has(written: str | None, find: str) -> bool:
    if written is None:
        return False
    if find in written.lower():
        return True
    return "\\" in written and len(written) <= LONGEST_FOUND and find in plain(written).lower()


def plain(written: str) -> str:
    r"""Return the text of a JSON string; other values as they are written.

    >>> plain(r'"K\u00f6ln"'), plain("45.00")
    ('Köln', '45.00')
    """
    if not written.startswith('"'):
        return written
    if "\\" not in written:
        return written[1:-1]
    try:
        return str(json.loads(written))
    except ValueError:  # an unknown escape
        return written[1:-1]


async def outline(text: str, turns: Turns, *, at: int = -1, skip: int = 0, find: str = "") -> Outline:
    """Return the part of a JSON text that a page shows.

    Args:
        text: the JSON.
        turns: lets other tasks run.
        at: the position at which the object or array to show begins; the whole text if none begins there.
        skip: the number of its first children to leave out.
        find: a text to search for in keys and values; case does not matter.

    Raises:
        NotReadableError: the text is not JSON, too large or too deep.
    """
    if len(text) > MOST_TEXT:
        raise NotReadableError(f"longer than {MOST_TEXT:,} characters")
    reading = _Reading(at, skip, find)
    match, place, count = _TOKEN.match, 0, 0
    while True:
        count += 1
        if not count % _TURN:
            await turns.give()
        if reading.is_hidden:
            place = await _skip_hidden(reading, text, place, turns)
        place = reading.count_run(text, place)
        token = match(text, place)
        kind = 0 if token is None else token.lastindex or 0
        if token is None or (kind == _END and (reading.frames or reading.state != _AFTER_VALUE)):
            raise NotReadableError.at(place)
        if kind == _END:
            break
        place, start = token.end(), token.start(_BEGUN if kind <= _TEXT else kind)
        step = _STEPS.get((reading.state, max(kind, _TEXT)))
        if step is None:
            raise NotReadableError.at(start)
        if kind == _BEGUN:
            place = await _end_of_string(text, place, turns)
        step(reading, text[start:place], start)
    if reading.root is None:
        return await outline(text, turns, find=find)
    return Outline(reading.root, reading.path, reading.found, reading.matches)


async def _end_of_string(text: str, place: int, turns: Turns) -> int:
    """Return the position after a long string whose beginning has been read."""
    while True:
        part = _REST_OF_STRING.match(text, place)
        if part is None or part.end() == place:
            raise NotReadableError.at(place)
        place = part.end()
        if part[1]:
            return place
        await turns.give()


async def _skip_hidden(reading: _Reading, text: str, place: int, turns: Turns) -> int:
    """Return the position after a hidden object or array; read only its strings and brackets."""
    depth = 1
    while depth:
        part = _NO_BRACKETS.match(text, place)
        end = place if part is None else part.end()
        found = text[end : end + 1]
        if found == '"':
            end = await _end_of_string(text, end + 1, turns)
        elif found in _BRACKETS and found:
            depth += 1 if found in _CLOSING else -1
            end += 1
        if end == place or not found:
            raise NotReadableError.at(end)
        place = end
        await turns.give()
    reading.end(_CLOSING[reading.frames[-1].kind], place)
    return place
