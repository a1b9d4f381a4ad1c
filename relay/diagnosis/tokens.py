"""Why a bearer token is not accepted: where it stands, how it is written, and whose it is instead."""

import base64
import binascii
from collections.abc import Iterable, Sequence
from urllib.parse import parse_qsl, unquote

from relay.config.secrets import digest
from relay.config.tokens import Token
from relay.diagnosis.captured import Finding
from relay.diagnosis.token_variants import is_placeholder, likeness
from relay.errors import Forbidden, Unauthenticated
from relay.incoming import Incoming

AUTHORIZATION = "header Authorization"
_SCHEMES = ("apikey", "basic", "digest", "hmac", "jwt", "key", "negotiate", "oauth", "token")
"""What is shown of a scheme: another one may be the secret itself."""

_HOLD = "Authorization: Bearer TOKEN"


def token_of(incoming: Incoming, tokens: Iterable[Token]) -> Token | None:
    """Return the configured token that a request presents as it should."""
    values = incoming.headers.getall("Authorization", [])
    if len(values) != 1:
        return None
    scheme, _, text = values[0].strip().partition(" ")
    return _exactly(text.strip(), tokens) if scheme.lower() == "bearer" else None


def explain_bearer(
    refusal: Unauthenticated | Forbidden, incoming: Incoming, own: Sequence[Token], others: Sequence[Token]
) -> Finding:
    """Say why a source refuses a request's token.

    Args:
        refusal: what `verify` raised.
        incoming: the request.
        own: the tokens that the source would take.
        others: all other secrets of the configuration; the sender may have been given one of them.
    """
    values = incoming.headers.getall("Authorization", [])
    if isinstance(refusal, Forbidden):
        return _beyond(refusal, token_of(incoming, own))
    if not values:
        return _elsewhere(incoming, own) or _headers(
            "there is none", f"have the sender send `{_HOLD}`; some proxies and redirects drop it"
        )
    if len(values) > 1:
        return _headers(f"it comes {len(values)} times", "have the sender, or the proxy before, send one")
    scheme, _, text = values[0].strip().partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        return _not_bearer(scheme, text.strip(), own)
    return _unknown(text.strip(), own, others)


def _beyond(refusal: Forbidden, token: Token | None) -> Finding:
    if token is None:
        return Finding(cause="scope", where=AUTHORIZATION, what=refusal.detail, do="give it another token")
    named = f' "{token.name}"' if token.name else ""
    may = f"it may {', '.join(token.scopes)}" if token.scopes else "it may nothing"
    return Finding(
        cause="scope",
        where=token.key,
        what=f"the token{named} is known, but: {refusal.detail}; {may}",
        do="add the scope to its `scopes`, or give the sender another token",
    )


def _elsewhere(incoming: Incoming, own: Sequence[Token]) -> Finding | None:
    """Find the token where senders of other services put it."""
    for name, value in incoming.headers.items():
        for part in (value, value.partition(" ")[2], value.partition("=")[2]):
            if _exactly(part.strip(), own) is not None:
                return _headers(f"there is none; the token stands in {name}", f"have it sent as `{_HOLD}`")
    for name, value in parse_qsl(incoming.query):
        if _exactly(value, own) is not None:
            what = f'there is none; the token stands in the query, as "{name}"'
            return _headers(what, f"have it sent as `{_HOLD}`: a URL ends up in logs; change the token")
    return None


def _not_bearer(scheme: str, text: str, own: Sequence[Token]) -> Finding:
    if scheme.lower() == "bearer":
        return _headers("no token stands behind Bearer", "the sender's variable for it is empty: set it")
    for sign in ":=":
        if scheme.lower().startswith(f"bearer{sign}"):
            return _headers(f'"{sign}" stands behind Bearer', f"have the sender write `{_HOLD}`")
    if not text and (_exactly(scheme, own) is not None or likeness_of(scheme, own)):
        return _headers("the token stands there alone", f"have the sender write `{_HOLD}`")
    if scheme.lower() == "basic" and _exactly(_password(text), own) is not None:
        return _headers(
            "the token is sent as a password, by the scheme Basic", f"have the sender write `{_HOLD}`"
        )
    shown = f'"{scheme}"' if text and scheme.lower() in _SCHEMES else "another one, or none"
    return _headers(f"its scheme is {shown}, not Bearer", f"have the sender write `{_HOLD}`")


def _unknown(given: str, own: Sequence[Token], others: Sequence[Token]) -> Finding:
    if (other := _exactly(given, others)) is not None:
        what = f"it is {_whose(other)}, {other.key}"
        return _secret(AUTHORIZATION, what, f"give the sender {_named(own)} instead")
    if is_placeholder(given):
        what = "a placeholder stands where the token belongs"
        return _secret(AUTHORIZATION, what, "fill in the sender's variable for it")
    if (near := likeness_of(given, own)) is not None:
        return near
    for token in others:
        if (like := likeness(given, _text(token))) is not None and like.sent:
            what = f"it is {_whose(token)}, {token.key}; and it {like.what}"
            return _secret(AUTHORIZATION, what, f"give the sender {_named(own)} instead")
    if not own:
        return _secret(AUTHORIZATION, "the source has no token that fits", "add one to its tokens")
    lengths = " or ".join(map(str, sorted({len(_text(token)) for token in own})))
    odd = "" if given.isascii() else ", not all of them ASCII"
    what = (
        f"it is no token of this source, nor like one: it has {len(given)} characters{odd}; those, {lengths}"
    )
    return _secret(AUTHORIZATION, what, f"give the sender {_named(own)}, or add its own to them")


def likeness_of(given: str, own: Iterable[Token]) -> Finding | None:
    """Say how a token that does not fit is one of the source's after all."""
    for token in own:
        like = likeness(given, _text(token))
        if like is None:
            continue
        if like.sent:
            what = f"it is {token.key}, but the token {like.what}"
            do = f"have the sender send it as {token.place or token.key} has it"
            return Finding(cause=like.cause, where=AUTHORIZATION, what=what, do=do)
        what = f"it is what the request has, but the configured token {like.what}"
        do = f"correct {token.place or 'it'}, and `relay reload` (a variable needs a restart)"
        return Finding(cause=like.cause, where=token.key, what=what, do=do)
    return None


def _exactly(given: str, tokens: Iterable[Token]) -> Token | None:
    """Find a token as the source would: trimmed, by its digest."""
    presented = digest(given.encode("utf-8", "surrogateescape"))
    return next((token for token in tokens if digest(_text(token).encode()) == presented), None)


def _text(token: Token) -> str:
    return token.secret.reveal().strip()


def _whose(token: Token) -> str:
    if token.kind == "admin":
        return "a token of the admin API"
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
