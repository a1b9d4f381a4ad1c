"""The primary server of two nodes is lost, and its standby is promoted.

`python -m tests.torture.failover` repeats it.
"""

import asyncio

import pytest
from postgres import needs_postgres

from torture.failover import run


@needs_postgres
@pytest.mark.parametrize("is_synchronous", [True, False], ids=["synchronous", "asynchronous"])
async def test_a_failover_loses_only_events_that_an_asynchronous_standby_did_not_have(
    is_synchronous, monkeypatch
):
    monkeypatch.setattr("torture.nodes.PAUSE", 0.1)  # less load
    toll = await asyncio.to_thread(run, is_synchronous=is_synchronous)
    assert toll.faults() == []
    assert toll.acknowledged > 20
    assert toll.warned == (not is_synchronous)
    assert bool(toll.lost) == (not is_synchronous)  # without a loss, the standby had no lag
