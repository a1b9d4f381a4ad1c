"""LazyChat's WooCommerce plugin: WordPress shops report events of the plugin and its settings.

Contract: docs/contracts/lazychat.md#responses.
"""

import re
from typing import ClassVar

import msgspec

from relay.hookspecs import hookimpl
from relay.source import (
    EMPTY,
    Accepted,
    BodyTimeout,
    Event,
    Incoming,
    Invalid,
    KeyConflict,
    RateLimited,
    Refusal,
    Reply,
    Secrets,
    Source,
    Unauthenticated,
    as_value,
    check_length,
    route,
)

PROBE = "settings.checking_connection"
PATH = "/api/woocommerce-plugin/events"
_SECONDS = re.compile(r"[0-9]{1,15}")


class Notification(msgspec.Struct):
    """The body of an event."""

    event_type: str | None = None
    event_data: msgspec.Raw = EMPTY
    site_info: msgspec.Raw = EMPTY


class LazyChat(Source, kind="lazychat", owns=("/api/woocommerce-plugin",), decompresses=False):
    """LazyChat: `POST /api/woocommerce-plugin/events`, answered with exactly 200."""

    tokens: Secrets

    verify_reads_body: ClassVar[bool] = False

    def verify(self, incoming: Incoming) -> None:
        """Require one of the tokens."""
        incoming.bearer(self.tokens)

    @route("POST", PATH)
    def event(self, incoming: Incoming) -> Accepted:
        """Accept an event. Its type may be in the header only, and its shop may be unknown."""
        body = incoming.decode(Notification)
        type_ = body.event_type or incoming.header("X-Event-Type")
        if not type_:
            raise Invalid(field="event_type", issue="field is required")
        return Accepted(
            event=Event(
                type=type_,
                subject=check_length(incoming.header("X-Lazychat-Shop-Id"), "X-Lazychat-Shop-Id") or None,
                data=as_value(body.event_data),
                context=_context(incoming, body),
            ),
            reply={"success": True},
        )

    def refuse(self, refusal: Refusal, incoming: Incoming) -> Reply:
        """Answer `{"success": false, "error": …}`, but 200 to a known shop's probe in temporary trouble.

        On any other status the plugin deletes its token and logs the shop out.
        """
        transient = isinstance(refusal, BodyTimeout | RateLimited | KeyConflict) or refusal.status >= 500  # noqa: PLR2004 - ours
        if transient and incoming.header("X-Event-Type") == PROBE and self._knows(incoming):
            return Reply(body={"success": True})
        return Reply(status=refusal.status, body={"success": False, "error": refusal.detail})

    def samples(self) -> tuple[Incoming, ...]:
        """See `Source.samples`."""
        headers = {
            "Content-Type": "application/json",
            "X-Event-Type": "plugin.updated",
            "X-Plugin-Version": "1.3.39",
            "X-Lazychat-Shop-Id": "1042",
            "X-Event-Timestamp": "1766399400",
        }
        return (Incoming.of("POST", PATH, headers, _SAMPLE),)

    def _knows(self, incoming: Incoming) -> bool:
        try:
            incoming.bearer(self.tokens)
        except Unauthenticated:
            return False
        return True


def _context(incoming: Incoming, body: Notification) -> dict[str, object]:
    """Return the context. Only `X-Event-Timestamp` is absolute: times in the body have no time zone."""
    context: dict[str, object] = {"site_info": as_value(body.site_info)}
    if version := incoming.header("X-Plugin-Version"):
        context["plugin_version"] = version
    if timestamp := incoming.header("X-Event-Timestamp"):
        context["event_timestamp"] = int(timestamp) if _SECONDS.fullmatch(timestamp) else timestamp
    return context


_SAMPLE = b"""{
  "event_type": "plugin.updated",
  "event_data": {
    "previous_version": "1.3.38",
    "new_version": "1.3.39",
    "update_time": "2025-12-22 10:30:00"
  },
  "site_info": {
    "site_url": "https://example.com",
    "site_name": "My Store",
    "wordpress_version": "6.4",
    "woocommerce_version": "8.5",
    "plugin_version": "1.3.39",
    "php_version": "8.1",
    "timestamp": "2025-12-22 10:30:00"
  }
}"""


@hookimpl
def relay_sources() -> list[type[Source]]:
    """Offer LazyChat."""
    return [LazyChat]
