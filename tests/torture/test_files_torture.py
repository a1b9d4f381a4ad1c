"""Files that vanish and bytes that flip, in short; `python -m tests.torture.files` does it 200 times."""

from stores import only_sqlite

from torture.files import delete, delete_all, replace, torture

pytestmark = only_sqlite("damage of its file")


async def test_file_damage_is_noticed_in_time_and_every_loss_is_reported(tmp_path):
    findings = await torture(tmp_path, [delete, replace, delete_all, None, None, None], seed=1)
    assert findings.late == []
    assert (findings.lost, findings.silent) == (0, 0)
    assert findings.flips == 3
    assert findings.dropped
    assert findings.fine


async def test_the_check_detects_a_relay_that_never_checks_its_files(tmp_path):
    findings = await torture(tmp_path, [delete], seed=1, variant="blind")
    assert findings.late == ["delete"]
    assert findings.lost
    assert not findings.fine


async def test_the_check_detects_a_relay_that_trusts_a_damaged_log(tmp_path):
    findings = await torture(tmp_path, [None, None, None], seed=1, variant="trusting")
    assert findings.silent
    assert not findings.fine
