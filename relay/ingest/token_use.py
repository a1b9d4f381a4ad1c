"""Which tokens and secrets senders use, so that an operator knows when an old one can be removed.

The check of a sender only adds 1 to the count of the token that matches (`relay.config.secrets.Usage`). Times
and metrics follow these counts every `EVERY` seconds.
"""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from relay.base.clock import SECOND, Clock
from relay.config.schema import AdminToken
from relay.config.secrets import Credential, Secret, Secrets, Usage
from relay.ingest.routes import Mount
from relay.metrics import Metrics
from relay.source import Source

EVERY = 15.0
"""Seconds between two updates: the precision of the time of the last use."""

ADMIN = ""
"""Stands for the admin API in place of a source's name."""


class Use(msgspec.Struct, frozen=True):
    """How often a token was used. Times are wall clock."""

    since: int  # the count begins here
    count: int
    last: int | None


def merged(uses: Sequence[Use]) -> Use:
    """Return the use of a token at all nodes. From `since` on, all nodes have counted."""
    return Use(
        since=max(use.since for use in uses),
        count=sum(use.count for use in uses),
        last=max((use.last for use in uses if use.last is not None), default=None),
    )


class TokenUse(msgspec.Struct):
    """The use of one token since the daemon started, or since its name was added."""

    name: str  # from config.toml; else of its variable, file or credential; else its key
    key: str  # such as `tokens[0]`
    since: int  # wall clock
    usage: Usage
    seen: int = 0  # the part of `usage` that is in `uses`
    uses: int = 0
    last_used: int | None = None  # wall clock

    @property
    def use(self) -> Use:
        """The use since `since`."""
        return Use(self.since, self.uses, self.last_used)


class TokenUses:
    """The use of the tokens of all sources and of the admin API."""

    def __init__(self, metrics: Metrics, clock: Clock, admin: Iterable[AdminToken] = ()) -> None:
        self._metrics = metrics
        self._clock = clock
        self._watched: dict[str, dict[str, TokenUse]] = {}  # by source and name of the token
        self._watch(
            ADMIN, ((f"tokens[{index}]", each.title, each.secret.usage) for index, each in enumerate(admin))
        )

    def adopt(self, mounts: Iterable[Mount]) -> None:
        """Watch the tokens of these sources. A token whose name existed before keeps its count."""
        self.update()
        gone = self._watched.keys() - {ADMIN}
        for mount in mounts:
            self._watch(mount.name, _tokens_of(mount.source))
            gone.discard(mount.name)
        for source in gone:
            self._watch(source, ())
            del self._watched[source]

    def update(self) -> None:
        """Update times and metrics."""
        now = self._clock.wall()
        for source, watched in self._watched.items():
            for use in watched.values():
                if new := use.usage.count - use.seen:
                    use.seen, use.uses, use.last_used = use.usage.count, use.uses + new, now
                    self._metrics.token_uses.labels(source, use.name).inc(new)
                    self._metrics.token_used_at.labels(source, use.name).set(now / SECOND)

    async def run(self) -> None:
        """Update times and metrics, as a periodic job."""
        self.update()

    def of(self, source: str) -> tuple[TokenUse, ...]:
        """Return the tokens of a source, up to date, in the order of its settings."""
        self.update()
        return tuple(self._watched.get(source, {}).values())

    def _watch(self, source: str, tokens: Iterable[tuple[str, str, Usage]]) -> None:
        former, found = self._watched.get(source, {}), dict[str, TokenUse]()
        for key, given, usage in tokens:
            name = given or key
            if name in found:
                name = f"{name} ({key})"
            use = former.get(name) or TokenUse(name=name, key=key, since=self._clock.wall(), usage=usage)
            found[name] = msgspec.structs.replace(use, key=key, usage=usage, seen=usage.count)
            self._metrics.token_uses.labels(source, name)  # exported as 0 from the start
            self._metrics.token_used_at.labels(source, name)
        for name in former.keys() - found.keys():
            self._metrics.token_uses.remove(source, name)
            self._metrics.token_used_at.remove(source, name)
        self._watched[source] = found


def _tokens_of(source: Source) -> Iterator[tuple[str, str, Usage]]:
    """Yield key, name and use of each secret in the settings of a source."""
    for field in msgspec.structs.fields(source):
        value = getattr(source, field.name)
        if isinstance(value, Secret):
            yield field.encode_name, value.name, value.usage
        elif isinstance(value, Secrets | tuple):
            for index, each in enumerate(value):
                if isinstance(each, Secret | Credential):
                    yield f"{field.encode_name}[{index}]", each.name, each.usage
