"""docs/receiving.md: requests and the effects of responses are as described."""

import asyncio
import json
import re
import tomllib

import pytest
import receivers
from daemons import SOURCES, adorn, destination, running, write_config
from machines import needs
from snippets import LANGUAGES, PAGE, SECRET, blocks, inbox, receiver, run, section
from wire import request

from relay.base.units import parse_duration
from relay.config.schema import CircuitConfig, DestinationConfig, RetryConfig
from relay.config.secrets import Secret, Url
from relay.config.signatures import SCHEMES
from relay.delivery.retry import verdict_of
from relay.formats import FORMATS
from relay.model import StoredEvent
from relay.signing import signer_of, verify

EXAMPLE = StoredEvent(
    id=1,
    public_id="evt_018bcfe5-6800-7000-8000-000000000001",
    source="moddy",
    type="moddy.member_joined",
    subject="80351110224678912",
    received_at=1_700_000_000_123_456,
    data='{"username":"Zoë","guild":"1180591620717411303"}'.encode(),
    context=b"{}",
    body=b"",
    content_type="application/json",
    sha256=b"",
)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_the_request_on_the_page_is_genuine():
    [request] = blocks("Request", "http")
    head, body = request.rstrip("\n").split("\n\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    assert body.encode() == FORMATS["standard"].render(EXAMPLE)
    assert fields["Content-Length"] == str(len(body.encode()))
    verify((Secret(SECRET),), fields, body.encode(), int(fields["webhook-timestamp"]))
    assert f"signed here with `{SECRET}`" in " ".join(PAGE.split())
    assert f"`now = {fields['webhook-timestamp']}`" in PAGE


def test_the_other_signatures_on_the_page_are_genuine():
    [request] = blocks("Request", "http")
    [shown] = blocks("Other signatures", "http")
    head, body = request.rstrip("\n").split("\n\n")
    fields = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    [secret] = re.findall(r"with the secret `(.+?)`", " ".join(section("Other signatures").split()))
    schemes = (SCHEMES["github"], SCHEMES["stripe"])
    signer = signer_of(schemes, (Secret(secret),), method="POST", url="")
    headers = signer.headers(fields["webhook-id"], int(fields["webhook-timestamp"]), body.encode())
    assert dict(line.split(": ", 1) for line in shown.splitlines()) == {
        name: value for name, value in headers.items() if not name.startswith("webhook-")
    }
    for name in SCHEMES:
        assert SCHEMES[name].header in PAGE


@pytest.mark.parametrize("size", [10, 3 * 2**19])
async def test_the_table_has_every_header_that_is_sent(size, tmp_path):
    table = re.findall(r"^\| `([a-z-]+)` \|", section("Request"), re.MULTILINE)
    body = adorn(payload={"note": "x" * size})
    async with (
        receivers.answers() as there,
        running(write_config(tmp_path, SOURCES, destination("mine", there.url))) as relay,
    ):
        answer = await relay.exchange(request("POST", "/v1/events", body, traceparent=TRACE))
        await there.until(1)
    [sent] = there.requests
    assert sent.line == "POST /hook HTTP/1.1"
    assert set(sent.headers) - {"host"} == set(table)
    assert sent.headers["webhook-id"] == answer.json["event_id"]
    assert sent.headers["content-length"] == str(len(sent.body))


def test_every_format_is_on_the_page_with_its_body_and_type():
    text = " ".join(section("Formats").split())
    assert set(re.findall(r"\*\*`(\w+)`\*\*", text)) == set(FORMATS)
    [example] = blocks("Formats", "json")
    assert example.rstrip("\n").encode() == FORMATS["cloudevents"].render(EXAMPLE)
    assert f"as `{FORMATS['cloudevents'].content_type}`" in text


ANSWERS = [
    ("any 2xx", (200, 204, 299), {"webhook-delivery": "disable", "retry-after": "5"}, "ok"),
    ("3xx", (301, 302, 304, 308), {}, "retry"),
    ("410", (410,), {}, "disable"),
    (
        "any status except 2xx, with `webhook-delivery: disable`",
        (302, 400, 429, 503),
        {"webhook-delivery": "disable"},
        "disable",
    ),
    (
        "any status except 2xx and 410, with `webhook-delivery: abort-message`",
        (302, 400, 500),
        {"webhook-delivery": "abort-message"},
        "abort",
    ),
    ("429 or 503 with `Retry-After`", (429, 503), {"retry-after": "30"}, "retry"),
    ("any other failure with `Retry-After`", (302, 400, 500), {"retry-after": "30"}, "retry"),
    ("every other status", (400, 401, 404, 409, 413, 418, 500, 502, 599), {}, "retry"),
    ("none: no connection, TLS, DNS, a broken response, more than 15 s", (None,), {}, "retry"),
]


def test_the_table_has_every_kind_of_response():
    rows = re.findall(r"^\| (.*?) \| .* \|$", section("Responses"), re.MULTILINE)
    assert rows == ["your response", *(row for row, *_ in ANSWERS)]


@pytest.mark.parametrize(("row", "statuses", "headers", "kind"), ANSWERS)
def test_a_response_in_the_table_has_the_described_effect(row, statuses, headers, kind):
    for status in statuses:
        meaning = verdict_of(status, "timeout", headers, now=0, max_retry_after=20.0)
        assert meaning.kind == kind
        assert meaning.hint == (30 if kind == "retry" and headers else None)
        assert meaning.pause == (20 if row == "429 or 503 with `Retry-After`" else None)


def test_the_schedule_on_the_page_is_the_default():
    text = section("Responses").replace("\n", " ")
    [schedule] = re.findall(r"\*\*The schedule\*\* waits (.*?) between attempts", text)
    retry = RetryConfig()
    assert tuple(parse_duration(wait) for wait in schedule.split(", ")) == retry.schedule
    assert f"{len(retry.schedule) + 1} attempts in about {sum(retry.schedule) / 3600:.0f} hours" in text
    assert "each up to a tenth longer" in text
    assert retry.jitter == 0.1
    assert f"pauses for that time, at most {retry.max_retry_after / 3600:.0f} h |" in text
    assert f"waits at least that long, at most {retry.max_retry_after / 3600:.0f} h |" in text


def test_the_other_numbers_on_the_page_are_the_defaults():
    answers = section("Responses").replace("\n", " ")
    slow = " ".join(section("Slow handlers").split())
    circuit, mine = CircuitConfig(), DestinationConfig(name="", url=Url(""))
    assert f"After {circuit.failures} consecutive failures" in answers
    assert f"The first one follows after {circuit.probe:.0f} s, the next ones at growing" in answers
    assert f"intervals of at most {circuit.max_probe / 60:.0f} min" in answers
    assert f"If every attempt fails for {mine.disable_after / 86_400:.0f} days" in answers
    assert f"more than {mine.timeout:.0f} s |" in answers
    connecting = f"of which connecting may take {mine.connect_timeout:.0f} s"
    assert f"An attempt may take {mine.timeout:.0f} s, {connecting}" in slow
    assert f"up to {mine.concurrency} requests are in flight at once" in " ".join(section("Order").split())


# --- trying it out --------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    """A folder with the page's receiver in Python."""
    home = tmp_path / "receiver"
    home.mkdir()
    LANGUAGES["python"].write(home)
    return home


@needs("curl", "openssl")
def test_the_shell_lines_send_a_signed_request(home):
    send, _ = blocks("Tests of your receiver", "sh")
    [make] = blocks("Secret rotation", "sh")
    wrong = send.replace(SECRET, run(("bash",), home, make).strip())
    with receiver(LANGUAGES["python"], home) as url:
        printed = [
            run(("bash", "-euo", "pipefail"), home, script.replace("http://127.0.0.1:9000/", url))
            for script in (send, send, wrong)
        ]
    assert printed[:2] == ["204\n", "204\n"]
    assert printed[2].endswith("401\n")
    assert list(inbox(home)) == [EXAMPLE.public_id]


@needs("curl", "openssl")
async def test_the_event_of_the_page_reaches_a_receiver_by_the_configuration_of_the_page(home, tmp_path):
    [config] = blocks("Tests of your receiver", "toml")
    _, post = blocks("Tests of your receiver", "sh")
    assert tomllib.loads(config)["destinations"]["mine"]["secrets"] == [SECRET]
    with receiver(LANGUAGES["python"], home) as url:
        free = '[server]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n'
        path = tmp_path / "config.toml"
        path.write_text(config.replace("http://127.0.0.1:9000/", url) + free)
        async with running(path) as relay:
            line = post.replace("http://127.0.0.1:8080", relay.addresses.public)
            answer = json.loads(await asyncio.to_thread(run, ("bash",), tmp_path, line))
            async with asyncio.timeout(30):
                while not (arrived := inbox(home)):  # noqa: ASYNC110 - another process writes it
                    await asyncio.sleep(0.02)
    [(id_, envelope)] = arrived.items()
    assert id_ == answer["event_id"]
    assert b'"type":"adorn.session.started"' in envelope
    assert b'"data":{"big": 12345678901234567890}' in envelope
