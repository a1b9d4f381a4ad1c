"""Fields of forms: URL-encoded text (WHATWG URL, 5) and multipart bodies (RFC 7578).

Python's own functions would stop the event loop. They take 0.35 s for a multipart message with a megabyte of
empty lines, 0.3 s for a megabyte of percent-encoded text, and 0.08 s for a header of 8 KB with many
semicolons.
"""

import re
from binascii import a2b_qp

URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"

LONGEST_HEAD = 8190
"""Bytes of the headers of one part; the same limit as for a request's header."""

MOST_PARAMETERS = 20
"""Parameters of a header of one part; browsers send two."""

_PARAMETER = re.compile(  # name and value, which may be quoted (RFC 9110, 5.6.6); or something else
    r"""[ \t]*(?:([^\s;="]+)[ \t]*=[ \t]*("[^"\\]*(?:\\.[^"\\]*)*"|[^\s;"]*)|[^;"]*)[ \t]*(?:;|\Z)""",
    re.DOTALL,
)
_LONE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_QUOTED = re.compile(r"\\(.)", re.DOTALL)


def urlencoded_fields(text: str, limit: int) -> list[tuple[str, str]]:
    """Return names and values of URL-encoded text, such as a query, in order, including empty values.

    Raises:
        ValueError: the text is not percent-encoded UTF-8, or has more than `limit` fields.
    """
    if text.count("&") >= limit:
        raise ValueError(f"more than {limit} fields")
    parts = (part.partition("=") for part in text.split("&") if part)
    return [(percent_decoded(name), percent_decoded(value)) for name, _, value in parts]


def percent_decoded(text: str) -> str:
    """Return a name or value of a form without its encoding; `%` without two digits stays unchanged.

    Raises:
        ValueError: the decoded text is not UTF-8.

    >>> percent_decoded("100%+of+%C3%A9%3D1")
    '100% of é=1'
    """
    if "%" not in text:
        return text.replace("+", " ")
    # With `=` instead of `%`, this is quoted-printable, which Python decodes in C.
    encoded = _LONE.sub(b"%25", text.replace("+", " ").encode())
    return a2b_qp(encoded.replace(b"=", b"%3D").replace(b"%", b"=")).decode()


def multipart_fields(body: bytes, content_type: str, limit: int) -> list[tuple[str, str]]:
    """Return names and values of a multipart form, in their order, without its files.

    Raises:
        ValueError: the body is not a multipart form, a value is not text in UTF-8, or there are more than
            `limit` parts.
    """
    boundary = _parameters(content_type).get("boundary")
    if not boundary or not boundary.isascii():
        raise ValueError("the content type has no boundary")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(), limit + 2)
    if len(parts) > limit + 1:
        raise ValueError(f"more than {limit} parts")
    if not parts or not parts.pop().startswith(b"--"):
        raise ValueError("the last part is cut short")
    fields = (_field(part.lstrip(b" \t")) for part in parts)
    return [field for field in fields if field is not None]


def _field(part: bytes) -> tuple[str, str] | None:
    """Return name and value of one part, from the line end after its boundary; None for a file."""
    head, ending, content = part.partition(b"\r\n\r\n")
    if not ending or not head.startswith(b"\r\n") or len(head) > LONGEST_HEAD:
        raise ValueError("a part has no headers")
    for line in head.decode().split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "content-disposition":
            parameters = _parameters(value)
            if "name" not in parameters:
                break
            is_file = not parameters.keys().isdisjoint(("filename", "filename*"))
            return None if is_file else (parameters["name"], content.decode())
    raise ValueError("a part has no name")


def _parameters(value: str) -> dict[str, str]:
    """Return the parameters of a header by their names in lower case; the first of several with one name."""
    found: dict[str, str] = {}
    at = value.find(";") + 1 or len(value)
    for _ in range(MOST_PARAMETERS):
        if at >= len(value):
            return found
        parameter = _PARAMETER.match(value, at)
        if parameter is None:
            raise ValueError("a header has a malformed parameter")
        name, text = parameter.groups()
        if name is not None:
            found.setdefault(name.lower(), _QUOTED.sub(r"\1", text[1:-1]) if text[:1] == '"' else text)
        at = parameter.end()
    raise ValueError(f"a header has more than {MOST_PARAMETERS} parameters")
