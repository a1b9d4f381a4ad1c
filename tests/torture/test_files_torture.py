"""Files that vanish and bytes that flip, in short; `python -m tests.torture.files` does it 200 times."""

from torture.files import delete, delete_all, replace, torture


async def test_file_damage_is_noticed_in_time_and_every_loss_is_reported(tmp_path):
    toll = await torture(tmp_path, [delete, replace, delete_all, None, None, None], seed=1)
    assert toll.late == []
    assert (toll.lost, toll.silent) == (0, 0)
    assert toll.flips == 3
    assert toll.dropped
    assert toll.fine


async def test_the_check_detects_a_relay_that_never_checks_its_files(tmp_path):
    toll = await torture(tmp_path, [delete], seed=1, variant="blind")
    assert toll.late == ["delete"]
    assert toll.lost
    assert not toll.fine


async def test_the_check_detects_a_relay_that_trusts_a_damaged_log(tmp_path):
    toll = await torture(tmp_path, [None, None, None], seed=1, variant="trusting")
    assert toll.silent
    assert not toll.fine
