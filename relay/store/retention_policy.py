"""Retention of finished data: the time to keep an event, as a pure function of its source and type."""

import re
from collections.abc import Mapping
from fnmatch import translate

import msgspec

from relay.base.clock import SECOND
from relay.config.schema import Config, Retention, SourceRetention


class Keep(msgspec.Struct, frozen=True):
    """How long events of a kind are kept, in microseconds."""

    events: int  # from the receipt
    dead: int  # from the time one of its deliveries became dead; may exceed `events`


class Policy:
    """`[retention]` combined with the `retention` of each source; all times in microseconds."""

    def __init__(self, default: Retention, sources: Mapping[str, SourceRetention] | None = None) -> None:
        self.held = _micros(default.held)
        self.attempts = _micros(default.attempts)
        self.stats = _micros(default.stats)
        self.default = Keep(_micros(default.events), _micros(default.dead))
        self.sources: dict[str, Keep] = {}  # sources with their own rule for all of their types
        self._types: dict[str, list[tuple[re.Pattern[str], Keep]]] = {}
        for name, rules in (sources or {}).items():
            if rules.events is not None:
                self.sources[name] = Keep(_micros(rules.events), self.default.dead)
            if rules.types:
                self._types[name] = [
                    (re.compile(translate(f"{name}.{pattern}")), Keep(_micros(kept), _micros(kept)))
                    for pattern, kept in rules.types.items()
                ]

    @classmethod
    def of_config(cls, config: Config) -> "Policy":
        """Return the policy of a configuration."""
        return cls(config.retention, {name: source.retention for name, source in config.sources.items()})

    @property
    def by_type(self) -> tuple[str, ...]:
        """The sources that have rules by event type."""
        return tuple(self._types)

    def of_type(self, source: str, full_type: str) -> Keep | None:
        """Return the first rule that matches a type; None: the rule of its source applies.

        The rule also limits dead deliveries, because it is for bodies that must be deleted in time.
        """
        for pattern, keep in self._types.get(source, ()):
            if pattern.match(full_type):
                return keep
        return None

    def shortest(self, source: str) -> int:
        """Return the shortest time for which any event of a source is kept."""
        own = [keep.events for _, keep in self._types.get(source, ())]
        return min([*own, self.sources.get(source, self.default).events])

    def of(self, source: str, full_type: str) -> Keep:
        """Return the rule for events of a source and full type."""
        return self.of_type(source, full_type) or self.sources.get(source, self.default)


def _micros(seconds: float) -> int:
    return int(seconds * SECOND)
