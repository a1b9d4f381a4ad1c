"""HTML in which every text is escaped, because payloads and names come from strangers.

Only `tag` and `maker` make `Markup`. All other values become text. Scripts, inline styles and addresses
outside of the dashboard cannot be written: the pages' Content-Security-Policy would block them, and here they
are an error.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TypeAlias


class Markup(str):
    """A text that is HTML."""

    __slots__ = ()


class Address(str):
    """The checked address of a page; `visit.link` caches it, because a page has hundreds of links."""

    __slots__ = ("escaped",)

    escaped: str


Content: TypeAlias = "str | int | float | Iterable[Content] | None"
"""The content of an element; None: nothing."""

Value: TypeAlias = str | int | float | None
"""Value of an attribute. True: the attribute without a value; None and False: no attribute."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", re.ASCII)
_UNSAFE = re.compile("[&<>\"'\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters of HTML, control characters, and those that change the order of the text around them."""

_escape = _UNSAFE.sub

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
_NAMES = 512
"""Names of elements and attributes whose check is remembered; the dashboard has about a hundred."""

_VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "wbr"})
_ACTIVE = frozenset({"base", "embed", "iframe", "object", "style"})
_ADDRESSES = frozenset({"action", "cite", "formaction", "href", "poster", "src", "srcset"})
_FORBIDDEN = frozenset({"style", "srcdoc", "ping", "background", "http-equiv"})
_RELATIVE = re.compile(r"(?!//)[^\\:\s]*([?#][^\\\s]*)?")
"""An address inside the dashboard: no scheme, no host. Browsers read a backslash as a slash."""


def escape(text: str) -> Markup:
    r"""Escape a text for content and attributes; control characters are shown as Python writes them.

    >>> escape('<a href="x">\x1b')
    '&lt;a href=&quot;x&quot;&gt;\\x1b'
    """
    return Markup(_escape(_escaped, text))


def _escaped(found: re.Match[str]) -> str:
    return _ENTITIES.get(found[0]) or ascii(found[0])[1:-1]


def address(text: str) -> Address:
    """Check an address once, for many uses.

    Raises:
        ValueError: it leads outside of the dashboard.
    """
    checked = Address(text)
    checked.escaped = _checked(text)
    return checked


def _checked(text: str) -> str:
    if not _RELATIVE.fullmatch(text):
        raise ValueError(f'"{text}" is not a relative address')
    return _escape(_escaped, text)


def join(*content: Content) -> Markup:
    """Return contents one after another."""
    return Markup("".join(map(_rendered, content)))


def tag(name: str, /, *content: Content, **attributes: Value) -> Markup:
    """Return an element.

    In names of attributes, a final underscore is dropped and others become dashes: `class_`, `aria_label`.

    Raises:
        ValueError: the element or attribute may run code, or an address leads outside of the dashboard.
    """
    if name == "script" and content:
        raise ValueError("a script has no text")
    return _element(f"<{name}", _closing(name), content, attributes)


def maker(name: str, /, **constant: Value) -> Callable[..., Markup]:
    """Return a function that makes elements with some constant attributes, faster than `tag`.

    It takes contents and further attributes, as `tag` does.
    """
    closing = _closing(name)
    opening = f"<{name}{_written(constant)}"
    return lambda *content, **attributes: _element(opening, closing, content, attributes)


def _element(
    opening: str, closing: str, content: Iterable[Content], attributes: Mapping[str, Value]
) -> Markup:
    inner = ""
    for each in content:  # most are of these types; `_rendered` takes all others
        if type(each) is Markup:
            inner += each
        elif type(each) is str:
            inner += _escape(_escaped, each)
        elif each is not None:
            inner += _rendered(each)
    if attributes:
        opening += _written(attributes)
    return Markup(f"{opening}>{inner}{closing}")


@lru_cache(_NAMES)
def _closing(name: str) -> str:
    """Check the name of an element; return its end."""
    if not _NAME.fullmatch(name) or name in _ACTIVE:
        raise ValueError(f"<{name}> is not allowed")
    return "" if name in _VOID else f"</{name}>"


def _written(attributes: Mapping[str, Value]) -> str:
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name, is_address = _attribute(key)
        if type(value) is str:
            written += f'{name}="{_checked(value) if is_address else _escape(_escaped, value)}"'
        elif type(value) is Address:
            written += f'{name}="{value.escaped}"'
        elif value is True:
            written += name
        else:
            text = str(value)
            written += f'{name}="{_checked(text) if is_address else _escape(_escaped, text)}"'
    return written


@lru_cache(_NAMES)
def _attribute(key: str) -> tuple[str, bool]:
    """Check the name of an attribute; return it after a space, and whether its value is an address."""
    name = key.removesuffix("_").replace("_", "-")
    if not _NAME.fullmatch(name) or name.startswith("on") or name in _FORBIDDEN:
        raise ValueError(f'the attribute "{name}" is not allowed')
    return f" {name}", name in _ADDRESSES


def _rendered(content: Content) -> str:
    if type(content) is Markup:
        return content
    if isinstance(content, str):
        return _escape(_escaped, content)
    if content is None:
        return ""
    if isinstance(content, (int, float)):
        return str(content)
    return "".join(map(_rendered, content))
