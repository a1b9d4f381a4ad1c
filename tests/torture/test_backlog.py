"""A backlog before a dead destination, in short; `python -m tests.torture.backlog` has 100,000 in it."""

from torture.backlog import CONCURRENCY, FAILURES, MOST_GROWTH, torture


async def test_a_backlog_drains_in_order_with_a_ramp_and_constant_memory(tmp_path):
    findings = await torture(tmp_path, 3000)
    assert findings.pending == 3000
    assert (findings.lost, findings.repeated, findings.disordered) == (0, 0, 0)
    assert (findings.rushed, findings.unbalanced) == (0, 0)
    assert FAILURES <= findings.spent < FAILURES + CONCURRENCY
    assert findings.grown + findings.drained < MOST_GROWTH
    assert findings.fine


async def test_the_check_detects_a_destination_without_order(tmp_path):
    for events in (600, 2000, 4000):  # a few may be in order by chance
        folder = tmp_path / f"{events}"
        folder.mkdir()
        findings = await torture(folder, events, variant="unordered")
        if findings.disordered:
            break
    assert findings.disordered
    assert not findings.fine


async def test_the_check_detects_a_circuit_that_never_opens(tmp_path):
    findings = await torture(tmp_path, 300, variant="headlong")
    assert findings.rushed
    assert not findings.fine
