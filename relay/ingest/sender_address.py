"""The address of a request's sender: the peer, or the address that a trusted proxy names."""

import ipaddress
import re
from collections.abc import Iterator
from typing import Literal

from multidict import CIMultiDictProxy

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
ForwardedHeader = Literal["X-Forwarded-For", "Forwarded"]

MOST_HOPS = 32
"""Entries of a chain that are read, from the nearest one on; real chains have two or three."""

_PORT = re.compile(r"\[(?P<v6>[^\]]+)\](?::\d{1,5})?|(?P<v4>[0-9.]+):\d{1,5}", re.ASCII)
_PAIR = re.compile(
    r"""\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)=("(?:[^"\\]|\\.)*+"|[^";\s]*)\s*(?:;|\Z)"""
)  # RFC 7239, 4
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


class SenderAddress:
    """Finds senders' addresses in one header, if the request comes from a trusted proxy.

    Args:
        trusted: addresses and networks of proxies; an IPv4 address includes its IPv4-mapped form.
        header: the only header to read. A proxy forwards the other header unchanged from the sender.
    """

    def __init__(self, trusted: tuple[str, ...] = (), header: ForwardedHeader = "X-Forwarded-For") -> None:
        self._trusted = tuple(_unmapped(ipaddress.ip_network(text, strict=False)) for text in trusted)
        self._header = header

    def of(self, peer: str | None, headers: CIMultiDictProxy[str]) -> str:
        """Return the sender's address: the nearest one in the chain that is not a trusted proxy.

        All lines of the header form one chain (RFC 9110, 5.3); each proxy appends its peer's address. Entries
        to the left of an untrusted address may be forged. An entry that is not an address ends the chain; the
        result is then the last known hop.
        """
        if not peer:
            return "unknown"
        sender = _address(peer)
        if sender is None:
            return peer
        if self._trusted and self._is_trusted(sender):
            for hop in self._hops(headers):
                address = _address(hop)
                if address is None:
                    break
                sender = address
                if not self._is_trusted(sender):
                    break
        return str(sender)

    def _hops(self, headers: CIMultiDictProxy[str]) -> Iterator[str]:
        """Yield the chain, nearest hop first."""
        entries = ",".join(headers.getall(self._header, ())).rsplit(",", MOST_HOPS)[-MOST_HOPS:]
        hops = (entry.strip() for entry in reversed(entries))
        if self._header == "Forwarded":
            return (_named(hop) for hop in hops if hop)
        return (hop for hop in hops if hop)

    def _is_trusted(self, address: Address) -> bool:
        return any(address in network for network in self._trusted)


def _named(element: str) -> str:
    """Return the `for` value of one element (RFC 7239); `""` if it is missing or the element is malformed.

    The caller splits at every comma. Addresses contain no commas, and an unclosed quote of a sender must not
    hide the elements that proxies append.
    """
    named, at = "", 0
    while at < len(element):
        pair = _PAIR.match(element, at)
        if pair is None or (named and pair[1].lower() == "for"):
            return ""
        if pair[1].lower() == "for":
            named = re.sub(r"\\(.)", r"\1", pair[2][1:-1]) if pair[2].startswith('"') else pair[2]
        at = pair.end()
    return named


def _address(text: str) -> Address | None:
    """Parse an address, with or without a port; an IPv4-mapped address becomes the IPv4 address."""
    if with_port := _PORT.fullmatch(text):
        text = with_port["v6"] or with_port["v4"]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])  # without the zone of a link-local one
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address


def _unmapped(network: Network) -> Network:
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        low = network.network_address.ipv4_mapped
        return ipaddress.IPv4Network((int(low or 0), network.prefixlen - _MAPPED.prefixlen))
    return network
