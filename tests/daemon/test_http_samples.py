"""Every recorded sample, replayed as raw bytes over a socket: the answer, the stored event, the worker."""

import json

import msgspec
import pytest
import pytest_asyncio
from daemons import SOURCES, Relay, running, write_config
from samples import Sample, like, read_samples

from relay.base.json_text import read
from relay.store.roster import Roster

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def relay(tmp_path_factory, listener):
    async with running(write_config(tmp_path_factory.mktemp("relay"), SOURCES)) as relay:
        yield relay


def worker_row(relay: Relay, expected: dict) -> dict:
    """Return a worker's row in the registry, with the fields of the sample."""
    [row] = [row for row in relay.app.store.workers.all() if row.id == expected["id"]]
    asked = {name: getattr(row, name) for name in expected if name != "change"}
    return json.loads(msgspec.json.encode(asked))


@pytest.mark.parametrize("sample", read_samples(), ids=str)
async def test_a_recorded_request_is_answered_and_stored_as_recorded(relay: Relay, sample: Sample):
    expect = sample.expect
    relay.app.store.workers.roster = Roster(())  # samples assume an empty registry
    newest = await relay.app.store.queries.find("events", limit=1)
    before = newest[0]["row"] if newest else 0

    answer = await relay.exchange(sample.request)

    assert answer.status == expect.status, answer
    assert like(answer.json, expect.body), answer.json
    assert {name: answer.headers.get(name.lower()) for name in expect.headers} == expect.headers
    rows = [
        row["row"] for row in await relay.app.store.queries.find("events", limit=10) if row["row"] > before
    ]
    events = (await relay.app.store.events.load(rows)).values() if rows else ()
    sent = [event for event in events if not event.type.startswith(f"{sample.kind}.worker.")]
    if expect.event is None:
        assert sent == []
    else:
        [event] = sent
        assert (event.source, event.type, event.subject) == (
            sample.kind,
            expect.event.type,
            expect.event.subject,
        )
        assert like(read(event.data), expect.event.data), event.data
        assert like(read(event.context), expect.event.context), event.context
        assert event.body == sample.request.partition(b"\r\n\r\n")[2]
    if expect.worker is None:
        assert relay.app.store.workers.all() == ()
    elif expect.worker["change"] == "unregister":
        assert expect.worker["id"] not in [
            row.id for row in relay.app.store.workers.all() if row.unregistered_at is None
        ]
    else:
        asked = {name: value for name, value in expect.worker.items() if name != "change"}
        assert worker_row(relay, expect.worker) == asked
