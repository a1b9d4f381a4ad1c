"""What is wrong with a request, in words: one record per cause."""

from typing import Literal

import msgspec

Cause = Literal["secret", "encoding", "bytes", "clock", "scope", "headers", "route", "body", "plugin"]
"""Where to look: `secret` another one, `encoding` the right one written otherwise, `bytes` a body that is not
what was sent or signed, `clock`, `scope` a token that may not; and what has nothing to do with secrets."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that keeps a request from being taken. None of its texts ever holds a secret."""

    cause: Cause
    where: str  # a header, the body, or a key of config.toml
    what: str
    do: str  # what to change next


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of looking at one request."""

    findings: tuple[Finding, ...]
    fits: str | None = None  # the key of config.toml that verifies it; None: none does, or none is needed
    signature: int | None = None  # of several in the request, the first that fits, counted from 1
    type: str | None = None  # full type of the event that it would become
    subject: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings
