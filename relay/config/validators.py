"""Checks of config values beyond their type; each check returns its value or raises ValueError."""

import ipaddress
import re
import ssl
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from yarl import URL

from relay.base.units import render_size
from relay.config.client_cert import ClientCert
from relay.config.problems import unreadable
from relay.config.secrets import Secret, Url
from relay.errors import installing
from relay.signing import Signer

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)
_PREFIX = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", re.ASCII)  # RFC 9110, 5.6.2
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)
_PORTS = range(65_536)
_FAILURES = range(300, 600)  # HTTP statuses
_SHORTEST_LEASE = 3.0  # seconds
_GONE = 410
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?:\.(?!-)[A-Za-z0-9-]{1,63})*", re.ASCII)
_USUAL_PORTS = {"http": ":80", "https": ":443"}
_OURS = {"connection", "content-length", "host", "transfer-encoding"}
_NO_NAMES = {"authorization", "cookie", "host", "origin", "content-type", *_OURS}
"""Headers that clients send, so that they cannot name a user."""

LARGEST_BODY = 256 * 2**20
"""The most that `max_body` can be, in bytes."""

POSTGRES = ("postgresql", "postgres")
SYSTEM_CA = "system"  # as `sslrootcert`: the CA certificates of the operating system
_POSTGRES_FILES = {"sslrootcert", "sslcert", "sslkey", "sslcrl", "passfile"}
_POSTGRES_CHOICES = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": ("any", "primary", "standby", "prefer-standby", "read-write", "read-only"),
    "pooler": ("true", "false"),
}
_OF_LIBPQ = {
    *("channel_binding", "client_encoding", "connect_timeout", "fallback_application_name", "gssdelegation"),
    *("gssencmode", "hostaddr", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval"),
    *("load_balance_hosts", "max_protocol_version", "min_protocol_version", "replication", "require_auth"),
    *("requirepeer", "requiressl", "scram_client_key", "scram_server_key", "sslcertmode", "sslcompression"),
    *("sslcrldir", "sslsni", "tcp_user_timeout"),
}
"""Options of psql that asyncpg sends to the server as settings, so that the server refuses the connection.

https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS"""
_ENCODE = "In a user name or password, write / ? # @ : and % as %2F %3F %23 %40 %3A %25"
"""Schemes of the URL of a PostgreSQL database."""

RESERVED = "relay"
"""The source name that the relay's own events have."""


def split_listen(text: str) -> tuple[str, int]:
    """Return host and port of `host:port`; an IPv6 host needs brackets, and port 0 means any free port.

    Raises:
        ValueError: the text is not of the form `host:port`.

    >>> split_listen("[::1]:8080")
    ('::1', 8080)
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    valid = (
        bool(colon and bare)
        and (":" in bare) == bracketed
        and bare.isprintable()
        and not set(bare) & set(" /[]@")
    )
    if not valid or not _PORT.fullmatch(port) or int(port) not in _PORTS:
        raise ValueError('expected "host:port" such as "127.0.0.1:8080" or "[::1]:8080"')
    return bare, int(port)


def listen(text: str) -> str:
    """Check the address of a listener."""
    split_listen(text)
    return text


def listen_or_off(text: str) -> str:
    """Check the address of a listener; `""` turns the listener off."""
    return listen(text) if text else text


def final_status(status: int) -> int:
    """Check a status that ends a delivery."""
    if status == _GONE:
        raise ValueError("remove 410: it always disables the destination and holds its deliveries")
    if status not in _FAILURES:
        raise ValueError(f"expected an HTTP status of a failure, 300 to 599, got {status}")
    return status


def body_size(count: int) -> int:
    """Check the maximum body size; memory holds several copies of a body while it is stored and sent."""
    if count > LARGEST_BODY:
        raise ValueError(f"expected at most {render_size(LARGEST_BODY)}, because bodies are held in memory")
    return count


def network(text: str) -> str:
    """Check an address or a network in CIDR notation."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError('expected an address or a network such as "10.0.0.0/8"') from None
    return text


def admin_proxy(text: str) -> str:
    """Check a proxy in front of the admin API: an address, a network, or `unix:` and the name of a user."""
    scheme, _, user = text.partition(":")
    if scheme != "unix":
        return network(text)
    if not user or not user.isprintable() or " " in user:
        raise ValueError('expected "unix:" and the name of the user that runs the proxy')
    return text


def user_header(text: str) -> str:
    """Check the name of the header in which a proxy names a user."""
    if not _TOKEN.fullmatch(text) or text.lower() in _NO_NAMES:
        raise ValueError('expected a header that only the proxy sets, such as "X-Remote-User"')
    return text


def file_name(text: str) -> str:
    """Check the name of a file or folder."""
    if not text.isprintable():
        raise ValueError("a file name must not contain control characters")
    return text


def printable(text: str) -> str:
    """Check a name that people read."""
    if not text.isprintable():
        raise ValueError("a name must not contain control characters")
    return text


def lease(seconds: float) -> float:
    """Check how long a node owns its lanes without a renewal; it renews once a second."""
    if seconds < _SHORTEST_LEASE:
        raise ValueError("a lease shorter than 3s would end before it can be renewed")
    return seconds


def storage(value: Url) -> Url:
    """Check the URL of the storage; errors never contain it, because it may contain a password."""
    text = value.reveal()
    scheme, _, name = text.partition(":")
    if not text.isprintable() or not (
        name.startswith("//") if scheme in POSTGRES else scheme == "sqlite" and name
    ):
        raise ValueError(
            'expected "sqlite:" and the name of a file, such as "sqlite:relay.db", '
            'or "postgresql://USER@HOST/DATABASE"'
        )
    if scheme in POSTGRES:
        _postgres(value)
    return value


def listen_url(value: Url) -> Url:
    """Check the URL of the connection for notifications; errors never contain it, as in `storage`."""
    text = value.reveal()
    if not text.isprintable() or not text.startswith(tuple(f"{scheme}://" for scheme in POSTGRES)):
        raise ValueError('expected "postgresql://USER@HOST/DATABASE"')
    if _postgres(value, "listen_url").get("pooler") == "true":
        raise ValueError(
            "notifications do not pass a pooler: write the address of the server, without pooler=true"
        )
    return value


def _postgres(value: Url, key: str = "url") -> dict[str, str]:
    options = postgres_options(value.reveal())
    if has_password(value.reveal()) and not value.is_hidden:
        variable = f"RELAY_STORAGE_{key.upper()}"
        raise ValueError(
            f'the URL contains a password: write it as a secret, {key} = {{ env = "{variable}" }}, '
            "or use a password file"
        )
    for name in _POSTGRES_FILES & options.keys():
        if options[name] != SYSTEM_CA:
            existing_file(Path(options[name]))
    _postgres_certificates(options)
    if find_spec("asyncpg") is None:
        raise ValueError(f"PostgreSQL needs the package asyncpg: {installing('asyncpg')}")
    return options


def _postgres_certificates(options: Mapping[str, str]) -> None:
    """Check that certificates and keys can be used; otherwise, each connection would fail."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority = options.get("sslrootcert", SYSTEM_CA)
    if authority != SYSTEM_CA:
        try:
            context.load_verify_locations(authority)
        except ssl.SSLError:
            raise ValueError(f"{authority} has no certificate in PEM form") from None
    if "sslcert" in options and "sslkey" in options:  # by default, the key is in the home directory
        password = Secret(options["sslpassword"]) if "sslpassword" in options else None
        given = ClientCert(cert=Path(options["sslcert"]), key=Path(options["sslkey"]), password=password)
        given.load_into(context)


def postgres_options(text: str) -> dict[str, str]:
    """Return the options in the URL of a PostgreSQL database, after a check of the whole URL.

    Raises:
        ValueError: it cannot be used. The message contains no part of the URL that may be a password.
    """
    try:
        parts = urlsplit(text)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        user, _, hosts = parts.netloc.rpartition("@")
        ports = [host.rpartition("]")[2].rpartition(":") for host in hosts.split(",")]
        numbers = [int(port) for _, colon, port in ports if colon]
        numbers += [int(port) for port in options.get("port", "").split(",") if port]
    except ValueError:
        raise ValueError(f"not a URL: its hosts or options cannot be read. {_ENCODE}") from None
    if parts.scheme not in POSTGRES:
        raise ValueError('expected "postgresql://USER@HOST/DATABASE"')
    if "@" in user or "@" in parts.path or parts.fragment:
        raise ValueError(f"not a URL: it has more than one @, or a #. {_ENCODE}")
    if "\0" in unquote(text):
        raise ValueError("the URL contains %00")
    if not all(port and port in _PORTS for port in numbers):
        raise ValueError("a port is not between 1 and 65535")
    _host_names([host.partition(":")[0] for host in hosts.split(",") if not host.startswith("[")])
    if not parts.path.strip("/") and not {"dbname", "database"} & options.keys():
        raise ValueError('the URL names no database, as in "postgresql://USER@HOST/DATABASE"')
    _postgres_values(options)
    return options


def _postgres_values(options: Mapping[str, str]) -> None:
    """Check the options of the URL of a PostgreSQL database, one by one."""
    if found := sorted(_OF_LIBPQ & options.keys()):
        raise ValueError(f"the relay does not support the option {found[0]}: remove it from the URL")
    for name, allowed in _POSTGRES_CHOICES.items():
        if (chosen := options.get(name, allowed[0])) not in allowed:
            raise ValueError(f'{name}: expected one of {", ".join(allowed)}, got "{chosen}"')
    for name in _POSTGRES_FILES & options.keys():
        if not options[name].startswith("/") and (name, options[name]) != ("sslrootcert", SYSTEM_CA):
            raise ValueError(f'{name}: expected an absolute path, got "{options[name]}"')
    hosts = options.get("host", "").split(",")
    if options.get("port", "").count(",") not in {0, len(hosts) - 1}:
        raise ValueError("port: expected one port, or one for each host")
    _host_names([host for host in hosts if not host.startswith("/")])


def _host_names(names: Sequence[str]) -> None:
    """Check that the resolver can look up host names."""
    try:
        for name in names:
            name.encode("idna")
    except UnicodeError:
        raise ValueError("a part of a host name is empty or longer than 63 characters") from None


def has_password(text: str) -> bool:
    """Return whether the URL of a PostgreSQL database contains a password."""
    parts = urlsplit(text)
    return ":" in parts.netloc.rpartition("@")[0] or bool(
        {"password", "sslpassword"} & dict(parse_qsl(parts.query, keep_blank_values=True)).keys()
    )


def url(value: Url) -> Url:
    """Check the URL of a destination; errors never contain it, because it may be a secret."""
    text = value.reveal()
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
        URL(text)  # the HTTP client's type must accept it as well
    except ValueError:
        raise ValueError("not a URL: its host or port cannot be read") from None
    if parts.scheme not in {"http", "https"}:
        raise ValueError("expected a URL that starts with http:// or https://")
    if not host:
        raise ValueError("the URL has no host")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "a URL must not contain a user name or a password; set an authorization header in `headers`"
        )
    if any(character.isspace() or not character.isprintable() for character in text):
        raise ValueError("the URL contains spaces or control characters")
    return value


def proxy(value: Secret) -> Secret:
    """Check the URL of an HTTP proxy; errors never contain it, because it may contain a password."""
    text = value.reveal()
    try:
        address = URL(text)
    except ValueError:
        raise ValueError("not a URL: its host or port cannot be read") from None
    if address.scheme != "http":
        raise ValueError("expected the URL of an HTTP proxy, such as http://proxy.example:3128")
    if not address.host or not address.port:
        raise ValueError("the URL has no host, or no port")
    if address.path_qs != "/" or address.fragment:
        raise ValueError("the URL of a proxy ends with its host and port")
    if any(character.isspace() or not character.isprintable() for character in text):
        raise ValueError("the URL contains spaces or control characters")
    return value


def web_origin(text: str) -> str:
    """Check an origin, or `*`. It must be exactly the text that browsers send (RFC 6454, 6.2)."""
    parts = urlsplit(text)
    if text != "*" and (not parts.netloc or text != f"{parts.scheme}://{parts.netloc}"):
        raise ValueError('expected an origin such as "https://shop.example", or "*"')
    if text != "*" and "*" in text:
        raise ValueError('list each origin; "*" permits every origin and cannot be a part of one')
    if not text.isascii():
        raise ValueError("write the host as browsers send it, in its xn-- form")
    usual = _USUAL_PORTS.get(parts.scheme.lower(), "")
    sent = text.lower().removesuffix(usual)
    if text != sent:
        raise ValueError(f'browsers send this origin as "{sent}"')
    return text


def host_name(text: str) -> str:
    """Check a host name, as the Host header has it, without a port."""
    if not _HOST.fullmatch(text):
        raise ValueError('expected a host name without scheme and port, such as "relay.example.org"')
    return text.lower()


def prefix(text: str) -> str:
    """Check the path below which a source is mounted."""
    if not _PREFIX.fullmatch(text):
        raise ValueError('expected a path such as "/acme", with a slash at its start and none at its end')
    return text


def name(text: str) -> str:
    """Check the name of a source or destination: it becomes part of event types, labels and paths."""
    if not _NAME.fullmatch(text):
        raise ValueError("a name is 1 to 64 of a-z, 0-9, - and _, and starts with a letter or a digit")
    return text


def pattern(text: str) -> str:
    """Check a pattern of event types."""
    if not text.removeprefix("!"):
        raise ValueError('a pattern must not be empty; "*" matches every event')
    if not text.isprintable():
        raise ValueError("a pattern must not contain line breaks or control characters")
    return text


def header_name(text: str) -> str:
    """Check the name of a header that an operator adds to deliveries."""
    if not _TOKEN.fullmatch(text):
        raise ValueError("not a valid header name")
    if text.lower() in _OURS or text.lower().startswith("webhook-"):
        raise ValueError("the relay sets this header itself")
    return text


def header_value(value: Secret) -> Secret:
    """Check a header's value without ever repeating it."""
    text = value.reveal()
    if any(character != "\t" and not character.isprintable() for character in text):
        raise ValueError("a header's value must not contain line breaks or control characters")
    return value


def signing_secret(value: Secret) -> Secret:
    """Check that a destination's secret is a Standard Webhooks key to sign with."""
    Signer((value,))
    return value


def existing_file(path: Path) -> Path:
    """Check that a file named by the operator exists and can be read."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {unreadable(path, error)}") from None
    return path


def client_cert(value: ClientCert) -> ClientCert:
    """Check that a client certificate and its key can be used, and belong together."""
    value.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    return value
