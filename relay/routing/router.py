"""Which way events go by `[destinations]`: what each asks for, and on which terms."""

from collections.abc import Mapping
from typing import Any

from relay.base.units import render_duration
from relay.config.schema import DestinationConfig
from relay.model import StoredEvent
from relay.routing.filters import Router, Subscription
from relay.routing.subscription import Terms

HOUR = 3600.0


def router_of(destinations: Mapping[str, DestinationConfig]) -> Router:
    """Compile what destinations ask for."""
    subscriptions = {name: Subscription.of(each.events, each.where) for name, each in destinations.items()}
    return Router(subscriptions, {name: _terms(each) for name, each in destinations.items()})


def explained(
    router: Router, event: StoredEvent, destinations: Mapping[str, DestinationConfig]
) -> list[dict[str, Any]]:
    """Say of every destination whether an event goes there, or which condition fails on which value."""
    return [
        {
            "name": name,
            "matches": each.matches,
            "reason": each.reason,
            "lines": each.lines(),
            "retries": retries(destinations[name]) if each.matches and name in destinations else None,
        }
        for name, each in router.explain(event).items()
    ]


def retries(destination: DestinationConfig) -> str:
    """Say which answers are retried, and for how long."""
    schedule, final = destination.retry.schedule, sorted(set(destination.final_statuses))
    seconds = sum(schedule)
    within = f"about {seconds / HOUR:.0f} hours" if seconds > 2 * HOUR else render_duration(seconds)
    parts = ["nothing is retried: it has no schedule"]
    if schedule:
        parts = [f"any answer but a 2xx is retried: {len(schedule) + 1} attempts in {within}"]
    if final:
        parts.append(f"{' and '.join(map(str, final))} end the delivery at once")
    return "; ".join((*parts, "410 disables the destination"))


def _terms(destination: DestinationConfig) -> Terms:
    return Terms.of(
        destination.name,
        order_by=destination.order_by,
        latest_by=destination.latest_by,
        ttl=destination.ttl,
        max_pending=destination.max_pending,
        on_dead=destination.on_dead,
    )
