"""The HTTP proxy that a destination is reached through: a tunnel for https, whole requests for http."""

import base64
from collections.abc import Collection

from yarl import URL

from relay.config.secrets import Secret
from relay.delivery.http.ssrf import Blocked, refused_target


class Proxy:
    """Where the proxy is, how it knows us (RFC 9110 §11.7.1), and what it must not be asked for."""

    def __init__(self, address: Secret, *, allow_private: bool, own: Collection[tuple[str, int]]) -> None:
        """Take an address that `relay.config.validators.proxy` has passed; the rest is as for the guard."""
        url = URL(address.reveal())
        self.credentials: dict[str, str] = {}
        if url.user or url.password:
            # aiohttp would write Latin-1; the one charset that RFC 7617 §2.1 names is UTF-8.
            pair = f"{url.user or ''}:{url.password or ''}".encode()
            self.credentials["Proxy-Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        self.url = url.with_user(None)
        self.name = f"{self.url.host_subcomponent}:{self.url.port}"  # for messages
        self._allow_private = allow_private
        self._own = own

    def check(self, target: URL) -> None:
        """Check that the proxy may be asked for a URL, as far as can be told.

        Raises:
            Blocked: its host is an address that must not be dialled.
        """
        reason = refused_target(
            target.raw_host or "", target.port or 0, allow_private=self._allow_private, own=self._own
        )
        if reason is not None:
            raise Blocked(reason)
