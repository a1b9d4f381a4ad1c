"""Messages: an event as people read it in a chat, a push notification or a page.

A message has a title, a sentence, a few fields, a link, and the command to type next. It never contains the
raw data. Of a sender's values, the relay chooses short ones and hides all but the last digits of long
numbers: phone numbers must not end up in a chat. An operator's choice in `message = {…}` is shown whole.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from urllib.parse import quote, urlsplit

import msgspec

from relay.base.clock import SECOND
from relay.config.message import MessageConfig
from relay.config.problems import SettingError
from relay.formats.own_events import Level, Words, words_about
from relay.formats.template import EventValues, Render, compile_text
from relay.model import StoredEvent

MOST_FIELDS = 10
"""Fields of a message; Discord takes 25, a block of Slack 10."""

MOST_LINES = 15
"""Lines of a message about several events; the others are only counted."""

_CHOSEN = 6  # number of fields that the relay chooses without `message = {…}`
_SHORT = 80  # characters of a label, and of a value that the relay chooses
_VALUE, _LINE, _TEXT = 300, 200, 1500  # characters of a field's value, of a line, and of the text
_TITLE = 140  # characters; Slack's headers have 150
_LINK = 1000  # characters
_TIMES = "\u00d7"

_LEVELS: tuple[Level, ...] = ("good", "info", "warning", "error", "critical")
_ICONS: Mapping[Level, str] = {"good": "🟢", "info": "🔵", "warning": "🟠", "error": "🔴", "critical": "🔴"}

_LONG_NUMBER = re.compile(r"(?<![\w-])\+?\(?\d[\d ()/-]{5,}\d(?![\w-])")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_PRIVATE = re.compile(
    r"pass(?:word|wd|phrase)?\Z|secret|token|api_?key|authoriz|^o?auth|credential|cookie|signature"
    r"|e?mail|phone|mobile|msisdn|jid|address|^qr|qr_?code",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message. Its texts are plain and of bounded length; each service format escapes them."""

    title: str
    at: int  # wall clock: when the event was received; the latest of several
    id: str  # of the event; the first of several
    about: str  # full type of the event; "" for events of several types
    source: str
    text: str = ""
    fields: tuple[tuple[str, str], ...] = ()
    lines: tuple[str, ...] = ()  # of a message about several events
    command: str = ""  # the next command for the operator
    all_command: str = ""  # the same for all events of this kind
    link: str = ""
    level: Level | None = None  # None: the relay does not judge the events of senders
    key: str = ""  # events with the same key are about the same problem
    is_over: bool = False  # the problem with this key is solved

    @property
    def heading(self) -> str:
        """The title with its icon."""
        return self.title if self.level is None else f"{_ICONS[self.level]} {self.title}"

    @property
    def line(self) -> str:
        """The message as one line."""
        return one_line(f"{self.title}: {self.text}" if self.text else self.title, _LINE)


class MessageWriter:
    """Writes the messages of one destination."""

    def __init__(self, config: MessageConfig) -> None:
        """Compile the templates.

        Raises:
            SettingError: a template is wrong.
        """
        self._title = _compiled(config.title, "title")
        self._text = _compiled(config.text, "text")
        self._key = _compiled(config.dedup_key, "dedup_key")
        self._link = _compiled_link(config.link)
        self._fields: tuple[tuple[str, Render], ...] | None = None
        if config.fields is not None:
            if len(config.fields) > MOST_FIELDS:
                raise SettingError(f"a message has at most {MOST_FIELDS} fields", "message", "fields")
            if not all(label.strip() for label in config.fields):
                raise SettingError("a field needs a label", "message", "fields")
            texts = config.fields.items()
            self._fields = tuple((label, _compile(text, "fields", label)) for label, text in texts)

    def write(self, event: StoredEvent) -> Message:
        """Return the message about one event."""
        values = EventValues(event)
        words = words_about(event) or _any_words(values)
        fields = words.fields
        if self._fields is not None:
            fields = tuple((label, render(values)) for label, render in self._fields)
        shown = ((one_line(label, _SHORT), cut(value, _VALUE)) for label, value in fields)
        title = words.title if self._title is None else self._title(values)
        text = words.text if self._text is None else self._text(values)
        return Message(
            title=one_line(title, _TITLE) or one_line(event.type, _TITLE),
            at=event.received_at,
            id=event.public_id,
            about=event.type,
            source=event.source,
            text=cut(text, _TEXT),
            fields=tuple((label, value) for label, value in shown if label and value),
            command=words.command,
            all_command=words.all_command,
            link="" if self._link is None else _checked_link(self._link(values)),
            level=words.level,
            key=words.key if self._key is None else self._key(values),
            is_over=words.is_over,
        )

    def write_group(self, events: Sequence[StoredEvent]) -> Message:
        """Return one message about several events. Equal lines are counted, and long lists are cut."""
        messages = [self.write(event) for event in events]
        first, count = messages[0], len(messages)
        if count == 1:
            return first
        types = {message.about for message in messages}
        title = f"{count} events of {len(types)} types"
        if len({message.title for message in messages}) == 1:
            title = f"{count} {_TIMES} {first.title}"
        elif len(types) == 1:
            title = f"{count} {_TIMES} {first.about}"
        lines = Counter(message.line for message in messages)
        shown = [f"{times} {_TIMES} {line}" if times > 1 else line for line, times in lines.items()][
            :MOST_LINES
        ]
        if others := list(lines.values())[MOST_LINES:]:
            shown.append(f"… and {sum(others)} more")
        levels = [message.level for message in messages if message.level is not None]
        begin, end = min(message.at for message in messages), max(message.at for message in messages)
        return Message(
            title=one_line(title, _TITLE),
            at=end,
            id=first.id,
            about=first.about if len(types) == 1 else "",
            source=first.source,
            text=f"From {moment(begin)} to {moment(end)}." if moment(begin) != moment(end) else "",
            lines=tuple(shown),
            command=_only(messages, lambda message: message.all_command),
            link=_only(messages, lambda message: message.link),
            level=max(levels, key=_LEVELS.index) if len(levels) == count else None,
        )


def _only(messages: Sequence[Message], part: Callable[[Message], str]) -> str:
    """Return the part that all messages have in common, else nothing."""
    return part(messages[0]) if len({part(message) for message in messages}) == 1 else ""


def _compiled(text: str | None, *key: str) -> Render | None:
    return None if text is None else _compile(text, *key)


def _compile(text: str, *key: str) -> Render:
    try:
        return compile_text(text, lambda value: value[: 2 * _TEXT])
    except ValueError as error:
        raise SettingError(str(error), "message", *key) from None


def _compiled_link(text: str | None) -> Render | None:
    """Compile the template of a URL. A value at its beginning is a URL; others are percent-encoded."""
    if text is None:
        return None
    begins_fixed = text[:1] != "{" or text[:2] == "{{"
    if begins_fixed and not text.startswith(("https://", "http://")):
        raise SettingError("expected a URL that starts with https:// or http://", "message", "link")
    try:
        return compile_text(text, (lambda value: quote(value[:_LINK], safe="")) if begins_fixed else str)
    except ValueError as error:
        raise SettingError(str(error), "message", "link") from None


def _checked_link(url: str) -> str:
    """Return a URL that every service accepts as a link, else nothing."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and len(url) <= _LINK
    except ValueError:
        return ""
    return (
        url if fits and url.isascii() and url.isprintable() and not set(url) & set(" <>\"'`|\\^{}()") else ""
    )


def _any_words(values: EventValues) -> Words:
    """Return the words about an event of a sender: its type and subject, and short values of its data."""
    event = values.event
    subject = masked(one_line(event.subject or "", _TITLE))
    title = f"{event.type} · {subject}" if subject else event.type
    fields = []
    for key, value in values.scalars():
        if value and len(value) <= _SHORT and value.isprintable() and not _PRIVATE.search(key):
            fields.append((label_of(key), masked(value)))
    return Words(title, fields=tuple(fields[:_CHOSEN]))


def masked(text: str) -> str:
    """Return a text with all but the last four digits of long numbers hidden; dates stay.

    >>> masked("call +62 812-3456-7890"), masked("45000.00 on 2026-11-27")
    ('call …7890', '45000.00 on 2026-11-27')
    """
    return _LONG_NUMBER.sub(
        lambda found: found[0] if _DATE.match(found[0]) else f"…{re.sub(r'[^0-9]', '', found[0])[-4:]}", text
    )


def label_of(key: str) -> str:
    """Return a key of JSON as a label.

    >>> label_of("orderId"), label_of("sale_amount"), label_of("HTTPStatus")
    ('Order id', 'Sale amount', 'HTTP status')
    """
    words = _WORD.findall(key)
    if not words:
        return key
    lower = [word if word.isupper() and len(word) > 1 else word.lower() for word in words]
    return " ".join([lower[0][:1].upper() + lower[0][1:], *lower[1:]])


def moment(at: int) -> str:
    """Return a time for people.

    >>> moment(1_700_000_000_123_456)
    '2023-11-14 22:13:20 UTC'
    """
    return datetime.fromtimestamp(at // SECOND, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def one_line(text: str, most: int) -> str:
    """Return a text as one line of at most `most` characters, without control characters."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text[: 4 * most]).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def cut(text: str, most: int) -> str:
    """Return a text of at most `most` characters, without control characters but with its lines."""
    kept = "".join(each if each.isprintable() or each == "\n" else " " for each in text[: 4 * most]).strip()
    return kept if len(kept) <= most else f"{kept[: most - 1]}…"
