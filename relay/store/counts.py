"""What there is to be counted of a destination."""

import msgspec


class Counts(msgspec.Struct, kw_only=True, frozen=True):
    """One destination's books: `created` equals the sum of all the others, always."""

    created: int = 0
    delivered: int = 0
    dead: int = 0
    expired: int = 0
    cancelled: int = 0
    pending: int = 0  # counted in the table, not derived: that is what makes the books of `counts` a check

    @property
    def unaccounted(self) -> int:
        """Created minus everything that is known of; 0 unless a delivery got lost."""
        return self.created - self.delivered - self.dead - self.expired - self.cancelled - self.pending


class Backlog(msgspec.Struct, frozen=True):
    """What a destination is owed at the moment."""

    due: int  # pending deliveries whose time has come
    oldest: int  # when the oldest pending one was created
    row: int  # which one that is
