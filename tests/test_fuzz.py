"""Mutated requests, in short; `python -m tests.torture.fuzz` sends a million."""

from torture.fuzz import Findings, torture


async def test_mutated_requests_are_refused_in_json_and_do_no_harm(tmp_path):
    found = await torture(tmp_path, 3000, seed=1)
    assert found.faults == []
    assert found.requests == 3000
    assert {200, 202, 400, 401, 404, 405, 413, 415, 422} <= found.answers.keys()
    assert found.logged < 20_000
    assert found.growth < 16 * 2**20
    assert found.fine


def test_what_must_not_happen_would_be_told():
    assert Findings().fine
    assert not Findings(faults=["500"]).fine
    assert not Findings(logged=2**20).fine
    assert not Findings(growth=2**24).fine
