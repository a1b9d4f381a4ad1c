"""kill -9 under load, in short; `python -m tests.torture.kill` does it a thousand times."""

from torture.kill import IN_FLIGHT, torture


async def test_twenty_kills_lose_nothing_that_was_acknowledged(tmp_path):
    findings = await torture(tmp_path, 20, seed=1)
    assert findings.lost == set()
    assert findings.undelivered == set()
    assert findings.corrupt == []
    assert findings.most_repeated <= IN_FLIGHT
    assert len(findings.acknowledged) > 20


async def test_the_check_detects_a_relay_that_replies_before_the_commit(tmp_path):
    findings = await torture(tmp_path, 2, seed=1, variant="acks-early")
    assert findings.lost
    assert not findings.fine
