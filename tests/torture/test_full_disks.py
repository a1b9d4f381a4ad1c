"""Full disks under load, in short; `python -m tests.torture.disk` fills a hundred."""

import pytest
from stores import only_sqlite

from torture.disk import FLOOR, torture

pytestmark = only_sqlite("its file on a full disk")


async def test_full_disks_and_kills_lose_nothing_and_the_relay_recovers(tmp_path):
    findings = await torture(tmp_path, 4, seed=1)
    assert findings.undelivered == set()
    assert (findings.odd, findings.down, findings.corrupt) == ([], [], [])
    assert (findings.slow, max(0, findings.repeated)) == (0, 0)
    assert findings.least >= FLOOR
    assert findings.refused > 10
    assert len(findings.acknowledged) > 20
    assert findings.fine


@pytest.mark.parametrize(
    ("variant", "rounds", "found"),
    [
        ("acks-early", 1, lambda findings: findings.undelivered),
        ("gives-up", 1, lambda findings: findings.down),
        ("stays-full", 2, lambda findings: findings.slow),
        ("no-floor", 0, lambda findings: findings.least < FLOOR),
    ],
)
async def test_the_check_detects_a_relay_that_fails_on_a_full_disk(tmp_path, variant, rounds, found):
    findings = await torture(tmp_path, rounds, seed=1, variant=variant, drain=2.0)
    assert found(findings)
    assert not findings.fine
