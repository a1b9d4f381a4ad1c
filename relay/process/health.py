"""Whether the daemon is ready, and if not, why."""

from collections.abc import Callable

Reason = Callable[[], str | None]


class Health:
    """Collects the facts that speak against being ready."""

    def __init__(self) -> None:
        self.phase: str | None = "starting"  # "draining" at the end; None: serving
        self._reasons: list[Reason] = []

    def watch(self, reason: Reason) -> None:
        """Ask this too: a sentence when something is wrong, else None."""
        self._reasons.append(reason)

    def reasons(self) -> list[str]:
        """Return everything that is wrong now; empty: ready."""
        found = [self.phase] if self.phase else []
        return found + [text for reason in self._reasons if (text := reason())]
