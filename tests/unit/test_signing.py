import base64
import binascii
from datetime import UTC, datetime

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from relay.config.secrets import Secret
from relay.keys import shared_key
from relay.signing import SignatureError, Signer, verify

# The published vector: standard-webhooks/standard-webhooks, the test "sign function works" of each library.
SECRET = Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
AT = 1614265330
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
HEADERS = {"webhook-id": ID, "webhook-timestamp": str(AT), "webhook-signature": SIGNATURE}

OTHER = Secret("whsec_" + base64.b64encode(b"another key of 32 bytes, for it.").decode())

keys = st.binary(min_size=24, max_size=64)
ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


def test_the_published_vector_is_signed_as_published():
    assert Signer((SECRET,)).headers(ID, AT, BODY) == HEADERS


def test_the_published_vector_verifies():
    verify((SECRET,), HEADERS, BODY, now=AT)


def test_every_current_secret_signs_and_each_one_verifies():
    headers = Signer((SECRET, OTHER)).headers(ID, AT, BODY)
    first, second = headers["webhook-signature"].split(" ")
    assert first == SIGNATURE
    assert second.startswith("v1,")
    assert second != first
    verify((SECRET,), headers, BODY, now=AT)
    verify((OTHER,), headers, BODY, now=AT)


def test_without_secrets_there_is_an_id_and_a_time_but_no_signature():
    assert Signer(()).headers(ID, AT, BODY) == {"webhook-id": ID, "webhook-timestamp": str(AT)}


@given(key=keys, webhook_id=ids, at=st.integers(0, 4_000_000_000), body=st.text(st.characters(codec="utf-8")))
def test_signatures_equal_those_of_the_reference_library(key, webhook_id, at, body):
    """The library reads bodies as text, so this covers UTF-8; the next test covers other bytes."""
    oracle = standardwebhooks.Webhook(key)
    secret = Secret(base64.b64encode(key).decode())
    ours = Signer((secret,)).headers(webhook_id, at, body.encode())["webhook-signature"]
    assert ours == oracle.sign(webhook_id, datetime.fromtimestamp(at, tz=UTC), body)


def test_the_reference_library_accepts_a_fresh_signature():
    headers = Signer((OTHER, SECRET)).headers(ID, int(datetime.now(tz=UTC).timestamp()), BODY)
    assert standardwebhooks.Webhook(SECRET.reveal()).verify(BODY, headers) == {"test": 2432232314}


@given(key=keys, body=st.binary(), flip=st.integers(0))
def test_any_changed_byte_of_any_body_breaks_the_signature(key, body, flip):
    secrets = (Secret(base64.b64encode(key).decode()),)
    headers = Signer(secrets).headers(ID, AT, body)
    verify(secrets, headers, body, now=AT)
    forged = bytearray(body or b"\0")
    forged[flip % len(forged)] ^= 1
    with pytest.raises(SignatureError) as caught:
        verify(secrets, headers, bytes(forged), now=AT)
    assert caught.value.problem == "signature"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"webhook-id": ""}, "headers"),
        ({"webhook-signature": ""}, "headers"),
        ({"webhook-timestamp": "1614265330.5"}, "timestamp"),
        ({"webhook-timestamp": "1_614_265_330"}, "timestamp"),
        ({"webhook-timestamp": "١٦١٤٢٦٥٣٣٠"}, "timestamp"),
        ({"webhook-timestamp": "-1"}, "timestamp"),
        ({"webhook-timestamp": "9" * 5000}, "timestamp"),
        ({"webhook-timestamp": str(AT - 301)}, "timestamp"),
        ({"webhook-timestamp": str(AT + 301)}, "timestamp"),
        ({"webhook-timestamp": str(AT - 300)}, "signature"),
        ({"webhook-timestamp": str(AT + 300)}, "signature"),
        ({"webhook-id": "msg_other"}, "signature"),
        ({"webhook-id": "\ud800\udcff"}, "signature"),
        ({"webhook-signature": SIGNATURE.removeprefix("v1,")}, "signature"),
        ({"webhook-signature": SIGNATURE.replace("v1,", "v1a,")}, "signature"),
        ({"webhook-signature": SIGNATURE[:-1]}, "signature"),
        ({"webhook-signature": "v1,\udcff\ud800 v1,"}, "signature"),
    ],
)
def test_an_invalid_signature_names_the_wrong_part(changes, problem):
    with pytest.raises(SignatureError) as caught:
        verify((SECRET,), HEADERS | changes, BODY, now=AT)
    assert caught.value.problem == problem


def test_a_missing_header_is_named():
    with pytest.raises(SignatureError, match="missing webhook-id, webhook-signature"):
        verify((SECRET,), {"webhook-timestamp": str(AT)}, BODY, now=AT)


@pytest.mark.parametrize(("now", "words"), [(AT + 400, "400 s ago"), (AT - 400, "400 s ahead")])
def test_a_wrong_timestamp_is_reported_with_its_offset(now, words):
    with pytest.raises(SignatureError, match=words):
        verify((SECRET,), HEADERS, BODY, now=now)


def test_without_secrets_nothing_verifies():
    with pytest.raises(SignatureError):
        verify((), HEADERS, BODY, now=AT)


def test_header_names_are_read_in_any_case():
    verify((SECRET,), {name.title(): value for name, value in HEADERS.items()}, BODY, now=AT)


def test_one_valid_signature_is_enough():
    signatures = f"v1a,AAAA v1,{'A' * 43}= {SIGNATURE} v2,x"
    verify((SECRET,), HEADERS | {"webhook-signature": signatures}, BODY, now=AT)


@pytest.mark.parametrize("size", [24, 25, 26, 64])
@pytest.mark.parametrize("prefix", ["whsec_", ""])
@pytest.mark.parametrize("padding", ["", "="])
def test_a_secret_may_lack_its_prefix_and_its_padding(size, prefix, padding):
    key = bytes(range(size))
    text = binascii.b2a_base64(key, newline=False).decode().rstrip("=")
    padded = text + "=" * (-len(text) % 4) if padding else text
    assert shared_key(Secret(prefix + padded)) == key


@pytest.mark.parametrize(
    "value",
    [
        "",
        "whsec_",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
        "hunter2-hunter2-hunter2-hunter2-hunter2",
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSé",
        "whsec_MfKQ9r8GKYqr TwjUPD8ILPZIo2LaLaSw",
        "whsk_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    ],
)
def test_a_bad_secret_is_refused_without_being_shown(value):
    with pytest.raises(ValueError, match="expected a signing secret") as caught:
        Signer((Secret(value),))
    assert "MfKQ" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
