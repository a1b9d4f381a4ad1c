"""Commands as a terminal shows them, with answers of a daemon that does not exist.

The clock, the zone, the ids and the width of the terminal are fixed. `python -m tests.golden` rewrites the
files in `screens/`; look at each difference before you commit it.
"""

import copy
import io
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from relay.cli import endpoint, main, screen, top

FOLDER = Path(__file__).parent / "screens"
WIDTHS = (80, 200)
ROWS = 24
NOW = 1_769_860_800.0  # 2026-01-31T12:00:00Z
CLEARED = "\r\x1b[K"  # the progress line
ZONE = "CET-1"  # as POSIX writes an offset of one hour east, without daylight saving time

LONG = "analytics-clickstream-long-running-consumer-blue"
TYPES = ("adorn.session.started", "adorn.session.finished", "adorn.image.shared", "lazychat.message.created")
SUBJECTS = ("s-1", "漢字の件名テスト 🎉", "x" * 200, "order/4711 — Überweisung", None)


def at(seconds):
    """Return the time this number of seconds from now."""
    then = NOW + seconds
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(then))}.{round(then % 1 * 1000):03d}Z"


def id_(prefix, seconds, random=0):
    """Return an id that was made this number of seconds from now."""
    digits = f"{int((NOW + seconds) * 1000):012x}"
    return f"{prefix}{digits[:8]}-{digits[8:]}-7{random:03x}-8ddd-eeeeeeeeeeee"


def event(number, **more):
    """Return an event of a list; the first one is the newest."""
    age = -3.25 * number - 1
    return {
        "id": id_("evt_", age), "source": TYPES[number % 4].partition(".")[0], "type": TYPES[number % 4],
        "subject": SUBJECTS[number % 5], "received_at": at(age), "size": 412 * 7**number % 2_000_000,
        "duplicate": number == 1, "repetitions": 2 * (number == 1),
        "deliveries": ({"delivered": 3}, {"pending": 2, "delivered": 5, "dead": 1}, {})[number % 3],
        **more,
    }  # fmt: skip


def delivery(number, **more):
    """Return a delivery of a list: delivered, pending, dead or expired."""
    age = -3.25 * number - 1
    state, reason, attempts, status, error = (
        ("delivered", None, 1, 200, None),
        ("pending", None, 0, None, None),
        ("pending", None, 4, None, "cannot connect to hooks.example.com:443: Connection refused"),
        ("dead", "exhausted", 12, 503, "HTTP 503 Service Unavailable"),
        ("expired", "ttl", 0, None, None),
    )[number % 5]
    return {
        "id": id_("dlv_", age, 0x3A1 + number), "event_id": id_("evt_", age), "type": TYPES[number % 4],
        "destination": ("crm-production-eu-west-1", "crm-production-eu-west-2", LONG, "slack")[number % 4],
        "state": state, "reason": reason, "attempts": attempts,
        "next_attempt_at": at(47 * attempts - 2) if state == "pending" else None, "last_status": status,
        "last_error": error, "created_at": at(age),
        "finished_at": None if state == "pending" else at(age + 0.125),
        "replay_of": id_("dlv_", -90_000) if number == 3 else None, "replayed_by": None,
        "group_key": None, **more,
    }  # fmt: skip


def attempt(number, **more):
    """Return an attempt of a dead delivery."""
    result, status, error = (
        ("5xx", 503, "HTTP 503 Service Unavailable"),
        ("connect", None, "cannot connect to hooks.example.com:443: Connection refused"),
        ("timeout", None, "no response within 15 s"),
    )[number % 3]
    return {
        "delivery_id": id_("dlv_", -9), "event_id": id_("evt_", -9), "type": TYPES[3],
        "destination": "crm-production-eu-west-2", "started_at": at(-60 * number - 9),
        "duration_ms": 4.0 + 7500.3 * number, "result": result, "status": status,
        "error": error, "truncated": False, "group_id": None, "group_size": None,
        "answer": '{"error": "upstream connect error or disconnect before headers"}' if status else "",
        **more,
    }  # fmt: skip


def tail_event(number):
    """Return an event of `relay tail`."""
    return {name: event(number)[name] for name in ("id", "source", "type", "subject", "received_at", "size")}


def tail_attempt(number):
    """Return an attempt of `relay tail`: delivered, retried, dead, of a deleted event."""
    state, status, error, next_attempt, reason = (
        ("delivered", 200, None, None, None),
        ("pending", None, "cannot connect to hooks.example.com:443: Connection refused", 47, None),
        ("dead", 503, "HTTP 503 Service Unavailable", None, "exhausted"),
        ("pending", 429, "HTTP 429 Too Many Requests", 3600, None),
    )[number]
    return {
        "delivery_id": id_("dlv_", -1, number), "event_id": id_("evt_", -1) if number < 3 else None,
        "destination": ("crm-production-eu-west-1", "crm-production-eu-west-2", "slack", LONG)[number],
        "type": TYPES[0] if number < 3 else None, "attempt": number + 1,
        "result": "ok" if number == 0 else "5xx",
        "status": status, "error": error, "duration_ms": 7.3 * 20**number, "state": state, "reason": reason,
        "next_attempt_at": None if next_attempt is None else at(next_attempt),
        "started_at": at(-0.7 + number / 8),
    }  # fmt: skip


PAUSE = {"paused_by": None, "paused_until": None}


def destination(name, held=None, *, pending=0, in_flight=0, dead=0, delivered=90_125, **more):
    """Return a destination of a list."""
    return {
        "name": name, "held": held, **PAUSE, "in_flight": in_flight,
        "url_host": "hooks.example.com" if held != "not_in_config" else None,
        "last_success": at(-7860 if held else -3) if delivered else None,
        "certificate_expires": at(86_400 * 41) if "crm" in name else None,
        "circuit": "open" if held == "circuit open" else "closed",
        "failing_since": None, "disabled_at": None, "held_until": None,
        "oldest_pending": at(-840) if pending else None,
        "last_error": "HTTP 503" if held == "circuit open" else None,
        "last_error_at": at(-37) if held == "circuit open" else None,
        "attempts_per_minute": 12.0, "failed_per_minute": 0.0,
        "created": delivered + dead + pending, "delivered": delivered, "dead": dead, "expired": 0,
        "cancelled": 2, "pending": pending, **more,
    }  # fmt: skip


def shards():
    """Return the shards of a destination: on two nodes, one with an open circuit, and one on no node."""
    rows = (("eu-1", 4, "closed"), ("eu-2", 0, "open"), ("eu-1", 2, "closed"), ("", 0, "closed"))
    return [
        {"shard": number, "node": node, "in_flight": in_flight, "circuit": circuit}
        for number, (node, in_flight, circuit) in enumerate(rows)
    ]


def change(number, **more):
    """Return a change of an operator."""
    verb, path, body = (
        ("POST", "/api/destinations/crm-production-eu-west-1/pause", '{"for":"1h"}'),
        ("POST", "/api/deliveries/retry", '{"filter":{"destination":"' + LONG + '","state":"dead"}}'),
        ("POST", "/api/reload", ""),
    )[number]
    return {
        "at": at(-60 * number), "operator": ("root", "deploy", "anna@example.com")[number],
        "access": ("socket", "token", "proxy")[number], "remote": "203.0.113.7", "method": verb,
        "path": path, "status": (200, 202, 409)[number], "body": body,
        "request_id": id_("req_", -60 * number), "node": "eu-1", **more,
    }  # fmt: skip


def match(name, *lines, **more):
    """Return where an event goes, and why."""
    goes = lines[0].startswith("yes")
    return {
        "name": name, "matches": goes, "reason": "matched" if goes else "no_pattern", "lines": list(lines),
        "held": None, "options": [],
        "retries": retries(name) if goes else None, **more,
    }  # fmt: skip


def retries(name):
    """Return the sentence about retries of a destination."""
    enable = f"`relay destinations enable {name}`"
    return (
        "any response other than 2xx is retried: 11 attempts in about 76 hours;"
        f" 410 disables the destination, and its deliveries wait until {enable}"
    )


def source(name, plugin, prefix, *, paused=False, **more):
    """Return a source of a list."""
    return {
        "name": name, "plugin": plugin, "prefix": prefix, "paused": paused, "last_event": at(-3),
        "silent": False, **more,
    }  # fmt: skip


def worker(number, status="ONLINE", **more):
    """Return a worker."""
    return {
        "source": "whatsapp", "id": f"whatsapp-worker-eu-central-{number:03}", "status": status,
        "maintenance": status == "MAINTENANCE",
        "maintenance_by": "operator" if status == "MAINTENANCE" else None,
        "maintenance_until": at(7200) if status == "MAINTENANCE" else None, "endpoint": f"https://worker-{number}.internal.example.com:8443",
        "description": "", "version": "2.14.0", "environment": "production", "max_sessions": 50,
        "registered_at": at(-86_400 * 12), "last_heartbeat": at(-7 if status == "ONLINE" else -4000),
        "restarts": number, "cpu": 45.5, "memory": 67.8, "uptime": 360_000.0, "message_count": 1250,
        "counts": {"total": 12, "connected": 11}, "sessions": [], "session_count": 12,
        "heard_minutes": "0" * 12 + "1" * 48, "queued_commands": 0, **more,
    }  # fmt: skip


def node(name, jobs, lanes, **more):
    """Return a node of a cluster."""
    return {
        "name": name, "version": "1.4.0", "is_self": False, "started_at": at(-86_400), "seen_at": at(-0.5),
        "lanes": list(lanes), "jobs": list(jobs), "config": "2c26b46b68ff", **more,
    }  # fmt: skip


def job(name, every, **more):
    """Return a job."""
    return {
        "name": name, "every": every, "running": False, "runs": 1440, "failures": 0, "started_at": at(-31),
        "succeeded_at": at(-31), "seconds": 0.0124, "error": None, "next_run_at": at(29), "node": None,
        **more,
    }  # fmt: skip


def replay(number, **more):
    """Return a replay; those before the first have ended."""
    running = number == 0
    return {
        "id": id_("rpl_", number), "state": "running" if running else "cancelled", "count": 12_400,
        "done": 3100, "created": 6050, "skipped": 75, "to": None if running else LONG, "rate": "20/s",
        "per_second": 19.8, "eta_seconds": 469.7 if running else None, "reached": at(-86_400),
        "began_at": at(-157 - 4000 * number), "ended_at": None if running else at(-3900 * number),
        "error": None, "node": None, **more,
    }  # fmt: skip


def refused(number, **more):
    """Return a refused request of a list."""
    source, reason, status, problem = (
        (
            "adorn",
            "validation",
            400,
            'session_id: expected a text, got 42, in {"session_id": 42, "event_type": …}',
        ),
        ("github-enterprise-production", "auth", 401, "the signature does not match"),
        (None, "unknown_route", 404, "no source has this path"),
    )[number % 3]
    what = "secrets[0] matches: the sender signed the body without the line ending that was added to it"
    do = "compare [sources.adorn] with the sender's settings"
    finding = {"cause": "plugin", "where": 'plugin "generic"', "what": what, "do": do}
    return {
        "findings": [finding] if number == 0 else [],
        "id": id_("ref_", -60 * number, 7), "at": at(-60 * number), "source": source, "reason": reason,
        "status": status, "problem": problem, "field": "session_id" if number == 0 else "",
        "method": "POST", "target": ("/v1/events", "/hooks/github/" + "x" * 90, "/wp-login.php")[number % 3],
        "remote": "203.0.113.7", "size": 4711, "retried_at": None, "event_id": None, **more,
    }  # fmt: skip


def page(*items):
    """Return a page without a next one."""
    return {"items": list(items), "next_cursor": None}


def id_page(digits, *items):
    """Return a page whose ids can be looked up by this number of hex digits."""
    return {**page(*items), "id_digits": digits}


PAYLOAD = (
    '{"event_type": "session.started", "session_id": "s-1", "total": 45000.00, "empty": {}, "tags": [],'
    ' "note": "Gr\\u00fc\\u00dfe \\ud83c\\udf89\\u0007", "items": [{"sku": "A-1", "qty": 2}, null, true]}'
)

ANSWERS = {
    "status": {
        "version": "1.4.0",
        "ready": True,
        "reasons": [],
        "addresses": {"public": "http://0.0.0.0:8080", "admin": "http://127.0.0.1:8081"},
        "uptime_seconds": 273_845,
        "sources": ["adorn", "github-enterprise-production", "whatsapp"],
        "destinations": ["crm-production-eu-west-1", "crm-production-eu-west-2", LONG, "slack", "billing"],
        "backups": {
            "last_success": at(-10_800),
            "bytes": 1_300_000_000,
            "kept": 7,
            "interval": "24h",
            "overdue": False,
            "error": None,
        },
        "disk": {
            "folder": "/var/lib/relay",
            "free": 195_000_000_000,
            "min_free": 1_000_000_000,
            "full": False,
            "days_left": 41.2,
        },
        "problems": [
            {
                "what": "crm-production-eu-west-2 has failed for 2h11m (circuit open), 1 204 deliveries wait",
                "next": "relay destinations test crm-production-eu-west-2 --close-circuit",
                "kind": "destination",
                "name": "crm-production-eu-west-2",
            },
            {
                "what": "github-enterprise-production is silent: its latest event came 1d1h ago",
                "next": "relay sources show github-enterprise-production",
                "kind": "source",
                "name": "github-enterprise-production",
            },
        ],
    },
    "events": id_page(9, *map(event, range(8))),
    "events/01a2": {
        **event(1),
        "owed": [delivery(number) for number in range(4)],
        "id_digits": 14,
        "content_type": "application/json",
        "payload": PAYLOAD,
        "payload_truncated": False,
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "intact": True,
        "replies": [
            {"received_at": at(-4.25), "status": 200, "duration_ms": 3.1, "heard": False},
            {"received_at": at(-2), "status": 200, "duration_ms": 2.2, "heard": True},
        ],
    },
    "deliveries": id_page(15, *map(delivery, range(10))),
    "deliveries/01a2": {**delivery(3), "tries": [attempt(number) for number in range(3)]},
    "attempts": id_page(14, attempt(0), attempt(1, type=TYPES[1]), attempt(2, delivery_id=id_("dlv_", -80))),
    "destinations": page(
        destination("crm-production-eu-west-1", in_flight=12, pending=14),
        destination("crm-production-eu-west-2", "circuit open", pending=1204, dead=31),
        destination(LONG),
        destination("slack", "paused", pending=3, paused_until=at(5400)),
        destination("billing", "disabled: gone", dead=7, delivered=0),
        destination("old", "not_in_config"),
        destination("warehouse", in_flight=6, pending=90, circuit="open", shards=shards()),
    ),
    "destinations/crm": {
        **destination("crm-production-eu-west-2", "circuit open", pending=1204, dead=31),
        "events": ["adorn.*", "!adorn.attire.*"],
        "failing_since": at(-7860),
        "disabled_at": None,
        "held_until": at(23),
        "due": 1190,
        "expires_next": at(2760),
        "order": {"keys": 312, "longest": 9, "is_whole": True},
        "oldest": delivery(2),
        "latest": delivery(1),
    },
    "destinations/warehouse": {
        **destination("warehouse", in_flight=6, pending=90, circuit="open", shards=shards()),
        "events": ["*"],
        "due": 84,
        "expires_next": None,
        "order": None,
        "oldest": delivery(2),
        "latest": delivery(0),
    },
    "audit": page(*map(change, range(3))),
    "events/01a2/explain": {
        "id": id_("evt_", -9),
        "type": TYPES[0],
        "destinations": [
            match("crm-production-eu-west-1", 'yes: "adorn.*" matches'),
            match(
                "crm-production-eu-west-2",
                'yes: "adorn.*" matches',
                held="circuit open",
                options=["expires if it is not delivered within 1h"],
            ),
            match(LONG, 'no: the type matches none of "lazychat.*"'),
        ],
    },
    "sources": page(
        source("adorn", "adorn", ""),
        source(
            "github-enterprise-production", "github", "/hooks/github", last_event=at(-90_000), silent=True
        ),
        source("whatsapp", "whatsapp", "", paused=True),
    ),
    "sources/adorn": {
        **source("adorn", "adorn", ""),
        "latest": event(0),
        "settings": {
            "plugin": "adorn",
            "tokens": ["<secret>", "<secret>"],
            "workers": {"offline_after": "1m30s"},
        },
        "missing": [],
        "tokens": [
            {
                "name": "ADORN_TOKEN",
                "key": "tokens[0]",
                "uses": 90_125,
                "last_used": at(-3),
                "since": at(-90_000),
            },
            {
                "name": "ADORN_TOKEN_OLD",
                "key": "tokens[1]",
                "uses": 0,
                "last_used": None,
                "since": at(-90_000),
            },
        ],
    },
    "workers": page(worker(1), worker(2, "OFFLINE"), worker(3, "MAINTENANCE", session_count=0)),
    "workers/whatsapp/w": {
        **worker(1),
        "metrics": [],
        "sessions": [
            {
                "id": "sess_42",
                "status": "connected",
                "phone": "+4915112345678",
                "name": "営業部",
                "last_activity": None,
            },
            {"id": "sess_43", "status": "qr", "phone": None, "name": None, "last_activity": None},
        ],
        "commands": [
            {
                "id": id_("cmd_", -9),
                "state": "queued",
                "created_at": at(-9),
                "sent_at": None,
                "expires_at": at(591),
                "command": {"type": "restart", "reason": "update"},
            },
        ],
    },
    "refused": page(*map(refused, range(3))),
    "refused/01a2": {
        **refused(0),
        "can_retry": True,
        "body": '{"session_id": 42, "event_type": "session.started"}',
        "headers": [["host", "relay.example.com"], ["authorization", "Bearer ****"]],
    },
    "replays": page(replay(0, node="eu-2"), replay(1)),
    "replays/01a2": replay(1),
    "jobs": page(
        job("retention", "1m"),
        job("ledger", "15s", next_run_at=at(14)),
        job(
            "export-to-bucket",
            "1h",
            failures=3,
            seconds=31.5,
            error="ConnectionError: cannot connect to s3.example.com:443: Connection refused",
        ),
    ),
    "nodes": page(
        node("eu-1", ("backup", "ledger"), ("crm-production-eu-west-1", LONG, "slack"), is_self=True),
        node("eu-2", ("forget", "retention"), ("crm-production-eu-west-2",), config="9f86d081884c"),
    ),
    "stats": page(
        *(
            {
                "hour": at(-3600 * number - 0),
                "source": "adorn",
                "type": TYPES[number % 3],
                "events": 90_125 // 9**number,
                "duplicates": number,
                "bytes": 10**9 // 50**number,
            }
            for number in range(4)
        )
    ),
    "db": {
        "path": "/var/lib/relay/relay.db",
        "version": 5,
        "bytes": 13_207_000_000,
        "free": 41_000_000,
        "log": 4_200_000,
        "events": 1_204_311,
        "oldest": at(-86_400 * 30),
        "newest": at(-1),
        "pending": 1221,
        "sqlite": "3.40.1",
        "engine": "SQLite 3.40.1",
        "backups": [
            {
                "path": "/var/lib/relay/backups/relay-20260131.db",
                "bytes": 1_300_000_000,
                "made_at": at(-10_800),
            }
        ],
    },
}
"""Answers to GET, by path below `/api/`. The id in a path is any id: the answer is always the same."""

STREAMS = {
    "tail": [
        ("event", tail_event(0)),
        *(("attempt", tail_attempt(number)) for number in range(4)),
        *(("event", tail_event(number)) for number in (2, 1)),
    ],
}
"""Items of the streams, by path below `/api/`."""

SCREENS = {
    "tail": "tail --limit 7",
    "status": "status",
    "events-list": "events list",
    "events-show": "events show 01a2",
    "deliveries-list": "deliveries list",
    "deliveries-show": "deliveries show 01a2",
    "attempts-list": "attempts list",
    "destinations-list": "destinations list",
    "destinations-show": "destinations show crm",
    "destinations-show-shards": "destinations show warehouse",
    "explain": "explain 01a2",
    "audit": "audit",
    "sources-list": "sources list",
    "sources-show": "sources show adorn",
    "workers-list": "workers list",
    "workers-show": "workers show whatsapp w",
    "refused-list": "refused list",
    "refused-show": "refused show 01a2",
    "replays-list": "replays list",
    "replays-show": "replays show 01a2",
    "jobs-list": "jobs list",
    "nodes": "nodes",
    "stats": "stats",
    "db-status": "db status",
}
"""Commands by the names of their files."""


class Followed(list):
    """The items of a stream, as `relay.cli.api_client.Stream` yields them."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Canned:
    """Answers as `relay.cli.api_client.Daemon` does."""

    def get(self, *path, **_query):
        return copy.deepcopy(ANSWERS["/".join(path)])

    def follow(self, *path, **_query):
        return Followed(copy.deepcopy(STREAMS["/".join(path)]))


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


@contextmanager
def fixed(width, **environment):
    """Fix the clock, the zone and the width of the terminal; yield the stream that the terminal shows."""
    terminal = Terminal()
    settings = {"COLUMNS": str(width), "LINES": str(ROWS), "TZ": ZONE, "NO_COLOR": "1", **environment}
    with (
        patch.dict(os.environ, settings),
        patch.object(screen, "now", lambda: NOW),
        patch.object(endpoint, "daemon_at", lambda *_: Canned()),
        patch("sys.stdout", terminal),
        patch("sys.stderr", terminal),
    ):
        time.tzset()
        try:
            yield terminal
        finally:
            os.environ.pop("TZ")
            time.tzset()
    time.tzset()


def top_snapshot(ago):
    """Return a snapshot of `relay top` from `ago` seconds ago: load varies, one destination fails."""
    wave = 40 * (1 + math.sin(ago / 40))
    failed = 2.0 if ago < 90 else 0.0
    rates = {"attempts_per_second": wave, "delivered_per_second": wave - failed, "failed_per_second": failed}

    def destination(name, held=None, *, pending=0, error=None, share=0.5):
        return {
            "name": name, "held": held, "circuit": "open" if held == "circuit open" else "closed",
            "pending": pending, "in_flight": round(8 * share),
            "attempts_per_second": round(wave * share, 1),
            "delivered_per_second": 0.0 if error else round(wave * share, 1),
            "failed_per_second": failed if error else 0.0,
            "last_error": error, "last_error_at": None if error is None else at(-ago - 3),
        }  # fmt: skip

    return {
        "at": at(-ago), "version": "1.4.0", "uptime_seconds": 273_845 - ago, "ready": True, "reasons": [],
        "backlog": 1204 if ago < 90 else 3, "events_per_second": round(wave, 1),
        **{name: round(rate, 1) for name, rate in rates.items()},
        "commit_ms": 1.76, "loop_lag_ms": 0.4, "workers": {"ONLINE": 12, "OFFLINE": 1}, "nodes": [],
        "sources": [
            {"name": name, "paused": name == "whatsapp", "events_per_second": round(wave * share, 1)}
            for name, share in (("adorn", 0.75), ("github-enterprise-production", 0.25), ("whatsapp", 0))
        ],
        "destinations": [
            destination("crm-production-eu-west-1"),
            destination(
                "crm-production-eu-west-2", "circuit open" if ago < 90 else None, pending=1190, share=0.05,
                error="cannot connect to hooks.example.com:443: Connection refused",
            ),
            destination(LONG, pending=14), destination("slack", "paused", share=0),
            *(destination(f"team-{number:02}", share=0.01) for number in range(20)),
        ],
    }  # fmt: skip


def cluster_snapshot(ago):
    """Return a snapshot of nodes that share the database; a shard of a destination has an open circuit."""
    snapshot = top_snapshot(ago)
    node = {"name": "eu-2", "answers": True, "ready": True, "reasons": [], "unable": False}
    silent = {"name": "eu-3", "answers": False, "ready": None, "reasons": [], "unable": False}
    older = {**silent, "name": "eu-4", "unable": True}
    divided = snapshot["destinations"][0] | {
        "name": "warehouse", "circuit": "open", "pending": 90, "in_flight": 6,
        "last_error": "HTTP 503 Service Unavailable", "last_error_at": at(-ago - 3),
    }  # fmt: skip
    others = snapshot["destinations"][1:4]
    return snapshot | {"nodes": [node, silent, older], "destinations": [divided, *others]}


def top_view(snapshot=top_snapshot, *, seconds=400):
    """Return the view of `relay top` after this number of seconds."""
    view = top.View()
    view.has_keys = True
    for ago in range(seconds, -1, -1):
        view.add(snapshot(ago))
    return view


def top_frame(width):
    """Return the screen of `relay top`."""
    return "".join(f"{line}\n" for line in top.frame(top_view(), width, ROWS))


def cluster_frame(width):
    """Return the screen of `relay top` in a cluster."""
    return "".join(f"{line}\n" for line in top.frame(top_view(cluster_snapshot), width, ROWS))


def draw_any(name, width):
    """Return a screen by the name of its file."""
    if name in SCREENS:
        return draw(SCREENS[name], width)
    with fixed(width):
        return FRAMES[name](width)


FRAMES = {"top": top_frame, "top-cluster": cluster_frame}
"""Full screens, by the names of their files."""


def draw(words, width, **environment):
    """Run a command and return the screen."""
    with fixed(width, **environment) as terminal:
        main.main(words.split(), "relay", standalone_mode=False)
    return terminal.getvalue().replace(CLEARED, "")


def file_of(name, width):
    """Return the file of a screen."""
    return FOLDER / f"{name}-{width}.txt"


def write():
    """Rewrite the screens."""
    drawn = {file_of(name, width): draw_any(name, width) for name in (*SCREENS, *FRAMES) for width in WIDTHS}
    for file in FOLDER.iterdir():
        file.unlink()
    for file, text in drawn.items():
        file.write_text(text)
