"""`relay verify --source`: why a source refuses a request, without a running relay."""

import base64
import hashlib
import hmac
import os
import pty
import subprocess
import sys
from urllib.parse import quote

import pytest
from commands import run
from daemons import SOURCES, write_config
from samples import read_samples

from relay.config.binding import Binder
from relay.config.document import read
from relay.config.tokens import all_tokens
from relay.diagnosis.captured import read_captured
from relay.diagnosis.source_request import diagnose
from relay.plugin_loading.loader import load

TOKEN = "Ab+c/long-token=1"
OTHER = "another-source-1"
ADMIN = "admin-token-7890"
SIGNING = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
CONFIG = f"""
[sources.moddy]
plugin = "moddy"
tokens = ["{TOKEN}", {{ secret = "second-token", name = "old" }}]
[sources.shop]
plugin = "lazychat"
prefix = "/acme"
tokens = ["{OTHER}"]
[sources.compozy]
plugin = "compozy"
tokens = [{{ secret = "reading-only", scopes = ["events:read"], name = "reader" }}]
[destinations.crm]
url = "https://crm.example/"
secrets = ["{SIGNING}"]
"""
BODY = '{"event_type": "member_joined", "discord_id": "42"}'


@pytest.fixture
def config(tmp_path):
    file = write_config(tmp_path, CONFIG)
    file.write_text(file.read_text().replace("[admin]", f'[admin]\ntokens = ["{ADMIN}"]'))
    return file


def request(*headers, method="POST", path="/internal/event/notify", body=BODY):
    return "\n".join([f"{method} {path} HTTP/1.1", "Host: relay.test", *headers, "", body])


def verify(config, text, *args, source="moddy", code=1):
    return run("verify", "--source", source, "--request", "-", "-c", config, *args, code=code, stdin=text)


def findings(result):
    return [(each["cause"], each["what"]) for each in result.json["findings"]]


SAMPLES = read_samples()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The configuration that the recorded samples are for, and its tokens."""
    file = write_config(tmp_path_factory.mktemp("samples"), SOURCES)
    config = load(file).config
    return config, all_tokens(Binder(read(file), os.environ), config)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_verify_accepts_the_same_requests_as_the_listener(loaded, sample):
    """The same recorded samples test the listener."""
    config, tokens = loaded
    report = diagnose(read_captured(sample.request), sample.kind, config.sources, tokens, 0)
    assert report.ok is (200 <= sample.expect.status < 300), report
    if sample.expect.event is not None:
        assert (report.type, report.subject) == (sample.expect.event.type, sample.expect.event.subject)


def test_a_valid_request_has_its_token_and_event_type(config):
    result = verify(config, request(f"Authorization: Bearer {TOKEN}"), code=0)
    assert result.out == "valid: sources.moddy.tokens[0]\nevent: moddy.member_joined, subject 42\n"
    result = verify(config, request("authorization:bearer   second-token "), "--json", code=0).json
    assert result == {
        "source": "moddy", "destination": None, "ok": True, "request": "POST /internal/event/notify",
        "fits": "sources.moddy.tokens[1]", "signature": None, "type": "moddy.member_joined", "subject": "42",
        "more": 0, "findings": [], "notes": [],
    }  # fmt: skip


def test_a_source_without_tokens_needs_no_token(tmp_path):
    config = write_config(tmp_path, SOURCES)
    text = request(path="/v1/events", body='{"event_type": "a.b", "session_id": "s"}')
    assert verify(config, text, source="adorn", code=0).out.startswith("valid: the source needs no token\n")


B64 = base64.b64encode(TOKEN.encode()).decode()
TOKENS = [
    (f'"{TOKEN}"', "encoding", "is in quotes"),
    (f"“{TOKEN}”", "encoding", "is in quotes"),
    (f"{TOKEN}\\n", "encoding", "ends with the two characters \\n"),
    (f"\ufeff{TOKEN}", "encoding", "byte order mark"),
    (f"{TOKEN[:5]}\u200b{TOKEN[5:]}", "encoding", "invisible characters"),
    (f"{TOKEN[:5]} {TOKEN[5:]}", "encoding", "white space"),
    (f"Bearer {TOKEN}", "encoding", 'has a second "Bearer" before it'),
    (TOKEN.lower(), "encoding", "differs in upper and lower case"),
    (quote(TOKEN, safe=""), "encoding", "percent-encoded"),
    (TOKEN.replace("+", " "), "encoding", "has spaces instead of +"),
    (B64, "encoding", "base64 of the expected value"),
    (B64.rstrip("="), "encoding", "base64 of the expected value"),
    (TOKEN.replace("+", "-").replace("/", "_"), "encoding", "uses the other base64 alphabet"),
    (TOKEN.encode().hex(), "encoding", "hexadecimal"),
    (hashlib.sha256(TOKEN.encode()).hexdigest(), "encoding", "sha256 digest"),
    (TOKEN[:12], "bytes", "is truncated: 12 of 17 characters"),
    (TOKEN[4:], "bytes", "lacks its beginning: 13 of 17 characters"),
    (TOKEN + "xyz", "bytes", "has 3 extra characters at the end"),
    ("xyz" + TOKEN, "bytes", "3 extra characters at the beginning"),
    (
        TOKEN.replace("long", "1ong"),
        "bytes",
        "differs at character 6; its length is 17, the configured one has 17",
    ),
    (OTHER, "secret", 'a token of source "shop", sources.shop.tokens[0]'),
    (f"{OTHER}x", "secret", 'a token of source "shop", sources.shop.tokens[0]; the token has 1 extra'),
    (ADMIN, "secret", "an admin token, admin.tokens[0]"),
    (SIGNING, "secret", 'a signing secret of destination "crm", destinations.crm.secrets[0]'),
    ("${MODDY_TOKEN}", "secret", "a placeholder"),
    ("your-token-here", "secret", "a placeholder"),
    ("undefined", "secret", "a placeholder"),
    ("q", "secret", "unknown token of 1 characters; the tokens of this source have 12 or 17"),
    ("pässword-of-theirs", "secret", "not all ASCII"),
]


@pytest.mark.parametrize(("sent", "cause", "message"), TOKENS)
def test_a_wrong_token_is_diagnosed_without_printing_a_secret(config, sent, cause, message):
    result = verify(config, request(f"Authorization: Bearer {sent}"), "--json")
    [(found, what)] = findings(result)
    assert (found, message in what) == (cause, True), what
    for secret in (sent, TOKEN, OTHER, ADMIN, SIGNING, "second-token"):
        assert len(secret) < 4 or secret not in result.out + result.err


HEADERS = [
    ([], "missing"),
    ([f"X-Api-Key: {TOKEN}"], "missing; the token is in X-Api-Key"),
    ([f"Proxy-Authorization: Bearer {TOKEN}"], "missing; the token is in Proxy-Authorization"),
    ([f"Cookie: token={TOKEN}"], "missing; the token is in Cookie"),
    ([f"Authorization: {TOKEN}"], "the token is sent without Bearer"),
    ([f"Authorization: Token {TOKEN}"], 'the scheme is "Token", not Bearer'),
    (["Authorization: Bearer"], "no token after Bearer"),
    ([f"Authorization: Bearer: {TOKEN}"], '":" after Bearer'),
    ([f"Authorization: Bearer={TOKEN}"], '"=" after Bearer'),
    (
        [f"Authorization: Basic {base64.b64encode(f'user:{TOKEN}'.encode()).decode()}"],
        "as a password, with the scheme Basic",
    ),
    (["Authorization: Basic ?"], 'the scheme is "Basic", not Bearer'),
    (["Authorization: secretword and-more"], "the scheme is unknown, not Bearer"),
    ([f"Authorization: Bearer {TOKEN}", f"Authorization: Bearer {TOKEN}"], "sent 2 times"),
]


@pytest.mark.parametrize(("headers", "message"), HEADERS)
def test_a_wrong_header_is_diagnosed(config, headers, message):
    result = verify(config, request(*headers), "--json")
    [(cause, what)] = findings(result)
    assert (cause, message in what) == ("headers", True), what
    for secret in (TOKEN, "secretword"):
        assert secret not in result.out + result.err


def test_a_token_in_the_query_is_found(config):
    result = verify(config, request(path=f"/internal/event/notify?token={quote(TOKEN, safe='')}"), "--json")
    assert findings(result) == [("headers", 'missing; the token is in the query, as "token"')]
    assert "long-token" not in result.out


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (b"\xef\xbb\xbfplain-token", "begins with a byte order mark"),
        (b'"plain-token"', "is in quotes"),
        (base64.b64encode(b"plain-token"), "is base64 of the expected value"),
        (b"plain-token-and", "is truncated: 11 of 15 characters"),
    ],
)
def test_a_wrong_secret_file_is_named(tmp_path, stored, message):
    (tmp_path / "moddy.token").write_bytes(stored)
    config = write_config(
        tmp_path, '[sources.moddy]\nplugin = "moddy"\ntokens = [{ file = "moddy.token" }]\n'
    )
    result = verify(config, request("Authorization: Bearer plain-token"))
    assert message in result.out
    assert "the file moddy.token" in result.out
    assert "plain-token" not in result.out


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b" \n"])
def test_newlines_at_the_end_of_a_secret_file_are_ignored(tmp_path, end):
    (tmp_path / "moddy.token").write_bytes(b"plain-token" + end)
    config = write_config(
        tmp_path, '[sources.moddy]\nplugin = "moddy"\ntokens = [{ file = "moddy.token" }]\n'
    )
    verify(config, request("Authorization: Bearer plain-token"), code=0)


def test_a_known_token_without_the_permission_is_reported(config):
    text = request("Authorization: Bearer reading-only", path="/api/v1/events", body='{"name": "a"}')
    result = verify(config, text, "--json", source="compozy")
    [finding] = result.json["findings"]
    assert (finding["cause"], finding["where"]) == ("scope", "sources.compozy.tokens[0]")
    assert (
        '"reader" is known, but: The token lacks the permission events:write; its scopes: events:read'
        in (finding["what"])
    )


PATHS = [
    ("/api/woocommerce-plugin/events", "the source's prefix is missing: /acme"),
    ("/acme/api/woocommerce-plugin/events/", "the path has an extra slash at the end"),
    ("/acme//api/woocommerce-plugin/events", "the path has a double slash"),
    ("/acme/api/WooCommerce-Plugin/events", "the path has capital letters"),
    ("/acme/acme/api/woocommerce-plugin/events", "the path has the source's prefix twice"),
    ("/relay/acme/api/woocommerce-plugin/events", '"/relay" precedes the source\'s path'),
    ("/acme/api/woocommerce-plugin/event", 'did you mean "/acme/api/woocommerce-plugin/events"?'),
    ("/internal/event/notify", 'the path belongs to source "moddy"'),
    ("/elsewhere", "unknown path"),
]


@pytest.mark.parametrize(("path", "message"), PATHS)
def test_a_wrong_path_is_reported_apart_from_the_token(config, path, message):
    text = request(f"Authorization: Bearer {OTHER}", path=path, body='{"event_type": "a"}')
    result = verify(config, text, "--json", source="shop")
    [(cause, what)] = findings(result)
    assert (cause, message in what) == ("route", True), what
    assert result.json["fits"] == "sources.shop.tokens[0]"


def test_an_absolute_url_in_the_request_line_is_accepted(config):
    verify(
        config,
        request(f"Authorization: Bearer {TOKEN}", path="http://relay.test/internal/event/notify"),
        code=0,
    )


def test_a_request_without_its_first_line_uses_the_source_s_only_path(config):
    text = "\n".join([f"Authorization: Bearer {OTHER}", "", '{"event_type": "a.b"}'])
    assert verify(config, text, "--json", source="shop", code=0).json["type"] == "shop.a.b"


@pytest.mark.parametrize(
    ("change", "cause", "message"),
    [
        ({"method": "GET"}, "route", "GET is not allowed on this path"),
        ({"headers": ["Content-Encoding: gzip"]}, "encoding", "compressed"),
        ({"headers": ["Content-Length: 500"]}, "bytes", "truncated: 51 of 500 bytes"),
        ({"body": ""}, "body", "the body is empty"),
        ({"body": "\ufeff{}"}, "body", "the body begins with a byte order mark"),
        ({"body": "event_type=a", "headers": ["Content-Type: application/x-www-form-urlencoded"]}, "body",
         "the body is a web form"),
        ({"body": "<a/>"}, "body", "XML"),
        ({"body": "{'event_type': 'a'}"}, "body", "single quotes"),
        ({"body": '{"a": NaN}'}, "body", "JSON has no NaN and no Infinity"),
        ({"body": '{"a": 1,}'}, "body", "invalid JSON: trailing comma in object (byte 8)"),
        ({"body": '{"metadata": ' + "[" * 20_000}, "body", "the JSON is nested too deeply"),
        ({"body": '"{\\"event_type\\": \\"a\\"}"'}, "body", "JSON that was encoded twice"),
        ({"body": '{"event_type": "member_joined"}'}, "body", "discord_id: field is required"),
        ({"body": '{"x": "%s"}' % ("y" * 2**21)}, "body", "exceed the maximum of 2 MiB"),
    ],
)  # fmt: skip
def test_problems_without_secrets_are_reported(config, change, cause, message):
    headers = [f"Authorization: Bearer {TOKEN}", *change.pop("headers", [])]
    result = verify(config, request(*headers, **change), "--json")
    assert any((found, message in what) == (cause, True) for found, what in findings(result)), result.out
    assert result.json["fits"] == "sources.moddy.tokens[0]"


@pytest.mark.parametrize("raw", [BODY.encode("utf-16"), b'{"event_type": "caf\xe9"}'])
def test_other_encodings_of_text_are_found(config, tmp_path, raw):
    (tmp_path / "body").write_bytes(raw)
    result = verify(config, request(f"Authorization: Bearer {TOKEN}"), "--data", f"@{tmp_path / 'body'}")
    assert "have the sender write UTF-8" in result.out


def test_several_findings_are_all_reported(config):
    result = verify(config, request("Content-Encoding: br", path="/internal/event/notify/", method="PUT"))
    assert [row[0] for row in result.rows] == ["route", "route", "encoding", "headers"]
    assert all(len(row) == 4 and row[3] for row in result.rows)


SIGNED = """
import hashlib, hmac
from relay.hookspecs import hookimpl
from relay.source import Accepted, Event, Incoming, Malformed, Reply, Secret, Source, Unauthenticated, route

class Signed(Source, kind="signed", owns=("/signed",)):
    secret: Secret

    def verify(self, incoming: Incoming) -> None:
        match incoming.header("X-Signature"):
            case "raise":
                raise RuntimeError("out of order")
            case "malformed":
                raise Malformed("no signature at all")
        mac = hmac.digest(self.secret.reveal().encode(), incoming.body, "sha256").hex()
        if incoming.header("X-Signature") != mac:
            raise Unauthenticated("the signature is wrong")
        if incoming.received_at > 1_700_000_300_000_000:
            raise Unauthenticated("the signature is too old")

    def handshake(self, incoming: Incoming) -> Reply | None:
        return Reply(status=202) if incoming.query == "challenge=1" else None

    def diagnose(self, incoming: Incoming) -> tuple[str, ...]:
        return () if incoming.header("X-Signature") else ("X-Signature is missing",)

    @route("POST", "/signed")
    def take(self, incoming: Incoming) -> Accepted:
        if incoming.target == "/signed?no":
            return Reply(status=204)
        return Accepted(events=[Event(type=type_) for type_ in ("a", "b", "c")], reply={})

@hookimpl
def relay_sources():
    return [Signed]
"""


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ([], "X-Signature is missing"),
        (["X-Signature: 00"], "refuses with 401: the signature is wrong"),
        (["X-Signature: malformed"], "refuses with 400: no signature at all"),
        (["X-Signature: raise"], "failed: RuntimeError: out of order"),
    ],
)
def test_a_source_of_another_kind_verifies_the_request_itself(tmp_path, headers, message):
    (tmp_path / "plugins.d").mkdir()
    (tmp_path / "plugins.d" / "signed.py").write_text(SIGNED)
    config = write_config(tmp_path, '[sources.signed]\nplugin = "signed"\nsecret = "s3cret-s3cret"\n')
    result = verify(config, request(*headers, path="/signed"), "--json", source="signed")
    assert findings(result) == [("plugin", message)]
    assert "s3cret" not in result.out


@pytest.mark.parametrize(
    ("path", "at", "message"),
    [
        (
            "/signed",
            "2023-11-14T22:15:00Z",
            "the source accepts these credentials\nevent: signed.a, and 2 more events",
        ),
        ("/signed?no", "2023-11-14T22:15:00Z", "the source answers with 204 and creates no event"),
        ("/signed?challenge=1", "2026-01-01T00:00:00Z", "the source answers with 202 and creates no event"),
        ("/signed", "2023-11-14T22:30:00Z", "refuses with 401: the signature is too old"),
    ],
)
def test_a_captured_request_is_verified_at_its_time_of_receipt(tmp_path, path, at, message):
    (tmp_path / "plugins.d").mkdir()
    (tmp_path / "plugins.d" / "signed.py").write_text(SIGNED)
    config = write_config(tmp_path, '[sources.signed]\nplugin = "signed"\nsecret = "s3cret-s3cret"\n')
    mac = hmac.digest(b"s3cret-s3cret", BODY.encode(), "sha256").hex()
    is_wrong = "refuses" in message
    result = verify(
        config, request(f"X-Signature: {mac}", path=path), "--at", at, source="signed", code=int(is_wrong)
    )
    assert message in result.out
    if not is_wrong:
        assert result.out == f"valid: {message}\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "Missing option '--request'"),
        (["--request", "-"], 2, "give either --source or --destination"),
        (["--request", "-", "--source", "a", "--destination", "b"], 2, "--source or --destination"),
        (["--request", "-", "--source", "modi"], 4, 'unknown source "modi", did you mean "moddy"?'),
        (["--request", "-", "--destination", "crn"], 4, 'unknown destination "crn", did you mean "crm"?'),
        (["--request", "-", "--destination", "crm", "--at", "noon"], 2, 'expected "2h"'),
        (["--request", "absent", "--source", "moddy"], 2, "cannot read absent: No such file"),
        (["--request", "-", "--data", "-", "--source", "moddy"], 2, "cannot both read standard input"),
    ],
)  # fmt: skip
def test_wrong_usage_has_a_hint(config, args, code, message):
    assert message in run("verify", *args, "-c", config, code=code, stdin="POST / HTTP/1.1\n\n").err


def test_an_invalid_capture_exits_with_1_and_the_expected_format(config):
    result = verify(config, "hello")
    assert result.err.startswith('standard input: expected a request: "POST /path HTTP/1.1"')


def test_bytes_that_are_not_text_are_printed_as_escapes(config, tmp_path):
    (tmp_path / "odd").write_bytes(b"POST /relay\xff\x1b/internal/event/notify HTTP/1.1\nX: \xff\n\n{}")
    args = ("--source", "moddy", "--request", tmp_path / "odd", "-c", config)
    assert "/relay\\udcff\\x1b" in run("verify", *args, code=1).out
    assert "\x1b" not in run("verify", *args, "--json", code=1).out


def test_on_a_terminal_a_finding_is_followed_by_its_hint(config, tmp_path):
    (tmp_path / "sent.http").write_text(request())
    arguments = ["verify", "--source", "moddy", "--request", str(tmp_path / "sent.http"), "-c", str(config)]
    program = [sys.executable, "-c", f"from relay.cli import main; main({arguments})"]
    ours, theirs = pty.openpty()
    done = subprocess.run(program, stdout=theirs, check=False, timeout=30)
    os.close(theirs)
    first, second, third = os.read(ours, 65_536).decode().splitlines()
    os.close(ours)
    assert done.returncode == 1
    assert first == "headers: header Authorization: missing"
    assert second.startswith("  have the sender send `Authorization: Bearer TOKEN`")
    assert third == "event: moddy.member_joined, subject 42"


GENERIC = """
[sources.hooks]
plugin = "generic"
path = "/hooks"
secrets = ["first-key", "second-key"]
verify = { hmac = { header = "X-Sign" } }
type = "{body:kind}"
[sources.calls]
plugin = "generic"
path = "/calls"
secrets = ["first-token", "second-token"]
verify = "bearer"
type = "call"
"""


def test_a_generic_source_names_the_key_and_settings_that_would_match(tmp_path):
    config = write_config(tmp_path, GENERIC)
    body = '{"kind": "paid"}'

    def result(signature, code=1):
        text = request(f"X-Sign: {signature}", path="/hooks", body=body)
        return verify(config, text, "--json", source="hooks", code=code).json

    mac = hmac.digest(b"second-key", body.encode(), "sha256")
    fine = result(mac.hex(), code=0)
    assert (fine["ok"], fine["type"]) == (True, "hooks.paid")
    found = result(base64.b64encode(mac).decode())["findings"]
    assert [each["what"] for each in found] == ['secrets[1] matches with encoding = "base64"']
    assert found[0]["do"] == "compare [sources.hooks] with the sender's settings"
    assert "second-key" not in str(found)
    text = request(f"X-Sign: {mac.hex()}", path="/hooks", body=body)
    shown = verify(config, text, source="hooks", code=0).out
    assert shown == "valid: the source accepts these credentials\nevent: hooks.paid\n"


def test_a_generic_source_names_its_bearer_token(tmp_path):
    config = write_config(tmp_path, GENERIC)
    text = request("Authorization: Bearer second-token", path="/calls", body="{}")
    assert verify(config, text, "--json", source="calls", code=0).json["fits"] == "sources.calls.secrets[1]"
    text = request("Authorization: Bearer second-tokem", path="/calls", body="{}")
    [finding] = verify(config, text, "--json", source="calls").json["findings"]
    assert finding["where"] == "header Authorization"
