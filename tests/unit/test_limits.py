"""The slots that all lanes share."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from relay.delivery.limits import OWN_SLOTS, Slots


class Waiter:
    """A lane for the slots: it wants a number of slots, and takes all it can on its turn."""

    def __init__(self, slots, wants):
        self.slots = slots
        self.wants = wants
        self.active = 0
        self.turns = 0

    def turn(self):
        self.turns += 1
        self.fill()

    def fill(self):
        while self.active < self.wants and self.slots.take(self, self.active):
            self.active += 1

    def end(self):
        self.active -= 1
        self.slots.give(self.active)


def test_every_lane_has_two_slots_beside_the_shared_ones():
    slots = Slots(shared=3)
    greedy, modest = Waiter(slots, 10), Waiter(slots, 10)
    greedy.fill()
    modest.fill()
    assert (greedy.active, modest.active) == (5, 2)


def test_a_refused_lane_gets_its_turn_when_a_slot_is_free():
    slots = Slots(shared=1)
    first, second = Waiter(slots, 3), Waiter(slots, 3)
    first.fill()
    second.fill()
    assert (second.active, second.turns) == (2, 0)
    first.wants = 0
    first.end()
    assert (second.active, second.turns) == (3, 1)


def test_a_lane_refused_often_gets_one_turn():
    slots = Slots(shared=1)
    first, second = Waiter(slots, 3), Waiter(slots, 3)
    first.fill()
    for _ in range(3):
        second.fill()
    first.wants = second.wants = 0
    first.end()
    assert second.turns == 1


def test_own_slots_free_no_shared_slot():
    slots = Slots(shared=0)
    first, second = Waiter(slots, 3), Waiter(slots, 3)
    first.fill()
    second.fill()
    first.end()
    assert (second.active, second.turns) == (2, 0)


def test_a_slot_that_one_waiter_does_not_take_goes_to_the_next():
    slots = Slots(shared=1)
    holder, paused, waiting = Waiter(slots, 3), Waiter(slots, 3), Waiter(slots, 3)
    for waiter in (holder, paused, waiting):
        waiter.fill()
    paused.wants = holder.wants = 0
    holder.end()
    assert (paused.active, waiting.active) == (2, 3)


def test_waiters_are_served_in_order_of_arrival():
    slots = Slots(shared=1)
    lanes = [Waiter(slots, 3) for _ in range(4)]
    for lane in lanes:
        lane.fill()
    served = []
    for holder in lanes[:-1]:
        holder.wants = 0
        holder.end()
        served += [number for number, lane in enumerate(lanes) if lane.active == 3]
    assert served == [1, 2, 3]


@given(
    cap=st.integers(0, 6),
    wants=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ends=st.lists(st.integers(0, 5), max_size=60),
)
def test_shared_slots_are_never_exceeded_and_never_left_unused(cap, wants, ends):
    slots = Slots(cap)
    lanes = [Waiter(slots, want) for want in wants]
    for lane in lanes:
        lane.fill()
    for number in ends:
        lane = lanes[number % len(lanes)]
        if lane.active:
            lane.wants -= 1
            lane.end()
            lane.fill()
        shared = Counter({lane: max(0, lane.active - OWN_SLOTS) for lane in lanes}).total()
        lacking = any(lane.active < lane.wants for lane in lanes)
        assert shared == cap if lacking else shared <= cap
    for lane in lanes:
        lane.wants = 0
        while lane.active:
            lane.end()
    late = Waiter(slots, 100)
    late.fill()
    assert late.active == cap + OWN_SLOTS
