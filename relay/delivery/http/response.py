"""The parser of HTTP responses: the status line decides, and nothing after it can change that.

It does no I/O, so the result cannot depend on how the bytes are cut into segments. It is more lenient than
aiohttp's parser, which loses a complete head if a malformed body arrives in the same segment: the relay would
then repeat for days an event that the receiver has already accepted.
"""

import re
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import msgspec

LINE_LIMIT = 8190
"""Bytes of a status line, and of the line with a chunk's size."""

HEAD_LIMIT = 64 * 1024
"""Bytes of the headers, and of the trailers, that are read."""

HEADER_LIMIT = 128
"""Headers that are read."""

READ_LIMIT = 64 * 1024
"""Bytes of a response body that are read before the connection is closed, even if it is 10 GB long."""

INTERIM_LIMIT = 100
"""Responses of class 1xx before the final one."""

KEEP_LIMIT = 16 * 1024
"""Bytes of a response body that are kept."""

WIRE_LIMIT = 2**20
"""Bytes of one response on the wire, with responses of class 1xx and chunk extensions."""

TOO_MUCH = "the response is too large"

_STATUS_LINE = re.compile(
    rb"[\r\n]*[ \t]*HTTP/([0-9])(?:\.([0-9]))?[ \t]+([0-9]{3})(?![0-9])([^\n]*)\n"
).match
_BEGINNING = re.compile(
    rb"[\r\n]*[ \t]*(?:H|HT|HTT|HTTP|HTTP/|HTTP/[0-9][^\n]*)?", re.DOTALL
).fullmatch  # of an incomplete status line
_HEAD_END = re.compile(rb"\n\r?\n").search
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\n]*)?\r?\n").match
_LISTS = frozenset(
    ("connection", "content-length", "transfer-encoding")
)  # may be split over several header lines
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII).fullmatch
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII).fullmatch

_SWITCHING = 101
_BODILESS = (_SWITCHING, 204, 304)

_Stage = Literal["status", "headers", "sized", "chunk size", "chunk", "chunk end", "trailers", "until close"]


class ResponseParser(msgspec.Struct):
    """Parses one response from the bytes that `feed` receives until `end`."""

    status: int | None = None  # of the final status line, once that is complete
    reason: str = ""
    headers: dict[str, str] = {}  # by lower-case name; the first value of a repeated header
    body: bytearray = bytearray()  # its first 16 KiB
    whole: bool = False  # `body` is complete, by the head
    trouble: str | None = None  # the fault of the response
    is_over: bool = False  # the rest is not read
    is_garbage: bool = False  # the first bytes do not begin a response
    excess: bool = False  # more bytes arrived than the head announced
    keeps: bool = False  # the connection can carry another request
    _stage: _Stage = "status"
    _pending: bytes = b""  # cannot be parsed before more bytes arrive
    _interim: int = 0  # responses of class 1xx
    _left: int = 0  # bytes of the body, or of the chunk
    _body_bytes: int = 0
    _wire_bytes: int = 0
    _kept_alive: bool = False

    @property
    def has_begun(self) -> bool:
        """Whether any bytes have arrived."""
        return self._wire_bytes > 0

    def feed(self, data: bytes) -> None:
        """Parse bytes that have arrived."""
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
            if at < 0:  # the rest needs more bytes
                if self._wire_bytes - len(self._pending) > WIRE_LIMIT:
                    self._stop(TOO_MUCH)
                return
        if at < len(data) and self.keeps:
            self._exceed()

    def end(self) -> None:
        """End the response: the connection is closed."""
        if self.is_over:
            self.keeps = False
        elif self._stage == "until close":
            self.whole, self.is_over = self._body_bytes <= KEEP_LIMIT, True
        else:
            what = "head" if self._stage in ("status", "headers") else "body"
            self._stop(f"the {what} is incomplete")

    def _exceed(self) -> None:
        self.keeps, self.excess = False, True

    def _stop(self, trouble: str | None) -> int:
        """Stop reading: the connection must be closed."""
        self.trouble, self.is_over, self.keeps = trouble, True, False
        return 0

    def _wait(self, data: bytes, at: int, most: int) -> int:
        """Keep bytes that cannot be parsed before more arrive, unless they exceed the limit already."""
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
            if is_long or self._interim > INTERIM_LIMIT:
                return self._stop(TOO_MUCH)
            line = _STATUS_LINE(data, at)
            if line is None or line.end() - at > LINE_LIMIT:
                if len(data) - at > LINE_LIMIT:
                    what = f"a status line of more than {LINE_LIMIT} bytes"
                    return self._garbage(
                        what if _BEGINNING(data, at, at + LINE_LIMIT) else "no HTTP response"
                    )
                if not _BEGINNING(data, at):
                    return self._garbage("no HTTP response")
                return self._wait(data, at, LINE_LIMIT)
            major, minor, status, reason = line.groups()
            code = int(status)
            if code // 100 == 1 and code != _SWITCHING:  # the final response follows
                end = _HEAD_END(data, line.end() - 1)
                if end is None or end.end() - at > HEAD_LIMIT:
                    return self._wait(data, at, HEAD_LIMIT)
                at = end.end()
                self._interim += 1
                continue
            self.status, self.reason = code, reason.decode("latin-1").strip()
            self._kept_alive = major == b"1" and minor == b"1"
            self._stage = "headers"
            return line.end() - 1  # its line end may be the first half of the end of the head

    def _garbage(self, what: str) -> int:
        self.is_garbage = True
        return self._stop(what)

    def _read_headers(self, data: bytes, at: int) -> int:
        end = _HEAD_END(data, at)
        if end is None or end.end() - at > HEAD_LIMIT:
            return self._wait(data, at, HEAD_LIMIT)
        lines = data[at + 1 : end.start()].decode("latin-1").split("\n", HEADER_LIMIT)
        headers, name, is_clean = self.headers, "", len(lines) <= HEADER_LIMIT
        for line in lines[:HEADER_LIMIT]:
            before, colon, value = line.partition(":")
            value = value.strip(" \t\r")
            if line[:1] in (" ", "\t") and name:  # obsolete line folding
                headers[name] = f"{headers[name]} {line.strip()}".strip()
                continue
            name = before.strip(" \t\r").lower()
            if not colon or not _NAME(before):
                if not line.strip():
                    continue  # an empty line: there are no headers
                is_clean = False
                if not colon:
                    name = ""
                    continue
            if name not in headers:
                headers[name] = value
            elif name in _LISTS:
                headers[name] += f", {value}"
        self._begin_body(is_clean=is_clean)
        return end.end()

    def _begin_body(self, *, is_clean: bool) -> None:
        """Find out from the head how long the body is, and whether the connection can be used again.

        `is_clean`: every header was valid.
        """
        headers = self.headers
        if (connection := headers.get("connection")) is not None:
            options = {option.strip() for option in connection.lower().split(",")}
            self._kept_alive = "close" not in options and (self._kept_alive or "keep-alive" in options)
        self._kept_alive = self._kept_alive and is_clean
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if self.status in _BODILESS:
            if coding is not None or length not in (None, "0") or self.status == _SWITCHING:
                self._kept_alive = False  # a body may still follow
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
                self._stop("the Content-Length is malformed")
                return
            self._stage, self._left = "sized", int(one)
            if not self._left:
                self._finish()

    # --- the body -------------------------------------------------------------------------------------

    def _read_body(self, data: bytes, at: int) -> int:
        """Read bytes of a body, or of a chunk."""
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
                return self._stop("a chunk size is malformed")
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
        """Skip the lines after the last chunk, up to the empty line."""
        while (end := data.find(b"\n", at)) >= 0:
            is_last = data[at:end] in (b"", b"\r")
            at = end + 1
            if is_last:
                self._finish()
                return at
            self._left += 1  # counts trailers here
            if self._left > HEADER_LIMIT:
                return self._stop(TOO_MUCH)
        return self._wait(data, at, LINE_LIMIT)

    _STEPS: ClassVar[Mapping[_Stage, Callable[["ResponseParser", bytes, int], int]]] = {
        "status": _read_status,
        "headers": _read_headers,
        "sized": _read_body,
        "until close": _read_body,
        "chunk size": _read_chunk_size,
        "chunk": _read_body,
        "chunk end": _read_chunk_end,
        "trailers": _read_trailers,
    }
    """Each step parses from an offset and returns the next offset; -1: it needs more bytes."""
