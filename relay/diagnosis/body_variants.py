"""Variants of a body: changes that frameworks, proxies and people make after signing, undone one by one."""

import codecs
import json
import re
import zlib
from collections.abc import Callable, Iterator

_LARGEST = 16 * 2**20  # bytes of a decompressed body
_RAW = "verify the raw body before anything parses it"
_LINES = "keep line endings unchanged: read and log the body as bytes"
_END = "pass on exactly the received bytes; `echo`, editors and templates change the last newline"


def body_variants(body: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Yield possible original bodies, each with the change since signing and the advice."""
    yield "a newline was added at the end", _END, body.rstrip(b"\r\n")
    for end in (b"\n", b"\r\n"):
        yield "the newline at the end was removed", _END, body + end
    yield "white space around the body was removed or added", _END, body.strip()
    yield "line endings were changed from CRLF to LF", _LINES, body.replace(b"\n", b"\r\n")
    yield "line endings were changed from LF to CRLF", _LINES, body.replace(b"\r\n", b"\n")
    yield "a byte order mark was added", _END, body.removeprefix(codecs.BOM_UTF8)
    for how, other in _unpacked(body):
        yield f"the body was compressed ({how}) after signing", "verify the decompressed body", other
    for other in _recoded(body):
        yield "the body was decoded and encoded in different character sets", _RAW, other
    for other in _rewritten(body):
        yield "the body was parsed and written again: same content, different bytes", _RAW, other


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
    """Yield the body as common JSON writers format it; numbers and the order of keys stay."""
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
    for char in "<>&":
        plain = plain.replace(char, f"\\u{ord(char):04x}")
    return plain


_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
_GZIP = 31  # window bits for gzip
_STYLES: tuple[Callable[[str], str], ...] = (str, _plain, _ascii, _php, _go)
"""Styles of escaping strings: unchanged, JavaScript and others, Python, PHP, Go."""
