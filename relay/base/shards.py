"""Shards: the parts of a destination's deliveries that different nodes of a cluster send at the same time.

A delivery has a slot, a number that never changes. A shard is a set of slots, so a new number of shards
changes no stored delivery. Deliveries with the same key have the same slot.
"""

import hashlib

import msgspec

SLOTS = 48
"""Number of slots. It is divisible by 2, 3, 4, 6, 8, 12 and 16. A claim reads one index range per slot."""

MOST_SHARDS = 16
"""Shards of a destination: two for each of the eight loaded nodes that one PostgreSQL server can serve."""

_HEX = 16
_ID_DIGITS = 4  # the last digits of an id, which are random


def slot_of(key: str | None, public_id: str) -> int:
    """Return the slot of a delivery: by its key, or by its id if it has no key.

    `SLOT_SQL` of `relay.store.postgres.shards` computes the same.

    >>> slot_of("order 1", "") == slot_of("order 1", "dlv_0190aaaa-bbbb-7ccc-8ddd-eeeeeeeeeeee")
    True
    >>> slot_of(None, "dlv_0190aaaa-bbbb-7ccc-8ddd-eeeeeeee0031")
    1
    """
    if key is None:
        return int(public_id[-_ID_DIGITS:], _HEX) % SLOTS
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:2]) % SLOTS


def lane_of(destination: str, slot: int | None, count: int) -> str:
    """Return the name of the lane that sends a delivery; `count` is the number of shards, 1 or more.

    With several shards, no lane sends a delivery until it has a slot. Until then, the first lane may end it.

    >>> lane_of("crm", 5, 4), lane_of("crm", None, 4), lane_of("crm", 5, 1)
    ('crm/1', 'crm/0', 'crm')
    """
    return destination if count == 1 else f"{destination}/{(slot or 0) % count}"


def destination_of(lane: str) -> str:
    """Return the destination of a lane: a name never contains a slash.

    >>> destination_of("crm/1"), destination_of("crm")
    ('crm', 'crm')
    """
    return lane.partition("/")[0]


class Shards(msgspec.Struct, frozen=True):
    """Some of a destination's shards."""

    count: int  # of all shards; 0: the number is changing, and nothing is sent
    numbers: frozenset[int]  # from 0

    def covers(self, slot: int | None) -> bool:
        """Return whether the deliveries of a slot belong to these shards."""
        return slot is not None and self.count > 0 and slot % self.count in self.numbers

    @property
    def slots(self) -> tuple[int, ...]:
        """The slots of these shards."""
        return tuple(filter(self.covers, range(SLOTS)))

    @property
    def is_all(self) -> bool:
        """Whether these are all shards."""
        return 0 < self.count == len(self.numbers)

    def share(self, total: int) -> int:
        """Return the part of a limit that these shards have; the parts of all shards add up to the limit.

        >>> [Shards(4, frozenset({number})).share(10) for number in range(4)]
        [3, 3, 2, 2]
        """
        if self.count == 0:
            return 0
        each, more = divmod(total, self.count)
        return sum(each + (number < more) for number in self.numbers)
