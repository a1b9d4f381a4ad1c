"""`GET /api/history`: the last hour, without Prometheus."""

import asyncio

import pytest
from daemons import SOURCES, Recorder, adorn, destination, running, write_config
from wire import exchange, request

from relay.base.clock import SECOND


@pytest.fixture
async def relay(tmp_path):
    async with Recorder() as recorder:
        config = write_config(tmp_path, SOURCES, destination("crm", recorder.url))
        async with running(config) as relay:
            yield relay


async def ask(relay, query=""):
    answer = await exchange(relay.addresses.socket, request("GET", f"/api/history{query}"))
    return answer.status, answer.json


async def test_the_history_has_each_source_and_destination(relay):
    history, metrics = relay.app.history, relay.app.metrics
    await relay.app.jobs.run("history")
    metrics.received.labels("adorn").inc(2)
    metrics.attempts.labels("crm", "5xx").inc()
    metrics.attempt_seconds.labels("crm").observe(0.05)
    history._ran_at -= 10 * SECOND  # ten seconds pass
    await history.run()
    status, found = await ask(relay, "?minutes=1&periods=2")
    assert (status, found["step_seconds"]) == (200, 30.0)
    assert [each["name"] for each in found["sources"]] == list(relay.app.ingest.mounts)
    assert {"name": "adorn", "events": [None, 2], "refused": [None, 0]} in found["sources"]
    [crm] = found["destinations"]
    assert (crm["succeeded"], crm["failed"], crm["pending"]) == ([None, 0], [None, 1], [None, 0])
    assert crm["p50_ms"][0] is None
    assert 25 <= crm["p50_ms"][1] <= crm["p95_ms"][1] <= 50
    for query, wanted in (("source=adorn", (["adorn"], [])), ("destination=crm", ([], ["crm"]))):
        _, one = await ask(relay, f"?minutes=1&periods=2&{query}")
        assert tuple([each["name"] for each in one[kind]] for kind in ("sources", "destinations")) == wanted
        assert all(each in found[kind] for kind in ("sources", "destinations") for each in one[kind])
    status, answer = await ask(relay, "?destination=crn")
    assert (status, 'did you mean "crm"' in answer["error"]["message"]) == (404, True)


async def test_a_new_event_counts_before_its_slot_has_ended(relay):
    assert (await relay.exchange(request("POST", "/v1/events", adorn()))).status == 200
    found = None
    async with asyncio.timeout(30):
        while found != [1]:
            _, answer = await ask(relay, "?minutes=1&periods=1&source=adorn&running=1")
            found = answer["sources"][0]["events"]
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    "query", ["?running=2", "?minutes=1441", "?minutes=0", "?periods=361", "?periods=x", "?hours=1"]
)
async def test_wrong_parameters_are_refused(relay, query):
    status, answer = await ask(relay, query)
    assert (status, answer["error"]["code"]) == (400, "bad_request")
