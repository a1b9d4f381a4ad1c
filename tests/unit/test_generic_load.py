"""Faults of a generic source are reported at load, at their line, with the correction."""

import sys
from pathlib import Path

import pytest
from generic import load_table, problems_of

HMAC = 'verify = { hmac = { header = "X-Sign" } }\nsecrets = ["s"]'

FAULTS = Path(__file__).parents[1] / "helpers" / "generic_faults.txt"
"""Blocks: lines of a table, then the expected problems, each after `> `."""


def cases():
    for block in FAULTS.read_text().strip().split("\n\n"):
        lines = block.splitlines()
        words = [line[2:] for line in lines if line.startswith("> ")]
        assert words, block
        yield "\n".join(line for line in lines if not line.startswith("> ")), words


@pytest.mark.parametrize(("text", "words"), list(cases()))
def test_a_wrong_setting_is_reported_at_its_line_with_a_hint(text, words):
    found = problems_of(text, verify="" if text.startswith("#") else '"none"')
    for each in words:
        assert any(each in problem for problem in found), found


def test_several_wrong_settings_are_reported_at_once():
    found = problems_of(
        'type = "{bdy}"\nsubject = "{item}"\nverify = "bearer"\npath = "/a/{b}"\nkey = "{path:c}"'
    )
    assert [problem.partition(" ")[0] for problem in found] == ["2:", "4:", "5:", "8:"]


def test_a_complete_table_loads_and_hides_its_secrets():
    source = load_table(
        'path = ["/a/{x}", "/b"]\n'
        'type = "{header:X-Topic}.{body:action}"\n'
        'secrets = ["hush-1", "hush-2"]\n'
        'verify = { hmac = { header = "X-S", prefix = "sha256=", tolerance = "90s", '
        'timestamp_header = "X-T", signed = "v0:{timestamp}:{body}" } }\n'
        'context = { "a b" = "{path:x}" }\n'
        'reply = { status = 202, json = { ok = true, id = "{event_id}", list = ["{body:a.0}"] } }\n'
    )  # fmt: skip
    assert source.routes() == (("POST", "/a/{x}", "receive"), ("POST", "/b", "receive"))
    assert source.verification.hmac.tolerance == 90
    assert "hush" not in repr(source)
    assert not source.is_open()


@pytest.mark.parametrize(
    ("text", "is_open"),
    [('verify = "none"', True), ('verify = "none"\nnetworks = ["192.0.2.0/24"]', True), (HMAC, False),
     ('verify = { ed25519 = { header = "X" } }\npublic_keys = ["' + "00" * 32 + '"]', False)],
)  # fmt: skip
def test_a_source_is_open_to_web_pages_unless_it_checks_credentials(text, is_open):
    source = load_table(text)
    assert source.is_open() is is_open
    warned = any("open to everyone" in warning for warning in source.warnings())
    assert warned is (is_open and not source.networks)


def test_a_key_in_the_query_is_a_warning():
    source = load_table('verify = { api_key = { query = "token" } }\nsecrets = ["s"]')
    assert source.warnings() == (
        "the key is in the URL, which proxies log; use a header if the sender supports that",
    )


def test_without_cryptography_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    for scheme in ("ed25519", "ecdsa"):
        (problem,) = problems_of(
            f'verify = {{ {scheme} = {{ header = "X" }} }}\npublic_keys = ["{"00" * 32}"]'
        )
        assert f"needs the package cryptography: {sys.executable} -m pip install cryptography" in problem


def test_routes_of_handshakes_alone_carry_no_events():
    source = load_table('handshakes = [{ method = "GET", reply = { text = "{query:a}" } }]')
    assert source.routes() == (
        ("POST", "/hooks/shop/{store}", "receive"),
        ("GET", "/hooks/shop/{store}", "answer"),
    )
