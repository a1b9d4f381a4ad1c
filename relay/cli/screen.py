"""Text for a person at a terminal: columns that fit its width, local times, short ids, aligned numbers.

Output for programs (pipes and `--json`) does not use this module; `relay.cli.output` chooses.
"""

import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import click

from relay.base.json_text import indented
from relay.base.text import Colour, paint, printable
from relay.base.units import render_duration

GAP = "  "
"""Between two columns."""

LEAST_DIGITS = 12
"""Hex digits of a short id. The first 12 digits of a UUIDv7 are its millisecond; 8 digits cover 65 s."""

UNIQUE_DIGITS = 16
"""Hex digits of a short id if the ids that share its millisecond are unknown: 12 of the bits are random."""

_UTC, _DIGITS = "relay.utc", "relay.digits"  # in click's `Context.meta`
_ID = re.compile(r"(?:[a-z]{3}_)?([0-9a-f]{8})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{4})-([0-9a-f]{12})")
_WORDS = re.compile(r"(?:`[^`]*`|\S)+")
_PIECES = re.compile(r"\x1b\[[0-9;]*m|.")
_ROUNDED = ((86_400 * 10, 86_400), (86_400, 3600), (3600, 60), (10, 1))  # from this age on, the unit
_LONG = 9_999.5  # milliseconds
_THOUSAND = 999.5  # rounds to 1000, which takes four columns
_TEN = 9.95
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

_STATES: Mapping[str, Colour] = {
    "delivered": "green", "dead": "red", "expired": "red",
    "ONLINE": "green", "OFFLINE": "red", "MAINTENANCE": "yellow",
    "open": "red", "failed": "red", "done": "green",
}  # fmt: skip


_HOLDS: Mapping[str, Colour | None] = {"": None, "delivering": "green", "accepting": "green"}


def _held_colour(cell: str) -> Colour | None:
    return _HOLDS.get(cell, "red" if cell.startswith(("disabled", "circuit")) else "yellow")


def _count_colour(cell: str) -> Colour | None:
    return None if cell in ("", "0") else "red"


_URGENT = {state: at for at, state in enumerate(("dead", "expired", "pending", "delivered"))}
_COLOURS: Mapping[str, Callable[[str], Colour | None]] = {
    **dict.fromkeys(("state", "status", "circuit"), _STATES.get),
    **dict.fromkeys(("dead", "expired", "failures", "failed_per_second"), _count_colour),
    "held": _held_colour,
    "paused": lambda cell: "yellow" if cell == "yes" else None,
    "result": lambda cell: "green" if cell == "ok" else "red",
    "deliveries": lambda cell: "red" if " dead" in cell or " expired" in cell else None,
    "why": lambda cell: "green" if cell.startswith("yes") else "yellow" if cell.startswith("held") else None,
}


def colour_of(name: str, cell: str) -> Colour | None:
    """Return the colour of a cell that shows a state or counts failures, None for any other cell.

    >>> colour_of("state", "dead"), colour_of("held", "paused"), colour_of("result", "ok")
    ('red', 'yellow', 'green')
    >>> colour_of("dead", "0"), colour_of("dead", "3"), colour_of("deliveries", "1 dead, 2 delivered")
    (None, 'red', 'red')
    """
    return _COLOURS[name](cell) if name in _COLOURS else None


# --- the width of text ----------------------------------------------------------------------------------


def width_of(text: str) -> int:
    """Return the number of a terminal's columns that a text takes.

    >>> width_of("crm"), width_of("漢字"), width_of("e\u0301")
    (3, 4, 1)
    """
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int, where: Literal["end", "middle"] = "end") -> str:
    """Shorten a text to a width; "…" replaces its end or its middle.

    >>> cut("production-eu-crm", 9), cut("production-eu-crm", 9, "middle"), cut("漢字漢字", 4)
    ('producti…', 'prod…-crm', '漢…')
    """
    if width_of(text) <= width:
        return text
    if width < 1:
        return ""
    tail = (width - 1) // 2 if where == "middle" else 0
    return _start(text, width - 1 - tail) + "…" + _start(text[::-1], tail)[::-1]


def _start(text: str, width: int) -> str:
    """Return the longest start of a text that takes at most `width` columns."""
    for at, character in enumerate(text):
        width -= _width(character)
        if width < 0:
            return text[:at]
    return text


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` columns, between words where possible.

    A command in backticks stays on one line if it fits.

    >>> wrap("the address is refused", 12), wrap("0123456789", 4), wrap("run `relay top`.", 12)
    (['the address', 'is refused'], ['0123', '4567', '89'], ['run', '`relay top`.'])
    """
    lines = [""]
    for word in _WORDS.findall(text):
        joined = f"{lines[-1]} {word}".lstrip()
        if width_of(joined) <= width:
            lines[-1] = joined
            continue
        rest, lines = word, lines if lines[-1] else []
        while width_of(rest) > width > 1:
            lines.append(_start(rest, width))
            rest = rest[len(lines[-1]) :]
        lines.append(rest)
    return lines


def clip(line: str, width: int) -> str:
    r"""Cut a line to a width; colour sequences do not count.

    >>> clip("\x1b[31mdead\x1b[0m, and more", 6)
    '\x1b[31mdead\x1b[0m, '
    """
    kept, room = [], width
    for piece in _PIECES.findall(line):
        if piece.startswith("\x1b"):
            kept.append(piece)
        elif room >= 0:
            room -= _width(piece)
            if room >= 0:
                kept.append(piece)
            else:
                room = -1
    return "".join(kept)


def terminal_width() -> int:
    """Return the width of the terminal; $COLUMNS has priority."""
    return shutil.get_terminal_size().columns


def one_line(text: str) -> str:
    """Return a text as one line without control characters; white space becomes one space.

    The variation selector that asks for a coloured symbol is left out: terminals disagree about its width.
    """
    return printable(" ".join(text.split()).replace("\ufe0f", ""))


# --- times, numbers, ids --------------------------------------------------------------------------------


def _set_utc(ctx: click.Context, _option: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    if value:
        ctx.meta[_UTC] = True


utc_option = click.option(
    "--utc", is_flag=True, expose_value=False, callback=_set_utc, help="On a terminal, show times in UTC."
)


def _in_utc() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and _UTC in context.meta


def now() -> float:
    """Return the seconds since the epoch."""
    return time.time()


def _local(moment: str) -> datetime:
    """Return a time of the API in the zone of the reader: `--utc`, else the machine's zone or $TZ."""
    return datetime.fromisoformat(moment).astimezone(UTC if _in_utc() else None)


def clock_times(moments: Sequence[str | None], *, fraction: bool = False) -> list[str]:
    """Return times for one column: all with the date, unless all are from today; "Z" marks UTC.

    `fraction` adds milliseconds.
    """
    zone, mark = (UTC, "Z") if _in_utc() else (None, "")
    today = datetime.fromtimestamp(now(), UTC).astimezone(zone)
    shown = [moment and _local(moment) for moment in moments]
    if all(not each or each.date() == today.date() for each in shown):
        form = "%H:%M:%S"
    elif all(not each or each.year == today.year for each in shown):
        form = "%b %d %H:%M:%S"
    else:
        form = "%Y-%m-%d %H:%M:%S"
    if fraction:
        return [f"{each:{form}}.{each.microsecond // 1000:03d}{mark}" if each else "" for each in shown]
    return [f"{each:{form}}{mark}" if each else "" for each in shown]


def full_time(moment: str | None) -> str:
    """Return a time with its date, zone and distance from now: `2026-01-31 13:00:00 CET (3m ago)`."""
    if moment is None:
        return ""
    return f"{_local(moment):%Y-%m-%d %H:%M:%S %Z} ({distance(moment)})"


def distance(moment: str) -> str:
    """Return how long ago a time was, or how far ahead it is."""
    seconds = now() - datetime.fromisoformat(moment).timestamp()
    return f"{rough(seconds)} ago" if seconds >= 0 else f"in {rough(-seconds)}"


def ago(moment: str | None) -> str:
    """Return how long ago a time was, `""` for None."""
    return "" if moment is None else distance(moment)


def due(moment: str | None) -> str:
    """Return when something is due: `in 4m`, or `due` if its time has come."""
    if moment is None:
        return ""
    when = distance(moment)
    return when if when.startswith("in") else "due"


def rough(seconds: float) -> str:
    """Return a duration in at most two units.

    >>> rough(7_325), rough(0.2), rough(4_000_000)
    ('2h2m', '0s', '46d')
    """
    unit = next((unit for least, unit in _ROUNDED if seconds >= least), 1)
    return render_duration(seconds // unit * unit) if seconds >= 1 else "0s"


def milliseconds(value: float | None) -> str:
    """Return a duration in milliseconds, or in seconds if it is long.

    >>> milliseconds(12.34), milliseconds(15_000.2), milliseconds(0.3), milliseconds(None)
    ('12 ms', '15.0 s', '<1 ms', '')
    """
    if value is None:
        return ""
    if value < 1:
        return "<1 ms"
    return f"{value:.0f} ms" if value < _LONG else f"{value / 1000:.1f} s"


def size_text(count: float) -> str:
    """Return a number of bytes with three digits.

    >>> size_text(812), size_text(1229), size_text(195_000_000), size_text(2**50)
    ('812 B', '1.2 KiB', '186 MiB', '1024 TiB')
    """
    digits = 0
    for unit in _UNITS:
        if count < _THOUSAND or unit == _UNITS[-1]:
            break
        count /= 1024
        digits = 0 if count >= _TEN else 1
    return f"{count:.{digits}f} {unit}"


def number_text(value: float) -> str:
    """Return a number with spaces between its groups of three digits.

    >>> number_text(90_125), number_text(12.5)
    ('90 125', '12.5')
    """
    return f"{value:,}".replace(",", " ")


def set_digits(digits: int | None) -> None:
    """Set the hex digits by which the ids of this command's table can be looked up; None: they are unknown.

    They replace the number of digits of a column.
    """
    if digits is not None:
        click.get_current_context().meta[_DIGITS] = max(digits, LEAST_DIGITS)


def _known_digits() -> int | None:
    context = click.get_current_context(silent=True)
    return None if context is None else context.meta.get(_DIGITS)


def short_ids(ids: Sequence[str | None], least: int = LEAST_DIGITS) -> list[str]:
    """Return the ids without prefix and dashes, as short as possible while they stay distinct.

    >>> short_ids(["evt_0190aaaa-bbbb-7ccc-8ddd-eeeeeeeeeeee", "evt_0190aaaa-bbbb-7cc1-8ddd-eeeeeeeeeeee"])
    ['0190aaaabbbb7ccc', '0190aaaabbbb7cc1']
    """
    digits = [_digits(each) if each else "" for each in ids]
    distinct = {each for each in digits if each}
    length = least
    while len({each[:length] for each in distinct}) < len(distinct):
        length += 1
    return [each[:length] for each in digits]


def _digits(id_: str) -> str:
    match = _ID.fullmatch(id_)
    return "".join(match.groups()) if match else id_


# --- tables ---------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """One column of a table."""

    name: str
    """Key of the item. It also decides the colour."""
    heading: str
    show: Callable[[Sequence[Any]], Sequence[str]]
    """Returns the texts of all values of the column."""
    right: bool = False
    least: int = 0
    """Width to which the column may shrink; 0: it does not shrink."""
    wish: int = 0
    """Width below which the column shrinks only after all columns of rank 2 and more have gone."""
    rank: int = 0
    """A table that is too wide loses the column with the highest rank; 0: it stays."""
    long: Literal["end", "middle", "wrap"] = "end"
    """Treatment of a text that is too long: cut at its end or in its middle, or continue on the next line."""
    of: Callable[[Mapping[str, Any]], Any] | None = None
    """Returns the value of an item; by default, the value of its key `name`."""

    def value(self, item: Mapping[str, Any]) -> Any:
        """Return the value of an item."""
        return item[self.name] if self.of is None else self.of(item)


def text(
    name: str, heading: str = "", *, least: int = 10, wish: int = 0, rank: int = 0,
    long: Literal["end", "middle", "wrap"] = "end",
) -> Column:  # fmt: skip
    """Return a column of texts that may be cut."""
    return Column(name, heading or name, each(cell), least=least, wish=wish, rank=rank, long=long)


def word(name: str, heading: str = "", *, rank: int = 0) -> Column:
    """Return a column of short words, such as states, that are never cut."""
    return Column(name, heading or name, each(cell), rank=rank)


def number(name: str, heading: str = "", *, rank: int = 0) -> Column:
    """Return a column of numbers, aligned on the right."""
    return Column(name, heading or name, each(_number), right=True, rank=rank)


def size(name: str, heading: str = "", *, rank: int = 0) -> Column:
    """Return a column of sizes in bytes."""
    return Column(name, heading or name, each(_size), right=True, rank=rank)


def moment(name: str, heading: str = "", *, rank: int = 0) -> Column:
    """Return a column of times, in the zone of the reader."""
    return Column(name, heading or name, clock_times, rank=rank)


def short_id(name: str, heading: str = "", *, least: int = LEAST_DIGITS, rank: int = 0) -> Column:
    """Return a column of short ids with at least this number of hex digits, see `set_digits`."""
    return Column(name, heading or name, lambda ids: short_ids(ids, _known_digits() or least), rank=rank)


def last_result(*, rank: int = 0) -> Column:
    """Return a column with the response or the error of a delivery's last attempt."""
    shape = text("last_error", "last result", least=12, rank=rank)
    return shape._replace(of=lambda delivery: result_text(delivery["last_status"], delivery["last_error"]))


def result_text(status: int | None, error: str | None) -> str:
    """Return the response or the error of an attempt, `""` for None.

    >>> result_text(503, "HTTP 503 Service Unavailable"), result_text(None, "timeout")
    ('503 Service Unavailable', 'timeout')
    """
    code = cell(status)
    return f"{code} {cell(error).removeprefix(f'HTTP {code}').strip()}".strip()


def states_text(counts: Mapping[str, int]) -> str:
    """Return the number of deliveries by state, those that need attention first.

    >>> states_text({"pending": 3, "delivered": 2, "dead": 1})
    '1 dead, 3 pending, 2 delivered'
    """
    order = sorted(counts, key=lambda state: _URGENT.get(state, len(_URGENT)))
    return ", ".join(f"{counts[state]} {state}" for state in order)


def each(show: Callable[[Any], str]) -> Callable[[Sequence[Any]], list[str]]:
    """Return the `show` of a column that formats each value alone."""
    return lambda values: [show(value) for value in values]


def _number(value: float | None) -> str:
    return "" if value is None else number_text(value)


def _size(value: float | None) -> str:
    return "" if value is None else size_text(value)


def cell(value: object) -> str:
    """Return a value of the API as text.

    >>> cell(None), cell(True), cell(["a", "b"]), cell({"dead": 2})
    ('', 'yes', 'a, b', '2 dead')
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{amount} {name}" for name, amount in value.items())
    return str(value)


def table(
    shape: Sequence[Column], items: Sequence[Mapping[str, Any]], *, width: int, colour: bool
) -> list[str]:
    """Return the lines of a table that fits a terminal of this width; the headings are the first line."""
    texts = [
        [one_line(each) for each in column.show([column.value(item) for item in items])] for column in shape
    ]
    natural = [
        max(map(width_of, [column.heading, *cells])) for column, cells in zip(shape, texts, strict=True)
    ]
    widths = _fit(shape, natural, [any(cells) for cells in texts], width)
    chosen = [(shape[at], texts[at], room) for at, room in widths.items()]
    headings = [_padded(column.heading.upper(), room, right=column.right) for column, _, room in chosen]
    lines = [GAP.join(headings)]
    for number_ in range(len(items)):
        colours = [colour_of(column.name, cells[number_]) if colour else None for column, cells, _ in chosen]
        parts = [_parts(column, cells[number_], room) for column, cells, room in chosen]
        lines += [
            GAP.join(
                _padded(part, room, right=column.right, colour=painted)
                for part, (column, _, room), painted in zip(line, chosen, colours, strict=True)
            )
            for line in zip_longest(*parts, fillvalue="")
        ]
    return [clip(line.rstrip(), width) for line in lines]


def _fit(
    shape: Sequence[Column], natural: Sequence[int], filled: Sequence[bool], width: int
) -> dict[int, int]:
    """Return the widths of the columns that are shown, by their index."""
    least = [
        min(wide, max(column.least, width_of(column.heading)) if column.least else wide)
        for column, wide in zip(shape, natural, strict=True)
    ]
    wished = [
        min(wide, max(column.wish, low)) for column, wide, low in zip(shape, natural, least, strict=True)
    ]
    shown = list(range(len(shape)))

    def excess(widths: Iterable[int]) -> int:
        return sum(widths) + len(GAP) * (len(shown) - 1) - width

    droppable = sorted((not filled[at], shape[at].rank, at) for at in shown if shape[at].rank)
    while droppable and excess(wished[at] for at in shown) > 0:
        is_empty, rank, at = droppable.pop()  # an empty column goes first
        if rank == 1 and not is_empty and excess(least[at] for at in shown) <= 0:
            break
        shown.remove(at)
    widths = {at: natural[at] for at in shown}
    heads = [
        width_of(column.heading) if column.least else low for column, low in zip(shape, least, strict=True)
    ]
    for floor in (wished, least, heads):
        for _ in range(excess(widths.values())):
            widest = max(shown, key=lambda at: widths[at] - floor[at])
            if widths[widest] <= floor[widest]:
                break
            widths[widest] -= 1
    return widths


def _parts(column: Column, cell_: str, room: int) -> list[str]:
    """Return the lines of one cell."""
    return wrap(cell_, room) if column.long == "wrap" else [cut(cell_, room, column.long)]


def _padded(text_: str, room: int, *, right: bool, colour: Colour | None = None) -> str:
    space = " " * (room - width_of(text_))
    shown = paint(text_, colour) if text_ else ""
    return space + shown if right else shown + space


def payload_lines(payload: str, most: int) -> list[str]:
    """Return the first lines of a payload, indented; JSON shows its structure, with its numbers unchanged.

    >>> payload_lines('{"a": [1.50, {}], "b": "x"}', 4)
    ['  {', '    "a": [', '      1.50,', '      {}']
    """
    try:
        text_ = indented(payload)
    except (ValueError, RecursionError):
        text_ = payload
    return [f"  {printable(line.expandtabs(4))}".rstrip() for line in text_.splitlines()[:most]]


class Field(NamedTuple):
    """One line about an item."""

    label: str
    text: str
    colour: Colour | None = None


def field_lines(fields: Sequence[Field], *, width: int, colour: bool) -> list[str]:
    """Return a line for each field; a long text continues on the next line, an empty one is left out."""
    shown = [(each, one_line(each.text)) for each in fields]
    room = max((width_of(each.label) for each, text_ in shown if text_), default=0)
    lines = []
    for (label, _, painted), text_ in shown:
        parts = wrap(text_, max(1, width - room - len(GAP))) if text_ else []
        for at, part in enumerate(parts):
            head = _padded("" if at else label, room, right=False)
            lines.append(head + GAP + paint(part, painted if colour else None))
    return lines
