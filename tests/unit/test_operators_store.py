"""Logins to the dashboard and the audit trail in the store, on each engine."""

import asyncio

import pytest
from stores import KINDS, make_store

from relay.errors import RelayError
from relay.model import AuditEntry, Login


@pytest.fixture(params=KINDS)
async def store(tmp_path, clock, request):
    store = make_store(tmp_path / "relay.db", clock, kind=request.param)
    await store.open()
    yield store
    await store.close()


def login(number=1, *, at=1_000, binding=None):
    return Login(bytes([number]) * 32, "olga", "operate", binding, at, at)


async def test_a_login_is_read_unchanged(store):
    for given in (login(1), login(2, binding=b"\0\xff")):
        await store.logins.add(given, before=0, most=9)
        assert await store.logins.find(given.digest) == given
    await store.logins.note_use(login(1).digest, 2_000)
    assert (await store.logins.find(login(1).digest)).seen_at == 2_000
    assert await store.logins.find(b"x") is None


async def test_only_one_caller_takes_a_code(store):
    code = login(3)
    await store.logins.add(code, before=0, most=9)
    taken = await asyncio.gather(*(store.logins.take(code.digest) for _ in range(5)))
    assert sorted(taken, key=lambda each: each is None) == [code, None, None, None, None]
    assert await store.logins.find(code.digest) is None


async def test_old_logins_and_those_beyond_the_limit_are_deleted(store):
    for number in range(1, 6):
        await store.logins.add(login(number, at=number), before=2, most=3)
    found = [number for number in range(1, 6) if await store.logins.find(bytes([number]) * 32)]
    assert found == [3, 4, 5]
    assert await store.logins.clear() == 3
    assert await store.logins.find(login(5).digest) is None


def entry(number, operator="olga", status=200):
    return AuditEntry(
        number, operator, "token", "::1", "POST", "/api/reload", '{"a":"é"}', status, "req_1", "node-1"
    )


async def test_the_audit_trail_is_newest_first_filtered_and_bounded(store):
    for number in range(1, 8):
        await store.audit.add(entry(number, "olga" if number % 2 else "ivan", None), most=6)
    [page, cursor] = await store.audit.page(limit=4)
    assert page == tuple(entry(number, "olga" if number % 2 else "ivan", None) for number in (7, 6, 5, 4))
    [rest, cursor] = await store.audit.page(limit=4, cursor=cursor)
    assert ([each.at for each in rest], cursor) == ([3, 2], None)
    [page, _] = await store.audit.page(limit=9, operator="olga", since=4, until=7)
    assert [each.at for each in page] == [5]
    with pytest.raises(RelayError, match="cursor"):
        await store.audit.page(limit=4, cursor="-1")
