"""Log lines with ids in fields. Rate limits keep senders from filling the disk."""

import json
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal, TextIO

from relay.base.clock import SECOND, Clock, rfc3339
from relay.base.text import paint, printable, wants_colour
from relay.process import journal

Format = Literal["auto", "json", "text", "journald"]
MOST_KEYS = 1000
"""Maximum number of keys that one rate-limited log tracks."""

MOST_QUEUED = 2**20  # bytes of queued lines while the log has no reader
FLUSH = 0.5  # seconds that the end of the process waits for queued lines

_OTHERS = ""
_INFO = 6
_PRIORITY = {"DEBUG": 7, "INFO": _INFO, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
_COLOUR = {"DEBUG": "2", "INFO": "36", "WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}


def fields(**named: object) -> dict[str, Mapping[str, object]]:
    """Return the fields of a log line for `extra=`, without None values."""
    return {"fields": {name: value for name, value in named.items() if value is not None}}


def in_one_line(error: object) -> str:
    """Return an error's text as one line."""
    return "; ".join(line.strip() for line in str(error).splitlines())


class RateLimitedLog:
    """Writes one line per key every `every` seconds, with the number of suppressed lines.

    While lines of a key keep coming, its pause doubles up to `most` seconds. Otherwise an attacker, or a shop
    with an old token, would fill the disk.
    """

    def __init__(
        self, log: logging.Logger, clock: Clock, every: float = 10.0, *, most: float | None = None
    ) -> None:
        self._log = log
        self._clock = clock
        self._every = int(every * SECOND)
        self._most = int((most or every) * SECOND)
        # By key: time of the last line, number of lines suppressed since, pause.
        self._last: dict[str, tuple[int, int, int]] = {}

    def is_due(self, key: str) -> bool:
        """Return whether a line with this key would be written now; if not, count it as suppressed."""
        key = self._known(key)
        written, suppressed, pause = self._last.get(key, (0, 0, 0))
        if self._clock.steady() - written < pause:
            self._last[key] = (written, suppressed + 1, pause)
            return False
        return True

    def info(self, key: str, line: str, **named: object) -> None:
        """Log at level info. Beyond `MOST_KEYS`, all new keys share one line."""
        self._write(logging.INFO, key, line, None, named)

    def warning(self, key: str, line: str, **named: object) -> None:
        """Log at level warning."""
        self._write(logging.WARNING, key, line, None, named)

    def error(self, key: str, line: str, error: BaseException | None, **named: object) -> None:
        """Log at level error, with a traceback."""
        self._write(logging.ERROR, key, line, error, named)

    def _write(
        self, level: int, key: str, line: str, error: BaseException | None, named: Mapping[str, object]
    ) -> None:
        key = self._known(key)
        if not self.is_due(key):
            return
        _, suppressed, pause = self._last.get(key, (0, 0, 0))
        pause = min(2 * pause, self._most) if suppressed else self._every
        self._last[key] = (self._clock.steady(), 0, pause)
        more = f" ({suppressed} more like it)" if suppressed else ""
        self._log.log(level, "%s%s", line, more, exc_info=error, extra=fields(**named))

    def _known(self, key: str) -> str:
        """Return the key that counts this line."""
        if key in self._last or len(self._last) < MOST_KEYS:
            return key
        now = self._clock.steady()
        self._last = {  # drop keys that would be written at once and have no suppressed lines
            known: (written, suppressed, pause)
            for known, (written, suppressed, pause) in self._last.items()
            if suppressed or now - written < pause
        }
        return key if len(self._last) < MOST_KEYS else _OTHERS


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        line = {
            "time": rfc3339(int(record.created * SECOND)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """Text for people: coloured on a terminal, with journald's priority prefix under systemd.

    Only a traceback takes several lines; text from senders never does.
    """

    def __init__(self, *, colour: bool = False, journald: bool = False) -> None:
        super().__init__()
        self._colour = colour
        self._journald = journald

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        text = self._text(record)
        if self._journald:
            prefix = f"<{_PRIORITY.get(record.levelname, _INFO)}>"
            return "\n".join(f"{prefix}{record.name}: {line}" for line in text.splitlines())
        level = f"{record.levelname.lower():<7}"
        if self._colour:
            level = f"\x1b[{_COLOUR.get(record.levelname, '0')}m{level}\x1b[0m"
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{clock} {level} {record.name}: {text}"

    def _text(self, record: logging.LogRecord) -> str:
        """Return the message with its fields and its traceback."""
        text = printable(record.getMessage())
        if pairs := " ".join(f"{name}={_value(value)}" for name, value in _fields(record).items()):
            text += " " + paint(pairs, "dim" if self._colour else None)
        if record.exc_info:
            traceback = self.formatException(record.exc_info).split("\n")
            text = "\n".join([text, *(printable(line) for line in traceback)])
        return text


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    found: Mapping[str, object] = getattr(record, "fields", {})
    return found


def _value(value: object) -> str:
    """Render a value, quoted if it could be confused with the next field."""
    text = str(value)
    return printable(text if text and not set(text) & set(' "=') else json.dumps(text, ensure_ascii=False))


class JournalEntries(TextLines):
    """An entry of the journal: the text as in other formats, and each field as a field of the journal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message, without the prefixes of a line."""
        return f"{record.name}: {self._text(record)}"

    def entry(self, record: logging.LogRecord) -> bytes:
        """Render a record in the journal's protocol."""
        named = {name.upper(): printable(str(value)) for name, value in _fields(record).items()}
        entry = {
            **named,
            "MESSAGE": self.format(record),
            "PRIORITY": str(_PRIORITY.get(record.levelname, _INFO)),
            "SYSLOG_IDENTIFIER": "relay",
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
        }
        return journal.encode(entry)


def under_systemd() -> bool:
    """Return whether stderr is connected to the journal."""
    return journal.is_behind(sys.stderr)


def is_read(stream: TextIO) -> bool:
    """Return whether a stream accepts a line within `FLUSH` seconds; True if it has no file descriptor."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return bool(poll.poll(FLUSH * 1000))
    except (OSError, ValueError):
        return True


class Lines(logging.StreamHandler[TextIO]):
    """Writes lines to a stream and never blocks, even if its reader hangs (a stopped `less`, a hung journal).

    A line is written at once if the stream has room. Otherwise it is queued and a thread writes it. Beyond
    `MOST_QUEUED` bytes, lines are dropped and counted; the count is logged once the stream is read again.
    A terminal reports room even for a single byte, so the thread writes all lines to terminals.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.dropped = 0
        self.on_drop: Callable[[], None] = lambda: None
        self._unreported = 0  # dropped lines that no log line has reported yet
        self._queue: deque[bytes] = deque()
        self._size = 0  # bytes in the queue and in the line that is being written
        self._changed = threading.Condition()  # not the logging module's lock, which every log call holds
        self._thread: threading.Thread | None = None
        self._poll: select.poll | None = None
        with suppress(OSError, ValueError):
            self._fd = stream.fileno()
            self._is_terminal = os.isatty(self._fd)
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLOUT)
        self._is_plain = self._poll is None

    def emit(self, record: logging.LogRecord) -> None:
        """Write, queue or drop a line."""
        if self._is_plain:  # no file descriptor: writing never blocks
            super().emit(record)
            return
        try:
            line = self._line(record)
        except Exception:  # noqa: BLE001 - as in `StreamHandler`, a format error does not reach the caller
            self.handleError(record)
            return
        with self._changed:
            if not self._size:
                try:
                    line = self._try_to_write(line)
                except BlockingIOError:  # no room; or another process made the stream non-blocking
                    pass
                except OSError:  # the reader has ended
                    self._drop()
                    return
            if not line:
                return
            if self._size + len(line) > MOST_QUEUED:
                self._drop()
            else:
                self._queue.append(line)
                self._size += len(line)
                self._changed.notify_all()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._write, name="log", daemon=True)
                    self._thread.start()

    def flush(self) -> None:
        """Wait up to `FLUSH` seconds for queued lines."""
        if self._is_plain:
            super().flush()
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._size, FLUSH)

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + self.terminator).encode(errors="backslashreplace")

    def _try_to_write(self, line: bytes) -> bytes:
        """Write until the stream would block, and return the rest."""
        if len(line) > select.PIPE_BUF or not self._can_take():
            return line
        return line[os.write(self._fd, line) :]

    def _can_take(self) -> bool:
        """Return whether a line of up to `PIPE_BUF` bytes can be written without blocking."""
        return (
            not self._is_terminal
            and self._poll is not None
            and any(what & select.POLLOUT for _, what in self._poll.poll(0))
        )

    def _drop(self) -> None:
        self.dropped += 1
        self._unreported += 1
        self.on_drop()

    def _write(self) -> None:
        """Write queued lines, and block until the stream takes them; runs in a thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                line = self._queue.popleft()
            try:
                self._write_all(line)
                with self._changed:
                    unreported = 0 if self._queue else self._unreported
                if unreported:
                    self._write_all(self._drop_report(unreported))
                    with self._changed:
                        self._unreported -= unreported
            except OSError:  # the reader has ended
                with self._changed:
                    self._drop()
            with self._changed:
                self._size -= len(line)
                self._changed.notify_all()

    def _write_all(self, line: bytes) -> None:
        room = select.poll()
        room.register(self._fd, select.POLLOUT)
        while line:
            with suppress(BlockingIOError):
                line = line[os.write(self._fd, line) :]
            if line:
                room.poll()

    def _drop_report(self, count: int) -> bytes:
        what = "line was" if count == 1 else "lines were"
        text = f"{count} log {what} dropped because nobody read the log"
        record = logging.makeLogRecord(
            {"name": "relay.log", "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
            | fields(count=count)
        )
        return self._line(record)


class JournalLines(Lines):
    """Sends records to the journal, with their fields, and never blocks, even if journald hangs."""

    def __init__(self, journal_: journal.Journal) -> None:
        super().__init__(sys.stderr)
        self._is_plain = False
        self._journal = journal_
        self._entries = JournalEntries()
        self.setFormatter(self._entries)

    def close(self) -> None:
        """Close the socket."""
        self.flush()
        self._journal.close()
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return self._entries.entry(record)

    def _try_to_write(self, line: bytes) -> bytes:
        self._journal.send(line)
        return b""

    def _write_all(self, line: bytes) -> None:
        self._journal.send(line, wait=True)


def on_drop(call: Callable[[], None]) -> None:
    """Register a callback for each dropped line; it may run in any thread."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Lines):
            handler.on_drop = call


def _handler_for(format_: Format) -> Lines:
    """Return a handler for a format; under systemd, `journald` sends entries to the journal."""
    if format_ == "journald" and under_systemd():
        with suppress(OSError):  # the socket is missing or forbidden: lines with priorities do, too
            return JournalLines(journal.Journal())
    handler = Lines(sys.stderr)
    if format_ == "json":
        handler.setFormatter(JsonLines())
    else:
        colour = format_ == "text" and wants_colour(sys.stderr)
        handler.setFormatter(TextLines(colour=colour, journald=format_ == "journald"))
    return handler


def configure(level: str, format_: Format, *, under_systemd: bool) -> None:
    """Send all log lines to stderr; the format `auto` depends on the kind of stderr."""
    if format_ == "auto":
        format_ = "journald" if under_systemd else "text" if sys.stderr.isatty() else "json"
    handler = _handler_for(format_)
    for former in logging.getLogger().handlers:  # a reload replaces it
        if isinstance(former, Lines):
            former.flush()
            handler.on_drop = former.on_drop
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # It logs a traceback for each fault of a remote peer; the relay counts these and logs one line.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
    # It logs a warning for each run that it skips: one a second for each job that waits for the database.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    # At level debug it logs every statement with its parameters, which contain senders' data.
    logging.getLogger("aiosqlite").setLevel(logging.WARNING)
