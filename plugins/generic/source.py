"""The generic source: reads requests of any sender, as its settings describe."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from relay.source import Accepted, Incoming, MethodNotAllowed, Reply

from .compiled import Compiled
from .keys import Keys
from .reading import WITHOUT_BODY
from .samples import example_of, renewed
from .settings import Sample, Verify


class Generic(Keys, kind="generic", dict=True):
    """A source for any sender, described by its settings.

    Raises:
        ExceptionGroup: settings that are wrong or contradict each other; each names its key.
    """

    def __post_init__(self) -> None:
        _ = self.compiled

    @cached_property
    def compiled(self) -> Compiled:
        """The compiled settings."""
        return Compiled(self)

    @classmethod
    def merged(cls, preset: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
        """Return a table with defaults: `context` name by name, `verify` key by key of the same scheme."""
        merged = {**preset, **table}
        default, own = preset.get("verify"), table.get("verify")
        if isinstance(default, dict) and isinstance(own, dict) and default.keys() == own.keys():
            merged["verify"] = {
                scheme: {**keys, **own[scheme]} if isinstance(own[scheme], dict) else own[scheme]
                for scheme, keys in default.items()
            }
        default, own = preset.get("context"), table.get("context")
        if isinstance(default, dict) and isinstance(own, dict):
            merged["context"] = {**default, **own}
        return merged

    def routes(self) -> tuple[tuple[str, str, str], ...]:
        """Return a route for each path and method; methods of handshakes alone have no events."""
        others = dict.fromkeys(each.method for each in self.handshakes if each.method not in self.methods)
        return tuple(
            (method, path, name)
            for path in self.paths
            for methods, name in ((self.methods, "receive"), (others, "answer"))
            for method in methods
        )

    def needs_body(self) -> bool:
        """Return whether signatures, keys in the body or handshakes need the body."""
        return self.compiled.needs_body

    def screen(self, incoming: Incoming) -> None:
        """Check the sender's address."""
        self.compiled.check_network(incoming)

    def handshake(self, incoming: Incoming) -> Reply | None:
        """Answer a handshake that needs no verified sender."""
        early = self.compiled.early
        return self.compiled.greet(early, incoming) if early else None

    def verify(self, incoming: Incoming) -> None:
        """Check the sender's credentials."""
        self.compiled.scheme.check(incoming)

    def receive(self, incoming: Incoming) -> Accepted | Reply:
        """Accept the event or the events of a request."""
        compiled = self.compiled
        if compiled.late and (reply := compiled.greet(compiled.late, incoming)) is not None:
            return reply
        return compiled.accept(incoming)

    def answer(self, incoming: Incoming) -> Reply:
        """Answer a verified handshake; requests with its method are not events."""
        reply = self.compiled.greet(self.compiled.late, incoming)
        if reply is None:
            raise MethodNotAllowed(allow=self.methods)
        return reply

    def is_open(self) -> bool:
        """Return whether no credentials are checked.

        Networks do not count: a web page that somebody in such a network visits can send from there.
        """
        return self.verification == "none"

    def warnings(self) -> tuple[str, ...]:
        """See `Source.warnings`."""
        found = []
        if self.is_open() and not self.networks:
            found.append('open to everyone who can reach it: verify = "none"')
        if (
            isinstance(self.verification, Verify)
            and self.verification.api_key
            and self.verification.api_key.query
        ):
            found.append("the key is in the URL, which proxies log; use a header if the sender supports that")
        return tuple(found)

    def diagnose(self, incoming: Incoming) -> tuple[str, ...]:
        """Return the faults of a refused request."""
        return tuple(self.compiled.scheme.explain(incoming))

    def samples(self) -> tuple[Incoming, ...]:
        """Return the configured samples, or a default one; `relay send --data` replaces its body."""
        method = self.methods[0]
        body, headers = example_of(self.type, self.events)
        if method in WITHOUT_BODY:
            del headers["Content-Type"]
            body = ""
        made = Sample(name="request", method=method, headers=headers, body=body)
        return tuple(each.request(self.paths[0]) for each in self.examples or (made,))

    def sign(self, incoming: Incoming) -> Incoming:
        """Return a sample with credentials, and with a new idempotency key."""
        return self.compiled.scheme.sign(renewed(incoming, self.key, self.events))
