"""Subscriptions of destinations: patterns over event types, conditions, and options for deliveries."""

import hashlib
import re
from fnmatch import translate
from typing import Any, Literal

import msgspec

from relay.base.clock import SECOND
from relay.model import OPERATOR_SOURCE, Grouping, Target
from relay.routing.conditions import Conditions, Mismatch, compile_conditions
from relay.routing.envelope import ABSENT, EnvelopeView, Path

_OPERATOR_PREFIX = f"{OPERATOR_SOURCE}."
"""Prefix of the types of the relay's own events; only a pattern with the same prefix matches them."""

_KEY_LENGTH = 200  # characters; for a longer value the key is its digest, because senders choose it


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why an event does or does not go to a destination."""

    matches: bool
    reason: Literal["matched", "no_pattern", "taken_away", "where"]
    pattern: str | None = None  # the pattern that decided; None: no pattern matches the type
    misses: tuple[tuple[Mismatch, ...], ...] = ()  # for `where`: the failed conditions of each alternative

    def lines(self) -> tuple[str, ...]:
        """Return the explanation as text, one line per finding."""
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
            return (f'no: "{self.pattern}" excludes it',)
        return ("no: no pattern matches this type",)


class Patterns:
    """Shell-style patterns over full types (`fnmatch.fnmatchcase`); `*` also matches dots.

    `"!pattern"` excludes types, at any position of the list. The relay's own events (`relay.…`) are matched
    only by patterns that start with `relay.`.
    """

    __slots__ = ("_excluded", "_included")

    def __init__(self, patterns: tuple[str, ...]) -> None:
        """Compile the patterns.

        Raises:
            ValueError: a pattern is empty, or all patterns exclude.
        """
        if not all(pattern.removeprefix("!") for pattern in patterns):
            raise ValueError("a pattern is empty")
        self._included = [(text, _compile(text)) for text in patterns if not text.startswith("!")]
        self._excluded = [(text, _compile(text[1:])) for text in patterns if text.startswith("!")]
        if self._excluded and not self._included:
            raise ValueError(f'"{self._excluded[0][0]}" excludes, but no pattern includes; put "*" before it')

    def matches(self, full_type: str) -> bool:
        """Return whether the patterns match a type."""
        return self.explain(full_type).matches

    def explain(self, full_type: str) -> Explanation:
        """Return which pattern decides on a type."""
        for text, pattern in self._excluded:
            if pattern.match(full_type):
                return Explanation(matches=False, reason="taken_away", pattern=text)
        is_operator_type = full_type.startswith(_OPERATOR_PREFIX)
        for text, pattern in self._included:
            if pattern.match(full_type) and (not is_operator_type or text.startswith(_OPERATOR_PREFIX)):
                return Explanation(matches=True, reason="matched", pattern=text)
        return Explanation(matches=False, reason="no_pattern")


class Subscription(msgspec.Struct, frozen=True):
    """The events that one destination gets."""

    patterns: Patterns
    where: Conditions | None = None

    @classmethod
    def of(cls, events: tuple[str, ...], where: Any = None) -> "Subscription":
        """Compile a destination's `events` and `where` from config.toml.

        Raises:
            ValueError: `events` or `where` is invalid.
        """
        return cls(Patterns(events), None if where is None else compile_conditions(where))

    def matches(self, view: EnvelopeView) -> bool:
        """Return whether the destination gets the event."""
        return self.patterns.matches(view.event.type) and (self.where is None or self.where.matches(view))

    def explain(self, view: EnvelopeView) -> Explanation:
        """Return why the destination gets the event or not; agrees with `matches`."""
        by_type = self.patterns.explain(view.event.type)
        if not by_type.matches or self.where is None:
            return by_type
        misses = self.where.misses(view)
        if not all(misses):
            return by_type
        return Explanation(matches=False, reason="where", pattern=by_type.pattern, misses=misses)


class SubscriptionOptions(msgspec.Struct, frozen=True):
    """How one destination's deliveries are ordered, expired and limited."""

    fixed: Target  # the options that are the same for every event
    order_by: Path | None = None
    latest_by: Path | None = None
    group_by: tuple[Path, ...] = ()

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
        group_by: str | tuple[str, ...] | None = None,
        group_wait: float = 0.0,
        group_max: int = 1,
        shards: int = 1,
    ) -> "SubscriptionOptions":
        """Compile a destination's config keys of these names; `ttl` and `group_wait` are in seconds.

        Raises:
            ValueError: a path is malformed.
        """
        micros = None if ttl is None else int(ttl * SECOND)
        grouping: Grouping | None = None
        paths: tuple[str, ...] = ()
        if group_by is not None:
            grouping = Grouping("", int(group_wait * SECOND), group_max)
            paths = (group_by,) if isinstance(group_by, str) else group_by
        return cls(
            Target(
                destination,
                ttl=micros,
                max_pending=max_pending,
                on_dead=on_dead,
                grouping=grouping,
                is_spread=shards > 1,
            ),
            None if order_by is None else Path.parse(order_by),
            None if latest_by is None else Path.parse(latest_by),
            tuple(map(Path.parse, paths)),
        )

    @property
    def depend_on_event(self) -> bool:
        """Whether the options differ from event to event."""
        return self.order_by is not None or self.latest_by is not None or bool(self.group_by)

    def resolve(self, view: EnvelopeView) -> Target:
        """Return the options for one event; an event without the value has no key."""
        if not self.depend_on_event:
            return self.fixed
        order = None if self.order_by is None else _key(view.find(self.order_by))
        latest = None if self.latest_by is None else _key(view.find(self.latest_by))
        if latest is not None:
            latest = f"{view.event.type} {latest}"  # a newer event of this type and value
        target = msgspec.structs.replace(self.fixed, order_key=order, latest_key=latest)
        if not self.group_by or target.grouping is None:
            return target
        keys = [_key(view.find(path)) or "" for path in self.group_by]
        key = keys[0] if len(keys) == 1 else _key(keys) or ""
        grouping = msgspec.structs.replace(target.grouping, key=key)
        return msgspec.structs.replace(target, grouping=grouping)


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def _key(value: object) -> str | None:
    """Return a JSON value as a key: equal values give equal keys."""
    if value is ABSENT:
        return None
    text = value if isinstance(value, str) else msgspec.json.encode(value, order="sorted").decode()
    if len(text) <= _KEY_LENGTH and text.isprintable():
        return text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
