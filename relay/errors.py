"""Every way a request or the daemon itself can say no.

Handlers never build error text for the wire: they raise a refusal, its class has the HTTP status and
the closed `reason` (a metric label), and the source's `refuse` puts it into the sender's envelope.
"""

from typing import ClassVar


class RelayError(Exception):
    """Something the operator has to know; `hint` is what to type or change next."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UnknownError(RelayError):
    """What an operator named is not there."""


class RestartNeededError(RelayError):
    """What has changed can only be taken in by a start: `keys` of config.toml, files of plugins."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__(
            f"restart needed: {', '.join(keys)}",
            hint="nothing was changed; restart the relay, or put these back and reload",
        )
        self.keys = keys


class BusyError(RelayError):
    """What is asked for is under way already, and goes one at a time."""


class StorageError(RelayError):
    """The store could not do what was asked; nothing of it was kept."""


class StorageUnavailableError(StorageError):
    """The disk is full, busy or failing: the whole batch was rolled back and may be sent again."""


class Refusal(Exception):  # noqa: N818 - a refusal is the field's word, and most are no errors of ours
    """A request that is not accepted; the sender hears it in its own envelope.

    Attributes:
        status: HTTP status of the answer, unless the source's contract has another.
        reason: the closed metric label of `relay_events_rejected_total`.
        code: a stable word for machine-readable envelopes.
        message: one sentence for the sender; never holds a secret or a header's raw value.
        field: the field of the body that is wrong, `""` where none is to blame.
        issue: what is wrong with that field.
        retry_after: seconds for a `Retry-After` header, 0 for none.
    """

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "plugin_error"
    code: ClassVar[str] = "internal_error"
    text: ClassVar[str] = "Internal server error"
    pause: ClassVar[int] = 0

    def __init__(self, message: str = "", *, field: str = "", issue: str = "", retry_after: int = 0) -> None:
        super().__init__(message or self.text)
        self.message = message or self.text
        self.field = field
        self.issue = issue
        self.retry_after = retry_after or self.pause

    @property
    def detail(self) -> str:
        """What is wrong with which field, or the message where no field is to blame."""
        return f"{self.field or self.message}: {self.issue}" if self.issue else self.message


class Malformed(Refusal):
    """The body is not what its format demands: broken JSON, invalid UTF-8, a body cut short."""

    status, reason, code = 400, "malformed", "malformed"
    text = "The body is not valid JSON"


class Invalid(Refusal):
    """The body can be read, but a field is missing or of the wrong kind."""

    status, reason, code = 400, "invalid", "validation_error"
    text = "The body is not valid"


class Conflict(Refusal):
    """What is asked contradicts what is registered, and the operator wants that refused."""

    status, reason, code = 409, "invalid", "conflict"
    text = "Already registered"


class KeyConflict(Refusal):
    """An idempotency key that another request has had, at a source with `key_conflict = "reject"`."""

    status, reason, code = 422, "key_conflict", "key_conflict"
    text = "This idempotency key has been used for another request"


class Unauthenticated(Refusal):
    """No token, not a bearer token, or one that nobody configured.

    `problem` tells the three apart: `missing`, `scheme` or `unknown`.
    """

    status, reason, code = 401, "auth", "unauthorized"
    text = "Missing or invalid token"

    def __init__(self, message: str = "", *, problem: str = "unknown") -> None:
        super().__init__(message)
        self.problem = problem


class Forbidden(Refusal):
    """The token is known and may not do this."""

    status, reason, code = 403, "forbidden", "forbidden"
    text = "The token may not do this"


class NotFound(Refusal):
    """No route of this source has that path."""

    status, reason, code = 404, "not_found", "not_found"
    text = "No such path"


class MethodNotAllowed(Refusal):
    """The path exists under other methods, which `allow` lists."""

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
    """A `Content-Encoding` other than identity; inflating hostile bodies froze peers for seconds."""

    status, reason, code = 415, "encoding", "unsupported_encoding"
    text = "Send the body without Content-Encoding"


class RateLimited(Refusal):
    """More requests per token than the source's `rate_limit`."""

    status, reason, code = 429, "rate_limit", "rate_limited"
    text = "Too many requests"


class PluginFailed(Refusal):
    """The source's plugin raised or returned nonsense; nothing was stored."""

    status, reason, code = 500, "plugin_error", "internal_error"
    text = "Internal server error"


class Unavailable(Refusal):
    """Something of ours is in the way for the moment; the sender keeps the event and tries again."""

    status, code, pause = 503, "unavailable", 5
    text = "Temporarily unavailable"


class Paused(Unavailable):
    """An operator paused this source."""

    reason, pause = "paused", 30
    text = "This source is paused"


class Draining(Unavailable):
    """The daemon is stopping; its successor will take the event."""

    reason = "draining"
    text = "Shutting down"


class DiskFull(Unavailable):
    """Less free space than `min_free_disk`."""

    reason = "disk"
    text = "Out of disk space"


class StorageDown(Unavailable):
    """The store cannot write at the moment."""

    reason = "storage"
    text = "Storage is unavailable"


class Overloaded(Unavailable):
    """The write queue, the budget of bytes in flight or the connection cap is used up."""

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
"""Every `reason` a refusal may carry: the label values of `relay_events_rejected_total`."""

UNROUTABLE = ("path", "method", "malformed", "too_many")
"""Why a request matched no route: the label values of `relay_requests_unroutable_total`."""
