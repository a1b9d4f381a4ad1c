"""HTML in which every text is escaped, because payloads and names come from strangers.

Only `tag` and `maker` make `Markup`. All other values become text. Scripts, inline styles and addresses
outside of the dashboard cannot be written: the pages' Content-Security-Policy would block them, and here they
are an error.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TypeAlias


class Markup(str):
    """A text that is HTML."""

    __slots__ = ()


Content: TypeAlias = "str | int | float | Iterable[Content] | None"
"""The content of an element; None: nothing."""

Value: TypeAlias = str | int | float | None
"""Value of an attribute. True: the attribute without a value; None and False: no attribute."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", re.ASCII)
_UNSAFE = re.compile("[&<>\"'\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters of HTML, control characters, and those that change the order of the text around them."""

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
    return Markup(_UNSAFE.sub(_escaped, text))


def _escaped(found: re.Match[str]) -> str:
    return _ENTITIES.get(found[0]) or ascii(found[0])[1:-1]


def join(*content: Content) -> Markup:
    """Return contents one after another."""
    return Markup("".join(map(_rendered, content)))


def tag(name: str, /, *content: Content, **attributes: Value) -> Markup:
    """Return an element.

    In names of attributes, a final underscore is dropped and others become dashes: `class_`, `aria_label`.

    Raises:
        ValueError: the element or attribute may run code, or an address leads outside of the dashboard.
    """
    _check_element(name)
    if name == "script" and content:
        raise ValueError("a script has no text")
    written = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            written += _attribute(_attribute_name(key), value)
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{''.join(map(_rendered, content))}</{name}>")


def maker(name: str, /, **attributes: Value) -> Callable[[Content], Markup]:
    """Return a function that makes many elements with the same name and attributes, faster than `tag`."""
    closing = f"</{name}>"
    opening = tag(name, **attributes).removesuffix(closing)
    return lambda content: Markup(f"{opening}{_rendered(content)}{closing}")


@lru_cache(_NAMES)
def _check_element(name: str) -> None:
    if not _NAME.fullmatch(name) or name in _ACTIVE:
        raise ValueError(f"<{name}> is not allowed")


@lru_cache(_NAMES)
def _attribute_name(key: str) -> str:
    name = key.removesuffix("_").replace("_", "-")
    if not _NAME.fullmatch(name) or name.startswith("on") or name in _FORBIDDEN:
        raise ValueError(f'the attribute "{name}" is not allowed')
    return name


def _attribute(name: str, value: Value) -> str:
    if value is True:
        return f" {name}"
    text = str(value)
    if name in _ADDRESSES and not _RELATIVE.fullmatch(text):
        raise ValueError(f'{name}: "{text}" is not a relative address')
    return f' {name}="{_UNSAFE.sub(_escaped, text)}"'


def _rendered(content: Content) -> str:
    if isinstance(content, str):
        return content if isinstance(content, Markup) else _UNSAFE.sub(_escaped, content)
    if content is None:
        return ""
    if isinstance(content, (int, float)):
        return str(content)
    return "".join(map(_rendered, content))
