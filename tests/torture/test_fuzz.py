"""Mutated requests, in short; `python -m tests.torture.fuzz` sends a million."""

import pytest

from torture.fuzz import Findings, torture


async def test_mutated_requests_get_json_and_do_no_harm(tmp_path):
    found = await torture(tmp_path, 3000, seed=1)
    assert found.faults == []
    assert found.requests == 3000
    assert {200, 202, 400, 401, 404, 405, 413, 415, 422} <= found.answers.keys()
    assert len(found.acknowledged) > 40
    assert found.stored == len(found.arrived) > 200
    assert found.logged < 40_000
    assert found.growth < 16 * 2**20
    assert found.fine


@pytest.mark.parametrize(
    ("meddling", "fault"), [({"hangs": 0.05}, "no answer"), ({"corrupts": 0.15}, "in the answer")]
)
async def test_the_check_detects_missing_and_wrong_replies(tmp_path, meddling, fault):
    found = await torture(tmp_path, 300, seed=1, patience=2.0, **meddling)
    assert not found.fine
    assert sum(fault in each for each in found.faults) > 5


def test_the_check_reports_every_violation():
    assert Findings().fine
    assert not Findings(faults=["500"]).fine
    assert not Findings(logged=2**20).fine
    assert not Findings(growth=2**24).fine
