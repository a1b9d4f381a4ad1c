"""How far one page looks for what is rare: so many candidates, and so long; the next one goes on."""

import asyncio

MOST_CANDIDATES = 10_000

SECONDS = 0.025
"""The step under way is ended."""

STEP = 500  # candidates that one statement looks at
DEEP_STEP = 100  # of which bodies are read
FIRST = 50  # at least, so that a short page gets on as well


class Bound:
    """One page's."""

    def __init__(self, *, deep: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._left = MOST_CANDIDATES
        self._step = DEEP_STEP if deep else STEP
        self._deadline = self._loop.time() + SECONDS

    def step(self, wanted: int) -> int:
        """Return how many candidates to look at next."""
        return min(max(wanted, FIRST), self._step, self._left)

    def reached(self, looked: int) -> bool:
        """Note that so many more have been looked at; say whether that is enough."""
        self._left -= looked
        return self._left <= 0 or self._loop.time() >= self._deadline
