"""The cap over all lanes, and each lane's own share outside it."""

from collections import deque
from typing import Protocol

CAP = 256
OWN = 2
"""Slots of every lane that the cap does not touch: even behind 255 hanging sends it moves."""


class Waiter(Protocol):
    """Who wants to be told when a slot is free."""

    def turn(self) -> None:
        """Try again; take what is needed, or nothing."""
        ...


class Slots:
    """Counts attempts being made; who is refused is told when one ends, first come, first served."""

    def __init__(self, cap: int = CAP) -> None:
        self._free = cap
        self._waiting: deque[Waiter] = deque()

    def take(self, waiter: Waiter, active: int) -> bool:
        """Take a slot for a lane with `active` attempts under way; False: wait to be told."""
        if active < OWN:
            return True
        if self._free > 0:
            self._free -= 1
            return True
        if waiter not in self._waiting:
            self._waiting.append(waiter)
        return False

    def give(self, active: int) -> None:
        """Give a slot back; `active` are those that the lane has left."""
        if active < OWN:
            return
        self._free += 1
        while self._free > 0 and self._waiting:
            # One that has nothing to send any more takes nothing: then it is the next one's.
            self._waiting.popleft().turn()
