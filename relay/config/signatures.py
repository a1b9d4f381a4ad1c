"""Signature schemes of destinations, as `signatures` in config.toml lists them."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec

from relay.base.template import Takes, parse
from relay.config.problems import guess, kind_of, shown
from relay.config.secrets import Secret

PLACEHOLDERS: Mapping[str, Takes] = {
    "body": "nothing",
    "id": "nothing",
    "timestamp": "nothing",
    "method": "nothing",
    "url": "nothing",
}
"""Placeholders of the signed text."""

STANDARD_KEYS = ("standard", "svix")
"""Schemes with the signatures and keys of Standard Webhooks; of their keys, only `secrets` can be set."""


def _help(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class SignatureConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One of the `signatures` of a destination: the name of a known scheme, or a table that describes one."""

    scheme: Annotated[
        str,
        _help("`standard`, `svix`, `github` or `stripe`; sets the defaults of the other keys"),
    ] = ""
    header: Annotated[
        str,
        msgspec.Meta(min_length=1, max_length=100),
        _help("the header with the signature, such as `X-Hub-Signature-256`; required without `scheme`"),
    ]
    algorithm: Annotated[
        Literal["sha256", "sha1", "sha512"], _help("the hash of the HMAC: `sha256`, `sha1` or `sha512`")
    ] = "sha256"
    encoding: Annotated[Literal["hex", "base64"], _help("encoding of the signature: `hex` or `base64`")] = (
        "hex"
    )
    key_encoding: Annotated[
        Literal["text", "hex", "base64"],
        _help("encoding of the secrets: `text` (their bytes are the key), `hex` or `base64`"),
    ] = "text"
    prefix: Annotated[
        str, msgspec.Meta(max_length=100), _help("text before each signature, such as `sha256=` or `v1=`")
    ] = ""
    separator: Annotated[
        str,
        msgspec.Meta(max_length=10),
        _help("text between several signatures in the header; if empty, the header has one signature"),
    ] = ""
    signed: Annotated[
        str,
        _help("the signed text: a template with `{body}`, `{id}`, `{timestamp}`, `{method}` and `{url}`"),
    ] = "{body}"
    timestamp_header: Annotated[
        str | None, _help("the header with the time of the attempt, for schemes that sign it")
    ] = None
    timestamp_field: Annotated[
        str | None,
        msgspec.Meta(min_length=1, max_length=100),
        _help("text before the time, such as `t=`, if the signature's header contains the time"),
    ] = None
    timestamp_unit: Annotated[
        Literal["s", "ms"], _help("unit of the time, counted from 1970: `s` or `ms`")
    ] = "s"
    secrets: Annotated[
        tuple[Secret, ...], _help("keys of this scheme; if empty, the destination's `secrets`")
    ] = ()

    @property
    def is_standard(self) -> bool:
        """Whether the signatures and keys are those of Standard Webhooks."""
        return self.scheme in STANDARD_KEYS

    @classmethod
    def expand(cls, value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a value in config.toml as a full table, and the defaults of its scheme.

        Raises:
            ValueError: the value is neither a name nor a table, or the scheme is unknown.
        """
        if not isinstance(value, str | dict):
            raise ValueError(f"expected the name of a scheme, or a table, got {kind_of(value)}")  # noqa: TRY004 - the caller reports values
        table = {"scheme": value} if isinstance(value, str) else value
        name = table.get("scheme", "")
        if name == "":
            return table, {}
        if not isinstance(name, str) or name not in SCHEMES:
            advice = guess(str(name), SCHEMES) or f"; known: {', '.join(SCHEMES)}"
            raise ValueError(f"unknown signature scheme {shown(name)}{advice}")
        if name in STANDARD_KEYS and (others := sorted(table.keys() - {"scheme", "secrets"})):
            raise ValueError(f'the scheme "{name}" has a fixed form; remove `{others[0]}`')
        return table, msgspec.structs.asdict(SCHEMES[name])

    def written(self) -> Any:
        """Return the shortest value that config.toml could have for this record, with its secrets."""
        known = SCHEMES.get(self.scheme)
        if self == known:
            return self.scheme
        defaults = known or SignatureConfig(header="")
        values = {key: getattr(self, key) for key in self.__struct_fields__}
        changed = {key: value for key, value in values.items() if value != getattr(defaults, key)}
        return changed if known is None else {"scheme": self.scheme, **changed}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield each key that does not fit the others, and why."""
        try:
            template = parse(self.signed)
            template.check(PLACEHOLDERS, frozenset())
        except ValueError as error:
            yield "signed", str(error)
            return
        kinds = {each.kind for each in template.placeholders}
        has_time = self.timestamp_header is not None or self.timestamp_field is not None
        if "body" not in kinds:
            yield "signed", "must contain {body}; otherwise the signature does not protect the body"
        if "timestamp" in kinds and not has_time:
            text = "receivers must know the {timestamp}: add `timestamp_header` or `timestamp_field`"
            yield "signed", text
        if has_time and "timestamp" not in kinds:
            yield "signed", "must contain {timestamp}; an unsigned time does not prevent replays"
        if self.timestamp_header is not None and self.timestamp_field is not None:
            yield "timestamp_field", "give either `timestamp_header` or `timestamp_field`"
        if self.timestamp_field is not None and not self.separator:
            text = 'missing; with `timestamp_field`, the header is a list such as "t=…,v1=…"'
            yield "separator", text
        for key in ("prefix", "separator", "timestamp_field"):
            text = getattr(self, key) or ""
            if not (text.isascii() and text.isprintable()):
                yield key, "expected printable ASCII characters only"


SCHEMES: Mapping[str, SignatureConfig] = {
    each.scheme: each
    for each in (
        SignatureConfig(scheme="standard", header="webhook-signature"),
        SignatureConfig(scheme="svix", header="svix-signature"),
        # docs.github.com, "Validating webhook deliveries"
        SignatureConfig(scheme="github", header="X-Hub-Signature-256", prefix="sha256="),
        # docs.stripe.com, "Verify webhook signatures manually"
        SignatureConfig(
            scheme="stripe",
            header="Stripe-Signature",
            prefix="v1=",
            separator=",",
            signed="{timestamp}.{body}",
            timestamp_field="t=",
        ),
    )
}
"""Known schemes by name."""

DEFAULT = (SCHEMES["standard"],)
"""The signatures of a destination that lists none."""
