"""A backlog before a dead destination, in short; `python -m tests.torture.backlog` has 100,000 in it."""

from torture.backlog import CONCURRENCY, FAILURES, MOST_GROWTH, torture


async def test_a_backlog_drains_in_order_with_a_ramp_and_constant_memory(tmp_path):
    toll = await torture(tmp_path, 3000)
    assert toll.pending == 3000
    assert (toll.lost, toll.repeated, toll.disordered) == (0, 0, 0)
    assert (toll.rushed, toll.unbalanced) == (0, 0)
    assert FAILURES <= toll.spent < FAILURES + CONCURRENCY
    assert toll.grown + toll.drained < MOST_GROWTH
    assert toll.fine


async def test_the_check_detects_a_destination_without_order(tmp_path):
    toll = await torture(tmp_path, 2000, variant="unordered")
    assert toll.disordered
    assert not toll.fine


async def test_the_check_detects_a_circuit_that_never_opens(tmp_path):
    toll = await torture(tmp_path, 300, variant="headlong")
    assert toll.rushed
    assert not toll.fine
