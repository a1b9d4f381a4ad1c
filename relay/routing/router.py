"""The router: finds the destinations of an event by the subscriptions in `[destinations]`."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from relay.base.units import render_duration
from relay.config.schema import DestinationConfig
from relay.model import PAUSED_IN_CONFIG, StoredEvent, Target
from relay.routing.envelope import EnvelopeView
from relay.routing.subscription import Explanation, Subscription, SubscriptionOptions

MAX_ROUTES = 4096
"""Types that a router caches; senders choose types, so their number needs a limit."""

_HOUR = 3600.0


class Router:
    """Returns the destinations of an event with their options; tries the patterns once per type."""

    __slots__ = ("_options", "_routes", "_subscriptions")

    def __init__(
        self,
        subscriptions: Mapping[str, Subscription],
        options: Mapping[str, SubscriptionOptions] | None = None,
    ) -> None:
        """Take the subscription of each destination, and the options of destinations that have options."""
        self._subscriptions = dict(subscriptions)
        self._options = {name: SubscriptionOptions(Target(name)) for name in subscriptions}
        self._options |= dict(options or {})
        # Per type: whether the result depends on the event itself, and the possible destinations.
        self._routes: dict[str, tuple[bool, tuple[Target, ...]]] = {}

    @classmethod
    def of(cls, destinations: Mapping[str, DestinationConfig]) -> "Router":
        """Compile the subscriptions of these destinations.

        Raises:
            ValueError: a pattern, a condition or a path is invalid.
        """
        return cls(
            {name: Subscription.of(each.events, each.where) for name, each in destinations.items()},
            {
                name: SubscriptionOptions.of(
                    each.name,
                    order_by=each.order_by,
                    latest_by=each.latest_by,
                    ttl=each.ttl,
                    max_pending=each.max_pending,
                    on_dead=each.on_dead,
                    group_by=each.group_by,
                    group_wait=each.group_wait,
                    group_max=each.group_max,
                    shards=each.shards,
                )
                for name, each in destinations.items()
            },
        )

    def route(self, event: StoredEvent) -> tuple[Target, ...]:
        """Return the destinations that get the event, in the order of the config."""
        depends, candidates = self._routes.get(event.type) or self._by_type(event.type)
        if not depends:
            return candidates
        view, found = EnvelopeView(event), []
        for candidate in candidates:
            where = self._subscriptions[candidate.destination].where
            if where is None or where.matches(view):
                found.append(self._options[candidate.destination].resolve(view))
        return tuple(found)

    def adopt(self, other: "Router") -> None:
        """Replace the subscriptions by those of another router, in one step, for all users of this router."""
        self._subscriptions = other._subscriptions  # noqa: SLF001 - the same class
        self._options = other._options  # noqa: SLF001 - the same class
        self._routes = {}

    @property
    def destinations(self) -> tuple[str, ...]:
        """The destinations in the order of the config."""
        return tuple(self._subscriptions)

    def resolve(self, destination: str, event: StoredEvent) -> Target | None:
        """Return a destination's options for an event, subscribed or not; None: it is not in the config."""
        options = self._options.get(destination)
        return None if options is None else options.resolve(EnvelopeView(event))

    def explain(self, event: StoredEvent) -> Mapping[str, Explanation]:
        """Return for each destination why it gets the event or not."""
        view = EnvelopeView(event)
        return {name: each.explain(view) for name, each in self._subscriptions.items()}

    def _by_type(self, full_type: str) -> tuple[bool, tuple[Target, ...]]:
        """Try the patterns of all subscriptions and remember the result."""
        names = [name for name, each in self._subscriptions.items() if each.patterns.matches(full_type)]
        depends = any(
            self._subscriptions[name].where is not None or self._options[name].depend_on_event
            for name in names
        )
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        route = self._routes[full_type] = (depends, tuple(self._options[name].fixed for name in names))
        return route


def explained(
    router: Router, event: StoredEvent, destinations: Mapping[str, DestinationConfig]
) -> list[dict[str, Any]]:
    """Return for each destination whether it gets an event, or which condition fails on which value."""
    found = []
    for name, each in router.explain(event).items():
        config = destinations.get(name) if each.matches else None
        target = None if config is None else router.resolve(name, event)
        found.append(
            {
                "name": name,
                "matches": each.matches,
                "reason": each.reason,
                "lines": each.lines(),
                "held": PAUSED_IN_CONFIG if config is not None and config.paused else None,
                "options": () if config is None or target is None else tuple(consequences(config, target)),
                "retries": None if config is None else retries(config),
            }
        )
    return found


def consequences(config: DestinationConfig, target: Target) -> Iterator[str]:
    """Yield the effects of a destination's options on the delivery of an event."""
    if (grouping := target.grouping) is not None:
        paths = (config.group_by,) if isinstance(config.group_by, str) else config.group_by or ()
        values = _value(grouping.key) if len(paths) == 1 else grouping.key  # of several: a list as JSON
        which = f" with the same {', '.join(paths)} ({values})" if paths else ""
        yield (
            f"grouped: waits up to {render_duration(config.group_wait)} for other events{which};"
            f" one message reports up to {config.group_max} of them"
        )
    if config.order_by is not None and target.order_key is not None:
        value = _value(target.order_key)
        yield f"ordered: waits until the earlier deliveries with {config.order_by} {value} have ended"
    if config.latest_by is not None and target.latest_key is not None:
        value = _value(target.latest_key.partition(" ")[2])
        yield f"a newer event of this type with {config.latest_by} {value} replaces it while it waits"
    if config.ttl is not None:
        yield f"expires if it is not delivered within {render_duration(config.ttl)}"
    if config.on_dead is not None:
        yield f"if the delivery is dead, {config.on_dead} gets the event"


def _value(key: str) -> str:
    """Return the value of an option's path for a sentence; long values are stored as digests."""
    return json.dumps(key, ensure_ascii=False) if key else "not present"


def retries(destination: DestinationConfig) -> str:
    """Return which responses are retried, and for how long."""
    schedule, final = destination.retry.schedule, sorted(set(destination.final_statuses))
    seconds = sum(schedule)
    within = f"about {seconds / _HOUR:.0f} hours" if seconds > 2 * _HOUR else render_duration(seconds)
    parts = ["no retries: the retry schedule is empty"]
    if schedule:
        parts = [f"any response other than 2xx is retried: {len(schedule) + 1} attempts in {within}"]
    if final:
        parts.append(f"{' and '.join(map(str, final))} {'end' if final[1:] else 'ends'} the delivery at once")
    enable = f"`relay destinations enable {destination.name}`"
    return "; ".join((*parts, f"410 disables the destination, and its deliveries wait until {enable}"))
