"""The store of refused requests: `relay.store.Refused`, on each engine."""

import asyncio

import msgspec
import pytest
from stores import KINDS, accept, break_disk, count_rows, make_store

from relay.base.ids import REFUSED, new_id
from relay.errors import AlreadyRetried, RelayError, StorageError, UnknownError
from relay.model import RefusedRequest


@pytest.fixture(params=KINDS)
async def store(tmp_path, clock, request):
    store = make_store(tmp_path / "relay.db", clock, kind=request.param)
    await store.open()
    yield store
    await store.close()


def refused(clock, **fields):
    given = {"source": "shop", "reason": "invalid", "status": 400, "problem": "wrong", "method": "POST"}
    rest = {"target": "/hook", "headers": (("X-A", "b\0"),), "remote": "192.0.2.1", "body": b"\0\xff"}
    return RefusedRequest(id=new_id(REFUSED, clock.wall()), at=clock.wall(), **{**given, **rest, **fields})


async def add(store, clock, count=1, **fields):
    added = []
    for _ in range(count):
        added.append(refused(clock, **fields))
        clock.advance(60)
    await store.refused.add(added)
    return added


async def test_a_request_is_read_unchanged(store, clock):
    [added] = await add(store, clock)
    assert await store.refused.named(added.id) == added
    assert await store.refused.named(added.id.removeprefix(REFUSED)[:18]) == added
    [[listed], cursor] = await store.refused.page(limit=10)
    assert (listed.body, cursor) == (None, None)
    assert listed.headers == added.headers


async def test_pages_are_newest_first_and_filtered(store, clock):
    first = await add(store, clock, 3)
    other = await add(store, clock, 2, source=None, reason="path", body=None)
    [page, cursor] = await store.refused.page(limit=3)
    assert [each.id for each in page] == [other[1].id, other[0].id, first[2].id]
    [page, cursor] = await store.refused.page(limit=3, cursor=cursor)
    assert ([each.id for each in page], cursor) == ([first[1].id, first[0].id], None)
    [page, _] = await store.refused.page(limit=9, source="shop", since=first[1].at, until=first[2].at)
    assert [each.id for each in page] == [first[1].id]
    [page, _] = await store.refused.page(limit=9, reason="path")
    assert len(page) == 2
    with pytest.raises(RelayError, match="cursor"):
        await store.refused.page(limit=9, cursor="x")


async def test_a_retry_that_is_refused_again_is_noted(store, clock):
    [added] = await add(store, clock)
    await store.refused.note_retry(added.id, clock.wall())
    found = await store.refused.named(added.id)
    assert (found.retried_at, found.event_id) == (clock.wall(), None)


def retry(refused, acceptance):
    return msgspec.structs.replace(acceptance, retry_of=refused.id)


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_retry_stores_one_event_and_the_result_in_one_transaction(store, clock, key):
    [added, other] = await add(store, clock, 2)
    stored = await store.events.append(retry(added, accept(clock, key=key)))
    found = await store.refused.named(added.id)
    assert (found.retried_at, found.event_id) == (clock.wall(), stored.event_id)
    with pytest.raises(AlreadyRetried) as error:
        await store.events.append(retry(added, accept(clock, key=key)))
    assert error.value.event_id == stored.event_id
    await store.refused.note_retry(added.id, clock.wall())  # refused by a node with another configuration
    assert (await store.refused.named(added.id)).event_id == stored.event_id
    same = await store.events.append(retry(other, accept(clock, key=key)))
    assert same.duplicate == (key is not None)
    assert (await store.refused.named(other.id)).event_id == same.event_id
    assert await count_rows(store, "events") == (1 if key else 2)


async def test_a_retry_with_several_events_stores_them_once(store, clock):
    [added] = await add(store, clock)

    def acceptances():
        first, *others = (accept(clock, key=key) for key in (None, "k", None))
        return [retry(added, first), *others]

    receipt = await store.events.append_all(acceptances())
    assert (await store.refused.named(added.id)).event_id == receipt.each[0].event_id
    with pytest.raises(AlreadyRetried):
        await store.events.append_all(acceptances())
    assert await count_rows(store, "events") == 3


async def test_a_retry_that_could_not_be_stored_can_be_repeated(store, clock):
    [added] = await add(store, clock)
    with pytest.MonkeyPatch.context() as patch:
        break_disk(store, patch)
        with pytest.raises(StorageError):
            await store.events.append(retry(added, accept(clock)))
    assert (await store.refused.named(added.id)).retried_at is None
    async with asyncio.timeout(30):
        while store.failure is not None:  # noqa: ASYNC110 - the writer tries once a second
            await asyncio.sleep(0.05)
    stored = await store.events.append(retry(added, accept(clock)))
    assert (await store.refused.named(added.id)).event_id == stored.event_id


async def test_old_requests_and_those_beyond_a_size_are_deleted(store, clock):
    added = await add(store, clock, 5, body=b"x" * 1000)
    assert await store.refused.prune(added[2].at, 10**6) == 2
    assert await store.refused.prune(0, 2500) == 1
    [page, _] = await store.refused.page(limit=9)
    assert [each.id for each in page] == [added[4].id, added[3].id]
    assert await store.refused.prune(clock.wall(), 0) == 2


async def test_wrong_ids(store, clock):
    added = await add(store, clock, 2)
    with pytest.raises(UnknownError):
        await store.refused.named("ref_0000")
    with pytest.raises(RelayError, match="not a valid id"):
        await store.refused.named("xyz")
    ids = sorted(each.id for each in added)
    with pytest.raises(RelayError, match=f"ambiguous refused request id .*; matches: {ids[0]}, {ids[1]}\n"):
        await store.refused.named(ids[0][:8])
