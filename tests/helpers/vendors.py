"""How the vendors of the presets sign requests, written from their documents and without the relay's code."""

import base64
import hashlib
import hmac
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

ROOT = Path(__file__).parents[2]
PUBLIC = "https://hooks.example"
"""Scheme and host of the relay, as the vendors see it."""

ED25519 = Ed25519PrivateKey.generate()
ECDSA_KEY = generate_private_key(SECP256R1())


def presets():
    """Read the files of all presets."""
    files = sorted((ROOT / "plugins" / "presets").glob("*.toml"), key=lambda file: file.stem)
    return {file.stem: tomllib.loads(file.read_text()) for file in files}


def secret_of(name):
    """Return the secret, or the public key, that the tests configure for a preset."""
    if name.startswith("discord"):
        return ED25519.public_key().public_bytes_raw().hex()
    if name == "sendgrid":
        public = ECDSA_KEY.public_key()
        return base64.b64encode(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
    if name in ("standard-webhooks", "svix"):
        return "whsec_" + base64.b64encode(f"the key of {name}, 32 bytes or so".encode()).decode()
    return f"secret-of-{name}"


class Sent(NamedTuple):
    """A request before it is signed."""

    method: str
    target: str  # path and query
    headers: dict[str, str]
    body: bytes
    at: int  # seconds since 1970


def signed(name, sent, secret=None):
    """Return the headers of a request with the signature of a preset's vendor; `secret_of` by default."""
    return {**sent.headers, **_SIGNERS[name]((secret or secret_of(name)).encode(), sent)}


def unsigned_query(name):
    """Return the query that a vendor without a signature appends to the URL."""
    return f"?token={secret_of(name)}" if name in ("microsoft-graph", "azure-event-grid") else ""


def _hex(key, message, algorithm="sha256"):
    return hmac.new(key, message, algorithm).hexdigest()


def _base64(key, message, algorithm="sha256"):
    return base64.b64encode(hmac.new(key, message, algorithm).digest()).decode()


def _of_body(header, prefix="", render=_hex, algorithm="sha256"):
    """Sign the body alone."""
    return lambda key, sent: {header: prefix + render(key, sent.body, algorithm)}


def _standard(prefix):
    def sign(key, sent):
        message = f"{sent.headers[f'{prefix}-id']}.{sent.at}.".encode() + sent.body
        raw = base64.b64decode(key.removeprefix(b"whsec_"))
        # The first signature is of another key: receivers accept any that fits.
        signatures = f"v1,{_base64(b'other', message)} v1,{_base64(raw, message)}"
        return {f"{prefix}-timestamp": str(sent.at), f"{prefix}-signature": signatures}

    return sign


def _stripe(header):
    def sign(key, sent):
        signature = _hex(key, f"{sent.at}.".encode() + sent.body)
        return {header: f"t={sent.at},v1={_hex(b'other', sent.body)},v0=ignored,v1={signature}"}

    return sign


def _sorted_form(body):
    fields = sorted(set(parse_qsl(body.decode(), keep_blank_values=True)))
    return "".join(name + value for name, value in fields).encode()


def _form(header):
    def sign(key, sent):
        return {header: _base64(key, f"{PUBLIC}{sent.target}".encode() + _sorted_form(sent.body), "sha1")}

    return sign


def _discord(_key, sent):
    signature = ED25519.sign(str(sent.at).encode() + sent.body).hex()
    return {"X-Signature-Timestamp": str(sent.at), "X-Signature-Ed25519": signature}


def _sendgrid(_key, sent):
    signature = ECDSA_KEY.sign(str(sent.at).encode() + sent.body, ECDSA(hashes.SHA256()))
    return {
        "X-Twilio-Email-Event-Webhook-Timestamp": str(sent.at),
        "X-Twilio-Email-Event-Webhook-Signature": base64.b64encode(signature).decode(),
    }


def _hubspot(key, sent):
    message = f"{sent.method}{PUBLIC}{sent.target}".encode() + sent.body + f"{sent.at}000".encode()
    return {"X-HubSpot-Signature-v3": _base64(key, message), "X-HubSpot-Request-Timestamp": f"{sent.at}000"}


def _with_version(header, timestamp_header):
    """Sign `v0:{timestamp}:{body}`, as Slack and Zoom do."""

    def sign(key, sent):
        signature = _hex(key, f"v0:{sent.at}:".encode() + sent.body)
        return {timestamp_header: str(sent.at), header: f"v0={signature}"}

    return sign


def _twitch(key, sent):
    moment = datetime.fromtimestamp(sent.at, UTC).strftime("%Y-%m-%dT%H:%M:%S.123456789Z")
    message = (sent.headers.get("Twitch-Eventsub-Message-Id", "") + moment).encode() + sent.body
    return {
        "Twitch-Eventsub-Message-Timestamp": moment,
        "Twitch-Eventsub-Message-Signature": "sha256=" + _hex(key, message),
    }


def _pagerduty(key, sent):
    return {"X-PagerDuty-Signature": f"v1={_hex(b'former', sent.body)},v1={_hex(key, sent.body)}"}


def _paddle(key, sent):
    return {"Paddle-Signature": f"ts={sent.at};h1={_hex(key, f'{sent.at}:'.encode() + sent.body)}"}


def _square(key, sent):
    return {"x-square-hmacsha256-signature": _base64(key, f"{PUBLIC}{sent.target}".encode() + sent.body)}


def _trello(key, sent):
    return {"x-trello-webhook": _base64(key, sent.body + f"{PUBLIC}{sent.target}".encode(), "sha1")}


def _basic(key, _sent):
    return {"Authorization": "Basic " + base64.b64encode(b"relay:" + key).decode()}


def _header(name, prefix=""):
    return lambda key, _sent: {name: prefix + key.decode()}


_SIGNERS = {
    "alertmanager": _header("Authorization", "Bearer "),
    "azure-event-grid": lambda *_: {},
    "bitbucket": _of_body("X-Hub-Signature", "sha256="),
    "calendly": _stripe("Calendly-Webhook-Signature"),
    "chargebee": _basic,
    "discord-events": _discord,
    "discord-interactions": _discord,
    "dropbox": _of_body("X-Dropbox-Signature"),
    "gitea": _of_body("X-Gitea-Signature"),
    "github": _of_body("X-Hub-Signature-256", "sha256="),
    "gitlab": _header("X-Gitlab-Token"),
    "grafana": _header("Authorization", "Bearer "),
    "hubspot": _hubspot,
    "intercom": _of_body("X-Hub-Signature", "sha1=", algorithm="sha1"),
    "jira": _of_body("X-Hub-Signature", "sha256="),
    "line": _of_body("x-line-signature", render=_base64),
    "linear": _of_body("Linear-Signature"),
    "mandrill": _form("X-Mandrill-Signature"),
    "meta": _of_body("X-Hub-Signature-256", "sha256="),
    "microsoft-graph": lambda *_: {},
    "okta": _header("Authorization"),
    "paddle": _paddle,
    "pagerduty": _pagerduty,
    "postmark": _basic,
    "razorpay": _of_body("X-Razorpay-Signature"),
    "sendgrid": _sendgrid,
    "sentry": _of_body("Sentry-Hook-Signature"),
    "shopify": _of_body("X-Shopify-Hmac-SHA256", render=_base64),
    "slack": _with_version("X-Slack-Signature", "X-Slack-Request-Timestamp"),
    "square": _square,
    "standard-webhooks": _standard("webhook"),
    "stripe": _stripe("Stripe-Signature"),
    "svix": _standard("svix"),
    "telegram": _header("X-Telegram-Bot-Api-Secret-Token"),
    "terraform": _of_body("X-TFE-Notification-Signature", algorithm="sha512"),
    "trello": _trello,
    "twilio": _form("X-Twilio-Signature"),
    "twilio-voice": _form("X-Twilio-Signature"),
    "twitch": _twitch,
    "typeform": _of_body("Typeform-Signature", "sha256=", render=_base64),
    "vercel": _of_body("x-vercel-signature", algorithm="sha1"),
    "woocommerce": _of_body("X-WC-Webhook-Signature", render=_base64),
    "zoom": _with_version("x-zm-signature", "x-zm-request-timestamp"),
}


def sha256(body):
    """Return the digest of a body in hex, as Twilio puts it into a URL."""
    return hashlib.sha256(body).hexdigest()
