"""Hostile requests to generic sources, in short; `python -m tests.torture.generic` sends ten thousand."""

import pytest

from torture import generic


async def test_hostile_requests_to_generic_sources_are_refused_or_mapped_as_configured(tmp_path):
    found = await generic.torture(tmp_path, 700, seed=3)
    assert found.faults == []
    assert {200, 202, 400, 401, 404, 405, 413} <= found.statuses.keys()
    assert sum(count > 0 for count in found.accepted.values()) >= 11


@pytest.mark.parametrize(
    ("module", "name", "fake"),
    [
        ("compiled", "compile_text", lambda *_, **__: lambda reading: reading.incoming.headers["X-Canary"]),
        ("compiled", "compile_value", lambda *_: lambda _: 1 / 0),
    ],
)
async def test_a_leak_and_an_exception_would_be_found(tmp_path, monkeypatch, module, name, fake):
    monkeypatch.setattr(f"relay.sources.generic.{module}.{name}", fake)
    found = await generic.torture(tmp_path, 60, seed=1)
    assert found.faults
