"""The clear text of the tokens that sources accept, for the moment of use: bound are their digests only."""

from collections.abc import Iterator
from typing import Any

import msgspec

from relay.config.bind import Binder
from relay.config.model import Config, SourceConfig
from relay.config.problem import dotted
from relay.config.secret import Secret, Secrets


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One configured token, and where it stands."""

    secret: Secret  # as it was found, spaces around it included
    key: str  # such as `sources.moddy.tokens[0]`
    place: str  # what it is found in: `the file moddy.token`; "" for the text itself
    source: str | None = None  # None: a token of `[admin]`
    field: str = ""  # of the source's settings
    name: str = ""
    scopes: tuple[str, ...] | None = None  # None: every scope


def tokens_of(binder: Binder, source: SourceConfig) -> Iterator[Token]:
    """Yield a source's tokens, in the order of the file; `source` must have been bound from that file."""
    table = binder.document.data["sources"][source.name]
    for field in source.settings.__struct_fields__:
        if isinstance(getattr(source.settings, field), Secrets):
            for index, given in enumerate(table.get(field, ())):
                long = given if isinstance(given, dict) and "secret" in given else {"secret": given}
                yield Token(
                    secret=binder.origin.secret(long["secret"]),
                    key=dotted(("sources", source.name, field, index)),
                    place=_place(long["secret"]),
                    source=source.name,
                    field=field,
                    name=long.get("name", ""),
                    scopes=None if long.get("scopes") is None else tuple(long["scopes"]),
                )


def all_tokens(binder: Binder, config: Config) -> tuple[Token, ...]:
    """Return the tokens of every source and of the admin API."""
    given = binder.document.data.get("admin", {}).get("tokens", ())
    admin = [
        Token(secret=secret, key=dotted(("admin", "tokens", index)), place=_place(given[index]))
        for index, secret in enumerate(config.admin.tokens)
    ]
    found = [token for source in config.sources.values() for token in tokens_of(binder, source)]
    return (*found, *admin)


def _place(given: Any) -> str:
    """Name what a secret is found in."""
    for key, words in _PLACES.items():
        if isinstance(given, dict) and key in given:
            return f"{words} {given[key]}"
    return ""


_PLACES = {"env": "the environment variable", "file": "the file", "credential": "the credential"}
