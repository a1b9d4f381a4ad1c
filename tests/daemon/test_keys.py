"""The text forms of keys, and the signatures of ed25519 pairs."""

import base64
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st
from machines import needs

from relay.config.problems import ConfigError
from relay.config.secrets import Secret
from relay.keys import has_signed, private_key, public_key
from relay.plugin_loading.loader import load
from relay.signing import SignatureError, Signer, verify

# The vector of the specification's own server: svix/svix-webhooks, `test_asymmetric_key_signing`. The
# specification shows the same signature in its example of headers.
PAIR = "6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PRIVATE = Secret(f"whsk_{PAIR}")
PUBLIC = Secret("whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4=")
SHARED = Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
AT = 1614265330
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1a,hnO3f9T8Ytu9HwrXslvumlUpqtNVqkhqw/enGzPCXe5BdqzCInXqYXFymVJaA7AZdpXwVLPo3mNl8EM+m7TBAg=="
HEADERS = {"webhook-id": ID, "webhook-timestamp": str(AT), "webhook-signature": SIGNATURE}

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

# RFC 8032 §7.1: private key, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd"
            "25bf5f0595bbe24655141438e7a100b"
        ),
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        (
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594"
            "a7c15e9716ed28dc027beceea1ec40a"
        ),
    ),
]

seeds = st.binary(min_size=32, max_size=32)


def written(prefix, key):
    return Secret(prefix + base64.b64encode(key).decode())


def problem_of(secrets, headers, body=BODY):
    with pytest.raises(SignatureError) as caught:
        verify(secrets, headers, body, now=AT)
    return caught.value.problem


@pytest.mark.parametrize(("private", "public", "text", "signature"), RFC_8032)
def test_the_vectors_of_the_rfc_are_signed_and_verified(private, public, text, signature):
    private, public, text, signature = map(bytes.fromhex, (private, public, text, signature))
    key = private_key(written("whsk_", private + public))
    assert key.sign(text) == signature
    assert has_signed(public_key(written("whpk_", public)), signature, text)


@pytest.mark.parametrize(
    "secret",
    [PRIVATE, Secret(PRIVATE.reveal().rstrip("=")), written("whsk_", base64.b64decode(PAIR)[:32])],
)
def test_the_published_vector_is_signed_with_every_form_of_the_key(secret):
    assert Signer((secret,)).headers(ID, AT, BODY) == HEADERS


@pytest.mark.parametrize("secret", [PUBLIC, Secret(PUBLIC.reveal().rstrip("=")), PRIVATE])
def test_the_published_vector_verifies_by_either_key_of_the_pair(secret):
    verify((secret,), HEADERS, BODY, now=AT)


def test_keys_of_both_kinds_sign_in_order_and_each_one_verifies():
    headers = Signer((SHARED, PRIVATE)).headers(ID, AT, BODY)
    assert re.fullmatch(r"v1,[\w+/]{43}= " + re.escape(SIGNATURE), headers["webhook-signature"])
    for secret in (SHARED, PUBLIC):
        verify((secret,), headers, BODY, now=AT)
    turned = Signer((PRIVATE, SHARED)).headers(ID, AT, BODY)["webhook-signature"]
    assert turned.split(" ") == headers["webhook-signature"].split(" ")[::-1]


def test_the_reference_library_ignores_signatures_of_the_other_kind():
    headers = Signer((PRIVATE, SHARED)).headers(ID, int(datetime.now(tz=UTC).timestamp()), BODY)
    assert standardwebhooks.Webhook(SHARED.reveal()).verify(BODY, headers) == {"test": 2432232314}


@given(seed=seeds, stranger=seeds, body=st.binary(), flip=st.integers(0))
def test_any_signed_request_verifies_and_any_change_breaks_it(seed, stranger, body, flip):
    secret = written("whsk_", seed)
    public = written("whpk_", private_key(secret).public_key().public_bytes_raw())
    headers = Signer((secret,)).headers(ID, AT, body)
    verify((public,), headers, body, now=AT)
    if stranger != seed:
        assert problem_of((written("whsk_", stranger),), headers, body) == "signature"
    forged = bytearray(body or b"\0")
    forged[flip % len(forged)] ^= 1 << flip % 8
    assert problem_of((public,), headers, bytes(forged)) == "signature"
    signature = bytearray(base64.b64decode(headers["webhook-signature"].removeprefix("v1a,")))
    signature[flip % 64] ^= 1 << flip % 8
    changed = headers | {"webhook-signature": f"v1a,{base64.b64encode(signature).decode()}"}
    assert problem_of((public,), changed, body) == "signature"


@pytest.mark.parametrize(
    "signature",
    [
        "v1a,",
        "v1a,AAAA",
        "v1a,=",
        "v1a,\udcff\ud800",
        SIGNATURE.removeprefix("v1a,"),
        SIGNATURE.replace("v1a,", "v1,"),
        SIGNATURE.replace("v1a,", "v1b,"),
        SIGNATURE + "=",
        SIGNATURE[:-1],
        SIGNATURE.replace(",", " "),
        f"v1a,{'A' * 86}==",
        Signer((SHARED,)).headers(ID, AT, BODY)["webhook-signature"],
    ],
)
def test_a_signature_of_another_key_does_not_verify(signature):
    headers = HEADERS | {"webhook-signature": signature}
    assert problem_of((PUBLIC,), headers) == "signature"
    verify((PUBLIC,), HEADERS | {"webhook-signature": f"{signature} {SIGNATURE}"}, BODY, now=AT)


@pytest.mark.parametrize(
    "changes",
    [{"webhook-id": "msg_other"}, {"webhook-timestamp": str(AT + 1)}, {"webhook-id": "\ud800\udcff"}],
)
def test_id_and_time_are_signed_as_well(changes):
    assert problem_of((PUBLIC,), HEADERS | changes) == "signature"


def test_a_public_key_does_not_sign():
    with pytest.raises(ValueError, match="only verifies, at the receiver"):
        Signer((PUBLIC,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("whsk_", "32 or 64 bytes"),
        ("whsk_hush", "32 or 64 bytes"),
        ("whsk_" + base64.b64encode(b"hush" * 6).decode(), "32 or 64 bytes"),
        ("whsk_" + base64.b64encode(b"hush" * 10).decode(), "32 or 64 bytes"),
        ("whsk_" + base64.b64encode(b"hush" * 20).decode(), "32 or 64 bytes"),
        ("whsk_" + base64.b64encode(b"hush" * 16).decode(), "second half"),
        ("whsk_" + PAIR.replace("/", "_"), "32 or 64 bytes"),
        ("WHSK_" + PAIR, "expected a signing secret"),
    ],
)
def test_a_bad_private_key_is_refused_without_being_shown(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        Signer((Secret(text),))
    for part in ("hush", base64.b64encode(b"hush").decode()[:4], PAIR[:8]):
        assert part not in str(caught.value)


@pytest.mark.parametrize("text", ["whpk_", "whpk_AAAA", f"whpk_{PAIR}", "whpk_é"])
def test_a_bad_public_key_is_refused(text):
    with pytest.raises(ValueError, match="expected a public key"):
        verify((Secret(text),), HEADERS, BODY, now=AT)


# --- in config.toml -----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        '[destinations.crm]\nurl = "https://crm.example/"\nsecrets = [{ env = "OLD" }, { env = "NEW" }]\n'
    )
    return path


def test_a_destination_may_mix_both_kinds(config):
    crm = load(config, {"OLD": SHARED.reveal(), "NEW": PRIVATE.reveal()}).config.destinations["crm"]
    assert Signer(crm.secrets).headers(ID, AT, BODY)["webhook-signature"].endswith(f" {SIGNATURE}")


@pytest.mark.parametrize("new", [PUBLIC.reveal(), "whsk_hush"])
def test_a_key_that_cannot_sign_is_a_problem_at_its_line(config, new):
    with pytest.raises(ConfigError, match=r"config\.toml:3: destinations\.crm\.secrets\[1\]: ") as caught:
        load(config, {"OLD": SHARED.reveal(), "NEW": new})
    assert "hush" not in str(caught.value)


def test_without_the_library_a_private_key_is_a_problem_with_the_command_to_install_it(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    with pytest.raises(ConfigError, match=r"secrets\[1\]: .* -m pip install cryptography\n"):
        load(config, {"OLD": SHARED.reveal(), "NEW": PRIVATE.reveal()})
    with pytest.raises(ValueError, match="pip install"):
        verify((PUBLIC,), HEADERS, BODY, now=AT)
    assert load(config, {"OLD": SHARED.reveal(), "NEW": SHARED.reveal()}).config.destinations


def test_the_library_is_not_imported_without_such_a_key():
    code = f"""
import sys
sys.modules["cryptography"] = None
from relay.config.secrets import Secret
from relay.signing import Signer, verify
secrets = (Secret({SHARED.reveal()!r}),)
verify(secrets, Signer(secrets).headers("evt", 0, b""), b"", now=0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


@needs("openssl")
def test_the_commands_on_the_page_create_a_key_pair(tmp_path):
    commands = re.search(r"```sh\n(openssl genpkey .*?)```", PAGE.read_text(), re.DOTALL)[1]
    done = subprocess.run(
        ["sh", "-ec", commands], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=30
    )
    private, public = map(Secret, done.stdout.split())
    verify((public,), Signer((private,)).headers(ID, AT, BODY), BODY, now=AT)
