"""Signature schemes besides Standard Webhooks, against published vectors and independent code."""

import base64
import hashlib
import hmac
import tomllib

import pytest
from commands import run
from daemons import write_config

from relay.config import effective
from relay.config.secrets import Secret
from relay.config.signatures import DEFAULT, SCHEMES, SignatureConfig
from relay.plugin_loading.loader import load
from relay.signing import SignatureError, Signer, signer_of, verifier_of

KEY = Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
AT = 1614265330
BODY = b'{"test": 2432232314}'


def sign(*signatures, secrets=(KEY,), body=BODY, id_="msg_p5jXN8AQM9LWM0D4loKWxJek", at=AT):
    schemes = tuple(SCHEMES[each] if isinstance(each, str) else each for each in signatures)
    return signer_of(schemes, secrets, method="POST", url="https://a.example/b?c=d").headers(id_, at, body)


def mac(key, text, algorithm="sha256"):
    return hmac.new(key.encode(), text, algorithm)


def test_the_default_is_the_plain_signer_of_standard_webhooks():
    assert type(signer_of(DEFAULT, (KEY,), method="POST", url="")) is Signer
    assert sign("standard") == Signer((KEY,)).headers("msg_p5jXN8AQM9LWM0D4loKWxJek", AT, BODY)


def test_github_signs_as_its_documentation_shows():
    """docs.github.com, "Validating webhook deliveries", "Testing the webhook payload validation"."""
    headers = sign("github", secrets=(Secret("It's a Secret to Everybody"),), body=b"Hello, World!")
    expected = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert headers["X-Hub-Signature-256"] == expected
    assert set(headers) == {"webhook-id", "webhook-timestamp", "X-Hub-Signature-256"}


def test_svix_has_its_own_header_names_and_the_published_signature():
    """The vector of the libraries of Svix and of Standard Webhooks, "sign function works"."""
    assert sign("svix") == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": str(AT),
        "svix-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "svix-timestamp": str(AT),
        "svix-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_stripe_signs_time_and_body_with_the_whole_text_of_the_secret():
    expected = mac(KEY.reveal(), b"%d." % AT + BODY).hexdigest()
    assert sign("stripe")["Stripe-Signature"] == f"t={AT},v1={expected}"
    both = sign("stripe", secrets=(KEY, Secret("other")))["Stripe-Signature"]
    other = mac("other", b"%d." % AT + BODY).hexdigest()
    assert both == f"t={AT},v1={expected},v1={other}"


def test_schemes_sign_side_by_side_each_with_its_own_secrets():
    old = SignatureConfig(header="X-Old", algorithm="sha1", encoding="base64", secrets=(Secret("old"),))
    headers = sign("standard", old, "svix")
    assert headers["webhook-signature"] == headers["svix-signature"]
    assert headers["X-Old"] == base64.b64encode(mac("old", BODY, "sha1").digest()).decode()


def test_a_scheme_table_can_set_text_algorithm_key_and_position_of_the_time():
    scheme = SignatureConfig(
        header="X-Signature",
        algorithm="sha512",
        key_encoding="hex",
        prefix="v0=",
        signed="{method}{url}:{id}:{timestamp}:{body}:{{}}",
        timestamp_header="X-Time",
        timestamp_unit="ms",
        secrets=(Secret("00ff"),),
    )
    headers = sign(scheme, id_="i")
    text = b"POSThttps://a.example/b?c=d:i:%d000:" % AT + BODY + b":{}"
    expected = hmac.new(b"\x00\xff", text, hashlib.sha512).hexdigest()
    assert headers["X-Signature"] == f"v0={expected}"
    assert headers["X-Time"] == f"{AT}000"
    assert "webhook-signature" not in headers


@pytest.mark.parametrize("name", ["github", "stripe", "svix"])
class TestVerification:
    def test_a_signed_request_verifies(self, name):
        verifier_of(SCHEMES[name], (Secret(KEY.reveal()), KEY))(sign(name), BODY, AT)

    @pytest.mark.parametrize(("body", "key"), [(BODY + b" ", KEY), (BODY, Secret("whsec_" + "A" * 32))])
    def test_a_changed_body_and_another_secret_do_not_verify(self, name, body, key):
        with pytest.raises(SignatureError) as caught:
            verifier_of(SCHEMES[name], (key,))(sign(name), body, AT)
        assert caught.value.problem == "signature"

    def test_a_missing_header_is_named(self, name):
        with pytest.raises(SignatureError, match=f"missing .*{SCHEMES[name].header}") as caught:
            verifier_of(SCHEMES[name], (KEY,))({}, BODY, AT)
        assert caught.value.problem == "headers"

    def test_an_old_request_is_refused_where_the_time_is_signed(self, name):
        check = verifier_of(SCHEMES[name], (KEY,))
        if name == "github":
            check(sign(name), BODY, AT + 301)
            return
        with pytest.raises(SignatureError, match="signed 301 s ago, the limit is 300 s"):
            check(sign(name), BODY, AT + 301)


@pytest.mark.parametrize("value", ["", "t=", "v1=", "t=1,v1=", "v1=00,t=x", "t=1e9,v1=00", ",,,=", "\udcff"])
def test_a_malformed_header_is_refused(value):
    with pytest.raises(SignatureError):
        verifier_of(SCHEMES["stripe"], (KEY,))({"Stripe-Signature": value}, BODY, AT)


# --- config.toml ----------------------------------------------------------------------------------


SHARED = 'secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]'
PLAIN = 'secrets = ["plain"]'
PAIR = 'secrets = ["whsk_AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA="]'


def config(tmp_path, signatures, secrets=SHARED, more=""):
    return write_config(
        tmp_path,
        f'[destinations.crm]\nurl = "https://crm.example/"\n{secrets}\nsignatures = {signatures}\n{more}',
    )


@pytest.mark.parametrize(
    ("signatures", "secrets"),
    [
        ("[]", ""),
        ('["standard", "github", "stripe", "svix"]', SHARED),
        ('["github"]', PLAIN),
        ('["standard", { scheme = "github", secrets = ["plain"] }]', PAIR),
        ('[{ header = "X-A", secrets = ["k"] }, { header = "X-B", secrets = ["k"] }]', ""),
        ('[{ scheme = "standard", secrets = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"] }]', PLAIN),
    ],
)  # fmt: skip
def test_valid_signature_tables_are_accepted_and_shown_without_secrets(tmp_path, signatures, secrets):
    path = config(tmp_path, signatures, secrets)
    crm = load(path).config.destinations["crm"]
    signer_of(crm.signatures, crm.secrets, method="POST", url="").headers("i", 1, b"")
    shown = tomllib.loads(run("config", "show", "-c", path).out)["destinations"]["crm"]["signatures"]
    written = tomllib.loads(f"x = {signatures}")["x"]
    assert len(shown) == len(written)
    for one, other in zip(shown, written, strict=True):
        if isinstance(other, dict):
            other["secrets"] = ["<secret>"]
        assert one == other


@pytest.mark.parametrize(
    ("signatures", "secrets", "problem"),
    [
        ('["githup"]', SHARED, 'unknown signature scheme "githup", did you mean "github"?'),
        ('["none"]', SHARED, "known: standard, svix, github, stripe"),
        ("[5]", SHARED, "signatures[0]: expected the name of a scheme, or a table, got 5"),
        ("[{ secrets = [] }]", SHARED, "signatures[0].header: missing"),
        ('[{ scheme = "svix", header = "X" }]', SHARED, '"svix" has a fixed form; remove `header`'),
        ('[{ header = "X-A", prefiks = "" }]', SHARED, "did you mean"),
        ('["github", "github"]', SHARED, "X-Hub-Signature-256 is set by signatures[0] already"),
        ('[{ header = "webhook-signature" }]', SHARED, "the relay sets this header itself"),
        ('[{ header = "Content-Type" }]', SHARED, "set by the relay itself already"),
        ('[{ header = "x-key" }]', SHARED, "the header x-key is set by `headers` already"),
        ('[{ header = "X A" }]', SHARED, "not a valid header name"),
        ('[{ header = "X", signed = "{id}" }]', SHARED, "signatures[0].signed: must contain {body}"),
        ('[{ header = "X", signed = "{bdy}" }]', SHARED, "{bdy}; did you mean {body}?"),
        ('[{ header = "X", signed = "{body" }]', SHARED, "column 1: no } closes the placeholder"),
        ('[{ header = "X", signed = "{body|upper}" }]', SHARED, 'the filter "upper" does not work here'),
        ('[{ header="X", signed="{timestamp}{body}" }]', SHARED, "receivers must know the {timestamp}"),
        ('[{ header = "X", timestamp_header = "Y" }]', SHARED, "must contain {timestamp}"),
        (
            '[{ header = "X", signed = "{timestamp}{body}", timestamp_field = "t=" }]',
            SHARED,
            "signatures[0].separator: missing",
        ),
        ('[{ header = "X", prefix = "é" }]', SHARED, "expected printable ASCII characters only"),
        ('["github"]', "", "signatures[0]: has no secrets"),
        ('["github"]', 'secrets = ["one", "two"]', "contains one signature, but there are 2 secrets"),
        ('["github"]', PAIR, "crm.secrets[0]: an ed25519 key signs Standard Webhooks only"),
        ('["github"]', PAIR, "shared secret; or give signatures[0] its own `secrets`"),
        ('["standard", "github"]', PLAIN, "crm.secrets[0]: expected a signing secret"),
        ('[{ scheme = "svix", secrets = ["plain"] }]', PAIR, "signatures[0].secrets[0]: expected a signing"),
        (
            '[{ header = "X", key_encoding = "hex", secrets = ["plain"] }]',
            "",
            "signatures[0].secrets[0]: the secret is not hex, which `key_encoding` requires",
        ),
    ],
)  # fmt: skip
def test_each_invalid_signature_table_is_a_problem_with_its_line(tmp_path, signatures, secrets, problem):
    more = 'headers = { "X-Key" = "v" }'
    path = config(tmp_path, signatures, secrets, more=more)
    result = run("check-config", "-c", path, code=1).err
    assert problem in result
    key = "secrets" if "crm.secrets" in problem or "its own `secrets`" in problem else "signatures"
    [number] = [n for n, line in enumerate(path.read_text().splitlines(), 1) if line.startswith(f"{key} =")]
    assert f"{path}:{number}: destinations.crm.{key}" in result
    assert "plain" not in result


def test_only_a_destination_without_any_key_is_reported_as_unsigned(tmp_path):
    signed = config(tmp_path, '[{ scheme = "github", secrets = ["k"] }]', "")
    assert load(signed).config.warnings == ()
    assert "unsigned" in load(config(tmp_path, '["standard"]', "")).config.warnings[0]


def test_the_reference_of_a_scheme_is_its_name():
    assert [each.written() for each in SCHEMES.values()] == list(SCHEMES)
    assert effective._value(DEFAULT, None) == ["standard"]
