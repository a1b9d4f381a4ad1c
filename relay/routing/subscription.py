"""On which terms a destination is owed an event: order, freshness, backlog, who stands in."""

import hashlib

import msgspec

from relay.base.clock import SECOND
from relay.model import Owed
from relay.routing.envelope import ABSENT, EnvelopeView, Path

_LONGEST_KEY = 200  # characters; a longer value stands as its digest, senders choose it


class Terms(msgspec.Struct, frozen=True):
    """One destination's terms; `plain` holds those that are the same for every event."""

    plain: Owed
    order_by: Path | None = None
    latest_by: Path | None = None

    @classmethod
    def of(
        cls,
        destination: str,
        *,
        order_by: str | None = None,
        latest_by: str | None = None,
        ttl: float | None = None,
        max_pending: int | None = None,
        on_dead: str | None = None,
    ) -> "Terms":
        """Compile a destination's keys of these names; `ttl` in seconds.

        Raises:
            ValueError: a path is malformed.
        """
        micros = None if ttl is None else int(ttl * SECOND)
        return cls(
            Owed(destination, ttl=micros, max_pending=max_pending, on_dead=on_dead),
            None if order_by is None else Path.parse(order_by),
            None if latest_by is None else Path.parse(latest_by),
        )

    @property
    def vary(self) -> bool:
        """Whether they depend on the event."""
        return self.order_by is not None or self.latest_by is not None

    def owed(self, view: EnvelopeView) -> Owed:
        """Return the terms for one event; one without the value is bound to no other."""
        if not self.vary:
            return self.plain
        order = None if self.order_by is None else _key(view.find(self.order_by))
        latest = None if self.latest_by is None else _key(view.find(self.latest_by))
        if latest is not None:
            latest = f"{view.event.type} {latest}"  # a newer event of that type and value
        return msgspec.structs.replace(self.plain, order_key=order, latest_key=latest)


def _key(value: object) -> str | None:
    """Write a JSON value as a key: equal values give equal keys."""
    if value is ABSENT:
        return None
    text = value if isinstance(value, str) else msgspec.json.encode(value, order="sorted").decode()
    if len(text) <= _LONGEST_KEY and text.isprintable():
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
