"""`relay verify --destination`: why a receiver could not verify a captured delivery."""

import base64
import gzip
import hmac
import json
import re
import time

import msgspec
import pytest
import receivers
from commands import run
from daemons import SOURCES, adorn, destination, running, write_config
from wire import request

from relay.config.secrets import Secret
from relay.config.signatures import SCHEMES
from relay.signing import Signer, signer_of, verifier_of

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
SECOND = "whsec_aG9va2ZlcnJ5IGV4YW1wbGUga2V5LCAzMiBieXRlcy4="
OTHERS = "whsec_b3RoZXIgcmVjZWl2ZXJzIGtleSwgMzIgYnl0ZXM="
PRIVATE = "whsk_" + base64.b64encode(bytes(range(1, 33))).decode()
STRANGER = "whsk_" + base64.b64encode(bytes(range(32))).decode()
FORMER = "whsec_Zm9ybWVyIHNlY3JldCwgZ29uZSBmcm9tIGNvbmZpZw=="
CONFIG = f"""
[destinations.crm]
url = "https://crm.example/hook"
secrets = ["{SECRET}", "{SECOND}"]
[destinations.audit]
url = "https://audit.example/hook"
secrets = ["{OTHERS}"]
[destinations.open]
url = "https://open.example/hook"
[destinations.pair]
url = "https://pair.example/hook"
secrets = ["{PRIVATE}"]
"""
NOW = 1_700_000_000
ID = "evt_018bcfe5-6800-7000-8000-000000000001"
BODY = (
    f'{{"id":"{ID}","type":"moddy.member_joined","subject":null,'
    '"data":{"total":45000.00,"big":12345678901234567890,"text":"caf\u00e9 </a> x/y","list":[],'
    '"more":{"a":[1,2]}}}'
).encode()


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path, CONFIG)


def signed(body=BODY, *secrets, id_=ID, at=NOW):
    return Signer(tuple(map(Secret, secrets or (SECRET,)))).headers(id_, at, body)


def mac(text, key=None):
    digest = hmac.digest(key or base64.b64decode(SECRET.removeprefix("whsec_")), text, "sha256")
    return "v1," + base64.b64encode(digest).decode()


def capture(headers, body=BODY):
    lines = [f"{name}: {value}" for name, value in headers.items()]
    head = "\r\n".join(["POST /hook HTTP/1.1", *lines, f"Content-Length: {len(body)}", "", ""])
    return head.encode("utf-8", "surrogateescape") + body


def verify(config, captured, *args, name="crm", code=1, at="2023-11-14T22:13:21Z"):
    file = config.parent / "captured.http"
    file.write_bytes(captured)
    when = () if at is None else ("--at", at)
    return run(
        "verify", "--destination", name, "--request", file, "-c", config, "--json", *when, *args, code=code
    )


def only(result, secrets=(SECRET, SECOND, OTHERS, FORMER)):
    for secret in secrets:
        assert secret.removeprefix("whsec_")[:16] not in result.out + result.err
    [finding] = result.json["findings"]
    assert finding["do"]
    return finding


async def test_a_captured_delivery_of_the_relay_verifies(tmp_path):
    async with receivers.answers() as receiver:
        config = write_config(tmp_path, SOURCES, destination("crm", receiver.url))
        async with running(config) as relay:
            body = b'{"event_type": "a.b", "session_id": "s", "payload": {"n": 45000.00}}'
            await relay.exchange(request("POST", "/v1/events", body))
            await receiver.until(1)
    [arrived] = receiver.requests
    result = verify(
        config, capture(arrived.headers, arrived.body).replace(b"content-length", b"x-l"), at=None, code=0
    )
    assert (result.json["ok"], result.json["fits"]) == (True, "destinations.crm.secrets[0]")


def test_the_report_names_the_matching_secret_and_signature(config):
    result = verify(config, capture(signed(BODY, FORMER, SECOND)), code=0)
    assert (result.json["fits"], result.json["signature"]) == ("destinations.crm.secrets[1]", 2)
    plain = run(
        "verify", "--destination", "crm", "--request", config.parent / "captured.http", "-c", config,
        "--at", "2023-11-14T22:13:21Z",
    )  # fmt: skip
    assert plain.out == "valid: destinations.crm.secrets[1], signature 2\n"


def test_ed25519_signatures_verify(config):
    headers = signed(BODY, PRIVATE)
    assert (
        verify(config, capture(headers), name="pair", code=0).json["fits"] == "destinations.pair.secrets[0]"
    )
    assert (
        "the only signature is ed25519 (v1a)" in only(verify(config, capture(signed(BODY, STRANGER))))["what"]
    )
    assert (
        "the only signature is HMAC (v1)"
        in only(verify(config, capture(signed(BODY, FORMER)), name="pair"))["what"]
    )
    relabelled = {**headers, "webhook-signature": headers["webhook-signature"].replace("v1a", "v1")}
    assert only(verify(config, capture(relabelled), name="pair"))["what"] == (
        "the label is v1, but the signature has the 64 bytes of v1a"
    )


def test_another_destination_s_secret_is_named(config):
    finding = only(verify(config, capture(signed(BODY, OTHERS))))
    assert (finding["cause"], finding["where"]) == ("secret", "destinations.crm.secrets")
    assert 'destinations.audit.secrets[0], a secret of destination "audit"' in finding["what"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("crm", 'no secret of destination "crm"'), ("audit", 'no secret of destination "audit"')],
)
def test_an_unknown_secret_is_reported(config, name, message):
    finding = only(verify(config, capture(signed(BODY, FORMER)), name=name))
    assert (finding["cause"], message in finding["what"]) == ("secret", True)


@pytest.mark.parametrize(
    ("key", "message"),
    [(SECRET, "the key whsec_ included"), (SECRET.removeprefix("whsec_"), "the key as text")],
)
def test_a_key_that_was_not_decoded_is_found(config, key, message):
    head = f"{ID}.{NOW}.".encode()
    headers = {**signed(), "webhook-signature": mac(head + BODY, key.encode())}
    finding = only(verify(config, capture(headers)))
    assert (finding["cause"], message in finding["what"]) == ("encoding", True)


def _json(**options):
    """Rewrite the body as json.dumps does, except for numbers, which it would change."""
    text = BODY.decode().replace("45000.00", "45000.5").replace("12345678901234567890", "12")
    return text.encode(), json.dumps(json.loads(text), **options).encode()


REWRITTEN = [
    ("parsed and written again", *_json()),
    ("parsed and written again", *_json(ensure_ascii=False)),
    ("parsed and written again", *_json(indent=2)),
    ("parsed and written again", *_json(indent=4, ensure_ascii=False)),
    ("parsed and written again", *_json(separators=(",", ":"))),
    ("parsed and written again", *reversed(_json(indent=2))),
    ("parsed and written again", *reversed(_json(indent="\t", ensure_ascii=False))),
    ("parsed and written again", BODY.replace(b"/", b"\\/").replace("\u00e9".encode(), b"\\u00e9"), BODY),
    ("parsed and written again", BODY.replace(b"<", b"\\u003c").replace(b">", b"\\u003e"), BODY),
    ("parsed and written again", BODY, json.dumps(BODY.decode()).encode()),
    ("a newline was added", BODY, BODY + b"\n"),
    ("a newline was added", BODY, BODY + b"\r\n"),
    ("newline at the end was removed", BODY + b"\n", BODY),
    ("from CRLF to LF", b"a\r\nb", b"a\nb"),
    ("from LF to CRLF", b"a\nb", b"a\r\nb"),
    ("byte order mark", BODY, b"\xef\xbb\xbf" + BODY),
    ("white space around the body was removed or added", BODY, b" " + BODY + b"\t"),
    ("encoded in different character sets", BODY, BODY.decode().encode("latin-1")),
    ("encoded in different character sets", BODY, BODY.decode("latin-1").encode()),
    ("compressed (gzip)", BODY, gzip.compress(BODY)),
    ("an empty body was signed", b"", BODY),
]


@pytest.mark.parametrize(("message", "sent", "got"), REWRITTEN)
def test_a_changed_body_is_reported_with_the_change(config, message, sent, got):
    finding = only(verify(config, capture(signed(sent), got)))
    assert (finding["cause"], finding["where"]) == ("bytes", "body")
    assert message in finding["what"], finding


HEADS = [
    ("the id is missing", f"{NOW}.".encode()),
    ("the timestamp is missing", f"{ID}.".encode()),
    ("id and timestamp are swapped", f"{NOW}.{ID}.".encode()),
    ("id and timestamp are missing", b""),
    ("the dots are missing", f"{ID}{NOW}".encode()),
]


@pytest.mark.parametrize(("message", "head"), HEADS)
def test_a_wrong_signed_text_is_reported(config, message, head):
    finding = only(verify(config, capture({**signed(), "webhook-signature": mac(head + BODY)})))
    assert (finding["cause"], message in finding["what"]) == ("headers", True)


def test_an_id_that_belongs_to_another_event_is_found(config):
    finding = only(verify(config, capture({**signed(), "webhook-id": "evt_other"})))
    assert (
        finding["what"]
        == "webhook-id differs from the id in the body; the signature covers the id in the body"
    )


@pytest.mark.parametrize(
    ("missing", "instead"),
    [
        ("webhook-id", None),
        ("webhook-timestamp", "X-Hook-Timestamp"),
        ("webhook-signature", "svix-signature"),
    ],
)
def test_a_header_that_is_missing_or_renamed_is_found(config, missing, instead):
    headers = {"X-Request-Id": "none of it", **signed()}
    value = headers.pop(missing)
    if instead:
        headers[instead] = value
    finding = only(verify(config, capture(headers)))
    assert (finding["cause"], finding["where"]) == ("headers", f"header {missing}")
    assert finding["what"] == ("missing" + (f"; the request has {instead}" if instead else ""))


SIGNATURE = signed()["webhook-signature"]
RAW = base64.b64decode(SIGNATURE.removeprefix("v1,"))


@pytest.mark.parametrize(
    ("written", "cause", "message"),
    [
        (SIGNATURE.removeprefix("v1,"), "encoding", "the signature has an invalid format"),
        (f"v1={SIGNATURE.removeprefix('v1,')}", "encoding", "the signature has an invalid format"),
        (f'"{SIGNATURE}"', "encoding", "the signature has an invalid format"),
        (f"{SIGNATURE}, v1,{'A' * 43}=", "encoding", "the signature has an invalid format"),
        (SIGNATURE.rstrip("="), "encoding", "the signature has an invalid format"),
        (f"sha256={RAW.hex()}", "encoding", "hexadecimal, not base64"),
        (f"v1,{RAW.hex()}", "encoding", "hexadecimal, not base64"),
        (
            SIGNATURE.replace("v1,", "v1a,"),
            "encoding",
            "the label is v1a, but the signature has the 32 bytes of v1",
        ),
        (SIGNATURE[:23], "bytes", "the signature has 15 bytes; v1 has 32, v1a has 64"),
        ("v1,", "encoding", "no complete signature"),
    ],
)
def test_a_signature_in_another_format_is_reported(config, written, cause, message):
    finding = only(verify(config, capture({**signed(), "webhook-signature": written})))
    assert (finding["cause"], finding["where"]) == (cause, "header webhook-signature")
    assert message in finding["what"], finding


def _signed_with(sign):
    """Return the headers of a time whose signature contains this character."""
    for at in range(NOW, NOW + 200):
        headers = signed(at=at)
        if sign in headers["webhook-signature"][3:]:
            return headers
    raise AssertionError(sign)


@pytest.mark.parametrize(
    ("sign", "become", "message"),
    [("+", " ", "spaces instead of +"), ("/", "_", "URL-safe"), ("+", "-", "URL-safe")],
)
def test_characters_changed_by_urls_are_reported(config, sign, become, message):
    headers = _signed_with(sign)
    headers["webhook-signature"] = headers["webhook-signature"].replace(sign, become)
    assert message in only(verify(config, capture(headers)))["what"]


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("2023-11-14T22:20:00Z", "signed 6m40s before receipt; receivers allow 5m"),
        ("2023-11-14T22:00:00Z", "signed 13m20s after receipt; receivers allow 5m"),
    ],
)
def test_a_wrong_clock_is_reported_with_the_difference(config, at, message):
    result = verify(config, capture(signed()), at=at)
    finding = only(result)
    assert (finding["cause"], finding["what"]) == ("clock", message)
    assert result.json["fits"] == "destinations.crm.secrets[0]"


def test_the_default_time_of_receipt_is_now(config):
    verify(config, capture(signed(at=int(time.time()))), at=None, code=0)
    assert only(verify(config, capture(signed()), at=None))["cause"] == "clock"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (f"{NOW}000", "the value is in milliseconds, not seconds"),
        (f"{NOW}000000", "the value is in microseconds, not seconds"),
        ("2023-11-14T22:13:20Z", "not a number of seconds since 1970"),
    ],
)
def test_a_timestamp_in_another_format_is_reported(config, written, message):
    result = verify(config, capture({**signed(), "webhook-timestamp": written}))
    assert message in [finding["what"] for finding in result.json["findings"]]


def test_a_truncated_capture_is_reported(config):
    captured = capture(signed())[:-20]
    causes = [(each["cause"], each["where"]) for each in verify(config, captured).json["findings"]]
    assert causes[0] == ("bytes", "body")


def test_a_destination_without_secrets_signs_nothing(config):
    result = verify(config, capture({"webhook-id": ID, "webhook-timestamp": str(NOW)}), name="open")
    finding = result.json["findings"][0]
    assert (finding["cause"], finding["where"]) == ("secret", "destinations.open.secrets")


def test_two_problems_are_both_reported(config):
    result = verify(config, capture(signed(BODY, OTHERS), BODY + b"\n"), at="2023-11-14T23:00:00Z")
    assert [each["cause"] for each in result.json["findings"]] == ["clock", "secret", "bytes"]


# --- other schemes ------------------------------------------------------------------------------------

OLD = "the secret of a former sender"
MOVING = f"""
[destinations.moving]
url = {{ env = "MOVING_URL", development = "https://moving.example/a-secret-path" }}
secrets = ["{SECRET}"]
signatures = ["standard", "svix", "stripe", {{ scheme = "github", secrets = ["{OLD}"] }}]
[destinations.legacy]
url = "https://legacy.example/hook"
signatures = [{{ scheme = "github", secrets = ["of legacy"] }}]
"""


def moving(body=BODY, *, only=None, old=OLD, secret=SECRET, at=NOW):
    schemes = [msgspec.structs.replace(SCHEMES["github"], secrets=(Secret(old),))]
    schemes += [SCHEMES[name] for name in ("standard", "svix", "stripe")]
    wanted = tuple(each for each in schemes if only in (None, each.scheme))
    return signer_of(wanted, (Secret(secret),), method="POST", url="").headers(ID, at, body)


@pytest.fixture
def moved(tmp_path):
    return write_config(tmp_path, CONFIG, MOVING)


async def test_a_delivery_signed_side_by_side_verifies_by_every_scheme(tmp_path):
    async with receivers.answers() as receiver:
        more = f'signatures = ["standard", "svix", "stripe", {{ scheme = "github", secrets = ["{OLD}"] }}]'
        config = write_config(tmp_path, SOURCES, destination("crm", receiver.url, more))
        async with running(config) as relay:
            await relay.exchange(request("POST", "/v1/events", adorn()))
            await receiver.until(1)
    [arrived] = receiver.requests
    now = int(arrived.headers["webhook-timestamp"])
    for name in ("standard", "svix", "stripe"):
        verifier_of(SCHEMES[name], (Secret(SECRET),))(arrived.headers, arrived.body, now)
    verifier_of(SCHEMES["github"], (Secret(OLD),))(arrived.headers, arrived.body, now)
    result = verify(config, capture(arrived.headers, arrived.body), at=None, code=0)
    shared = "destinations.crm.secrets[0]"
    assert result.json["fits"] == f"{shared}, {shared}, {shared}, destinations.crm.signatures[3].secrets[0]"


def test_a_scheme_alone_verifies_and_the_absent_ones_are_notes(moved):
    result = verify(moved, capture(moving(only="github")), name="moving", code=0)
    assert result.json["fits"] == "destinations.moving.signatures[3].secrets[0]"
    assert result.json["notes"] == [
        "the request has no header webhook-signature",
        "the request has no header svix-signature",
        "the request has no header Stripe-Signature",
    ]
    assert result.json["request"] == "POST /hook"


def test_without_any_signature_each_header_is_missing(moved):
    result = verify(moved, capture({"webhook-id": ID, "webhook-timestamp": str(NOW)}), name="moving")
    assert {each["where"] for each in result.json["findings"]} == {
        "header webhook-signature",
        "header svix-id",
        "header svix-timestamp",
        "header svix-signature",
        "header Stripe-Signature",
        "header X-Hub-Signature-256",
    }


GITHUB = {"X-Hub-Signature-256": "sha256=" + hmac.new(b"of legacy", BODY, "sha256").hexdigest()}


@pytest.mark.parametrize(
    ("headers", "body", "cause", "what"),
    [
        (GITHUB, BODY + b"\n", "bytes", "a newline was added at the end"),
        ({"X-Hub-Signature-256": GITHUB["X-Hub-Signature-256"][7:]}, BODY, "encoding", "lacks 'sha256='"),
        (
            {"X-Hub-Signature-256": "sha256=ab"},
            BODY,
            "encoding",
            "no signature of sha256 in hex after 'sha256='",
        ),
        (
            {"X-Hub-Signature-256": "sha256=" + hmac.new(b"of legacy\n", BODY, "sha256").hexdigest()},
            BODY,
            "encoding",
            "with a line break at its end",
        ),
        (
            {"X-Hub-Signature-256": "sha256=" + hmac.new(OLD.encode(), BODY, "sha256").hexdigest()},
            BODY,
            "secret",
            r"signed with destinations\.moving\.signatures\[3\]\.secrets\[0\]",
        ),
        (
            {"X-Hub-Signature-256": "sha256=" + hmac.new(b"nobody's", BODY, "sha256").hexdigest()},
            BODY,
            "secret",
            'no secret of destination "legacy" for github matches',
        ),
    ],
)
def test_each_fault_of_another_scheme_has_its_finding(moved, headers, body, cause, what):
    result = verify(moved, capture(headers, body), name="legacy")
    finding = only(result, (SECRET, OLD, "of legacy"))
    assert finding["cause"] == cause
    assert re.search(what, finding["what"])


def test_stripe_s_time_and_key_are_diagnosed(moved):
    late = verify(moved, capture(moving(only="stripe")), name="moving", at="2023-11-14T23:13:20Z")
    assert (late.json["findings"][0]["cause"], late.json["findings"][0]["where"]) == (
        "clock",
        "header Stripe-Signature",
    )
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    decoded = hmac.new(key, f"{NOW}.".encode() + BODY, "sha256").hexdigest()
    result = verify(moved, capture({"Stripe-Signature": f"t={NOW},v1={decoded}"}), name="moving")
    whats = [each["what"] for each in result.json["findings"] if each["where"].endswith("secrets[0]")]
    assert whats == ["the secret was used as the key after base64 decoding"]
    alone = hmac.new(SECRET.encode(), BODY, "sha256").hexdigest()
    result = verify(moved, capture({"Stripe-Signature": f"t={NOW},v1={alone}"}), name="moving")
    assert "the body alone was signed" in [each["what"] for each in result.json["findings"]]


def test_a_secret_url_is_not_printed_and_not_needed(moved):
    raw = capture(moving(only="github")).replace(b"/hook", b"/a-secret-path")
    result = verify(moved, raw, name="moving", code=0)
    assert result.json["request"] == "POST <secret>"
    substitute = ', development = "https://moving.example/a-secret-path"'
    moved.write_text(moved.read_text().replace(substitute, ""))
    assert verify(moved, capture(moving(only="github")), name="moving", code=0).json["ok"]
