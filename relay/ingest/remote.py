"""Where a request came from: the peer, or behind a proxy that is trusted, whom that one names."""

import ipaddress

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Remote:
    """Names senders for the log; `X-Forwarded-For` is believed from trusted proxies only."""

    def __init__(self, trusted: tuple[str, ...]) -> None:
        """Take addresses and networks."""
        self._trusted: tuple[Network, ...] = tuple(
            ipaddress.ip_network(text, strict=False) for text in trusted
        )

    def of(self, peer: str | None, forwarded: str) -> str:
        """Return the sender's address: the last one in the chain that is no proxy of ours.

        Whoever is not trusted may have written anything further left, and what is no address ends the
        chain: the answer is then the last hop that is known.
        """
        if not peer:
            return "unknown"
        sender, chain = peer, [part.strip() for part in forwarded.split(",")]
        while chain and self._is_trusted(sender):
            hop = chain.pop()
            try:
                sender = str(ipaddress.ip_address(hop))
            except ValueError:
                break
        return sender

    def _is_trusted(self, address: str) -> bool:
        if not self._trusted:
            return False
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._trusted)
