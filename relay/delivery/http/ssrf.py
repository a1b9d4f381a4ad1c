"""Protection against server-side request forgery (SSRF): the addresses that must not be dialled.

The check takes the address of each connect, so it covers literal addresses, names that resolve differently
the next time, and IPv4 addresses inside IPv6 ones. Behind a proxy that address is the proxy's: the relay does
not see where the proxy connects to, and can refuse a target only if its URL contains an address.

The table is explicit because `ipaddress.is_global` follows the registries of the Python release (on 3.11.7 it
was wrong for 11 of 20 addresses).
"""

import socket
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Sources: IANA IPv4 and IPv6 Special-Purpose Address Registries, RFC 5771 and RFC 4291. The first match
# counts, so narrow blocks precede the wide blocks that contain them.
_SPECIAL = (
    ("0.0.0.0/8", "unspecified"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "carrier-grade NAT"),
    ("127.0.0.0/8", "loopback"),
    ("168.63.129.16/32", "cloud platform"),  # Azure's wire server: globally routable, but it serves the host
    ("169.254.0.0/16", "link-local"),  # includes the metadata services of most clouds
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "protocol assignment"),
    ("192.0.2.0/24", "documentation"),
    ("192.31.196.0/24", "AS112"),
    ("192.52.193.0/24", "AMT"),
    ("192.88.99.0/24", "6to4 relay"),
    ("192.168.0.0/16", "private"),
    ("192.175.48.0/24", "AS112"),
    ("198.18.0.0/15", "benchmarking"),
    ("198.51.100.0/24", "documentation"),
    ("203.0.113.0/24", "documentation"),
    ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"),
    ("240.0.0.0/4", "reserved"),
    ("::/128", "unspecified"),
    ("::1/128", "loopback"),
    ("::/96", "IPv4-compatible"),
    ("::ffff:0:0/96", "IPv4-mapped"),
    ("::ffff:0:0:0/96", "IPv4-translated"),
    ("64:ff9b::/96", "NAT64"),
    ("64:ff9b:1::/48", "local NAT64"),
    ("100::/64", "discard-only"),
    ("100:0:0:1::/64", "dummy prefix"),
    ("2001::/32", "Teredo"),
    ("2001:2::/48", "benchmarking"),
    ("2001:10::/28", "ORCHID"),
    ("2001:20::/28", "ORCHIDv2"),
    ("2001::/23", "protocol assignment"),
    ("2001:db8::/32", "documentation"),
    ("2002::/16", "6to4"),
    ("2620:4f:8000::/48", "AS112"),
    ("3fff::/20", "documentation"),
    ("5f00::/16", "SRv6 segment"),
    ("fc00::/7", "unique local"),
    ("fe80::/10", "link-local"),
    ("fec0::/10", "site-local"),
    ("ff00::/8", "multicast"),
)
SPECIAL: tuple[tuple[Network, str], ...] = tuple((ip_network(block), kind) for block, kind in _SPECIAL)
"""Every special-purpose block, with its name in error texts."""

NEVER = frozenset({"unspecified", "multicast", "broadcast"})
"""Kinds that are refused even with `allow_private = true`: no receiver can have such an address."""

_GLOBAL_V6 = IPv6Network("2000::/3")  # all unicast addresses that IANA has allocated; the rest is reserved

# Where an IPv6 address contains an IPv4 address: bits to shift right (RFC 4291, 6052, 8215, 3056).
_EMBEDDING = (
    (IPv6Network("::/96"), 0),
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("::ffff:0:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("64:ff9b:1::/48"), 0),
    (IPv6Network("2002::/16"), 80),
)


class Blocked(OSError):  # noqa: N818 - the attempt's result has this label
    """A connect was refused; `reason` is the reason, with the address.

    `str()` is always the same: otherwise a failed connect to a name with several addresses raises a plain
    `OSError` with all texts combined, instead of one `Blocked`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__("address refused")
        self.reason = reason


def refused(
    address: str, port: int, *, allow_private: bool, own: Collection[tuple[str, int]] = ()
) -> str | None:
    """Return why the relay must not connect to this address, or None if it may.

    Args:
        address: an IP address as it is passed to `connect`, with or without an IPv6 zone.
        port: the TCP port.
        allow_private: permit all special blocks except those in `NEVER`.
        own: the relay's listeners. They are always refused, because an event sent there would loop.
            A wildcard address or a host name means every address of this machine.

    Raises:
        OSError: no descriptor is left for the query to the kernel.
    """
    try:
        outer = ip_address(address.partition("%")[0])
    except ValueError:
        return f"{address!r} is not an IP address"
    for checked in (outer, *_embedded(outer)):
        inside = "" if checked == outer else f" (inside {address})"
        kind = _kind(checked)
        if kind in NEVER or (kind is not None and not allow_private):
            return f"{checked}{inside} is a {kind} address"
        if any(_is_listener(checked, port, listener) for listener in own):
            return f"{checked}{inside} port {port} is the relay itself"
    return None


def refused_target(
    host: str, port: int, *, allow_private: bool, own: Collection[tuple[str, int]] = ()
) -> str | None:
    """Return why the relay must not request this host from a proxy, or None if it may.

    Addresses, in every spelling that a C library accepts, are checked as by `refused`. Only loopback names
    are refused (RFC 6761 §6.3); the proxy decides on all other names. The arguments are those of `refused`,
    except that `host` is the host of a URL.
    """
    host = host.rstrip(".").lower()
    if ":" not in host:
        loopback = host == "localhost" or host.endswith(".localhost")
        try:
            host = socket.inet_ntoa(socket.inet_aton("127.0.0.1" if loopback else host))
        except OSError:
            return None
    return refused(host, port, allow_private=allow_private, own=own)


def _kind(address: Address) -> str | None:
    """Return the name of an address's special block; None: it is an ordinary global address."""
    for network, kind in SPECIAL:
        if address in network:
            return kind
    if isinstance(address, IPv6Address) and address not in _GLOBAL_V6:
        return "reserved"
    return None


def _embedded(address: Address) -> list[IPv4Address]:
    """Return the IPv4 address inside an IPv6 address, if any."""
    if isinstance(address, IPv4Address) or int(address) <= 1:  # `::` and `::1` contain no IPv4 address
        return []
    return [
        IPv4Address(int(address) >> shift & 0xFFFF_FFFF)
        for network, shift in _EMBEDDING
        if address in network
    ]


def _is_listener(address: Address, port: int, listener: tuple[str, int]) -> bool:
    host, listening = listener
    if port != listening:
        return False
    try:
        bound = ip_address(host)
    except ValueError:  # "" or a name, whose addresses may change at any time
        return _local(address)
    return _local(address) if bound.is_unspecified else bound == address


def _local(address: Address) -> bool:
    """Return whether an address belongs to this machine: only then can it be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IP's own numbers
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True
