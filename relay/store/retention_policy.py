"""How long what has been dealt with is kept: a pure rule, asked per event."""

import re
from collections.abc import Mapping
from fnmatch import translate

import msgspec

from relay.base.clock import SECOND
from relay.config.schema import Config, Retention, SourceRetention


class Keep(msgspec.Struct, frozen=True):
    """How long events of a kind are kept, in microseconds."""

    events: int  # since their receipt
    dead: int  # since a delivery of theirs died, whatever `events` says


class Policy:
    """What `[retention]` and the sources' own `retention` say together; all in microseconds."""

    def __init__(self, default: Retention, sources: Mapping[str, SourceRetention] | None = None) -> None:
        self.held = _micros(default.held)
        self.attempts = _micros(default.attempts)
        self.stats = _micros(default.stats)
        self.default = Keep(_micros(default.events), _micros(default.dead))
        self.sources: dict[str, Keep] = {}  # that differ from the default in all of their types
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
        """Return what a whole config says."""
        return cls(config.retention, {name: source.retention for name, source in config.sources.items()})

    @property
    def by_type(self) -> tuple[str, ...]:
        """The sources of which some types are kept differently."""
        return tuple(self._types)

    def of_type(self, source: str, full_type: str) -> Keep | None:
        """Return the rule of a type's own, the first that fits; None: its source's holds.

        One of these is for bodies that nobody shall have for longer: it limits what is dead as well.
        """
        for pattern, keep in self._types.get(source, ()):
            if pattern.match(full_type):
                return keep
        return None

    def shortest(self, source: str) -> int:
        """Return the least time for which any event of a source is kept."""
        own = [keep.events for _, keep in self._types.get(source, ())]
        return min([*own, self.sources.get(source, self.default).events])

    def of(self, source: str, full_type: str) -> Keep:
        """Return how long events of this source and full type are kept."""
        return self.of_type(source, full_type) or self.sources.get(source, self.default)


def _micros(seconds: float) -> int:
    return int(seconds * SECOND)
