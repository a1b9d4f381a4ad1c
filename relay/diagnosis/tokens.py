"""Why a bearer token is not accepted: its place, its format, or its owner."""

import base64
import binascii
from collections.abc import Iterable, Sequence
from urllib.parse import parse_qsl, unquote

from relay.config.secrets import digest
from relay.config.tokens import Token
from relay.diagnosis.token_variants import is_placeholder, variant_of
from relay.errors import Forbidden, Unauthenticated
from relay.model import Finding
from relay.source import Incoming

AUTHORIZATION = "header Authorization"
_SCHEMES = ("apikey", "basic", "digest", "hmac", "jwt", "key", "negotiate", "oauth", "token")
"""Schemes that may be printed. An unknown one may be the secret itself."""

_FORM = "Authorization: Bearer TOKEN"


def token_of(incoming: Incoming, tokens: Iterable[Token]) -> Token | None:
    """Return the configured token that a request has in the specified format."""
    values = incoming.headers.getall("Authorization", [])
    if len(values) != 1:
        return None
    scheme, _, text = values[0].strip().partition(" ")
    return _exactly(text.strip(), tokens) if scheme.lower() == "bearer" else None


def explain_token(
    refusal: Unauthenticated | Forbidden, incoming: Incoming, own: Sequence[Token], others: Sequence[Token]
) -> Finding:
    """Return why a source refuses the token of a request.

    Args:
        refusal: raised by `verify`.
        incoming: the request.
        own: the tokens that the source accepts.
        others: all other secrets of the configuration, in case the sender uses a wrong one.
    """
    values = incoming.headers.getall("Authorization", [])
    if isinstance(refusal, Forbidden):
        return explain_scope(refusal, token_of(incoming, own))
    if not values:
        return _elsewhere(incoming, own) or _headers(
            "missing", f"have the sender send `{_FORM}`; some proxies and redirects drop the header"
        )
    if len(values) > 1:
        return _headers(f"sent {len(values)} times", "send the header once; a proxy may add the second one")
    scheme, _, text = values[0].strip().partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        return _not_bearer(scheme, text.strip(), own)
    return _unknown(text.strip(), own, others)


def explain_scope(refusal: Forbidden, token: Token | None) -> Finding:
    """Return why a token does not permit a request; `token` is None if it is unknown."""
    if token is None:
        return Finding(
            cause="scope", where=AUTHORIZATION, what=refusal.detail, do="give the sender another token"
        )
    named = f' "{token.name}"' if token.name else ""
    scopes = f"its scopes: {', '.join(token.scopes)}" if token.scopes else "it has no scopes"
    return Finding(
        cause="scope",
        where=token.key,
        what=f"the token{named} is known, but: {refusal.detail}; {scopes}",
        do="add the scope to its `scopes`, or give the sender another token",
    )


def _elsewhere(incoming: Incoming, own: Sequence[Token]) -> Finding | None:
    """Return a finding for a token in another header or in the query."""
    for name, value in incoming.headers.items():
        for part in (value, value.partition(" ")[2], value.partition("=")[2]):
            if _exactly(part.strip(), own) is not None:
                return _headers(f"missing; the token is in {name}", f"have the sender write `{_FORM}`")
    for name, value in parse_qsl(incoming.query):
        if _exactly(value, own) is not None:
            what = f'missing; the token is in the query, as "{name}"'
            return _headers(
                what, f"have the sender write `{_FORM}`, and replace the token: logs contain URLs"
            )
    return None


def _not_bearer(scheme: str, text: str, own: Sequence[Token]) -> Finding:
    if scheme.lower() == "bearer":
        return _headers("no token after Bearer", "set the sender's variable for the token; it is empty")
    for char in ":=":
        if scheme.lower().startswith(f"bearer{char}"):
            return _headers(f'"{char}" after Bearer', f"have the sender write `{_FORM}`")
    if not text and (_exactly(scheme, own) is not None or variant_finding(scheme, own)):
        return _headers("the token is sent without Bearer", f"have the sender write `{_FORM}`")
    if scheme.lower() == "basic" and _exactly(_password(text), own) is not None:
        return _headers(
            "the token is sent as a password, with the scheme Basic", f"have the sender write `{_FORM}`"
        )
    shown = f'"{scheme}"' if text and scheme.lower() in _SCHEMES else "unknown"
    return _headers(f"the scheme is {shown}, not Bearer", f"have the sender write `{_FORM}`")


def _unknown(given: str, own: Sequence[Token], others: Sequence[Token]) -> Finding:
    if (other := _exactly(given, others)) is not None:
        what = f"the request has {_whose(other)}, {other.key}"
        return _secret(AUTHORIZATION, what, f"give the sender {_named(own)} instead")
    if is_placeholder(given):
        what = "the request has a placeholder instead of a token"
        return _secret(AUTHORIZATION, what, "set the sender's variable for the token")
    if (near := variant_finding(given, own)) is not None:
        return near
    for token in others:
        if (variant := variant_of(given, _text(token))) is not None and variant.sent:
            what = f"the request has {_whose(token)}, {token.key}; the token {variant.what}"
            return _secret(AUTHORIZATION, what, f"give the sender {_named(own)} instead")
    if not own:
        return _secret(AUTHORIZATION, "the source has no token of this kind", "add one to its tokens")
    lengths = " or ".join(map(str, sorted({len(_text(token)) for token in own})))
    odd = "" if given.isascii() else ", not all ASCII"
    what = f"unknown token of {len(given)} characters{odd}; the tokens of this source have {lengths}"
    return _secret(
        AUTHORIZATION, what, f"give the sender {_named(own)}, or add the sender's token to the source"
    )


def variant_finding(given: str, own: Iterable[Token]) -> Finding | None:
    """Return a finding for a token that is a variant of one of the source's tokens."""
    for token in own:
        variant = variant_of(given, _text(token))
        if variant is None:
            continue
        if variant.sent:
            what = f"the request has {token.key}, but the token {variant.what}"
            do = f"have the sender send exactly the value of {token.place or token.key}"
            return Finding(cause=variant.cause, where=AUTHORIZATION, what=what, do=do)
        what = f"the request has this token, but the configured one {variant.what}"
        do = f"correct {token.place or 'the value'} and run `relay reload`"
        return Finding(cause=variant.cause, where=token.key, what=what, do=do)
    return None


def _exactly(given: str, tokens: Iterable[Token]) -> Token | None:
    """Return the token with the same digest after trimming, as the source compares them."""
    presented = digest(given.encode("utf-8", "surrogateescape"))
    return next((token for token in tokens if digest(_text(token).encode()) == presented), None)


def _text(token: Token) -> str:
    return token.secret.reveal().strip()


def _whose(token: Token) -> str:
    if token.kind == "admin":
        return "an admin token"
    if token.kind == "destination":
        return f'a signing secret of destination "{token.owner}"'
    return f'a token of source "{token.owner}"'


def _named(own: Sequence[Token]) -> str:
    return f"{own[0].key} ({own[0].place})" if own and own[0].place else own[0].key if own else "a token"


def _password(text: str) -> str:
    try:
        return unquote(base64.b64decode(text).decode().partition(":")[2])
    except (binascii.Error, ValueError):
        return ""


def _headers(what: str, do: str) -> Finding:
    return Finding(cause="headers", where=AUTHORIZATION, what=what, do=do)


def _secret(where: str, what: str, do: str) -> Finding:
    return Finding(cause="secret", where=where, what=what, do=do)
