"""Variants of a token: changes by copying, quoting and encoding."""

import base64
import binascii
import hashlib
import re
from collections.abc import Callable
from difflib import SequenceMatcher
from urllib.parse import unquote

import msgspec

from relay.model import Cause

_QUOTES = "\"'`\u2018\u2019\u201c\u201d"
_INVISIBLE = re.compile(r"[\s\u200b-\u200f\u2060\ufeff\u00ad]+")
_PLACEHOLDER = re.compile(
    r"\$\{?\w+\}?|\$\(.*\)|%\w+%|\{\{.*\}\}|<.*>|\[.*\]|x{3,}|\*{3,}"
    r"|null|nil|none|undefined|changeme"
    r"|(?:your|my|the)?[-_ ]?(?:api)?[-_ ]?(?:token|secret|key)(?:[-_ ]?here)?",
    re.IGNORECASE,
)
_BEARER = re.compile(r"bearer[ :=]+", re.IGNORECASE)
_ALIKE = 0.85  # minimum of SequenceMatcher's ratio: one of eight characters may differ
_LEAST = 8  # characters; shorter tokens are similar by chance


class Variant(msgspec.Struct, frozen=True):
    """The difference between two tokens; `sent`: the request has the changed one, not the configuration."""

    cause: Cause
    what: str  # continues "the token …"
    sent: bool = True


def is_placeholder(text: str) -> bool:
    """Return whether a text is still a placeholder instead of a secret.

    >>> is_placeholder("${TOKEN}"), is_placeholder("undefined"), is_placeholder("s3cret")
    (True, True, False)
    """
    return _PLACEHOLDER.fullmatch(text) is not None


def variant_of(given: str, known: str) -> Variant | None:
    """Return the difference between a sent token and a configured token, or None if they are unrelated."""
    for what, cause, undo in _WAYS:
        if undo(given) == known:
            return Variant(cause, what)
        if undo(known) == given:
            return Variant(cause, what, sent=False)
    for what, form in _FORMS:
        if form(given) == form(known):
            return Variant("encoding", what)
    if _latin(given) == known:
        return Variant("encoding", "is encoded in Latin-1, not UTF-8")
    if given == _hashed(known) or known == _hashed(given):
        return Variant("encoding", "is a sha256 digest, not the token itself", sent=given == _hashed(known))
    return _cut(given, known) or _near(given, known)


def _cut(given: str, known: str) -> Variant | None:
    if min(len(given), len(known)) < _LEAST:
        return None
    if known.startswith(given):
        return Variant("bytes", f"is truncated: {len(given)} of {len(known)} characters")
    if known.endswith(given):
        return Variant("bytes", f"lacks its beginning: {len(given)} of {len(known)} characters")
    if given.startswith(known):
        return Variant("bytes", f"has {len(given) - len(known)} extra characters at the end")
    if given.endswith(known):
        return Variant("bytes", f"has {len(given) - len(known)} extra characters at the beginning")
    return None


def _near(given: str, known: str) -> Variant | None:
    if min(len(given), len(known)) < _LEAST:
        return None
    matcher = SequenceMatcher(None, given, known, autojunk=False)
    if matcher.quick_ratio() < _ALIKE or matcher.ratio() < _ALIKE:
        return None
    at = next(
        (at for at, pair in enumerate(zip(given, known, strict=False), 1) if pair[0] != pair[1]),
        min(len(given), len(known)) + 1,
    )
    return Variant(
        "bytes", f"differs at character {at}; its length is {len(given)}, the configured one has {len(known)}"
    )


def _latin(text: str) -> str | None:
    """Return a text that is not UTF-8, decoded as Latin-1."""
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
    ("is in quotes", "encoding", _unquoted),
    ("contains white space or invisible characters", "encoding", _squeezed),
    ("ends with the two characters \\n, not a newline", "encoding", _unescaped),
    ('has a second "Bearer" before it', "encoding", lambda text: _BEARER.sub("", text, 1)),
    ("is percent-encoded, as in a URL", "encoding", unquote),
    ("has spaces instead of +, like a decoded web form", "encoding", lambda text: text.replace(" ", "+")),
    ("is base64 of the expected value", "encoding", _unbase64),
    ("is hexadecimal", "encoding", _unhex),
)
"""Changes of a token, their cause, and how to undo each."""

_FORMS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("differs in upper and lower case", str.casefold),
    ("uses the other base64 alphabet or padding", _standard),
)
"""Changes that cannot be undone, and a form in which both tokens are equal."""
