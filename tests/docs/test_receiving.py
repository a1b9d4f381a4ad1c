"""docs/receiving.md: the snippets accept only requests that the relay signed, and store each event once."""

import asyncio
import base64
import json
import os
import re
import sqlite3
import time
from contextlib import asynccontextmanager

import msgspec
import pytest
from snippets import (
    HERE,
    LANGUAGES,
    OTHER,
    PAGE,
    PYTHON_RECEIVER,
    SECRET,
    blocks,
    break_inbox,
    empty_inbox,
    handle_inbox,
    inbox,
    judge,
    receiver,
    run,
)
from stores import make_event

from relay.base.clock import SystemClock
from relay.config.schema import DestinationConfig
from relay.config.secrets import Secret, Url
from relay.delivery.http.http_client import HttpClient
from relay.formats import FORMATS
from relay.signing import SignatureError, Signer, verify

HEADERS = "a webhook header is missing or malformed"
LATE = "webhook-timestamp is too far off"
UNFIT = "no signature matches"
KEY = "expected a secret: whsec_ and the base64 of at least 24 bytes"

ID = "evt_0198a2c4-7d1e-7bb2-9c3f-1f0e5d2a4b6c"
BODY = b'{"id":"evt_1","data":{"total":45000.00,"big":1180591620717411303424}}'


class Case(msgspec.Struct):
    """A request and the expected result."""

    problem: str | None = None  # None: it is genuine
    at: int = 0  # its timestamp, from now
    secrets: tuple[str, ...] = (SECRET,)  # the receiver's
    signed_by: tuple[str, ...] = (SECRET,)
    id: str = ID
    body: bytes = BODY
    sent: bytes | None = None  # the body that arrives; None: the signed one
    changes: dict[str, str | None] = {}  # headers changed after signing; None: left out
    library: bool = True  # whether the library agrees

    def headers(self, now: int) -> dict[str, str]:
        """Sign, then change."""
        signer = Signer(tuple(Secret(secret) for secret in self.signed_by))
        headers = signer.headers(self.id, now + self.at, self.body) | self.changes
        return {name: value for name, value in headers.items() if value is not None}

    @property
    def arrives(self) -> bytes:
        """The body as the receiver sees it."""
        return self.body if self.sent is None else self.sent


def secret_of(size, *, prefix="whsec_", padded=True):
    text = prefix + base64.b64encode(bytes(range(size))).decode()
    return text if padded else text.rstrip("=")


def cases(now):
    """Return every case by its name; a case that sets a signature is a request with the current time."""
    genuine = Case().headers(now)["webhook-signature"]

    def signature(text):
        return {"webhook-signature": text}

    table = {
        "valid": Case(),
        "unicode": Case(body='{"name":"Zoë \U0001f99c \\u00e9 \u2028 漢字"}'.encode()),
        "no UTF-8": Case(body=b'{"name":"\xff\x00"}', library=False),
        "empty body": Case(body=b"", library=False),
        "megabyte": Case(body=b'"' + b"x" * 2**20 + b'"'),
        "tampered body": Case(UNFIT, sent=BODY.replace(b"45000.00", b"45000.0")),
        "body with one byte more": Case(UNFIT, sent=BODY + b"\n"),
        "wrong secret": Case(UNFIT, signed_by=(OTHER,)),
        "another id": Case(UNFIT, changes={"webhook-id": ID.replace("evt_0", "evt_1")}),
        "another timestamp": Case(UNFIT, changes={"webhook-timestamp": str(now - 1)}),
        "as old as may be": Case(at=-300, library=False),  # the library reads the clock itself
        "as far ahead as may be": Case(at=300, library=False),
        "too old": Case(LATE, at=-301),
        "too far ahead": Case(LATE, at=301, library=False),
        "far too far ahead": Case(LATE, at=4000),
        "twelve digits": Case(LATE, at=999_999_999_999 - now),
        "second signature matches": Case(signed_by=(OTHER, SECRET)),
        "first signature matches": Case(signed_by=(SECRET, OTHER)),
        "second secret fits": Case(secrets=(OTHER, SECRET)),
        "first secret fits": Case(secrets=(SECRET, OTHER)),
        "fit among strangers": Case(changes=signature(f"v1a,AAAA v1,{'A' * 43}= {genuine} v2,x")),
        "unsigned": Case(HEADERS, signed_by=()),
        "signature without version": Case(UNFIT, changes=signature(genuine.removeprefix("v1,"))),
        "signature of another version": Case(UNFIT, changes=signature(genuine.replace("v1,", "v1a,"))),
        "signature without padding": Case(UNFIT, changes=signature(genuine.rstrip("="))),
        "signature cut short": Case(UNFIT, changes=signature(genuine[:20])),
        "signature of another alphabet": Case(UNFIT, changes=signature("v1,é漢 v1,")),
        "no secrets": Case(UNFIT, secrets=()),
    }
    for header in ("webhook-id", "webhook-timestamp", "webhook-signature"):
        table[f"no {header}"] = Case(HEADERS, changes={header: None})
        table[f"empty {header}"] = Case(HEADERS, changes={header: ""})
    for timestamp in ("1e9", "-1", "1_614_265_330", "\uff11\uff16", "9" * 5000):
        table[f"timestamp {timestamp[:9]}"] = Case(HEADERS, changes={"webhook-timestamp": timestamp})
    for ending in (".0", "\n"):
        changes = {"webhook-timestamp": f"{now}{ending}"}
        table[f"timestamp and {ending!r}"] = Case(HEADERS, changes=changes, library=False)
    for id_ in ("../../etc/passwd", f"{ID}.1", f"{ID}\n", "evt_é", "a" * 101):
        table[f"id {id_!r:.60}"] = Case(HEADERS, id=id_, library=False)
    for secret in ("", "whsec_", secret_of(23)):
        table[f"secret {secret!r}"] = Case(KEY, secrets=(secret,), library=False)
    for size in (24, 25, 26, 32, 64):
        for prefix in ("whsec_", ""):
            for padded in (True, False):
                secret = secret_of(size, prefix=prefix, padded=padded)
                table[f"secret {secret}, {padded}"] = Case(secrets=(secret,), signed_by=(secret_of(size),))
    return table


@pytest.fixture(scope="module", params=HERE)
def snippets(request, tmp_path_factory):
    """Put the snippets of one language into files, built once; gives (name, language, folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    LANGUAGES[request.param].write(folder)
    return request.param, LANGUAGES[request.param], folder


@pytest.fixture
def place(snippets):
    """Return (language, folder) with an empty inbox."""
    _, language, folder = snippets
    empty_inbox(folder)
    return language, folder


def test_python_is_always_tested_and_no_language_of_the_page_is_left_out():
    assert HERE[:2] == ["python", "standardwebhooks"]
    assert list(LANGUAGES) == ["python", "standardwebhooks", "node", "php", "go"]
    fences = set(re.findall(r"^```(\w+)$", PAGE, re.MULTILINE))
    assert fences - {"http", "json", "sh", "toml"} == {"python", "js", "php", "go"}


def test_verify_accepts_only_genuine_requests(snippets):
    name, language, folder = snippets
    now = int(time.time())
    table = cases(now)
    if name == "standardwebhooks":  # it reports every problem as a signature that does not fit
        table = {key: case for key, case in table.items() if case.library}
        for case in table.values():
            case.problem = case.problem and UNFIT
    expected = {key: [None, case.problem] if case.problem else [case.id, None] for key, case in table.items()}
    questions = {key: (case.secrets, case.headers(now), case.arrives, now) for key, case in table.items()}
    assert judge(language, folder, questions) == expected


def test_relay_verify_agrees():
    """Only the page checks the form of an id, and refuses a useless secret."""
    now = int(time.time())
    for name, case in cases(now).items():
        if case.problem == KEY or name.startswith("id "):
            continue
        secrets = tuple(Secret(secret) for secret in case.secrets)
        try:
            verify(secrets, case.headers(now), case.arrives, now)
            genuine = True
        except SignatureError:
            genuine = False
        assert genuine is (case.problem is None), name


# --- receivers ------------------------------------------------------------------------------------


def event(data=b'{"name":"Zo\xc3\xab"}'):
    return make_event(SystemClock(), b"", id=1, type="moddy.member_joined", subject="8", data=data)


@asynccontextmanager
async def sending(url, *secrets):
    """Send as the relay sends; yields a function from an event to the status of the response."""
    client = HttpClient(DestinationConfig(name="mine", url=Url(url), allow_private=True))
    signer = Signer(tuple(Secret(secret) for secret in secrets))

    async def send(event):
        body = FORMATS["standard"].render(event)
        headers = {
            "content-type": "application/json",
            **signer.headers(event.public_id, int(time.time()), body),
        }
        return (await client.send(url, headers, body)).status

    try:
        yield send
    finally:
        await client.close()


async def test_a_receiver_stores_each_event_once(place):
    first, second = event(), event(b'{"big":"' + b"x" * 2**20 + b'"}')
    with receiver(*place) as url:
        async with sending(url, SECRET) as send:
            assert [await send(first), await send(first)] == [204, 204]
            assert await asyncio.gather(*(send(second) for _ in range(6))) == [204] * 6
    assert inbox(place[1]) == {one.public_id: FORMATS["standard"].render(one) for one in (first, second)}


async def test_a_receiver_remembers_handled_events(place):
    handled, fresh = event(), event()
    with receiver(*place) as url:
        async with sending(url, SECRET) as send:
            assert await send(handled) == 204
            handle_inbox(place[1])
            assert [await send(handled), await send(fresh)] == [204, 204]
    assert list(inbox(place[1])) == [fresh.public_id]


async def test_a_receiver_remembers_events_after_a_kill(place):
    kept = event()
    for _ in range(2):
        with receiver(*place) as url:
            async with sending(url, SECRET) as send:
                assert await send(kept) == 204
    assert inbox(place[1]) == {kept.public_id: FORMATS["standard"].render(kept)}


async def test_a_receiver_refuses_a_request_without_a_matching_signature(place):
    strange = secret_of(32)
    fitting = event()
    with receiver(*place) as url:
        for secrets in ((strange,), ()):
            async with sending(url, *secrets) as send:
                assert await send(event()) == 401
        async with sending(url, strange, SECRET) as send:
            assert await send(fitting) == 204
    assert list(inbox(place[1])) == [fitting.public_id]


async def test_a_receiver_that_cannot_store_an_event_responds_with_an_error(place):
    with receiver(*place) as url:
        break_inbox(place[1])
        async with sending(url, SECRET) as send:
            assert await send(event()) in (500, None)  # Python's server hangs up


# --- workers --------------------------------------------------------------------------------------


def test_the_worker_handles_each_event_once_and_retries_a_failed_one(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    [schema] = re.findall(r'^SCHEMA = """(.*?)"""', PYTHON_RECEIVER, re.MULTILINE | re.DOTALL)
    [code] = blocks("Slow handlers", "python")
    worker = {"__name__": "worker"}
    exec(compile(code, "worker.py", "exec"), worker)
    with sqlite3.connect("inbox.db") as db:
        db.execute(schema)
        db.execute("CREATE TABLE members (id TEXT)")
        rows = [(name, json.dumps({"id": name})) for name in ("a", "b", "c")]
        db.executemany("INSERT INTO inbox (id, body) VALUES (?, ?)", rows)
        db.execute("INSERT INTO inbox (id, arrived, done) VALUES ('old', '2020-01-01 00:00:00', 1)")
        db.execute("UPDATE inbox SET arrived = '2020-01-01 00:00:00' WHERE id = 'b'")
        db.execute("UPDATE inbox SET arrived = datetime('now', '-29 days') WHERE id = 'a'")
    bad = {"b"}

    def handle(db, event):
        db.execute("INSERT INTO members VALUES (?)", (event["id"],))
        if event["id"] in bad:
            raise LookupError("not this one")

    worker["work"](handle)
    assert [row for (row,) in db.execute("SELECT id FROM members")] == ["a", "c"]
    assert "LookupError: not this one" in capfd.readouterr().err
    bad.clear()
    worker["work"](handle)
    worker["work"](handle)
    assert [row for (row,) in db.execute("SELECT id FROM members")] == ["a", "c", "b"]
    assert capfd.readouterr().err == ""
    assert db.execute("SELECT id, body, done FROM inbox").fetchall() == [("a", None, 1), ("c", None, 1)]
    db.close()


def test_the_worker_for_folders_handles_each_event_once_and_retries_a_failed_one(tmp_path):
    [script] = blocks("Slow handlers", "sh")
    folder, handle = tmp_path / "inbox", tmp_path / "handle"
    folder.mkdir()
    (folder / ".part-1").write_text("not whole")
    (folder / "evt_1").write_text("one\n")
    (folder / "evt_2").write_text("two\n")
    (folder / "evt_3").touch()
    for name in ("evt_2", "evt_3"):
        os.utime(folder / name, (0, 0))  # long ago: only handled events may be deleted
    handle.write_text(
        "#!/bin/sh\nread -r event && echo $event >>seen && { [ $event = one ] || [ -e well ]; }\n"
    )
    handle.chmod(0o755)

    def rounds(count):
        for _ in range(count):
            run(("sh",), tmp_path, script)
        return (tmp_path / "seen").read_text().splitlines()

    assert rounds(2) == ["one", "two", "two"]
    (tmp_path / "well").touch()
    assert rounds(2) == ["one", "two", "two", "two"]
    assert {path.name for path in folder.iterdir()} == {".part-1", "evt_1", "evt_2"}
