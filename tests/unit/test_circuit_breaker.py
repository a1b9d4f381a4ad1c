"""The circuit breaker as a state machine: opening, probing, recovering."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.base.clock import SECOND
from relay.config.schema import CircuitConfig
from relay.delivery.circuit_breaker import FAILURE_RESULTS, NEUTRAL_RESULTS, CircuitBreaker
from relay.model import RESULTS

NOW = 1_700_000_000 * SECOND
LIFE = sorted(set(RESULTS) - FAILURE_RESULTS - NEUTRAL_RESULTS)


class Destination:
    """A circuit breaker with a clock, fed with results of attempts."""

    def __init__(self, concurrency=8, **config):
        self.circuit = CircuitBreaker(CircuitConfig(**config), concurrency)
        self.now = NOW

    def ends(self, *results):
        """Record attempts that began just now, and return the change by the last one."""
        changes = [self.circuit.record(result, self.now, self.circuit.openings) for result in results]
        return changes[-1]

    def after(self, seconds):
        self.now += int(seconds * SECOND)
        return self

    @property
    def limit(self):
        return self.circuit.limit(self.now)

    @property
    def probe_in(self):
        return (self.circuit.open_until - self.now) / SECOND


def opened(**config):
    destination = Destination(**config)
    assert destination.ends(*["timeout"] * 10) == "opened"
    return destination


@pytest.mark.parametrize("result", sorted(FAILURE_RESULTS))
def test_ten_failures_of_one_kind_in_a_row_open_the_circuit_and_nine_do_not(result):
    destination = Destination()
    assert destination.ends(*[result] * 9) is None
    assert (destination.limit, destination.circuit.is_open) == (8, False)
    assert destination.ends(result) == "opened"
    assert (destination.limit, destination.circuit.is_open) == (0, True)


def test_different_failures_add_up():
    assert Destination().ends(*sorted(FAILURE_RESULTS), "dns", "5xx", "429") == "opened"


@pytest.mark.parametrize("result", LIFE)
def test_any_other_response_resets_the_count(result):
    destination = Destination()
    assert destination.ends(*["5xx"] * 9, result, *["5xx"] * 9) is None
    assert destination.ends("5xx") == "opened"


@pytest.mark.parametrize("result", sorted(NEUTRAL_RESULTS))
def test_an_attempt_that_sent_nothing_changes_nothing(result):
    destination = Destination()
    assert destination.ends(*["connect", result] * 9) is None
    assert destination.ends(result) is None
    assert destination.ends("connect") == "opened"
    assert destination.after(30).ends(result) is None
    assert destination.circuit.is_open


def test_the_number_of_failures_is_configurable():
    assert Destination(failures=1).ends("dns") == "opened"
    assert Destination(failures=3).ends("dns", "dns") is None


def test_one_probe_is_allowed_after_the_wait_and_not_before():
    destination = opened()
    assert destination.after(29.999999).limit == 0
    assert destination.after(0.000001).limit == 1
    assert destination.after(3600).limit == 1


def test_failed_probes_double_the_wait_up_to_the_maximum():
    destination, waits = opened(), []
    for _ in range(7):
        waits.append(destination.probe_in)
        assert destination.after(destination.probe_in).ends("timeout") is None
    assert waits == [30, 60, 120, 240, 300, 300, 300]


@pytest.mark.parametrize(("wait", "next_wait"), [(0, 10), (5, 10), (40, 80), (1000, 300), (86_400, 300)])
def test_a_circuit_that_was_open_before_goes_on_doubling_the_wait_within_its_limits(wait, next_wait):
    destination = Destination(probe=5.0, max_probe=300.0)
    destination.circuit.open_again(destination.now, wait * SECOND)
    assert destination.limit == 1
    assert destination.ends("timeout") is None
    assert destination.probe_in == next_wait


@pytest.mark.parametrize("result", LIFE)
def test_a_successful_probe_closes_the_circuit_and_resets_the_wait(result):
    destination = opened()
    destination.after(30).ends("timeout")
    assert destination.after(60).ends(result) == "recovered"
    assert not destination.circuit.is_open
    assert destination.ends("timeout") == "opened"
    assert destination.probe_in == 30


@pytest.mark.parametrize(
    ("concurrency", "allowed"),
    [
        (1, [1, 1, 1, 1]),
        (2, [1, 2, 2, 2]),
        (3, [1, 2, 2, 3]),
        (8, [1, 2, 2, 4, 4, 4, 4, 8, 8]),
        (20, [1, *[2] * 2, *[4] * 4, *[8] * 8, *[16] * 16, 20, 20]),
    ],
)
def test_after_recovery_each_full_round_of_responses_doubles_the_limit(concurrency, allowed):
    destination = opened(concurrency=concurrency)
    destination.after(30).ends("ok")
    seen = []
    for _ in allowed:
        seen.append(destination.limit)
        destination.ends("ok")
    assert seen == allowed


@pytest.mark.parametrize("answers", range(7))
def test_a_failure_while_ramping_up_opens_the_circuit_at_once(answers):
    destination = opened(concurrency=8)
    destination.after(30).ends("ok", *["ok"] * answers)
    assert destination.ends("5xx") == "opened"
    assert (destination.limit, destination.probe_in) == (0, 30)


def test_after_the_ramp_ten_failures_in_a_row_are_needed_again():
    destination = opened(concurrency=8)
    destination.after(30).ends("ok", *["ok"] * 7)
    assert destination.ends(*["5xx"] * 9) is None
    assert destination.ends("5xx") == "opened"


def test_late_failures_of_attempts_from_before_the_opening_are_not_failed_probes():
    destination = opened()
    for seconds in (1, 29, 60):  # before the probe is due, and long after
        assert destination.after(seconds).circuit.record("timeout", destination.now, 0) is None
    assert destination.circuit.open_until == NOW + 30 * SECOND
    assert destination.limit == 1


def test_late_failures_of_attempts_from_before_the_opening_do_not_stop_a_recovery():
    destination = opened()
    destination.after(30).ends("ok")
    assert destination.circuit.record("timeout", destination.now, 0) is None
    assert destination.limit == 1


def test_a_late_success_of_an_attempt_from_before_the_opening_closes_the_circuit():
    destination = opened()
    assert destination.after(1).circuit.record("ok", destination.now, 0) == "recovered"


def test_an_operator_can_make_the_probe_due_now():
    destination = opened()
    destination.after(30).ends("timeout")
    destination.circuit.probe_by(destination.now)
    assert destination.limit == 1
    destination.ends("timeout")
    assert destination.probe_in == 60


def test_a_closed_circuit_ramps_up_and_forgets_failures():
    destination = opened()
    destination.after(30).ends("timeout")
    assert destination.circuit.close() == "recovered"
    assert (destination.limit, destination.circuit.is_open) == (1, False)
    destination.ends("ok")
    assert destination.limit == 2
    assert destination.circuit.close() is None
    assert destination.limit == 2


def test_a_probe_from_before_the_closing_does_not_open_the_circuit_again():
    destination = opened()
    probe = destination.after(30).circuit.openings
    destination.circuit.close()
    assert destination.circuit.record("timeout", destination.now, probe) is None
    assert destination.limit == 1
    assert destination.ends("timeout") == "opened"
    assert destination.probe_in == 30


def test_a_new_config_is_probed_at_once_and_sets_the_waits():
    destination = Destination(failures=3, probe=30, max_probe=300)
    destination.ends("5xx", "5xx", "5xx")
    destination.after(30).ends("5xx")
    destination.circuit.reconfigure(CircuitConfig(failures=3, probe=5, max_probe=10), 8, destination.now)
    assert destination.limit == 1
    destination.ends("5xx")
    assert destination.probe_in == 10


def test_a_new_config_forgets_failures_and_sets_the_concurrency():
    destination = Destination(failures=3)
    destination.ends("5xx", "5xx")
    destination.circuit.reconfigure(CircuitConfig(failures=3), 4, destination.now)
    assert destination.ends("5xx") is None
    assert destination.limit == 4


@pytest.mark.parametrize(("concurrency", "limit"), [(8, 2), (2, 2), (1, 1)])
def test_a_new_config_continues_the_ramp_within_its_concurrency(concurrency, limit):
    destination = Destination(concurrency=8)
    destination.ends(*["5xx"] * 10)
    destination.after(30).ends("ok", "ok")
    assert destination.limit == 2
    destination.circuit.reconfigure(CircuitConfig(), concurrency, destination.now)
    assert destination.limit == limit


def test_probe_by_neither_opens_the_circuit_nor_delays_a_probe():
    destination = Destination()
    destination.circuit.probe_by(destination.now)
    assert destination.limit == 8
    destination = opened()
    destination.circuit.probe_by(destination.now + 3600 * SECOND)
    assert destination.probe_in == 30


@given(
    steps=st.lists(st.tuples(st.sampled_from(RESULTS), st.floats(0, 400), st.booleans())),
    concurrency=st.integers(1, 64),
    failures=st.integers(1, 12),
)
def test_after_any_sequence_of_results_the_limit_is_in_range_and_a_probe_follows(
    steps, concurrency, failures
):
    destination = Destination(concurrency, failures=failures)
    for result, seconds, late in steps:
        circuit = destination.after(seconds).circuit
        circuit.record(result, destination.now, max(0, circuit.openings - late))
        if circuit.is_open:
            assert destination.limit in (0, 1)
            assert circuit.open_until <= destination.now + 300 * SECOND
        else:
            assert 1 <= destination.limit <= concurrency


def test_another_number_of_slots_keeps_the_state():
    destination = Destination()
    for slots, limit in ((3, 3), (0, 0), (5, 5)):
        destination.circuit.resize(slots)
        assert destination.limit == limit
    assert destination.ends(*["timeout"] * 10) == "opened"
    destination.circuit.resize(4)
    assert destination.limit == 0
    assert destination.after(30).ends("ok") == "recovered"
    assert destination.ends("ok", "ok", "ok") is None
    destination.circuit.resize(2)
    assert destination.limit == 2
