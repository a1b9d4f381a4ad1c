"""Full disks under load, in short; `python -m tests.torture.disk` fills a hundred."""

import pytest

from torture.disk import FLOOR, torture


async def test_full_disks_and_kills_lose_nothing_and_the_relay_recovers(tmp_path):
    toll = await torture(tmp_path, 4, seed=1)
    assert toll.undelivered == set()
    assert (toll.odd, toll.down, toll.corrupt) == ([], [], [])
    assert (toll.slow, max(0, toll.repeated)) == (0, 0)
    assert toll.least >= FLOOR
    assert toll.refused > 10
    assert len(toll.acknowledged) > 20
    assert toll.fine


@pytest.mark.parametrize(
    ("variant", "rounds", "found"),
    [
        ("acks-early", 1, lambda toll: toll.undelivered),
        ("gives-up", 1, lambda toll: toll.down),
        ("stays-full", 2, lambda toll: toll.slow),
        ("no-floor", 0, lambda toll: toll.least < FLOOR),
    ],
)
async def test_the_check_detects_a_relay_that_fails_on_a_full_disk(tmp_path, variant, rounds, found):
    toll = await torture(tmp_path, rounds, seed=1, variant=variant, drain=2.0)
    assert found(toll)
    assert not toll.fine
