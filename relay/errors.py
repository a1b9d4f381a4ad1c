"""All errors: refusals of requests, and errors for operators.

Handlers never build error texts for senders. They raise a refusal, whose class has the HTTP status and the
`reason` (a metric label from a closed list), and the source's `refuse` renders it in the sender's format.
"""

import shlex
import sys
from typing import ClassVar


def installing(package: str) -> str:
    """Return the command that installs an optional package for the Python that runs the relay."""
    return shlex.join((sys.executable, "-m", "pip", "install", package))


class RelayError(Exception):
    """An error for the operator; `hint` is the next command or the change that solves the problem."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UnknownError(RelayError):
    """The object that the operator named does not exist."""


class RestartNeededError(RelayError):
    """A reload cannot apply these changes: `keys` of config.toml, or files of plugins."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(
            f"restart needed: {', '.join(keys)}",
            hint="nothing was changed; restart the daemon, or undo these changes and reload",
        )
        self.keys = keys


class BusyError(RelayError):
    """The same operation is already running; only one may run at a time."""


class SetInConfigError(RelayError):
    """config.toml decides this, so a command cannot change it."""


class UnsupportedError(RelayError):
    """The database engine does not support this operation."""


class ForbiddenError(RelayError):
    """The token of a request to the admin API does not allow it."""


class ThrottledError(RelayError):
    """The client sent too many wrong tokens; it may try again after `seconds`."""

    def __init__(self, message: str, *, seconds: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.seconds = seconds


class StorageError(RelayError):
    """The store failed and rolled back; the call changed nothing."""


class StorageUnavailableError(StorageError):
    """The disk is full, busy or failing; the transaction was rolled back and may be retried."""


class Refusal(Exception):  # noqa: N818 - "refusal" is the project's word, and most are not errors of the relay
    """A request that the relay does not accept. The source renders the error in the sender's format.

    Attributes:
        status: HTTP status of the response, unless the source's contract demands another.
        reason: the label value of `relay_events_rejected_total`, from a closed list.
        code: a stable word for machine-readable envelopes.
        message: one sentence for the sender; never contains a secret or a header's raw value.
        field: the invalid field of the body, or `""`.
        issue: the fault of that field.
        retry_after: seconds for a `Retry-After` header, 0 for none.
        note: more about the fault, for the log and for sources whose contract leaves the text free.
    """

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "plugin_error"
    code: ClassVar[str] = "internal_error"
    text: ClassVar[str] = "Internal server error"
    pause: ClassVar[int] = 0

    def __init__(
        self, message: str = "", *, field: str = "", issue: str = "", retry_after: int = 0, note: str = ""
    ) -> None:
        super().__init__(message or self.text)
        self.message = message or self.text
        self.field = field
        self.issue = issue
        self.note = note
        self.retry_after = retry_after or self.pause

    @property
    def detail(self) -> str:
        """The field and its fault, or the message if no field is at fault."""
        return f"{self.field or self.message}: {self.issue}" if self.issue else self.message


class Malformed(Refusal):
    """The body violates its format: broken JSON, invalid UTF-8, or a truncated body."""

    status, reason, code = 400, "malformed", "malformed"
    text = "The body is not valid JSON"


class Invalid(Refusal):
    """The body is valid JSON, but a field is missing or has the wrong type."""

    status, reason, code = 400, "invalid", "validation_error"
    text = "The body is not valid"


class Conflict(Refusal):
    """The request contradicts the worker registry, and the configuration refuses such requests."""

    status, reason, code = 409, "invalid", "conflict"
    text = "Already registered"


class KeyConflict(Refusal):
    """Another request used this idempotency key, and the source has `key_conflict = "reject"`."""

    status, reason, code = 422, "key_conflict", "key_conflict"
    text = "This idempotency key has been used for another request"


class AlreadyRetried(Refusal):
    """An operator retries a refused request that an earlier retry has stored as the event `event_id`."""

    status, reason, code = 409, "invalid", "conflict"
    text = "This request was already retried"

    def __init__(self, event_id: str = "") -> None:
        super().__init__()
        self.event_id = event_id


class Unauthenticated(Refusal):
    """No token, no bearer token, or a token that is not configured.

    `problem` is `missing`, `scheme` or `unknown` respectively.
    """

    status, reason, code = 401, "auth", "unauthorized"
    text = "Missing or invalid token"

    def __init__(self, message: str = "", *, problem: str = "unknown") -> None:
        super().__init__(message)
        self.problem = problem


class Forbidden(Refusal):
    """The token is valid but lacks the scope for this request."""

    status, reason, code = 403, "forbidden", "forbidden"
    text = "The token may not do this"


class NotFound(Refusal):
    """The source has no route with this path."""

    status, reason, code = 404, "not_found", "not_found"
    text = "No such path"


class MethodNotAllowed(Refusal):
    """The path exists, but not for this method; `allow` lists the methods."""

    status, reason, code = 405, "method", "method_not_allowed"
    text = "Method not allowed"

    def __init__(self, message: str = "", *, allow: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.allow = allow


class BodyTimeout(Refusal):
    """The body did not arrive within its deadline."""

    status, reason, code = 408, "timeout", "request_timeout"
    text = "The body did not arrive in time"


class TooLarge(Refusal):
    """The body is larger than the source's `max_body`."""

    status, reason, code = 413, "too_large", "payload_too_large"
    text = "The body is too large"


class UnsupportedEncoding(Refusal):
    """A `Content-Encoding` that the source does not accept; `accepts` lists those that it accepts."""

    status, reason, code = 415, "encoding", "unsupported_encoding"
    text = "Send the body without Content-Encoding"

    def __init__(self, message: str = "", *, accepts: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.accepts = accepts


class RateLimited(Refusal):
    """The token exceeds the source's `rate_limit`."""

    status, reason, code = 429, "rate_limit", "rate_limited"
    text = "Too many requests"


class PluginFailed(Refusal):
    """The source's plugin raised an exception or returned an invalid value; nothing was stored."""

    status, reason, code = 500, "plugin_error", "internal_error"
    text = "Internal server error"


class Unavailable(Refusal):
    """The relay cannot accept requests at the moment; the sender keeps the event and retries."""

    status, code, pause = 503, "unavailable", 5
    text = "Temporarily unavailable"


class Paused(Unavailable):
    """An operator paused this source."""

    reason, pause = "paused", 30
    text = "This source is paused"


class Draining(Unavailable):
    """The daemon is stopping; it accepts the event after its restart."""

    reason = "draining"
    text = "Shutting down"


class DiskFull(Unavailable):
    """The disk has less free space than `min_free_disk`."""

    reason = "disk"
    text = "Out of disk space"


class StorageDown(Unavailable):
    """The store cannot write at the moment."""

    reason = "storage"
    text = "Storage is unavailable"


class Overloaded(Unavailable):
    """The write queue, the body budget or the connection limit is exhausted."""

    reason, pause = "overload", 1
    text = "Overloaded"


REASONS = (
    "auth",
    "forbidden",
    "malformed",
    "invalid",
    "key_conflict",
    "encoding",
    "method",
    "not_found",
    "too_large",
    "timeout",
    "rate_limit",
    "paused",
    "draining",
    "disk",
    "storage",
    "overload",
    "plugin_error",
)
"""All values of `Refusal.reason`: the label values of `relay_events_rejected_total`."""

TEMPORARY = frozenset(
    each.reason for each in (RateLimited, Paused, Draining, DiskFull, StorageDown, Overloaded)
)
"""Reasons with status 429 or 503. The sender repeats such a request, so it is not kept."""

UNROUTABLE = ("path", "method", "malformed", "too_many")
"""Reasons why a request matched no route: the label values of `relay_requests_unroutable_total`."""
