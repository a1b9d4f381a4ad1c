"""Log lines: one event per line, and a hostile sender cannot fill the disk with them."""

import json
import logging
import os
import sys
import time
from typing import Literal

from relay.clock import SECOND, Clock, rfc3339

Format = Literal["auto", "json", "text", "journald"]
_PRIORITY = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}
_COLOUR = {"DEBUG": "2", "INFO": "36", "WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}


class Sparing:
    """Writes one line per key in `every` seconds, and says how many it swallowed.

    A million fuzzed requests, sent as fast as they are answered, write half a megabyte so.
    """

    def __init__(self, log: logging.Logger, clock: Clock, every: float = 10.0) -> None:
        self._log = log
        self._clock = clock
        self._every = int(every * SECOND)
        self._last: dict[str, tuple[int, int]] = {}  # key → (when last written, swallowed since)

    def info(self, key: str, line: str) -> None:
        """Log a line; keys come from closed lists."""
        self._write(logging.INFO, key, line, None)

    def warning(self, key: str, line: str) -> None:
        """Log what an operator should see."""
        self._write(logging.WARNING, key, line, None)

    def error(self, key: str, line: str, error: BaseException | None) -> None:
        """Log a failure with its traceback."""
        self._write(logging.ERROR, key, line, error)

    def _write(self, level: int, key: str, line: str, error: BaseException | None) -> None:
        now = self._clock.steady()
        written, swallowed = self._last.get(key, (0, 0))
        if now - written < self._every:
            self._last[key] = (written, swallowed + 1)
            return
        self._last[key] = (now, 0)
        more = f" ({swallowed} more like it)" if swallowed else ""
        self._log.log(level, "%s%s", line, more, exc_info=error)


class JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        line = {
            "time": rfc3339(int(record.created * SECOND)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextLines(logging.Formatter):
    """For people: on a terminal with colour, under systemd with journald's priority prefix."""

    def __init__(self, *, colour: bool = False, journald: bool = False) -> None:
        super().__init__()
        self._colour = colour
        self._journald = journald

    def format(self, record: logging.LogRecord) -> str:
        """Render a record."""
        text = record.getMessage()
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        if self._journald:
            prefix = f"<{_PRIORITY.get(record.levelname, 6)}>"
            return "\n".join(f"{prefix}{record.name}: {line}" for line in text.splitlines())
        level = f"{record.levelname.lower():<7}"
        if self._colour:
            level = f"\x1b[{_COLOUR.get(record.levelname, '0')}m{level}\x1b[0m"
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{clock} {level} {record.name}: {text}"


def under_systemd() -> bool:
    """Say whether stderr leads to the journal."""
    return "JOURNAL_STREAM" in os.environ


def configure(level: str, format_: Format, *, under_systemd: bool) -> None:
    """Send every log line to stderr in the format that suits where it goes."""
    if format_ == "auto":
        format_ = "journald" if under_systemd else "text" if sys.stderr.isatty() else "json"
    handler = logging.StreamHandler(sys.stderr)
    if format_ == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(TextLines(colour=sys.stderr.isatty(), journald=format_ == "journald"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Both report what remote peers do wrong with a traceback each; we count and say it in one line.
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL)
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
