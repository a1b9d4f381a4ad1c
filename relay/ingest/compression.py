"""Compressed bodies: gzip and deflate (RFC 9110, 8.4.1), with limits for output, members and time at once.

A hostile megabyte becomes a gigabyte, which takes seconds. So the output has the limit of an uncompressed
body, and other requests run after each millisecond.
"""

import asyncio
import time
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from relay.errors import Malformed, TooLarge, UnsupportedEncoding

if TYPE_CHECKING:  # commands use this module without aiohttp
    from relay.ingest.body import Hold

ENCODINGS = ("gzip", "deflate")
BITE = 2**13  # bytes of input at once: the slowest to read, blocks without content, take about 1 ms
STEP = 2**16  # bytes of output at once: about 0.2 ms
TURN = 0.001  # seconds that one turn of the event loop may spend
MOST_MEMBERS = 100  # of a gzip body; real senders write one

_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS
_MARK = b"\x1f\x8b"


def encoding_of(header: str) -> str:
    """Return `gzip`, `deflate` or `""` for a `Content-Encoding`; several lines are joined by commas.

    Raises:
        UnsupportedEncoding: it is another one, or several.
    """
    encoding = header.strip().lower().removeprefix("x-")
    if encoding in ("", "identity"):
        return ""
    if encoding not in ENCODINGS:
        raise UnsupportedEncoding(
            "Send the body as gzip or deflate, or without Content-Encoding", accepts=ENCODINGS
        )
    return encoding


async def decompress(body: bytes, encoding: str, limit: int, hold: "Hold") -> bytes:
    """Return the content of a compressed body; `hold` reserves its bytes.

    Raises:
        Malformed, TooLarge: as `pieces`.
        Overloaded: the budget has no bytes left for it.
    """
    content, due = bytearray(), time.monotonic() + TURN
    for piece in pieces(body, encoding, limit):
        hold.take(len(piece))
        content += piece
        if time.monotonic() > due:
            await asyncio.sleep(0)
            due = time.monotonic() + TURN
    return bytes(content)


def pieces(body: bytes, encoding: str, limit: int) -> Iterator[bytes]:
    """Yield the content of a compressed body in small pieces, which may be empty.

    Some senders write deflate without the zlib format around it; both are accepted.

    Raises:
        Malformed: the body is not in this encoding, is cut short, or has bytes after its end.
        TooLarge: the content has more than `limit` bytes.
    """
    format_ = _GZIP if encoding == "gzip" else _ZLIB if _is_zlib(body) else _RAW
    machine, rest, at, size, members = zlib.decompressobj(format_), b"", 0, 0, 1
    while True:
        if not rest:  # a slice, because each call copies the input that it leaves
            rest = body[at : at + BITE]
            at += len(rest)
        try:
            piece = machine.decompress(rest, STEP)
        except zlib.error:
            raise Malformed(f"The body is not valid {encoding}") from None
        size += len(piece)
        if size > limit:
            raise TooLarge
        yield piece
        rest = machine.unconsumed_tail
        if machine.eof:
            at -= len(machine.unused_data)
            if at == len(body):
                return
            members += 1
            if encoding != "gzip" or not body.startswith(_MARK, at) or members > MOST_MEMBERS:
                raise Malformed(f"The body has bytes after the end of its {encoding}")
            machine, rest = zlib.decompressobj(format_), b""
        elif not rest and not piece and at == len(body):
            raise Malformed(f"The {encoding} body is incomplete")


def _is_zlib(body: bytes) -> bool:
    """Return whether a body begins with a zlib header (RFC 1950, 2.2)."""
    return len(body) >= 2 and body[0] & 0x0F == zlib.DEFLATED and (body[0] << 8 | body[1]) % 31 == 0  # noqa: PLR2004
