"""Shards: slots of deliveries, and the parts of limits."""

import hashlib

import pytest

from relay.base.ids import DELIVERY, new_id
from relay.base.shards import MOST_SHARDS, SLOTS, Shards, destination_of, lane_of, slot_of


@pytest.mark.parametrize("key", ["", "order 1", "größe", "\ud83d"])
def test_equal_keys_have_equal_slots(key):
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    assert slot_of(key, "dlv_1") == slot_of(key, "dlv_2") == int(digest[:4], 16) % SLOTS


def test_deliveries_without_a_key_are_spread_by_their_ids():
    found = [slot_of(None, new_id(DELIVERY, 1)) for _ in range(4800)]
    counts = [found.count(slot) for slot in range(SLOTS)]
    assert min(counts) > 50
    assert max(counts) < 170


@pytest.mark.parametrize("count", range(1, MOST_SHARDS + 1))
def test_each_slot_belongs_to_one_shard_and_each_part_of_a_limit_to_one(count):
    each = [Shards(count, frozenset({number})) for number in range(count)]
    for slot in range(SLOTS):
        [owner] = [shards for shards in each if shards.covers(slot)]
        assert slot in owner.slots
        if count > 1:
            assert lane_of("crm", slot, count) == f"crm/{min(owner.numbers)}"
    for total in (count, count + 1, 97):
        parts = [shards.share(total) for shards in each]
        assert sum(parts) == total
        assert min(parts) >= 1
        assert Shards(count, frozenset(range(count))).share(total) == total
    sizes = [len(shards.slots) for shards in each]
    assert max(sizes) - min(sizes) <= 1
    assert Shards(count, frozenset(range(count))).is_all


def test_nothing_belongs_to_shards_while_their_number_changes():
    changing = Shards(0, frozenset())
    assert not any(map(changing.covers, range(SLOTS)))
    assert (changing.share(8), changing.slots, changing.is_all) == (0, (), False)


def test_a_delivery_without_a_slot_belongs_to_no_shard():
    assert not Shards(2, frozenset({0, 1})).covers(None)
    assert lane_of("crm", None, 2) == "crm/0"
    assert destination_of("crm/0") == destination_of("crm") == "crm"
