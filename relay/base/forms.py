"""Fields of forms: URL-encoded text (WHATWG URL, 5) and multipart bodies (RFC 7578).

Python's parser of multipart messages takes 0.35 s for a megabyte of empty lines, which would stop the event
loop, so the parts are split here.
"""

from email.message import Message
from urllib.parse import parse_qsl

URLENCODED = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"

LONGEST_HEAD = 8190
"""Bytes of the headers of one part; as of a request's header."""


def urlencoded_fields(text: str, limit: int) -> list[tuple[str, str]]:
    """Return names and values of URL-encoded text, such as a query, in their order; empty values count.

    Raises:
        ValueError: the text is not percent-encoded UTF-8, or has more than `limit` fields.
    """
    return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=limit, separator="&")


def multipart_fields(body: bytes, content_type: str, limit: int) -> list[tuple[str, str]]:
    """Return names and values of a multipart form, in their order, without its files.

    Raises:
        ValueError: the body is not a multipart form, a value is not text in UTF-8, or there are more than
            `limit` parts.
    """
    boundary = _parameter("Content-Type", content_type, "boundary")
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
            field = _parameter(name, value, "name")
            if field is None:
                break
            is_file = _parameter(name, value, "filename") is not None
            return None if is_file else (field, content.decode())
    raise ValueError("a part has no name")


def _parameter(header: str, value: str, name: str) -> str | None:
    """Return a parameter of a header, decoded (RFC 2231); None if it is missing."""
    message = Message()
    message[header] = value.strip()
    found = message.get_param(name, header=header)
    if isinstance(found, tuple):
        charset, _, text = found
        try:
            return text.encode("latin-1").decode(charset or "ascii")
        except LookupError:
            raise ValueError(f"the charset of {name} is unknown") from None
    return found if isinstance(found, str) else None
