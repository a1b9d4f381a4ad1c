"""Secrets: given by environment, file, systemd credential or, in development, literally. Never printed."""

import hashlib
import hmac
import html
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from relay.config.problems import guess, kind_of, shown, unreadable


class Usage:
    """Counts the requests that a configured secret authenticated. It is not part of the secret's value."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Usage)

    def __hash__(self) -> int:
        return 0


class Secret:
    """A value that prints as `<secret>`; `reveal` is for the moment of use only."""

    __slots__ = ("_value", "name", "usage")

    def __init__(self, value: str, *, name: str = "") -> None:
        self._value = value
        self.name = name  # name of the variable, file or credential that contains it; "" for a literal
        self.usage = Usage()

    def reveal(self) -> str:
        """Return the clear text."""
        return self._value

    def __repr__(self) -> str:
        return "<secret>"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))


class Url(Secret):
    """A URL that may be a secret. Then it prints as scheme and host, else as config.toml contains it."""

    __slots__ = ("_parts", "_shown", "is_hidden")

    def __init__(self, value: str, *, is_hidden: bool = False) -> None:
        super().__init__(value)
        self.is_hidden = is_hidden
        self._shown, self._parts = _hidden(value) if is_hidden else (value, ())

    def __repr__(self) -> str:
        return self._shown

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        same_kind = isinstance(other, Url) and self.is_hidden == other.is_hidden
        return same_kind and super().__eq__(other)

    __hash__ = Secret.__hash__

    def hide(self, text: bytes) -> bytes:
        """Return a text without the secret parts of this URL, whole or cut off at the end of the text.

        Receivers repeat the URL of a request in redirects and error pages.
        """
        for part in self._parts:
            text = text.replace(part, b"<secret>")
        for part in self._parts:
            for length in range(min(len(part) - 1, len(text)), _SHORTEST - 1, -1):
                if text.endswith(part[:length]):
                    return text[:-length] + b"<secret>"
        return text


_SHORTEST = 6
"""Characters: shorter segments of a secret URL's path, and shorter values of its query, are not secret."""


def _hidden(url: str) -> tuple[str, tuple[bytes, ...]]:
    """Return a secret URL's scheme and host, and its parts that must not be printed, the longest first."""
    try:
        address = urlsplit(url)
        host = address.hostname and address.netloc.rpartition("@")[2]
    except ValueError:
        host = None
    if not host:
        return "<secret>", ()
    path, query = address.path, address.query
    found = {path, query, f"{path}?{query}", *re.split(r"[/?&=;]", f"{path}?{query}")}
    found |= {unquote(part) for part in found}
    found |= {html.escape(part) for part in found}
    parts = sorted((part for part in found if len(part) >= _SHORTEST), key=len, reverse=True)
    return f"{address.scheme}://{host}", tuple(part.encode("utf-8", "surrogatepass") for part in parts)


class Absent(Secret):
    """Placeholder for a secret that this command cannot read and does not need."""

    __slots__ = ("why",)

    def __init__(self, why: str) -> None:
        super().__init__("")
        self.why = why  # the missing secret


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """One token that a source accepts, as a digest: the clear text is not kept."""

    digest: bytes  # of the token's bytes, see `digest`
    name: str = ""  # from config.toml, else of the variable, file or credential; "" if there is neither
    scopes: frozenset[str] | None = None  # None: every scope
    usage: Usage = msgspec.field(default_factory=Usage)

    def allows(self, scope: str) -> bool:
        """Return whether the token has that scope."""
        return self.scopes is None or scope in self.scopes


class Secrets:
    """The tokens that a source accepts. Several may be valid at once, so that a token can be rotated."""

    __slots__ = ("_credentials",)

    def __init__(self, *credentials: Credential) -> None:
        self._credentials = credentials

    @classmethod
    def of(cls, *tokens: str, usages: Iterable[Usage] = ()) -> "Secrets":
        """Accept these clear-text tokens with every scope; `usages` count their uses, one for each."""
        counted = usages or [Usage() for _ in tokens]
        return cls(
            *(
                Credential(digest=digest(token.encode()), usage=usage)
                for token, usage in zip(tokens, counted, strict=True)
            )
        )

    def find(self, token: bytes) -> Credential | None:
        """Return the credential of a presented token, in the same time whether it exists or not."""
        presented, found = hashlib.blake2b(token, digest_size=32).digest(), None  # as `digest`
        for credential in self._credentials:
            if hmac.compare_digest(credential.digest, presented):
                found = credential
        return found

    def __iter__(self) -> Iterator[Credential]:
        return iter(self._credentials)

    def __len__(self) -> int:
        return len(self._credentials)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secrets) and self._credentials == other._credentials

    def __hash__(self) -> int:
        return hash(self._credentials)

    def __repr__(self) -> str:
        return f"<{len(self)} secrets>"


def digest(token: bytes) -> bytes:
    """Return the hash of a token; memory and comparisons contain only hashes, never tokens.

    Python has BLAKE2 built in. A call of OpenSSL's SHA-256 costs more, and every request needs a hash.
    """
    return hashlib.blake2b(token, digest_size=32).digest()


def holds_secret(value: object) -> bool:
    """Return whether a setting is a secret, or holds one: in a list, a table or a record."""
    if isinstance(value, Secrets):
        return len(value) > 0
    if isinstance(value, msgspec.Struct):
        return any(holds_secret(getattr(value, name)) for name in value.__struct_fields__)
    if isinstance(value, Mapping):
        return any(holds_secret(each) for each in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(holds_secret(each) for each in value)
    return isinstance(value, Secret | Credential)


FORMS = '{ env = "NAME" }, { file = "path" } or { credential = "name" }'
_KEYS = ("env", "file", "credential", "development")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_LARGEST = 64 * 1024  # bytes of a secret's file; a wrong path may name a disk image


class _MissingError(ValueError):
    """The place is valid but contains no secret; `development` may replace it."""


class _DeniedError(ValueError):
    """This user may not read the place, or reading it failed."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Looks up secrets in the environment, files and credentials. Its errors never contain a secret."""

    environ: Mapping[str, str]
    folder: Path  # of the config file
    development: bool
    credentials: Mapping[str, bytes | None] = {}  # by name, without a folder; None: unreadable for this user
    hidden: Mapping[Path, str] = {}  # folders that the daemon cannot see, and why
    place: str = "the unit's EnvironmentFile"  # where variables are set for the daemon
    after: str = ""  # further steps after a missing variable is set
    is_running: bool = False  # this process is the daemon, not a command in a shell
    lenient: bool = False  # unreadable secrets become `Absent`

    def secret(self, value: object, *, literal: bool = False) -> Secret:
        """Look a secret up; `literal` permits plain text outside development as well.

        A lenient look-up returns `Absent` for a secret that is missing or that this user may not read.

        Raises:
            ValueError: it is missing, empty, or not written in one of the permitted forms.
        """
        if isinstance(value, str):
            if not (literal or self.development):
                raise ValueError(f"a literal secret needs `development = true`; write {FORMS}")
            if not (literal or value.strip()):
                raise ValueError("the secret is empty")
            return Secret(value)
        if not isinstance(value, dict):
            raise ValueError(f"expected {FORMS}, got {kind_of(value)}")  # noqa: TRY004 - the caller reports values
        place = _place(value)
        try:
            return Secret(self._look_up(place, value), name=value[place])
        except (_MissingError, _DeniedError) as error:
            if self.lenient:
                return Absent(str(error))
            raise

    def url(self, value: object) -> Secret:
        """Return a URL that is plain text or a secret; raises and is lenient as `secret` is."""
        if isinstance(value, str):
            return Url(value)
        found = self.secret(value)
        return found if isinstance(found, Absent) else Url(found.reveal(), is_hidden=True)

    def visible(self, path: Path) -> Path:
        """Return a path that the daemon can see.

        Raises:
            ValueError: the service cannot see the path, even if this process can.
        """
        for folder, why in () if self.lenient else self.hidden.items():
            if path.is_relative_to(folder) and not self.folder.is_relative_to(folder):
                raise ValueError(f"{path} is hidden from the service by {why}; put it below {self.folder}")
        return path

    def _look_up(self, place: str, value: Mapping[str, str]) -> str:
        name = value[place]
        look = {"env": self._variable, "file": self._file, "credential": self._credential}[place]
        try:
            return look(name)
        except _MissingError:
            if self.development and "development" in value:
                return value["development"]
            raise

    def _variable(self, name: str) -> str:
        if not _VARIABLE.fullmatch(name):  # perhaps the secret itself, so it is not repeated
            raise ValueError("`env` must be the name of an environment variable, not the secret")
        text = self.environ.get(name, "")
        if not text.strip():
            state = "is empty" if name in self.environ else "is not set"
            if name not in self.environ and name in os.environ and not self.is_running:
                state = "is set in this shell, but not for the service"
            advice = f"set it (under systemd in {self.place}){self.after}"
            raise _MissingError(f"the environment variable {name} {state}; {advice}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the environment variable {name} is not UTF-8 text") from None
        return text

    def _file(self, name: str) -> str:
        return _read(self.visible(self.folder / name), f"the file {name}", "write the secret into it")

    def _credential(self, name: str) -> str:
        if "/" in name or name in {".", ".."}:
            raise ValueError("`credential` must be the name of a systemd credential, not a path")
        folder = self.environ.get("CREDENTIALS_DIRECTORY", "")
        advice = f"add `LoadCredential={name}:/path/to/file` to the unit, and restart the daemon"
        if not folder and name in self.credentials:
            if (content := self.credentials[name]) is None:
                raise _DeniedError(f"the credential {name} cannot be read by this user")
            return _text(content, f"the credential {name}", advice)
        if not folder:
            raise _MissingError(
                f"the credential {name} is missing ($CREDENTIALS_DIRECTORY is not set); {advice}"
            )
        return _read(Path(folder) / name, f"the credential {name}", advice)


def _place(value: Mapping[str, object]) -> str:
    """Return the key that names the place of a secret, such as `env` or `file`."""
    for key, text in value.items():
        if key not in _KEYS:
            advice = guess(key, _KEYS) or f"; expected {FORMS}"
            raise ValueError(f"unknown key {shown(key)}{advice}")
        if not isinstance(text, str) or not text:
            raise ValueError(f"`{key}` must be a string that is not empty")
    places = [key for key in _KEYS[:-1] if key in value]
    if len(places) != 1:
        raise ValueError(f"expected exactly one of {FORMS}")
    return places[0]


def _read(path: Path, what: str, advice: str) -> str:
    """Return a file's text without the newline that editors put at its end."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise _MissingError(f"{what} does not exist; {advice}") from None
    except (OSError, ValueError) as error:
        reason = unreadable(path, error) if isinstance(error, OSError) else "not a valid path"
        raise _DeniedError(f"{what} cannot be read: {reason}") from None
    return _text(content, what, advice)


def _text(content: bytes, what: str, advice: str) -> str:
    if len(content) > _LARGEST:
        raise ValueError(f"{what} is larger than 64 KiB: not a secret")
    try:
        text = content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8 text") from None
    if not text.strip():
        raise _MissingError(f"{what} is empty; {advice}")
    return text
