"""A receiver's answer, parsed as it arrives: the status line decides, and nothing behind it can undo that.

Without I/O, so that the result cannot depend on how the bytes are cut into segments. The parser is
more lenient than aiohttp's, which forgets a complete head when a malformed body arrives in the same
segment: then an event that the receiver has taken would be sent again for days.
"""

import re
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

LINE_LIMIT = 8190
"""Bytes of a status line, and of the line with a chunk's size."""

HEAD_LIMIT = 64 * 1024
"""Bytes of the headers, and of the trailers, that are read."""

HEADER_LIMIT = 128
"""Headers that are looked at."""

READ_LIMIT = 64 * 1024
"""Bytes read of an answer's body; beyond them the connection is closed: a 10 GB answer costs no more."""

ANNOUNCEMENT_LIMIT = 100
"""Answers of class 1xx before the final one."""

KEEP_LIMIT = 16 * 1024
"""Bytes kept of an answer's body."""

WIRE_LIMIT = 2**20
"""Bytes of one answer on the wire, with announcements (1xx) and the remarks behind a chunk's size."""

TOO_MUCH = "far more than an answer"

_STATUS_LINE = re.compile(
    rb"[\r\n]*[ \t]*HTTP/([0-9])(?:\.([0-9]))?[ \t]+([0-9]{3})(?![0-9])([^\n]*)\n"
).match
_BEGINNING = re.compile(
    rb"[\r\n]*[ \t]*(?:H|HT|HTT|HTTP|HTTP/|HTTP/[0-9][^\n]*)?", re.DOTALL
).fullmatch  # of a status line that has not come to its end
_HEAD_END = re.compile(rb"\n\r?\n").search
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\n]*)?\r?\n").match
_LISTS = frozenset(("connection", "content-length", "transfer-encoding"))  # may stand in several lines
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII).fullmatch
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII).fullmatch

_SWITCHING = 101
_BODILESS = (_SWITCHING, 204, 304)

_Stage = Literal["status", "headers", "sized", "chunk size", "chunk", "chunk end", "trailers", "until close"]


class Reply:
    """One answer. Feed it what arrives, and tell it of the connection's end."""

    __slots__ = (
        "_announcements", "_body_bytes", "_kept_alive", "_left", "_pending", "_stage", "_wire_bytes",
        "body", "excess", "headers", "is_garbage", "is_over", "keeps", "reason", "status", "trouble", "whole",
    )  # fmt: skip

    def __init__(self) -> None:
        self.status: int | None = None  # of the final status line, as soon as that is complete
        self.reason = ""
        self.headers: dict[str, str] = {}  # by lower-case name; of a repeated one the first value
        self.body = bytearray()  # its first 16 KiB
        self.whole = False  # whether that is all of it, as the head announced it
        self.trouble: str | None = None  # what is wrong with it
        self.is_over = False  # nothing more is to be read
        self.is_garbage = False  # what came is not the beginning of an answer
        self.excess = False  # more came than was announced
        self.keeps = False  # whether the connection can carry another request
        self._stage: _Stage = "status"
        self._pending = b""  # came, and cannot be parsed before more has come
        self._announcements = 0
        self._left = 0  # bytes of the body, or of the chunk
        self._body_bytes = 0
        self._wire_bytes = 0
        self._kept_alive = False

    @property
    def has_begun(self) -> bool:
        """Whether anything has come."""
        return self._wire_bytes > 0

    def feed(self, data: bytes) -> None:
        """Take in what has arrived."""
        if self.is_over:
            if self.keeps:
                self._exceed()
            return
        self._wire_bytes += len(data)
        if self._pending:
            data, self._pending = self._pending + data, b""
        at = 0
        while not self.is_over:
            at = self._STEPS[self._stage](self, data, at)
            if at < 0:  # more has to come first
                if self._wire_bytes - len(self._pending) > WIRE_LIMIT:
                    self._stop(TOO_MUCH)
                return
        if at < len(data) and self.keeps:
            self._exceed()

    def end(self) -> None:
        """Take in that nothing more comes: the connection is closed."""
        if self.is_over:
            self.keeps = False
        elif self._stage == "until close":
            self.whole, self.is_over = self._body_bytes <= KEEP_LIMIT, True
        else:
            what = "head" if self._stage in ("status", "headers") else "body"
            self._stop(f"the {what} broke off")

    def _exceed(self) -> None:
        self.keeps, self.excess = False, True

    def _stop(self, trouble: str | None) -> int:
        """Read no more of it: the connection has to be closed."""
        self.trouble, self.is_over, self.keeps = trouble, True, False
        return 0

    def _wait(self, data: bytes, at: int, most: int) -> int:
        """Keep what cannot be parsed before more of it has come, unless it is too much already."""
        if len(data) - at > most:
            return self._stop(TOO_MUCH)
        self._pending = data[at:]
        return -1

    def _finish(self) -> int:
        self.whole, self.is_over = self._body_bytes <= KEEP_LIMIT, True
        self.keeps = self._kept_alive
        return 0

    # --- the head -------------------------------------------------------------------------------------

    def _read_status(self, data: bytes, at: int) -> int:
        while True:
            is_long = self._wire_bytes - len(data) + at > WIRE_LIMIT
            if is_long or self._announcements > ANNOUNCEMENT_LIMIT:
                return self._stop(TOO_MUCH)
            line = _STATUS_LINE(data, at)
            if line is None or line.end() - at > LINE_LIMIT:
                if len(data) - at > LINE_LIMIT:
                    what = f"a status line of more than {LINE_LIMIT} bytes"
                    return self._garbage(what if _BEGINNING(data, at, at + LINE_LIMIT) else "no HTTP answer")
                if not _BEGINNING(data, at):
                    return self._garbage("no HTTP answer")
                return self._wait(data, at, LINE_LIMIT)
            major, minor, status, reason = line.groups()
            code = int(status)
            if code // 100 == 1 and code != _SWITCHING:  # an announcement: the answer is still to come
                end = _HEAD_END(data, line.end() - 1)
                if end is None or end.end() - at > HEAD_LIMIT:
                    return self._wait(data, at, HEAD_LIMIT)
                at = end.end()
                self._announcements += 1
                continue
            self.status, self.reason = code, reason.decode("latin-1").strip()
            self._kept_alive = major == b"1" and minor == b"1"
            self._stage = "headers"
            return line.end() - 1  # its line end may be the first half of the head's end

    def _garbage(self, what: str) -> int:
        self.is_garbage = True
        return self._stop(what)

    def _read_headers(self, data: bytes, at: int) -> int:
        end = _HEAD_END(data, at)
        if end is None or end.end() - at > HEAD_LIMIT:
            return self._wait(data, at, HEAD_LIMIT)
        lines = data[at + 1 : end.start()].decode("latin-1").split("\n", HEADER_LIMIT)
        is_clean = self._take_headers(lines[:HEADER_LIMIT]) and len(lines) <= HEADER_LIMIT
        self._begin_body(is_clean=is_clean)
        return end.end()

    def _take_headers(self, lines: list[str]) -> bool:
        """Note every header that can be read; say whether all of them can."""
        headers, name, is_clean = self.headers, "", True
        for line in lines:
            before, colon, value = line.partition(":")
            value = value.strip(" \t\r")
            if line[:1] in (" ", "\t") and name:  # an old way to go on in the next line
                headers[name] = f"{headers[name]} {line.strip()}".strip()
                continue
            name = before.strip(" \t\r").lower()
            if not colon or not _NAME(before):
                if not line.strip():
                    continue  # there are no headers at all
                is_clean = False
                if not colon:
                    name = ""
                    continue
            if name not in headers:
                headers[name] = value
            elif name in _LISTS:
                headers[name] += f", {value}"
        return is_clean

    def _begin_body(self, *, is_clean: bool) -> None:
        """Tell from the head how long the body is, and whether the connection can be used again."""
        headers = self.headers
        if (connection := headers.get("connection")) is not None:
            wishes = {wish.strip() for wish in connection.lower().split(",")}
            self._kept_alive = "close" not in wishes and (self._kept_alive or "keep-alive" in wishes)
        self._kept_alive = self._kept_alive and is_clean
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if self.status in _BODILESS:
            if coding is not None or length not in (None, "0") or self.status == _SWITCHING:
                self._kept_alive = False  # a body may follow all the same
            self._finish()
        elif coding is not None and coding.lower() != "identity":
            if length is not None:
                self._kept_alive = False
            chunked = coding.lower().rpartition(",")[2].strip() == "chunked"
            self._stage = "chunk size" if chunked else "until close"
        elif length is None:
            self._stage = "until close"
        else:
            lengths = {each.strip() for each in length.split(",")}
            if len(lengths) > 1 or not _LENGTH(one := lengths.pop()):
                self._stop("its Content-Length is malformed")
                return
            self._stage, self._left = "sized", int(one)
            if not self._left:
                self._finish()

    # --- the body -------------------------------------------------------------------------------------

    def _read_body(self, data: bytes, at: int) -> int:
        """Take what there is of a body, or of a chunk."""
        size = len(data) - at
        if self._stage != "until close":
            size = min(size, self._left)
            self._left -= size
        if size and (room := KEEP_LIMIT - self._body_bytes) > 0:
            self.body += data[at : at + min(size, room)]
        self._body_bytes += size
        at += size
        if self._body_bytes > READ_LIMIT:
            self._stop(None)
        elif self._left or self._stage == "until close":
            return -1
        elif self._stage == "chunk":
            self._stage = "chunk end"
        else:
            self._finish()
        return at

    def _read_chunk_size(self, data: bytes, at: int) -> int:
        size = _CHUNK_SIZE(data, at)
        if size is None or size.end() - at > LINE_LIMIT:
            if b"\n" in data[at : at + LINE_LIMIT]:
                return self._stop("a chunk's size is malformed")
            return self._wait(data, at, LINE_LIMIT)
        self._left = int(size[1], 16)
        self._stage = "chunk" if self._left else "trailers"
        return size.end()

    def _read_chunk_end(self, data: bytes, at: int) -> int:
        if data.startswith((b"\r\n", b"\n"), at):
            self._stage = "chunk size"
            return data.index(b"\n", at) + 1
        if data[at:] in (b"", b"\r"):
            return self._wait(data, at, 1)
        return self._stop("a chunk is longer than its size")

    def _read_trailers(self, data: bytes, at: int) -> int:
        """Skip what follows the last chunk, to its empty line."""
        while (end := data.find(b"\n", at)) >= 0:
            is_last = data[at:end] in (b"", b"\r")
            at = end + 1
            if is_last:
                self._finish()
                return at
            self._left += 1  # of trailers: there is no chunk any more
            if self._left > HEADER_LIMIT:
                return self._stop(TOO_MUCH)
        return self._wait(data, at, LINE_LIMIT)

    _STEPS: ClassVar[Mapping[_Stage, Callable[["Reply", bytes, int], int]]] = {
        "status": _read_status,
        "headers": _read_headers,
        "sized": _read_body,
        "until close": _read_body,
        "chunk size": _read_chunk_size,
        "chunk": _read_body,
        "chunk end": _read_chunk_end,
        "trailers": _read_trailers,
    }
    """Each reads from a place in the data and returns the next one; -1: more has to come first."""
