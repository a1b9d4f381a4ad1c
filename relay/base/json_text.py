r"""Reads JSON that msgspec refuses: lone surrogates, and numbers beyond machine types.

JavaScript can cut a string inside an emoji. Node then writes the remaining half, a lone surrogate, as an
escape: `"Bob \ud83d"`. This is valid JSON (RFC 8259, 8.2), but msgspec refuses it, and neither UTF-8 nor
SQLite can hold it. Stored bytes keep the escape. Text shows it as the six characters of the escape.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_SURROGATE = re.compile("[\ud800-\udfff]")
_SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPES = re.compile(  # escaped backslashes, surrogate pairs, lone surrogates
    rb"((?:\\\\)+|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')
_EMPTY = re.compile(r"([{\[])\n *\n *([}\]])")
_encode = msgspec.json.Encoder().encode
_read: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()
_skim: "msgspec.json.Decoder[msgspec.Raw]" = msgspec.json.Decoder(msgspec.Raw)


def decode(decoder: "msgspec.json.Decoder[T]", text: bytes) -> T:
    r"""Decode JSON. Strings contain a lone surrogate as its escape; `msgspec.Raw` keeps the sender's bytes.

    Raises:
        msgspec.DecodeError: invalid JSON, or not of the decoder's type.

    >>> decode(msgspec.json.Decoder(), rb'{"name": "Bob \ud83d"}')
    {'name': 'Bob \\ud83d'}
    """
    try:
        return decoder.decode(text)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        if _SUSPECT.search(text) is None:
            raise
    mended, escapes = _mend(text)
    value = decoder.decode(mended)
    if not escapes:
        return value
    stand_ins = re.compile(f"[{min(escapes)}-{max(escapes)}]")

    def show(text: str) -> str:
        if text.isascii():
            return text
        return stand_ins.sub(lambda found: escapes.get(found[0], found[0]).lower(), text)

    def restore(raw: msgspec.Raw) -> msgspec.Raw:
        text = bytes(raw).decode()
        return msgspec.Raw(stand_ins.sub(lambda found: escapes.get(found[0], found[0]), text).encode())

    return _walk(value, show, restore)  # type: ignore[no-any-return]


def read(text: bytes, *, exact: bool = False) -> Any:
    """Decode any JSON value. Strings contain a lone surrogate as its escape.

    Numbers that msgspec refuses (1e400, integers of 4,300 digits) become floats, unless `exact` is set.

    Raises:
        ValueError: invalid JSON, or `exact` and a number would change.
        RecursionError: the value is nested too deeply.
    """
    try:
        return decode(_read, text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        if exact:
            raise
    return _walk(
        json.loads(text.decode(), parse_int=_integer, parse_constant=_refuse), escape, lambda raw: raw
    )


def salvage(text: bytes) -> bytes:
    """Return almost-valid JSON as valid JSON.

    Drops a byte order mark, replaces invalid UTF-8, and turns NaN and Infinity into null and huge numbers
    into floats. For heartbeats, where only the id must be right; never for events.

    Raises:
        ValueError: the result is still not JSON.
        RecursionError: the value is nested too deeply.
    """
    readable = text.decode("utf-8-sig", "replace")
    value = json.loads(readable, parse_int=_integer, parse_constant=lambda _: None, strict=False)
    return encode(value)


def check(text: bytes) -> None:
    """Check that the bytes are exactly one JSON value in UTF-8.

    Raises:
        ValueError: invalid JSON or UTF-8.
        RecursionError: the value is nested too deeply.
    """
    if not text.isascii():
        text.decode()  # msgspec does not look inside Raw
    try:
        _skim.decode(text)
    except msgspec.DecodeError:
        decode(_skim, text)  # lone surrogates are valid


def indented(text: str) -> str:
    r"""Return JSON with line breaks and indentation; escapes become characters, numbers stay as sent.

    Raises:
        ValueError: invalid JSON.
        RecursionError: the value is nested too deeply.

    >>> indented('{"a": [1.50, {}], "b": "K\\u00f6ln"}').splitlines()
    ['{', '  "a": [', '    1.50,', '    {}', '  ],', '  "b": "Köln"', '}']
    """
    json.loads(text)
    parts: list[str] = []
    depth = 0
    for piece in _TOKENS.findall(text):
        if piece in "{[":
            depth += 1
            parts += [piece, "\n" + "  " * depth]
        elif piece in "}]":
            depth -= 1
            parts += ["\n" + "  " * depth, piece]
        elif piece == ",":
            parts += [piece, "\n" + "  " * depth]
        elif piece == ":":
            parts.append(": ")
        else:
            parts.append(json.dumps(json.loads(piece), ensure_ascii=False) if "\\" in piece else piece)
    return _EMPTY.sub(r"\1\2", "".join(parts))


def escape(text: str) -> str:
    r"""Return the text with lone surrogates replaced by their escapes, so that it can be stored and shown.

    >>> escape("Bob \ud83d")
    'Bob \\ud83d'
    """
    return text if text.isascii() else _SURROGATE.sub(lambda found: rf"\u{ord(found[0]):04x}", text)


def encode(value: Any, encoder: Callable[[Any], bytes] = _encode) -> bytes:
    """Encode a value as JSON. Strings contain a lone surrogate as its escape."""
    try:
        return encoder(value)
    except UnicodeEncodeError:
        return encoder(_walk(value, escape, lambda raw: raw))


def _integer(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts (a guard against quadratic time)
        return float(digits)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _mend(text: bytes) -> tuple[bytes, dict[str, str]]:
    """Replace lone surrogates by characters that the text does not contain; return the escapes as well."""
    parts = _ESCAPES.split(text)
    found = set(parts[1::2])
    lone = sorted(part for part in found if part[1:2] == b"u" and len(part) == len(rb"\uXXXX"))
    taken = {*text.decode(), *(json.loads(b'"%b"' % part) for part in found if part[1:2] == b"u")}
    free = (chr(place) for place in chain(range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)))
    stand_ins = dict(zip((each for each in free if each not in taken), lone, strict=False))
    mended = {escape: each.encode() for each, escape in stand_ins.items()}
    parts[1::2] = [mended.get(part, part) for part in parts[1::2]]
    return b"".join(parts), {each: escape.decode() for each, escape in stand_ins.items()}


def _walk(value: Any, text: Callable[[str], str], raw: Callable[[msgspec.Raw], msgspec.Raw]) -> Any:
    """Return the value with all strings and raw parts replaced."""

    def go(value: Any) -> Any:
        return _walk(value, text, raw)

    if isinstance(value, str):
        return text(value)
    if isinstance(value, msgspec.Raw):
        return raw(value)
    if isinstance(value, dict):
        return {go(key): go(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        make = getattr(value, "_make", type(value))  # a NamedTuple has one
        return make(map(go, value))
    if isinstance(value, msgspec.Struct):
        fields = {name: go(getattr(value, name)) for name in value.__struct_fields__}
        value = msgspec.structs.replace(value, **fields)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        value = dataclasses.replace(value, **{name: go(getattr(value, name)) for name in names})
    return value
