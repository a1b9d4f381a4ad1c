"""How a generic source checks its senders, and how `relay verify` explains a refused request."""

import base64
import gzip
import hashlib
import hmac
import time

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from generic import incoming, load_table, problems_of
from standardwebhooks import Webhook

from relay.source import Refusal

BODY = b'{"n": 1.50}'
AT = 1_700_000_000
KEY = b"s3cret"


def hex_of(text, key=KEY, algorithm="sha256"):
    return hmac.digest(key, text, algorithm).hex()


def base64_of(text, key=KEY, algorithm="sha256"):
    return base64.b64encode(hmac.digest(key, text, algorithm)).decode()


def source_of(verify, more="", secrets='["other", "s3cret"]'):
    return load_table(f"verify = {verify}\nsecrets = {secrets}\n{more}")


def problem_of(source, request):
    """Return why a request is refused, `""` if it is accepted."""
    try:
        source.screen(request)
        source.verify(request)
    except Refusal as error:
        return error.detail
    return ""


def test_a_bearer_token_is_one_of_the_secrets():
    source = source_of('"bearer"')
    assert not source.needs_body()
    assert problem_of(source, incoming(headers={"Authorization": "bearer  s3cret "})) == ""
    for headers in (
        {},
        {"Authorization": "Bearer nope"},
        {"Authorization": "Bearer "},
        {"Authorization": "s3cret"},
    ):
        assert problem_of(source, incoming(headers=headers))


def test_basic_credentials_are_a_user_and_one_of_the_secrets():
    source = source_of('{ basic = { user = "relay" } }')
    assert not source.needs_body()

    def sent(pair, scheme="Basic"):
        request = incoming(headers={"Authorization": f"{scheme} {base64.b64encode(pair).decode()}"})
        problem = problem_of(source, request)
        return problem, source.diagnose(request) if problem else ()

    wrong = "Wrong user name or password"
    assert sent(b"relay:s3cret") == ("", ())
    assert sent(b"relay:other", "basic") == ("", ())
    assert sent(b"root:s3cret") == (wrong, ('the user is not "relay"', "the password matches"))
    assert sent(b"relay: s3cret\n") == (wrong, ("the password matches without the white space around it",))
    assert sent(b"relay:x") == (wrong, ("the password does not match any of the 2 in `secrets`",))
    for value in ("", "Basic", "Basic %%%", "Bearer s3cret", "Basic é"):
        request = incoming(headers={"Authorization": value} if value else {})
        assert problem_of(source, request)
        assert source.diagnose(request)[0].startswith("header Authorization: ")


def test_an_api_key_is_in_a_header_a_query_or_the_body():
    header = source_of('{ api_key = { header = "X-Token", prefix = "key-" } }')
    assert not header.needs_body()
    assert problem_of(header, incoming(headers={"x-token": "key-s3cret"})) == ""
    assert (
        problem_of(header, incoming(headers={"X-Token": "s3cret"})) == "The key (header X-Token) is malformed"
    )
    assert header.diagnose(incoming(headers={"X-Token": "s3cret"}))[1:] == (
        "the key matches without the white space around it",
        "the key matches with its prefix: remove `prefix` from config.toml",
        'the key matches without `Bearer ` in front: set prefix = "Bearer "',
    )
    assert problem_of(header, incoming()) == "Missing key (header X-Token)"
    query = source_of('{ api_key = { query = "token" } }')
    assert problem_of(query, incoming(query="a=b&token=s3cret")) == ""
    assert problem_of(query, incoming(query="token=s3cre")) == "Unknown key"
    assert "several values" in problem_of(query, incoming(query="token=s3cret&token=x"))
    body = source_of('{ api_key = { value = "{body:auth.token}" } }')
    assert body.needs_body()
    assert problem_of(body, incoming(b'{"auth": {"token": "s3cret"}}')) == ""
    assert problem_of(body, incoming(b'{"auth": {"token": ""}}')).startswith("Missing key")
    item = source_of('{ api_key = { value = "{item:state}" } }', 'events = "{body:value}"')
    assert problem_of(item, incoming(b'{"value": [{"state": "s3cret"}, {"state": "other"}]}')) == ""
    for broken in (
        b'{"value": [{"state": "s3cret"}, {"state": "x"}]}',
        b'{"value": []}',
        b'{"value": [{}]}',
        b"{}",
    ):
        assert problem_of(item, incoming(broken))


@pytest.mark.parametrize(
    ("keys", "headers"),
    [
        ("", {"X-Sign": hex_of(BODY)}),
        ("", {"x-sign": f" {hex_of(BODY).upper()} "}),
        ("", {"X-Sign": hex_of(BODY, b"other")}),
        ('prefix = "sha256="', {"X-Sign": f"sha256={hex_of(BODY)}"}),
        ('algorithm = "sha1"', {"X-Sign": hex_of(BODY, algorithm="sha1")}),
        ('algorithm = "sha512", encoding = "base64"', {"X-Sign": base64_of(BODY, algorithm="sha512")}),
        ('encoding = "base64"', {"X-Sign": base64_of(BODY).rstrip("=")}),
        ('separator = ",", prefix = "v1="', {"X-Sign": f"v0=00, v1=00,v1={hex_of(BODY)}"}),
        ('separator = " "', {"X-Sign": f"zz {hex_of(BODY)}"}),
        ('signed = "{header:X-Id}.{body}"', {"X-Sign": hex_of(b"a\xff." + BODY), "X-Id": "a\udcff"}),
        ('signed = "{method}{url}{body}"',
         {"X-Sign": hex_of(b"POSThttps://hooks.example/hooks/shop/berlin?a=%20b" + BODY)}),
        ('signed = "{query:a}.{path:store}.{body:n}.{body}"', {"X-Sign": hex_of(b" b.berlin.1.50." + BODY)}),
    ],
)  # fmt: skip
def test_an_hmac_over_the_bytes_as_received_is_accepted(keys, headers):
    more = f", {keys}" if keys else ""
    source = source_of(f'{{ hmac = {{ header = "X-Sign"{more} }} }}', 'public_url = "https://hooks.example"')
    assert source.needs_body()
    assert problem_of(source, incoming(BODY, headers, query="a=%20b")) == ""
    for other in (BODY + b"\n", BODY[:-1], b""):
        assert problem_of(source, incoming(other, headers, query="a=%20b"))


@pytest.mark.parametrize(
    ("headers", "problem"),
    [
        ({}, "Missing signature (header X-Sign)"),
        ({"X-Sign": ""}, "The signature is malformed"),
        ({"X-Sign": "sha256="}, "The signature is malformed"),
        ({"X-Sign": hex_of(BODY)}, "The signature is malformed"),
        ({"X-Sign": "sha256=zz"}, "The signature does not match"),
        ({"X-Sign": "sha256=é"}, "The signature does not match"),
        ({"X-Sign": "sha256=\udcff"}, "The signature does not match"),
        ({"X-Sign": f"sha256={hex_of(BODY, b's3cre')}"}, "The signature does not match"),
        ({"X-Sign": f"sha256={hex_of(BODY)[:-2]}"}, "The signature does not match"),
        ({"X-Sign": f"sha256={hex_of(BODY)}00"}, "The signature does not match"),
    ],
)
def test_any_other_signature_is_refused(headers, problem):
    source = source_of('{ hmac = { header = "X-Sign", prefix = "sha256=" } }')
    assert problem_of(source, incoming(BODY, headers)) == problem


def test_a_signature_covers_the_bytes_as_received_of_a_compressed_body():
    source = source_of('{ hmac = { header = "X-Sign" } }', 'type = "{body:n}"')
    packed = gzip.compress(BODY)
    request = msgspec.structs.replace(incoming(BODY, {"X-Sign": hex_of(packed)}), compressed=packed)
    assert problem_of(source, request) == ""
    assert source.receive(request).event.type == "1.50"
    assert problem_of(source, msgspec.structs.replace(request, compressed=None))


def test_only_some_signatures_of_one_header_are_checked():
    source = source_of('{ hmac = { header = "X-Sign", separator = "," } }')
    signature = hex_of(BODY)
    assert problem_of(source, incoming(BODY, {"X-Sign": ",".join(["00"] * 9 + [signature])})) == ""
    many = incoming(BODY, {"X-Sign": ",".join(["00"] * 10 + [signature])})
    assert problem_of(source, many) == "More than 10 signatures"
    source = source_of('"standard-webhooks"', secrets='["whsec_a2tra2tra2tra2tra2tra2tra2tra2tra2tra2s="]')
    signed = source.sign(incoming(BODY, at=AT))
    more = signed.with_headers({"webhook-signature": "v1,x " * 10 + signed.headers["webhook-signature"]})
    assert problem_of(source, signed) == ""
    assert "more than 10 signatures" in problem_of(source, more)


def test_a_missing_part_of_the_signed_text_refuses():
    source = source_of('{ hmac = { header = "X-Sign", signed = "{header:X-Id}.{body}" } }')
    assert (
        problem_of(source, incoming(BODY, {"X-Sign": hex_of(b"." + BODY)}))
        == "The signed text has no {header:X-Id}"
    )


@pytest.mark.parametrize(
    ("key_encoding", "prefix", "secret"),
    [("hex", "", KEY.hex()), ("base64", "", base64.b64encode(KEY).decode()),
     ("base64", "whsec_", f"whsec_{base64.b64encode(KEY).decode()}"), ("text", "", "s3cret"),
     ("text", "k-", "k-s3cret")],
)  # fmt: skip
def test_a_key_is_text_hex_or_base64(key_encoding, prefix, secret):
    keys = f'key_encoding = "{key_encoding}", key_prefix = "{prefix}"'
    source = source_of(f'{{ hmac = {{ header = "X-Sign", {keys} }} }}', secrets=f'["{secret}"]')
    assert problem_of(source, incoming(BODY, {"X-Sign": hex_of(BODY)})) == ""


# --- times ----------------------------------------------------------------------------------------------

STRIPE = (
    'header = "S", separator = ",", timestamp_field = "t=", prefix = "v1=", signed = "{timestamp}.{body}"'
)
SLACK = (
    'header = "S", prefix = "v0=", timestamp_header = "T", signed = "v0:{timestamp}:{body}", tolerance = "1m"'
)


@pytest.mark.parametrize(
    ("late", "accepted"), [(0, True), (300, True), (-300, True), (301, False), (-301, False)]
)
def test_a_time_in_a_list_may_differ_by_five_minutes_in_both_directions(late, accepted):
    source = source_of(f"{{ hmac = {{ {STRIPE} }} }}")
    signature = hex_of(f"{AT}.".encode() + BODY)
    request = incoming(BODY, {"S": f"t={AT},v1={signature},v0=00"}, at=AT + late)
    assert (problem_of(source, request) == "") is accepted


@pytest.mark.parametrize(
    ("unit", "moment"), [("s", str(AT)), ("ms", f"{AT}123"), ("rfc3339", "2023-11-14T22:13:20.123456789Z")]
)
def test_a_time_is_in_seconds_milliseconds_or_rfc3339(unit, moment):
    source = source_of(f'{{ hmac = {{ {SLACK}, timestamp_unit = "{unit}" }} }}')

    def sent(stamp, at, signed=None):
        signature = hex_of(f"v0:{signed or stamp}:".encode() + BODY)
        return problem_of(
            source, incoming(BODY, {"S": f"v0={signature}", "T": stamp} if stamp else {"S": "v0=00"}, at=at)
        )

    assert sent(moment, AT) == ""
    assert sent(moment, AT + 59) == ""
    assert sent(moment, AT + 62) == "The signature is too old"
    assert sent(moment, AT - 62) == "The signature is too far in the future"
    assert sent("", AT) == "Missing time of the signature"
    for wrong in ("yesterday", "-1", "1e9", "9" * 20, "٣"):
        assert sent(wrong, AT) == "The time of the signature is malformed"
    assert sent(moment, AT, signed="1") == "The signature does not match"


# --- forms ----------------------------------------------------------------------------------------------

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
TWILIO = (
    '{ hmac = { header = "S", algorithm = "sha1", encoding = "base64", signed = "{url}{form:sorted}", '
    'body_sha256 = "bodySHA256" } }'
)


def test_a_signature_without_the_body_covers_forms_and_nothing_else():
    source = source_of(TWILIO, 'public_url = "https://hooks.example"')
    url = "https://hooks.example/hooks/shop/berlin"

    def sent(body, signed, headers=FORM, query=""):
        signature = base64_of(signed.encode(), algorithm="sha1")
        return problem_of(source, incoming(body, {**headers, "S": signature}, query=query))

    assert (
        sent(
            b"To=%2B1&From=a+b&Empty=&To=%2B1&To=0", f"{url}EmptyFroma bTo+1To0".replace("To+1To0", "To+1To0")
        )
        == ""
    )
    assert sent(b"", url) == ""
    assert sent(b'{"a": 1}', url, {}) == "The signature does not cover this body"
    assert (
        sent(b"a=1", f"{url}a1", {"Content-Type": "text/plain"}) == "The signature does not cover this body"
    )
    digest = hashlib.sha256(b'{"a": 1}').hexdigest()
    query = f"bodySHA256={digest}"
    assert sent(b'{"a": 1}', f"{url}?{query}", {}, query) == ""
    assert sent(b'{"a": 2}', f"{url}?{query}", {}, query) == "The signature does not cover this body"


# --- asymmetric -----------------------------------------------------------------------------------------

ED = Ed25519PrivateKey.generate()
EC = generate_private_key(SECP256R1())


def test_an_ed25519_signature_is_accepted():
    raw = ED.public_key().public_bytes_raw()
    for key in (raw.hex(), base64.b64encode(raw).decode()):
        source = load_table(
            'verify = { ed25519 = { header = "S", timestamp_header = "T", signed = "{timestamp}{body}" } }\n'
            f'public_keys = ["{"00" * 32}", "{key}"]'
        )
        signature = ED.sign(f"{AT}".encode() + BODY).hex()
        assert problem_of(source, incoming(BODY, {"S": signature, "T": str(AT)}, at=AT)) == ""
        assert source.diagnose(incoming(BODY + b"\n", {"S": signature, "T": str(AT)}, at=AT)) == (
            "public_keys[1] matches: the sender signed the body without the line ending that was added to it",
        )
        for other in (signature[:-2], "00" * 64, "zz"):
            assert problem_of(source, incoming(BODY, {"S": other, "T": str(AT)}, at=AT))


def test_an_ecdsa_signature_is_accepted():
    spki = EC.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    pem = EC.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    signature = base64.b64encode(EC.sign(BODY, ECDSA(hashes.SHA256()))).decode()
    for key in (base64.b64encode(spki).decode(), pem.replace("\n", "\\n")):
        source = load_table(f'verify = {{ ecdsa = {{ header = "S" }} }}\npublic_keys = ["{key}"]')
        assert problem_of(source, incoming(BODY, {"S": signature})) == ""
        assert problem_of(source, incoming(BODY + b" ", {"S": signature}))
        assert problem_of(source, incoming(BODY, {"S": base64.b64encode(b"0").decode()}))
        assert source.sign(incoming(BODY)).headers == {}
    other = generate_private_key(SECP384R1()).public_key()
    wrong = base64.b64encode(other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
    assert "P-256" in problems_of(f'verify = {{ ecdsa = {{ header = "S" }} }}\npublic_keys = ["{wrong}"]')[0]


# --- Standard Webhooks and networks ---------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["webhook-", "svix-"])
def test_standard_webhooks_are_accepted_with_their_own_library(prefix):
    secret = "whsec_" + base64.b64encode(b"k" * 32).decode()
    keys = f'{{ standard_webhooks = {{ header_prefix = "{prefix}", tolerance = "1m" }} }}'
    source = source_of('"standard-webhooks"' if prefix == "webhook-" else keys, secrets=f'["{secret}"]')
    signed = source.sign(incoming(BODY, at=AT))
    assert problem_of(source, signed) == ""
    assert problem_of(source, incoming(BODY + b" ", dict(signed.headers), at=AT)).startswith(
        "Invalid signature"
    )
    late = incoming(BODY, dict(signed.headers), at=AT + 301)
    assert "301 s ago" in problem_of(source, late)
    assert "301 s ago" in source.diagnose(late)[0]
    assert problem_of(source, incoming(BODY)).startswith("Invalid signature: missing webhook-id")
    now = int(time.time())
    fresh = dict(source.sign(incoming(BODY, at=now)).headers)
    lower = {name.replace(prefix, "webhook-"): value for name, value in fresh.items()}
    assert Webhook(secret).verify(BODY, lower) == {"n": 1.5}


@pytest.mark.parametrize(
    ("remote", "accepted"),
    [("192.0.2.7", True), ("::ffff:192.0.2.7", True), ("2001:db8::1", True), ("192.0.3.1", False),
     ("unknown", False), ("10.0.0.1", False), ("", False)],
)  # fmt: skip
def test_only_the_networks_may_send(remote, accepted):
    source = load_table('networks = ["192.0.2.0/24", "2001:db8::/32"]')
    assert (problem_of(source, incoming(remote=remote)) == "") is accepted


# --- samples and diagnosis ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "verify",
    ['"bearer"', '{ basic = { user = "u" } }', '{ api_key = { header = "K", prefix = "p " } }',
     '{ api_key = { query = "k" } }', '{ hmac = { header = "S", encoding = "base64" } }',
     f"{{ hmac = {{ {STRIPE} }} }}", f'{{ hmac = {{ {SLACK}, timestamp_unit = "ms" }} }}',
     f'{{ hmac = {{ {SLACK}, timestamp_unit = "rfc3339" }} }}',
     '{ hmac = { header = "S", signed = "{method}{url}{body}" } }'],
)  # fmt: skip
def test_a_signed_sample_is_accepted(verify):
    source = source_of(verify, 'public_url = "https://h.example"' if "{url}" in verify else "")
    signed = source.sign(incoming(BODY, query="a=b", at=AT))
    assert problem_of(source, signed) == ""
    assert problem_of(source, incoming(BODY, query="a=b", at=AT))


@pytest.mark.parametrize(
    ("keys", "headers", "body", "message"),
    [
        ("", {}, BODY, "the header X-Sign is missing"),
        ("", {"X-Sign": base64_of(BODY)}, BODY, 'secrets[1] matches with encoding = "base64"'),
        ("", {"X-Sign": f"sha256={hex_of(BODY)}"}, BODY, 'secrets[1] matches with prefix = "sha256="'),
        ("", {"X-Sign": hex_of(BODY, algorithm="sha1")}, BODY, 'secrets[1] matches with algorithm = "sha1"'),
        ("", {"X-Sign": hex_of(BODY)}, BODY + b"\n", "the body without the line ending that was added to it"),
        ("", {"X-Sign": hex_of(b'{"a":1,"b":2}')}, b'{ "a": 1, "b": 2 }', "before it was parsed and written"),
        ("", {"X-Sign": hex_of(BODY, b"wrong")}, BODY, "no configured key matches"),
        ('prefix = "v1="', {"X-Sign": hex_of(BODY)}, BODY, "no signature in the header X-Sign begins"),
        ('key_encoding = "base64"', {"X-Sign": hex_of(BODY, b"czNjcmV0")}, BODY,
         'secrets[1] matches with key_encoding = "text"'),
        ('signed = "{url}{body}"', {"X-Sign": hex_of(b"http://h.example/hooks/shop/berlin" + BODY)}, BODY,
         "a URL with http://, unlike `public_url`"),
        ('signed = "{header:X}{body}"', {"X-Sign": hex_of(BODY)}, BODY, "The signed text has no {header:X}"),
    ],
)  # fmt: skip
def test_a_diagnosis_names_the_secret_encoding_or_bytes_that_would_match(keys, headers, body, message):
    more = f", {keys}" if keys else ""
    secrets = '["b3RoZXI=", "czNjcmV0"]' if "key_encoding" in keys else '["other", "s3cret"]'
    verify = f'{{ hmac = {{ header = "X-Sign"{more} }} }}'
    source = source_of(verify, 'public_url = "https://h.example"', secrets=secrets)
    request = incoming(body, headers)
    assert problem_of(source, request)
    found = source.diagnose(request)
    assert any(message in each for each in found), found
    assert "s3cret" not in str(found)


def test_a_diagnosis_names_an_old_time():
    source = source_of(f"{{ hmac = {{ {SLACK} }} }}")
    signature = hex_of(f"v0:{AT}:".encode() + BODY)
    found = source.diagnose(incoming(BODY, {"S": f"v0={signature}", "T": str(AT)}, at=AT + 90))
    assert found == ("The signature is too old; the tolerance is 60 s", "secrets[1] matches")
