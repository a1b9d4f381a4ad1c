"""Which destinations an event must reach, and why: patterns over full types, and `where`."""

import re
from collections.abc import Mapping
from fnmatch import translate
from typing import Any, Literal

import msgspec

from relay.model import Owed, StoredEvent
from relay.routing.conditions import Miss, Where, compile_where
from relay.routing.envelope import EnvelopeView
from relay.routing.subscription import Terms

__all__ = ["Explanation", "Patterns", "Router", "Subscription", "compile_where"]

OPERATOR_EVENTS = "relay."
"""Full types of the relay's own events start so; only a pattern that does too can match them."""

_PLANS = 4096  # types remembered by a router: senders choose them, so their number must have an end


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why an event does or does not go to a destination."""

    matches: bool
    reason: Literal["matched", "no_pattern", "taken_away", "where"]
    pattern: str | None = None  # the one that decided; None: none names the type
    misses: tuple[tuple[Miss, ...], ...] = ()  # of where: what failed, per alternative

    def lines(self) -> tuple[str, ...]:
        """Return it in words, one line per finding."""
        if self.reason == "where":
            if len(self.misses) == 1:
                return tuple(f"no: {miss}" for miss in self.misses[0])
            return tuple(
                f"no: alternative {number}: {miss}"
                for number, misses in enumerate(self.misses, 1)
                for miss in misses
            )
        if self.reason == "matched":
            return (f'yes: "{self.pattern}" matches',)
        if self.reason == "taken_away":
            return (f'no: "{self.pattern}" takes it away',)
        return ("no: no pattern names this type",)


class Patterns:
    """Shell-style patterns over full types (`fnmatch.fnmatchcase`); `*` crosses dots.

    `"!pattern"` takes away, wherever it stands. Events of the relay itself (`relay.…`) are matched
    only by patterns that start with `relay.`.
    """

    __slots__ = ("_negative", "_positive")

    def __init__(self, patterns: tuple[str, ...]) -> None:
        """Compile them.

        Raises:
            ValueError: a pattern is empty, or there are only such that take away.
        """
        if not all(pattern.removeprefix("!") for pattern in patterns):
            raise ValueError("a pattern is empty")
        self._positive = [(text, _compile(text)) for text in patterns if not text.startswith("!")]
        self._negative = [(text, _compile(text[1:])) for text in patterns if text.startswith("!")]
        if self._negative and not self._positive:
            raise ValueError(f'"{self._negative[0][0]}" takes away from nothing; put "*" before it')

    def matches(self, full_type: str) -> bool:
        """Say whether a type is subscribed to."""
        return self.explain(full_type).matches

    def explain(self, full_type: str) -> Explanation:
        """Say which pattern decides on a type."""
        for text, pattern in self._negative:
            if pattern.match(full_type):
                return Explanation(matches=False, reason="taken_away", pattern=text)
        own = full_type.startswith(OPERATOR_EVENTS)
        for text, pattern in self._positive:
            if pattern.match(full_type) and (not own or text.startswith(OPERATOR_EVENTS)):
                return Explanation(matches=True, reason="matched", pattern=text)
        return Explanation(matches=False, reason="no_pattern")


class Subscription(msgspec.Struct, frozen=True):
    """What one destination wants."""

    patterns: Patterns
    where: Where | None = None

    @classmethod
    def of(cls, events: tuple[str, ...], where: Any = None) -> "Subscription":
        """Compile a destination's `events` and `where` as config.toml has them.

        Raises:
            ValueError: one of them is invalid.
        """
        return cls(Patterns(events), None if where is None else compile_where(where))

    def matches(self, view: EnvelopeView) -> bool:
        """Say whether the event is owed."""
        return self.patterns.matches(view.event.type) and (self.where is None or self.where.matches(view))

    def explain(self, view: EnvelopeView) -> Explanation:
        """Say why the event is owed or not; agrees with `matches`."""
        verdict = self.patterns.explain(view.event.type)
        if not verdict.matches or self.where is None:
            return verdict
        misses = self.where.misses(view)
        if not all(misses):
            return verdict
        return Explanation(matches=False, reason="where", pattern=verdict.pattern, misses=misses)


class Router:
    """Finds the destinations of an event, and on which terms; patterns are tried once per type."""

    __slots__ = ("_plans", "_subscriptions", "_terms")

    def __init__(
        self, subscriptions: Mapping[str, Subscription], terms: Mapping[str, Terms] | None = None
    ) -> None:
        """Take a subscription per destination, and terms where there are any."""
        self._subscriptions = dict(subscriptions)
        self._terms = {name: Terms(Owed(name)) for name in subscriptions} | dict(terms or {})
        # Per type: whether the event itself has a say, and who may be owed.
        self._plans: dict[str, tuple[bool, tuple[Owed, ...]]] = {}

    def route(self, event: StoredEvent) -> tuple[Owed, ...]:
        """Return the destinations that are owed the event, in the order of the config."""
        plan = self._plans.get(event.type)
        if plan is None:
            plan = self._plan(event.type)
        depends, candidates = plan
        if not depends:
            return candidates
        view = EnvelopeView(event)
        return tuple(
            self._terms[owed.destination].owed(view)
            for owed in candidates
            if self._passes(owed.destination, view)
        )

    def adopt(self, other: "Router") -> None:
        """Route as another router does, for everybody who holds this one, in one step."""
        self._subscriptions = other._subscriptions  # noqa: SLF001 - one of our own kind
        self._terms = other._terms  # noqa: SLF001 - likewise
        self._plans = {}

    @property
    def destinations(self) -> tuple[str, ...]:
        """Those of the config, in its order."""
        return tuple(self._subscriptions)

    def owed_to(self, destination: str, event: StoredEvent) -> Owed | None:
        """Return the terms of one destination, whether or not it asks for such events; None: no such one."""
        terms = self._terms.get(destination)
        return None if terms is None else terms.owed(EnvelopeView(event))

    def explain(self, event: StoredEvent) -> Mapping[str, Explanation]:
        """Say of every destination why it is owed the event or not."""
        view = EnvelopeView(event)
        return {name: each.explain(view) for name, each in self._subscriptions.items()}

    def _passes(self, name: str, view: EnvelopeView) -> bool:
        where = self._subscriptions[name].where
        return where is None or where.matches(view)

    def _plan(self, full_type: str) -> tuple[bool, tuple[Owed, ...]]:
        names = [name for name, each in self._subscriptions.items() if each.patterns.matches(full_type)]
        depends = any(self._subscriptions[name].where is not None or self._terms[name].vary for name in names)
        if len(self._plans) >= _PLANS:
            self._plans.clear()
        plan = self._plans[full_type] = (depends, tuple(self._terms[name].plain for name in names))
        return plan


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))
