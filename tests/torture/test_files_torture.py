"""Files that vanish and bytes that flip, in short; `python -m tests.torture.files` does it 200 times."""

from torture.files import delete, delete_all, replace, torture


async def test_what_happens_to_files_is_noticed_in_time_and_loses_nothing_without_a_word(tmp_path):
    toll = await torture(tmp_path, [delete, replace, delete_all, None, None, None], seed=1)
    assert toll.late == []
    assert (toll.lost, toll.silent) == (0, 0)
    assert toll.flips == 3
    assert toll.dropped
    assert toll.fine


async def test_a_relay_that_never_looks_at_its_files_is_found_out(tmp_path):
    toll = await torture(tmp_path, [delete], seed=1, variant="blind")
    assert toll.late == ["delete"]
    assert toll.lost
    assert not toll.fine


async def test_a_relay_that_takes_its_log_for_whole_is_found_out(tmp_path):
    toll = await torture(tmp_path, [None, None, None], seed=1, variant="trusting")
    assert toll.silent
    assert not toll.fine
