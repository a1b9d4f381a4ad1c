"""How one token can be another written otherwise: what copying, quoting and encoding do to them."""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from difflib import SequenceMatcher
from urllib.parse import unquote

import msgspec

from relay.diagnosis.captured import Cause

_QUOTES = "\"'`\u2018\u2019\u201c\u201d"
_INVISIBLE = re.compile(r"[\s\u200b-\u200f\u2060\ufeff\u00ad]+")
_PLACEHOLDER = re.compile(
    r"\$\{?\w+\}?|\$\(.*\)|%\w+%|\{\{.*\}\}|<.*>|\[.*\]|x{3,}|\*{3,}"
    r"|null|nil|none|undefined|changeme"
    r"|(?:your|my|the)?[-_ ]?(?:api)?[-_ ]?(?:token|secret|key)(?:[-_ ]?here)?",
    re.IGNORECASE,
)
_BEARER = re.compile(r"bearer[ :=]+", re.IGNORECASE)
_ALIKE = 0.85  # of SequenceMatcher's ratio: one character of eight may differ
_LEAST = 8  # characters; shorter ones are alike by chance


class Likeness(msgspec.Struct, frozen=True):
    """What makes two tokens differ, and whose is written otherwise: the sender's, else config.toml's."""

    cause: Cause
    what: str  # goes on from "the token …"
    sent: bool = True


def is_placeholder(text: str) -> bool:
    """Say whether something stands there that nobody filled in.

    >>> is_placeholder("${TOKEN}"), is_placeholder("undefined"), is_placeholder("s3cret")
    (True, True, False)
    """
    return _PLACEHOLDER.fullmatch(text) is not None


def likeness(given: str, known: str) -> Likeness | None:
    """Say how a presented token is a configured one after all; None: it is quite another."""
    for what, cause, undo in _WAYS:
        if undo(given) == known:
            return Likeness(cause, what)
        if undo(known) == given:
            return Likeness(cause, what, sent=False)
    for what, form in _FORMS:
        if form(given) == form(known):
            return Likeness("encoding", what)
    if _latin(given) == known:
        return Likeness("encoding", "is written in Latin-1, not UTF-8")
    if given == _hashed(known) or known == _hashed(given):
        return Likeness("encoding", "is a sha256 digest, not the token itself", sent=given == _hashed(known))
    return _cut(given, known) or _near(given, known)


def _cut(given: str, known: str) -> Likeness | None:
    if min(len(given), len(known)) < _LEAST:
        return None
    if known.startswith(given):
        return Likeness("bytes", f"is cut off: {len(given)} of its {len(known)} characters")
    if known.endswith(given):
        return Likeness("bytes", f"has lost its beginning: {len(given)} of its {len(known)} characters")
    if given.startswith(known):
        return Likeness("bytes", f"goes on after its {len(known)} characters, to {len(given)}")
    if given.endswith(known):
        return Likeness("bytes", f"has {len(given) - len(known)} characters before it")
    return None


def _near(given: str, known: str) -> Likeness | None:
    if min(len(given), len(known)) < _LEAST:
        return None
    matcher = SequenceMatcher(None, given, known, autojunk=False)
    if matcher.quick_ratio() < _ALIKE or matcher.ratio() < _ALIKE:
        return None
    at = next(
        (at for at, pair in enumerate(zip(given, known, strict=False), 1) if pair[0] != pair[1]),
        min(len(given), len(known)) + 1,
    )
    return Likeness(
        "bytes", f"differs at character {at}; it has {len(given)}, the configured one {len(known)}"
    )


def _latin(text: str) -> str | None:
    """Read as Latin-1 what was no UTF-8."""
    raw = text.encode("utf-8", "surrogateescape")
    return None if raw.isascii() else raw.decode("latin-1")


def _unquoted(text: str) -> str:
    return text.strip(_QUOTES)


def _squeezed(text: str) -> str:
    return _INVISIBLE.sub("", text)


def _unescaped(text: str) -> str:
    return text.removesuffix("\\n").removesuffix("\\r")


def _unbase64(text: str) -> str | None:
    standard = text.translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True).decode().strip()
    except (binascii.Error, ValueError):
        return None


def _standard(text: str) -> str:
    return text.translate(str.maketrans("-_", "+/")).rstrip("=")


def _unhex(text: str) -> str | None:
    try:
        return bytes.fromhex(text).decode()
    except ValueError:
        return None


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


_WAYS: tuple[tuple[str, Cause, Callable[[str], str | None]], ...] = (
    ("begins with a byte order mark", "encoding", lambda text: text.strip("\ufeff")),
    ("stands in quotes", "encoding", _unquoted),
    ("has white space or invisible characters in it", "encoding", _squeezed),
    ("ends with the two characters \\n, not a newline", "encoding", _unescaped),
    ('has the word "Bearer" before it once more', "encoding", lambda text: _BEARER.sub("", text, 1)),
    ("is percent-encoded, as in a URL", "encoding", unquote),
    ("has spaces for its +, as web forms read it", "encoding", lambda text: text.replace(" ", "+")),
    ("is base64 of what is meant", "encoding", _unbase64),
    ("is in hexadecimal", "encoding", _unhex),
)
"""What may have been done to a token, what that is a matter of, and how to undo it."""

_FORMS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("has capital and small letters changed", str.casefold),
    ("is in the other alphabet of base64, or padded otherwise", _standard),
)
"""What cannot be undone, and how two look alike in spite of it."""
