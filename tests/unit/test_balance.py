"""Comparing ledger and table reads pending rows only."""

import pytest
from stores import only_sqlite, opened, rows
from support import FakeClock

from relay.store.sqlite.ledger import AUDIT_SQL

pytestmark = only_sqlite("plans of its statements")


@pytest.fixture
async def store(tmp_path):
    async with opened(tmp_path / "relay.db", FakeClock()) as store:
        yield store


async def test_the_ledger_audit_uses_the_indexes_of_pending_deliveries(store):
    plan = [row[3] for row in await rows(store, f"EXPLAIN QUERY PLAN {AUDIT_SQL}")]
    assert [step for step in plan if step.startswith("SCAN")] == ["SCAN ledger"]
    assert [step for step in plan if step.startswith("SEARCH")] == [
        "SEARCH d USING INDEX deliveries_first (destination=?)",
        "SEARCH d USING INDEX deliveries_retry (destination=?)",
    ]
