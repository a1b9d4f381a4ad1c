"""Reads the clear text of configured secrets when needed; the configuration keeps only digests of tokens."""

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from relay.config.binding import Binder
from relay.config.problems import dotted
from relay.config.schema import Config, SourceConfig
from relay.config.secrets import Absent, Secret, Secrets


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """One configured secret and its place in config.toml."""

    secret: Secret  # as found, with the spaces around it
    key: str  # such as `sources.moddy.tokens[0]`
    kind: Literal["source", "destination", "admin"]
    owner: str = ""  # the source's or destination's name
    place: str = ""  # its place, such as `the file moddy.token`; "" for the text itself
    field: str = ""  # of the source's settings
    name: str = ""
    scopes: tuple[str, ...] | None = None  # None: every scope


def tokens_of(binder: Binder, source: SourceConfig) -> Iterator[Token]:
    """Yield a source's tokens, in the order of the file that it was bound from."""
    table = binder.document.data["sources"][source.name]
    for field in source.settings.__struct_fields__:
        if isinstance(getattr(source.settings, field), Secrets):
            for index, given in enumerate(table.get(field, ())):
                long = given if isinstance(given, dict) and "secret" in given else {"secret": given}
                yield Token(
                    secret=binder.origin.secret(long["secret"]),
                    key=dotted(("sources", source.name, field, index)),
                    kind="source",
                    owner=source.name,
                    place=_place(long["secret"]),
                    field=field,
                    name=long.get("name", ""),
                    scopes=None if long.get("scopes") is None else tuple(long["scopes"]),
                )


def all_tokens(binder: Binder, config: Config) -> tuple[Token, ...]:
    """Return the tokens of every source and of the admin API, and the signing secrets of destinations.

    Secrets that cannot be read here (`Absent`) are left out.
    """
    found = [token for source in config.sources.values() for token in tokens_of(binder, source)]
    given = binder.document.data.get("admin", {}).get("tokens", ())
    for index, each in enumerate(config.admin.tokens):
        key, secret = dotted(("admin", "tokens", index)), each.expand(given[index])[0]["secret"]
        found.append(Token(secret=each.secret, key=key, kind="admin", place=_place(secret), name=each.name))
    for name, destination in config.destinations.items():
        for index, secret in enumerate(destination.secrets):
            key = dotted(("destinations", name, "secrets", index))
            found.append(Token(secret=secret, key=key, kind="destination", owner=name))
    return tuple(token for token in found if not isinstance(token.secret, Absent))


def _place(given: Any) -> str:
    """Return the name of the place that contains a secret."""
    for key, words in _PLACES.items():
        if isinstance(given, dict) and key in given:
            return f"{words} {given[key]}"
    return ""


_PLACES = {"env": "the environment variable", "file": "the file", "credential": "the credential"}
