"""Log lines: one event per line, with ids that link it to others; a hostile sender cannot fill the disk."""

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

Format = Literal["auto", "json", "text", "journald"]
MOST_KEYS = 1000
"""Keys of one rate-limited log that are remembered."""

MOST_QUEUED = 2**20  # bytes of lines that wait for a reader
FLUSH = 0.5  # seconds that an end waits for them

_OTHERS = ""
_PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
_COLOUR = {"DEBUG": "2", "INFO": "36", "WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}


def fields(**named: object) -> dict[str, Mapping[str, object]]:
    """Return what a line carries beside its words, for `extra=`; None: it has none of that."""
    return {"fields": {name: value for name, value in named.items() if value is not None}}


def in_one_line(error: object) -> str:
    """Say an error of several lines in one."""
    return "; ".join(line.strip() for line in str(error).splitlines())


class Sparing:
    """Writes one line per key in `every` seconds, and says how many lines it left out.

    While lines keep coming, the pause between two of a key doubles, up to `most` seconds: senders that never
    stop, such as an attacker or a shop with an old token, would fill the disk otherwise.
    """

    def __init__(
        self, log: logging.Logger, clock: Clock, every: float = 10.0, *, most: float | None = None
    ) -> None:
        self._log = log
        self._clock = clock
        self._every = int(every * SECOND)
        self._most = int((most or every) * SECOND)
        self._last: dict[str, tuple[int, int, int]] = {}  # key → (when last written, left out since, pause)

    def is_due(self, key: str) -> bool:
        """Return whether a line of that key would be written now; if not, count it as left out."""
        key = self._known(key)
        written, swallowed, pause = self._last.get(key, (0, 0, 0))
        if self._clock.steady() - written < pause:
            self._last[key] = (written, swallowed + 1, pause)
            return False
        return True

    def info(self, key: str, line: str, **named: object) -> None:
        """Log a line with its fields; beyond `MOST_KEYS`, all new keys share one line."""
        self._write(logging.INFO, key, line, None, named)

    def warning(self, key: str, line: str, **named: object) -> None:
        """Log what an operator should see."""
        self._write(logging.WARNING, key, line, None, named)

    def error(self, key: str, line: str, error: BaseException | None, **named: object) -> None:
        """Log a failure with its traceback."""
        self._write(logging.ERROR, key, line, error, named)

    def _write(
        self, level: int, key: str, line: str, error: BaseException | None, named: Mapping[str, object]
    ) -> None:
        key = self._known(key)
        if not self.is_due(key):
            return
        _, swallowed, pause = self._last.get(key, (0, 0, 0))
        pause = min(2 * pause, self._most) if swallowed else self._every
        self._last[key] = (self._clock.steady(), 0, pause)
        more = f" ({swallowed} more like it)" if swallowed else ""
        self._log.log(level, "%s%s", line, more, exc_info=error, extra=fields(**named))

    def _known(self, key: str) -> str:
        """Return the key under which a line is counted."""
        if key in self._last or len(self._last) < MOST_KEYS:
            return key
        now = self._clock.steady()
        self._last = {  # without those whose next line would be written anyhow and has nothing to add
            known: (written, swallowed, pause)
            for known, (written, swallowed, pause) in self._last.items()
            if swallowed or now - written < pause
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
    """For people: on a terminal with colour, under systemd with journald's priority prefix.

    Only a traceback takes more than one line: what senders put into a message does not.
    """

    def __init__(self, *, colour: bool = False, journald: bool = False) -> None:
        super().__init__()
        self._colour = colour
        self._journald = journald

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        text = printable(record.getMessage())
        if pairs := " ".join(f"{name}={_value(value)}" for name, value in _fields(record).items()):
            text += " " + paint(pairs, "dim" if self._colour else None)
        if record.exc_info:
            traceback = self.formatException(record.exc_info).split("\n")
            text = "\n".join([text, *(printable(line) for line in traceback)])
        if self._journald:
            prefix = f"<{_PRIORITY.get(record.levelname, 6)}>"
            return "\n".join(f"{prefix}{record.name}: {line}" for line in text.splitlines())
        level = f"{record.levelname.lower():<7}"
        if self._colour:
            level = f"\x1b[{_COLOUR.get(record.levelname, '0')}m{level}\x1b[0m"
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{clock} {level} {record.name}: {text}"


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    found: Mapping[str, object] = getattr(record, "fields", {})
    return found


def _value(value: object) -> str:
    """Write a value so that the next field cannot be mistaken for a part of it."""
    text = str(value)
    return printable(text if text and not set(text) & set(' "=') else json.dumps(text, ensure_ascii=False))


def under_systemd() -> bool:
    """Say whether stderr leads to the journal."""
    return "JOURNAL_STREAM" in os.environ


def is_read(stream: TextIO) -> bool:
    """Return whether a stream can take a line within a moment; one that is no file can."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return bool(poll.poll(FLUSH * 1000))
    except (OSError, ValueError):
        return True


class Lines(logging.StreamHandler[TextIO]):
    """Writes lines to a stream; one that nobody reads (a stopped `less`, a hung journal) holds up nothing.

    A line is written at once where the stream can take it. Else it is queued, and a thread writes it; beyond
    `MOST_QUEUED` bytes lines are dropped and counted, and a line says how many once the stream is read again.
    A terminal calls itself writable with room for one byte, so all of its lines are written by the thread.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.dropped = 0
        self.on_drop: Callable[[], None] = lambda: None
        self._untold = 0  # dropped since a line said so
        self._queue: deque[bytes] = deque()
        self._size = 0  # bytes of the queue, and of the line that is being written
        self._changed = threading.Condition()  # the logging module's own lock is held by whoever logs
        self._thread: threading.Thread | None = None
        self._poll: select.poll | None = None
        with suppress(OSError, ValueError):
            self._fd = stream.fileno()
            self._is_terminal = os.isatty(self._fd)
            self._poll = select.poll()
            self._poll.register(self._fd, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or queue or drop it."""
        if self._poll is None:  # no file: it blocks nobody
            super().emit(record)
            return
        try:
            line = self._line(record)
        except Exception:  # noqa: BLE001 - a line that cannot be formatted fails nobody, as in `StreamHandler`
            self.handleError(record)
            return
        with self._changed:
            if not self._size and len(line) <= select.PIPE_BUF and self._can_take():
                try:
                    line = line[os.write(self._fd, line) :]
                except BlockingIOError:  # another process has made the stream one that never waits
                    pass
                except OSError:  # the reader is gone
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
        """Wait a moment for what is queued."""
        super().flush()
        if self._poll is not None:
            with self._changed:
                self._changed.wait_for(lambda: not self._size, FLUSH)

    def _line(self, record: logging.LogRecord) -> bytes:
        return (self.format(record) + self.terminator).encode(errors="backslashreplace")

    def _can_take(self) -> bool:
        """Return whether a short line can be written without waiting; a pipe then takes 4 KiB."""
        return (
            not self._is_terminal
            and self._poll is not None
            and any(what & select.POLLOUT for _, what in self._poll.poll(0))
        )

    def _drop(self) -> None:
        self.dropped += 1
        self._untold += 1
        self.on_drop()

    def _write(self) -> None:
        """Write what is queued, for as long as each line takes; runs in a thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                line = self._queue.popleft()
            try:
                self._write_all(line)
                with self._changed:
                    untold = 0 if self._queue else self._untold
                if untold:
                    self._write_all(self._confession(untold))
                    with self._changed:
                        self._untold -= untold
            except OSError:  # the reader is gone
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

    def _confession(self, count: int) -> bytes:
        what = "line was" if count == 1 else "lines were"
        text = f"{count} log {what} dropped: nobody read the log"
        record = logging.makeLogRecord(
            {"name": "relay.log", "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
            | fields(count=count)
        )
        return self._line(record)


def on_drop(call: Callable[[], None]) -> None:
    """Have something called for each line that is dropped; it may be called in any thread."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Lines):
            handler.on_drop = call


def configure(level: str, format_: Format, *, under_systemd: bool) -> None:
    """Send every log line to stderr in the format that suits where it goes."""
    if format_ == "auto":
        format_ = "journald" if under_systemd else "text" if sys.stderr.isatty() else "json"
    handler = Lines(sys.stderr)
    if format_ == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(
            TextLines(colour=format_ == "text" and wants_colour(sys.stderr), journald=format_ == "journald")
        )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Both report what remote peers do wrong with a traceback each; we count and say it in one line.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    # At debug it writes every statement with its parameters, senders' data among them.
    logging.getLogger("aiosqlite").setLevel(logging.WARNING)
