"""The clock of a cluster: it follows the server's clock without a jump, whatever the network does."""

import random

import pytest

from relay.base.clock import SECOND
from relay.store.postgres.clock import DRIFT, SLEW, ServerClock


class Machine:
    """A local clock, and a server whose clock is ahead; answers take the test's time."""

    def __init__(self, ahead=0.0):
        self.now = 1_700_000_000 * SECOND
        self.ahead = int(ahead * SECOND)
        self.clock = ServerClock(self)

    def wall(self):
        return self.now

    def steady(self):
        return self.now

    def advance(self, seconds):
        self.now += int(seconds * SECOND)

    def compare(self, there=0.0, back=0.0):
        sent = self.clock.local()
        self.advance(there)
        server = self.now + self.ahead
        self.advance(back)
        self.clock.compare(sent, self.clock.local(), server)

    @property
    def error(self):
        return (self.clock.steady() - self.now - self.ahead) / SECOND


def test_before_the_first_comparison_it_is_the_local_clock():
    machine = Machine(ahead=100)
    assert machine.clock.steady() == machine.clock.wall() == machine.now


@pytest.mark.parametrize("ahead", [-3600, -0.5, 0, 0.5, 3600])
def test_the_first_comparison_sets_the_clock(ahead):
    machine = Machine(ahead)
    machine.compare(0.001, 0.001)
    assert machine.error == 0
    assert machine.clock.wall() == machine.clock.steady()  # also of nodes whose machines' clocks are wrong


def test_half_the_round_trip_bounds_the_error():
    machine = Machine(ahead=10)
    machine.compare(there=0.4, back=0.0)
    assert machine.error == pytest.approx(0.2)


def test_the_smallest_round_trip_wins():
    machine = Machine(ahead=10)
    machine.compare(0.0, 0.4)
    machine.compare(0.001, 0.001)
    machine.compare(1.0, 0.0)  # worse than the known one
    machine.advance(60)
    assert machine.error == 0


def test_an_old_comparison_counts_less():
    machine = Machine(ahead=10)
    machine.compare(0.001, 0.001)
    machine.advance(0.01 * DRIFT)
    machine.ahead += SECOND // 100  # the machine's clock has drifted
    machine.compare(0.005, 0.005)
    machine.advance(60)
    assert machine.error == 0


@pytest.mark.parametrize("step", [-60, -1, 1, 60])
def test_a_step_of_the_server_is_followed_slowly_and_never_back(step):
    machine = Machine()
    machine.compare()
    machine.ahead = step * SECOND
    before, seconds = machine.clock.steady(), 0
    while machine.error:
        assert seconds <= abs(step) * SLEW
        machine.compare()
        machine.advance(1)
        seconds += 1
        now = machine.clock.steady()
        assert SECOND - SECOND // SLEW <= now - before <= SECOND + SECOND // SLEW
        before = now
    assert seconds == abs(step) * SLEW
    assert machine.clock.behind == 0


def test_the_clock_shows_its_lag():
    machine = Machine()
    machine.compare()
    machine.ahead = 10 * SECOND
    machine.compare()
    assert machine.clock.behind == 10 * SECOND
    machine.advance(100)
    assert machine.clock.behind == 5 * SECOND


def test_random_comparisons_never_move_it_back():
    rand = random.Random(15)
    machine = Machine()
    before = 0
    for _ in range(5000):
        machine.ahead += rand.randrange(-SECOND, SECOND)
        machine.compare(rand.random() / 10, rand.random() / 10)
        machine.advance(rand.random() / 1000)
        now = machine.clock.steady()
        assert now >= before
        before = now
