"""`relay verify --source` on requests of presets: which secret, bytes, URL or age would match."""

import json

import pytest
from commands import run
from vendors import Sent, presets, secret_of, signed

PRESETS = presets()
AT = 1_700_000_000
WHEN = "2023-11-14T22:13:20Z"


def verify(tmp_path, name, *, table="", body=None, headers=(), at=WHEN, scheme="https", code=1):
    """Verify a sample of a preset, signed at `AT` for https://hooks.example, and changed by the arguments."""
    preset = PRESETS[name]
    sample = preset["samples"][0]
    target = preset["preset"]["default_path"]
    sent = Sent("POST", target, sample["headers"], sample["body"].encode(), AT)
    fields = {**signed(name, sent), **dict(headers)}
    request = {
        "path": target,
        "headers": {each: value for each, value in fields.items() if value is not None},
        "body": sample["body"] if body is None else body(sample["body"]),
    }
    public = f'public_url = "{scheme}://hooks.example"\n' if "{url}" in str(preset["verify"]) else ""
    (tmp_path / "request.json").write_text(json.dumps(request))
    (tmp_path / "config.toml").write_text(
        f'development = true\n[sources.{name}]\nplugin = "{name}"\n{public}'
        + (table or f'secrets = ["{secret_of(name)}"]\n')
    )
    return run(
        "verify", "--source", name, "--request", tmp_path / "request.json", "--at", at,
        "-c", tmp_path / "config.toml", code=code,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["github", "stripe", "slack", "twilio", "hubspot", "svix", "gitlab"])
def test_a_genuine_request_is_valid_with_its_event(tmp_path, name):
    result = verify(tmp_path, name, code=0)
    assert result.out.startswith("valid: the source accepts these credentials\nevent: ")
    assert ", and 1 more event" in result.out or name != "hubspot"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("github", {"table": 'secrets = ["another-secret"]\n'}, "no configured key matches"),
        ("github", {"table": 'secrets = [" secret-of-github "]\n'}, "white space around it"),
        ("github", {"headers": [("X-Hub-Signature-256", None)]}, "header X-Hub-Signature-256 is missing"),
        ("github", {"body": lambda text: text + "\n"}, "without the line end"),
        ("github", {"body": lambda text: json.dumps(json.loads(text))}, "parsed and written again"),
        ("stripe", {"at": "2023-11-15T00:00:00Z"}, "too old"),
        ("slack", {"at": "2023-11-14T20:00:00Z"}, "too far in the future"),
        ("twilio", {"scheme": "http"}, "https://, unlike `public_url`"),
        ("twilio", {"table": 'secrets = ["wrong"]\n'}, "no configured key matches"),
        ("gitlab", {"headers": [("X-Gitlab-Token", "guess")]}, "Unknown key"),
        ("standard-webhooks", {"headers": [("webhook-signature", "v1,AAAA")]}, "signature"),
    ],
)
def test_a_refused_request_is_explained_without_a_secret(tmp_path, name, change, message):
    result = verify(tmp_path, name, **change)
    assert message in result.out
    assert secret_of(name) not in result.out
