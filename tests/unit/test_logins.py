"""How long a login to the dashboard is valid, and the name of an operator at the socket."""

import os

import pytest
from aiohttp.test_utils import make_mocked_request
from stores import make_store

from relay.api.logins import CODE_FOR, IDLE_FOR, NOTE_EVERY, VALID_FOR, Logins
from relay.api.operators import NAME_HEADER, Peer, operator_at_socket
from relay.base.clock import SECOND
from relay.config.schema import Admin, AdminToken
from relay.config.secrets import Secret
from relay.errors import ForbiddenError, StorageUnavailableError


@pytest.fixture
async def store(tmp_path, clock):
    store = make_store(tmp_path / "relay.db", clock)
    await store.open()
    yield store
    await store.close()


def admin(*tokens):
    return Admin(tokens=tuple(AdminToken(secret=Secret(text), scope=scope) for text, scope in tokens))


BOTH = admin(("one", "admin"), ("two", "operate"))


def visit(cookie=""):
    return make_mocked_request("GET", "/ui/", headers={"Host": "localhost:81", "Cookie": cookie})


async def cookie_of(logins, **body):
    answer = await logins.log_in(visit(), **body)
    [cookie] = answer.cookies.values()
    return f"{cookie.key}={cookie.value}"


async def scope_of(logins, cookie):
    operator = await logins.find(visit(cookie))
    return None if operator is None else operator.scope


async def test_a_login_ends_twelve_hours_after_its_last_use(store, clock):
    logins = Logins(store, clock, BOTH)
    cookie = await cookie_of(logins, token="one")
    for _ in range(3):
        clock.advance((IDLE_FOR - NOTE_EVERY - SECOND) // SECOND)
        assert await scope_of(logins, cookie) == "admin"
    clock.advance(IDLE_FOR // SECOND)
    assert await scope_of(logins, cookie) is None


async def test_a_login_ends_after_a_week_although_it_is_used(store, clock):
    logins = Logins(store, clock, BOTH)
    cookie = await cookie_of(logins, token="one")
    for _ in range(VALID_FOR // (IDLE_FOR // 2) - 1):
        clock.advance(IDLE_FOR // 2 // SECOND)
        assert await scope_of(logins, cookie) == "admin"
    clock.advance(IDLE_FOR // 2 // SECOND)
    assert await scope_of(logins, cookie) is None


async def test_a_login_is_valid_while_nothing_can_be_written(store, clock, monkeypatch):
    logins = Logins(store, clock, BOTH)
    cookie = await cookie_of(logins, token="two")
    clock.advance(NOTE_EVERY // SECOND)

    async def fail(*_):
        raise StorageUnavailableError("the disk is full")

    monkeypatch.setattr(store.logins, "note_use", fail)
    assert await scope_of(logins, cookie) == "operate"


async def test_a_code_is_valid_for_a_minute(store, clock):
    logins = Logins(store, clock, BOTH)
    code = await logins.new_code("olga", "read", None)
    clock.advance(CODE_FOR // SECOND - 1)
    assert await scope_of(logins, await cookie_of(logins, code=code)) == "read"
    code = await logins.new_code("olga", "read", None)
    clock.advance(CODE_FOR // SECOND)
    with pytest.raises(ForbiddenError, match="older than a minute"):
        await logins.log_in(visit(), code=code)
    assert await scope_of(logins, f"relay-81={code}") is None, "a code is not a cookie"


async def test_a_login_ends_with_its_token_and_never_has_more_than_its_scope(store, clock):
    logins = Logins(store, clock, BOTH)
    cookie = await cookie_of(logins, token="one")
    code = await logins.new_code("one", "admin", BOTH.tokens[0])
    lowered = Logins(store, clock, admin(("two", "operate"), ("one", "read")))
    assert await scope_of(lowered, cookie) == "read"
    assert await scope_of(lowered, await cookie_of(lowered, code=code)) == "read"
    raised = Logins(store, clock, admin(("two", "admin"), ("one", "admin")))
    code = await lowered.new_code("two", "operate", lowered._tokens[0])
    assert await scope_of(raised, await cookie_of(raised, code=code)) == "operate"
    removed = Logins(store, clock, admin(("two", "operate")))
    assert await scope_of(removed, cookie) is None
    code = await logins.new_code("one", "admin", BOTH.tokens[0])
    with pytest.raises(ForbiddenError):
        await removed.log_in(visit(), code=code)


async def test_the_store_has_neither_codes_nor_cookies_nor_tokens(store, clock, tmp_path):
    logins = Logins(store, clock, admin(("a-token-with-many-letters", "admin")))
    code = await logins.new_code("olga", "read", None)
    cookie = await cookie_of(logins, token="a-token-with-many-letters")
    await store.close()
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    for secret in (code, cookie.partition("=")[2], "a-token-with-many-letters"):
        assert secret.encode() not in stored
    await store.open()


@pytest.mark.parametrize(
    ("uid", "given", "name"),
    [
        (0, "ivan", "ivan (as root)"),
        (0, "root", "root"),
        (0, "", "root"),
        (0, "iv\tan", "root"),
        (0, "x" * 200, "root"),
        (54_321, "ivan", "uid 54321"),
        (65_534, "", "uid 65534"),
        (65_534, "ivan", "ivan (as uid 65534)"),
    ],
)
def test_only_root_names_the_user_behind_sudo(uid, given, name):
    request = make_mocked_request("POST", "/", headers={NAME_HEADER: given} if given else {})
    operator = operator_at_socket(request, Peer(7, uid))
    assert operator.name == name
    assert "nobody" not in str(operator)
    assert str(operator).endswith(", pid 7")
    assert os.geteuid() != 54_321
