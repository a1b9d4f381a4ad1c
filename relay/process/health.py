"""Whether the daemon is ready, and if not, why."""

from collections.abc import Callable

Reason = Callable[[], str | None]


class Health:
    """Collects the reasons why the daemon is not ready."""

    def __init__(self) -> None:
        self.phase: str | None = "starting"  # "draining" at the end; None: serving
        self._reasons: list[Reason] = []

    def watch(self, reason: Reason) -> None:
        """Add a check that returns a sentence if something is wrong, else None."""
        self._reasons.append(reason)

    def reasons(self) -> list[str]:
        """Return all current reasons; an empty list means ready."""
        found = [self.phase] if self.phase else []
        return found + [text for reason in self._reasons if (text := reason())]
