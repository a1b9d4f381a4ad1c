"""A captured request and its findings. Formats: raw HTTP, the output of `curl -v`, JSON."""

import base64
import binascii
import re
from typing import Any

import msgspec
from multidict import CIMultiDict

from relay.model import Finding


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The diagnosis of one request."""

    findings: tuple[Finding, ...]
    fits: str | None = None  # the key of config.toml that verifies the request, None without one
    signature: int | None = None  # position of the matching one of several signatures, from 1
    type: str | None = None  # full type of the event that it creates
    subject: str | None = None
    more: int = 0  # further events of the same request
    because: str = ""  # why the request is valid, if no single key proves it

    @property
    def ok(self) -> bool:
        """Whether the request is valid."""
        return not self.findings


_LINE = re.compile(rb"([A-Za-z]+) (\S+)(?: HTTP/[0-9.]+)?")
_FIELD = re.compile(rb"([A-Za-z0-9!#$%&'*+.^_`|~-]+):[ \t]*(.*)")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_LONE_LF = re.compile(rb"(?<!\r)\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;[^\r\n]*)?\r?\n")
_BOM = b"\xef\xbb\xbf"
_AUTO = "{auto}"  # placeholder for the length of the body
_EXPECTED = (
    'expected a request: "POST /path HTTP/1.1", headers, an empty line and the body;'
    " the output of `curl -v`; or JSON with method, path, headers and body"
)


class Captured(msgspec.Struct, kw_only=True):
    """A captured request, and the changes made by capturing it."""

    method: str
    target: str  # from the request line; "" if unknown
    headers: CIMultiDict[str]
    body: bytes = b""
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()  # remarks that are not problems


class _Json(msgspec.Struct):
    """A request as JSON, the format of `relay listen --json`."""

    method: str = "POST"
    path: str = ""
    headers: dict[str, str | list[str]] = {}
    body: str | None = None
    body_base64: str | None = None


def read_captured(content: bytes, body: bytes | None = None) -> Captured:
    """Return a captured request; `body` replaces the body in the file.

    Raises:
        ValueError: the content is not a request; the message is a sentence.
    """
    content = content.removeprefix(_BOM).lstrip(b"\r\n")
    if content.startswith(b"{"):
        captured = _from_json(content)
    elif b"> " in content and any(_LINE.fullmatch(line[2:].rstrip()) for line in _sent(content)):
        captured = _from_http(b"\n".join(line[2:].rstrip(b"\r") for line in _sent(content)) + b"\n\n")
        captured.notes += ("`curl -v` prints no body",)
    else:
        captured = _from_http(content)
    if body is not None:
        captured.body = body
        _measure(captured, trim=False)
    else:
        _measure(captured, trim=True)
    return captured


def _sent(content: bytes) -> list[bytes]:
    """Return the sent lines in the output of `curl -v`, up to the end of the first head."""
    lines = [line for line in content.split(b"\n") if line.startswith(b">")]
    ends = [at for at, line in enumerate(lines) if at and not line[1:].strip()]
    return lines[: ends[0]] if ends else lines


def _from_json(content: bytes) -> Captured:
    """Return a request in JSON, the last one of several lines."""
    requests = [line for line in content.splitlines() if line.strip()]
    is_lines = len(requests) > 1 and all(line.startswith(b"{") for line in requests)
    try:
        given = msgspec.json.decode(requests[-1] if is_lines else content, type=_Json)
        text = (given.body or "").encode()
        body = text if given.body_base64 is None else base64.b64decode(given.body_base64, validate=True)
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}; give the body as text, or as body_base64") from None
    except (msgspec.DecodeError, UnicodeError, binascii.Error) as error:
        raise ValueError(f"invalid JSON: {error}") from None
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in given.headers.items():
        for one in [value] if isinstance(value, str) else value:
            headers.add(_named(name), one)
    notes = (f"the last of {len(requests)} requests in the file",) if is_lines else ()
    return Captured(method=given.method.upper(), target=given.path, headers=headers, body=body, notes=notes)


def _from_http(content: bytes) -> Captured:
    end = _HEAD_END.search(content)
    head, body = (content, b"") if end is None else (content[: end.start()], content[end.end() :])
    first, *rest = (line.rstrip(b"\r") for line in head.split(b"\n"))
    start, lines = _LINE.fullmatch(first.strip()), rest
    if start is None:
        lines = [first, *rest]
        if not _FIELD.fullmatch(first):
            raise ValueError(_EXPECTED)
    fields, notes = _unfolded(lines)
    headers: CIMultiDict[str] = CIMultiDict()
    for number, line in enumerate(fields, 1):
        field = _FIELD.fullmatch(line)
        if field is None:  # the line may contain a part of a secret, so it is not printed
            raise ValueError(f"header {number} has no name; {_EXPECTED}")
        headers.add(_named(_text(field[1])), _text(field[2]))
    method, target = ("POST", "") if start is None else (_text(start[1]).upper(), _text(start[2]))
    return Captured(method=method, target=target, headers=headers, body=body, notes=notes)


def _unfolded(lines: list[bytes]) -> tuple[list[bytes], tuple[str, ...]]:
    """Join folded headers: a line that begins with a space continues the previous one."""
    fields: list[bytes] = []
    for line in lines:
        if line[:1] in (b" ", b"\t") and fields:
            fields[-1] += line.strip()
        else:
            fields.append(line)
    broken = len(fields) < len(lines)
    return fields, ("lines that begin with a space were joined to the previous header",) if broken else ()


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _named(name: str) -> str:
    """Return a header's name on the wire for a framework's variable such as HTTP_X_TOKEN."""
    return name[5:].replace("_", "-") if name.startswith("HTTP_") else name


def _measure(captured: Captured, *, trim: bool) -> None:
    """Undo changes that tools make when they save a body, guided by its length.

    `trim`: the body is the end of a file, whose last newline may not be the sender's.
    """
    if "chunked" in captured.headers.get("Transfer-Encoding", "").lower():
        if (joined := _joined(captured.body)) is not None:
            captured.body = joined
        return
    length = captured.headers.get("Content-Length", "").strip()
    if length == _AUTO:
        captured.body = captured.body.removesuffix(b"\n")
        return
    if not length:
        return
    if not (length.isascii() and length.isdigit()):
        captured.findings += (_wrong_length(f"invalid Content-Length: {length[:20]!r}"),)
        return
    _fit(captured, int(length), trim=trim)


def _fit(captured: Captured, length: int, *, trim: bool) -> None:
    body = captured.body
    restored = {
        "CRLF to LF": _LONE_LF.sub(b"\r\n", body),
        "LF to CRLF": body.replace(b"\r\n", b"\n"),
    }
    if len(body) == length:
        return
    for change, other in restored.items():
        if len(other) == length:
            captured.body = other
            note = f"saving changed line endings from {change}; they were restored to match Content-Length"
            captured.notes += (note,)
            return
    if len(body) > length:
        if body[length:].strip() or not trim:
            captured.notes += (f"only the first {length} bytes were used, as in Content-Length",)
        captured.body = body[:length]
        return
    lost = "; a newline at the end may have been lost on saving" if length - len(body) == 1 else ""
    captured.findings += (_wrong_length(f"truncated: {len(body)} of {length} bytes (Content-Length){lost}"),)


def _wrong_length(what: str) -> Finding:
    do = (
        "capture the whole body, or give it with --data @FILE; if the sender sent no more, correct the sender"
    )
    return Finding(cause="bytes", where="body", what=what, do=do)


def _joined(body: bytes) -> bytes | None:
    """Return the joined chunks (RFC 9112 §7.1), or None if a tool has joined them already."""
    parts: list[Any] = []
    at = 0
    while match := _CHUNK.match(body, at):
        size = int(match[1], 16)
        if size == 0:
            return b"".join(parts)
        at = match.end() + size
        parts.append(body[match.end() : at])
        end = re.compile(rb"\r?\n").match(body, at)
        if len(parts[-1]) < size or end is None:
            return None
        at = end.end()
    return None
