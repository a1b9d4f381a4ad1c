"""Why a body is not valid JSON, with advice for the sender."""

import codecs
import json
from collections.abc import Callable
from typing import Any

import msgspec

from relay.base.json_text import decode
from relay.model import Finding

UNEXPLAINED = "the source rejects the JSON"

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_FORM = "application/x-www-form-urlencoded"
_NUMBERS = (b"NaN", b"Infinity")
_decoder: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()


def explain_malformed(body: bytes, content_type: str) -> Finding:
    """Return the finding for a body that a source rejected as malformed."""
    form = content_type.partition(";")[0].strip().lower() == _FORM
    for what, do, applies in _FAULTS:
        if applies(body) or (form and what == _WEB_FORM):
            return Finding(cause="body", where="body", what=what, do=do)
    try:
        body.decode()
    except UnicodeDecodeError as error:
        what, do = f"byte {error.start + 1} is invalid UTF-8; the body may be Latin-1", _UTF8
    else:
        what, do = _syntax(body), "have the sender encode it with a JSON library"
    return Finding(cause="body", where="body", what=what, do=do)


def is_twice_encoded(body: bytes) -> bool:
    """Return whether a body is a JSON string that contains JSON."""
    try:
        inner = json.loads(body)
        return isinstance(inner, str) and isinstance(json.loads(inner), dict | list)
    except (ValueError, RecursionError):
        return False


def _syntax(body: bytes) -> str:
    try:
        decode(_decoder, body)
    except msgspec.DecodeError as error:
        what = str(error).removeprefix("JSON is malformed: ")
        if any(word in body for word in _NUMBERS):
            what += "; JSON has no NaN and no Infinity"
        return f"invalid JSON: {what}"
    except RecursionError:
        return "the JSON is nested too deeply"
    return UNEXPLAINED


_UTF8 = "have the sender write UTF-8"
_WEB_FORM = "the body is a web form, not JSON"
_FAULTS: tuple[tuple[str, str, Callable[[bytes], bool]], ...] = (
    (
        "the body is empty",
        "have the sender post its JSON; a proxy may drop the body",
        lambda body: not body.strip(),
    ),
    (
        "the body begins with a byte order mark",
        "have the sender write UTF-8 without BOM",
        lambda body: body.startswith(codecs.BOM_UTF8),
    ),
    ("the body is UTF-16 or UTF-32", _UTF8, lambda body: body.startswith(_UTF16) or b"\0" in body[:4]),
    (_WEB_FORM, "have the sender post the JSON itself", lambda body: body.startswith((b"payload=", b"%7B"))),
    (
        "the body is XML or HTML, not JSON",
        "have the sender post JSON",
        lambda body: body.lstrip()[:1] == b"<",
    ),
    (
        "strings are in single quotes, as Python prints them",
        "have the sender encode it as JSON",
        lambda body: body.lstrip()[:2] in (b"{'", b"['"),
    ),
)
