"""The HTTP proxy of a destination: a tunnel for https, full requests for http."""

import base64
from collections.abc import Collection

from yarl import URL

from relay.config.secrets import Secret
from relay.delivery.http.ssrf import Blocked, refused_target


class Proxy:
    """The proxy's URL, the credentials for it (RFC 9110 §11.7.1), and the check of targets."""

    def __init__(self, address: Secret, *, allow_private: bool, own: Collection[tuple[str, int]]) -> None:
        """Parse an address that `validators.proxy` has accepted; the rest is passed to `ssrf.refused`."""
        url = URL(address.reveal())
        self.credentials: dict[str, str] = {}
        if url.user or url.password:
            # aiohttp would encode as Latin-1; RFC 7617 §2.1 names UTF-8 only.
            pair = f"{url.user or ''}:{url.password or ''}".encode()
            self.credentials["Proxy-Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        self.url = url.with_user(None)
        self.name = f"{self.url.host_subcomponent}:{self.url.port}"  # for error texts
        self._allow_private = allow_private
        self._own = own

    def check(self, target: URL) -> None:
        """Check by a URL's text that the relay may request it from the proxy.

        Raises:
            Blocked: the host is an address that must not be dialled.
        """
        reason = refused_target(
            target.raw_host or "", target.port or 0, allow_private=self._allow_private, own=self._own
        )
        if reason is not None:
            raise Blocked(reason)
