"""Which way events go by `[destinations]`: what each asks for, and on which terms."""

from collections.abc import Mapping
from typing import Any

from relay.config.model import DestinationConfig
from relay.filters import Router, Subscription
from relay.model import StoredEvent
from relay.terms import Terms


def router_of(destinations: Mapping[str, DestinationConfig]) -> Router:
    """Compile what destinations ask for."""
    subscriptions = {name: Subscription.of(each.events, each.where) for name, each in destinations.items()}
    return Router(subscriptions, {name: _terms(each) for name, each in destinations.items()})


def explained(router: Router, event: StoredEvent) -> list[dict[str, Any]]:
    """Say of every destination whether an event goes there, or which condition fails on which value."""
    return [
        {"name": name, "matches": each.matches, "reason": each.reason, "lines": each.lines()}
        for name, each in router.explain(event).items()
    ]


def _terms(destination: DestinationConfig) -> Terms:
    return Terms.of(
        destination.name,
        order_by=destination.order_by,
        latest_by=destination.latest_by,
        ttl=destination.ttl,
        max_pending=destination.max_pending,
        on_dead=destination.on_dead,
    )
