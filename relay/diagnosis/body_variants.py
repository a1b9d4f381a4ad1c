"""What frameworks, proxies and people do to the bytes of a body after it was signed, undone one by one."""

import codecs
import json
import re
import zlib
from collections.abc import Callable, Iterator

_LARGEST = 16 * 2**20  # bytes that a compressed body may come to
_RAW = "verify the raw body, as it came in, before anything parses it"
_LINES = "let nothing rewrite line ends: read and log the body as bytes"
_END = "hand on exactly the bytes that came; `echo`, editors and templates change the last newline"


def rewrites(body: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Yield bodies that this one may have been, each with what was done to it since and what to do."""
    yield "a newline was added at its end", _END, body.rstrip(b"\r\n")
    for end in (b"\n", b"\r\n"):
        yield "the newline at its end was taken away", _END, body + end
    yield "white space around it was taken away or added", _END, body.strip()
    yield "its line ends were changed from CRLF to LF", _LINES, body.replace(b"\n", b"\r\n")
    yield "its line ends were changed from LF to CRLF", _LINES, body.replace(b"\r\n", b"\n")
    yield "a byte order mark was put before it", _END, body.removeprefix(codecs.BOM_UTF8)
    for how, other in _unpacked(body):
        yield f"it was compressed ({how}) after it was signed", "verify it unpacked", other
    for other in _recoded(body):
        yield "it was read in one character set and written in another", _RAW, other
    for other in _rewritten(body):
        yield "it was parsed and written again: the meaning is the same, the bytes were changed", _RAW, other


def _unpacked(body: bytes) -> Iterator[tuple[str, bytes]]:
    if body.startswith(b"\x1f\x8b"):
        try:
            yield "gzip", zlib.decompressobj(wbits=_GZIP).decompress(body, _LARGEST)
        except zlib.error:
            return


def _recoded(body: bytes) -> Iterator[bytes]:
    for read, write in (("utf-8", "latin-1"), ("utf-8", "cp1252"), ("latin-1", "utf-8"), ("cp1252", "utf-8")):
        try:
            yield body.decode(read).encode(write)
        except UnicodeError:
            continue


def _rewritten(body: bytes) -> Iterator[bytes]:
    """Yield the forms that the usual writers of JSON have; numbers and the order of keys stay."""
    try:
        text = body.decode()
        value = json.loads(text)
        if isinstance(value, str):  # JSON within JSON
            yield value.encode()
            text = value
            json.loads(text)
        tokens = _TOKENS.findall(text)
        for style in _STYLES:
            written = [style(token) if token.startswith('"') else token for token in tokens]
            for item, key in ((",", ":"), (", ", ": ")):
                yield "".join({",": item, ":": key}.get(token, token) for token in written).encode()
            for indent in ("  ", "    ", "\t"):
                yield _indented(written, indent).encode()
    except (ValueError, RecursionError):
        return


def _indented(pieces: list[str], indent: str) -> str:
    parts: list[str] = []
    depth = 0
    before = ""
    for piece in pieces:
        if piece in "]}":
            depth -= 1
            if before not in "[{":
                parts.append("\n" + indent * depth)
        elif before and before in "[{,":
            parts.append("\n" + indent * depth)
        parts.append(": " if piece == ":" else piece)
        depth += piece in "[{"
        before = piece
    return "".join(parts)


def _plain(token: str) -> str:
    return json.dumps(json.loads(token), ensure_ascii=False)


def _ascii(token: str) -> str:
    return json.dumps(json.loads(token))


def _php(token: str) -> str:
    return _ascii(token).replace("/", "\\/")


def _go(token: str) -> str:
    plain = _plain(token)
    for sign in "<>&":
        plain = plain.replace(sign, f"\\u{ord(sign):04x}")
    return plain


_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
_GZIP = 31  # window bits that mean gzip
_STYLES: tuple[Callable[[str], str], ...] = (str, _plain, _ascii, _php, _go)
"""How strings are escaped: as they are, by JavaScript and others, by Python, by PHP, by Go."""
