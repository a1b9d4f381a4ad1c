"""`relay explain --source`: where a body would go, by config.toml alone."""

import pytest
from commands import Commands, run
from daemons import SOURCES, Recorder, destination, running, write_config
from wire import request

BODY = (
    b'{"event_type": "sale.made", "session_id": "s-1", "payload": {"total": 99, "big": 12345678901234567890}}'
)
ROUTES = """
[destinations.sales]
url = "https://sales.example/"
events = ["shop.sale.*"]
where = { "data.total" = { gte = 100 } }
[destinations.all]
url = "https://all.example/"
[destinations.vip]
url = "https://vip.example/"
events = ["moddy.*", "!*.made"]
[sources.shop]
plugin = "adorn"
prefix = "/acme"
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "body.json").write_bytes(BODY)
    return write_config(tmp_path, SOURCES, ROUTES)


USUAL = (
    "any response other than 2xx is retried: 11 attempts in about 76 hours; 410 disables the destination, and"
    " its deliveries wait until `relay destinations enable {}`"
)


def explain(config, *args, code=0, stdin=None):
    return run("explain", *args, "-c", config, code=code, stdin=stdin)


def test_a_body_is_explained_without_a_daemon(config):
    result = explain(config, "--source", "shop", "--data", f"@{config.parent / 'body.json'}")
    assert result.rows == [
        ["sales", "no: data.total is 99, expected >= 100"],
        ["all", 'yes: "*" matches'],
        ["vip", 'no: "!*.made" excludes it'],
    ]


def test_a_body_from_standard_input_is_explained_as_json(config):
    result = explain(
        config, "--source", "shop", "--data", "-", "--json", stdin=BODY.replace(b"99", b"100")
    ).json
    assert (result["id"], result["type"]) == (None, "shop.sale.made")
    assert result["destinations"][0] == {
        "name": "sales",
        "matches": True,
        "reason": "matched",
        "lines": ['yes: "shop.sale.*" matches'],
        "held": None,
        "options": [],
        "retries": USUAL.format("sales"),
    }
    assert result["destinations"][2]["retries"] is None


def test_the_explanation_has_the_retried_responses(config):
    config.write_text(
        config.read_text()
        + """
[destinations.strict]
url = "https://strict.example/hook"
final_statuses = [413, 400, 413]
retry = { schedule = ["1m", "1h"] }
[destinations.strictest]
url = "https://strict.example/hook"
final_statuses = [503]
"""
    )
    result = explain(config, "--source", "shop", "--data", f"@{config.parent / 'body.json'}")
    usual, strict, strictest = (line for line in result.err.splitlines() if "retried" in line)
    assert usual == f"all: {USUAL.format('all')}"
    assert strict == (
        "strict: any response other than 2xx is retried: 3 attempts in 1h1m;"
        " 400 and 413 end the delivery at once; 410 disables the destination, and its deliveries wait until"
        " `relay destinations enable strict`"
    )
    assert "; 503 ends the delivery at once; " in strictest


OPTIONS = """
[destinations.chat]
url = "https://chat.example/hook"
format = "slack"
paused = true
group_by = ["subject", "data.none"]
ttl = "1h"
on_dead = "all"
[destinations.digest]
url = "https://digest.example/hook"
format = "slack"
group_by = []
[destinations.ordered]
url = "https://ordered.example/hook"
order_by = "data.total"
latest_by = "subject"
"""


def test_the_explanation_has_the_options_of_the_destination(config):
    config.write_text(config.read_text() + OPTIONS)
    result = explain(config, "--source", "shop", "--data", f"@{config.parent / 'body.json'}")
    lines = [line for line in result.err.splitlines() if "retried" not in line and "unsigned" not in line]
    grouped, most = "grouped: waits up to 30s for other events", "one message reports up to 100 of them"
    assert lines == [
        "chat: held now (paused in config.toml); sent when the hold ends",
        f'chat: {grouped} with the same subject, data.none (["s-1",""]); {most}',
        "chat: expires if it is not delivered within 1h",
        "chat: if the delivery is dead, all gets the event",
        f"digest: {grouped}; {most}",
        'ordered: ordered: waits until the earlier deliveries with data.total "99" have ended',
        'ordered: a newer event of this type with subject "s-1" replaces it while it waits',
    ]


def test_without_a_body_a_sample_is_explained(config):
    assert explain(config, "--source", "shop", "--json").json["type"] == "shop.image.shared"
    result = explain(config, "--source", "whatsapp", "--type", "qr_ready", "--json").json
    assert result["type"] == "whatsapp.qr_ready"


@pytest.mark.parametrize("path", ["/api/webhooks/message-status", "/api/webhooks/message-status?x=1"])
def test_a_path_chooses_among_several_routes(config, path):
    args = ("--source", "whatsapp", "--path", path, "--data", "-", "--json")
    result = explain(config, *args, stdin=b'{"workerId": "w", "sessionId": "s", "status": "read"}').json
    assert result["type"] == "whatsapp.message_status"


def test_a_path_may_name_the_prefix_or_not(config):
    for path in ("/v1/events", "/acme/v1/events"):
        args = ("--source", "shop", "--path", path, "--data", "-", "--json")
        assert explain(config, *args, stdin=BODY).json["type"] == "shop.sale.made"


def test_header_names_ignore_case(config):
    args = ("--source", "lazychat", "--header", "x-event-type: order.created", "--data", "-", "--json")
    assert explain(config, *args, stdin=b"{}").json["type"] == "lazychat.order.created"


async def test_the_running_daemon_gives_the_same_explanation(tmp_path):
    async with Recorder() as recorder:
        picky = destination("picky", recorder.url, 'where = { "subject" = "vip" }')
        config = write_config(tmp_path, SOURCES, destination("crm", recorder.url), picky)
        async with running(config) as relay:
            answer = await relay.exchange(request("POST", "/v1/events", BODY))
            stored = (
                await Commands(relay.addresses.socket)("explain", answer.json["event_id"], "--json")
            ).json
    offline = explain(config, "--source", "adorn", "--data", "-", "--json", stdin=BODY).json
    assert {**stored, "id": None} == offline


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([], 2, "give either the id of a stored EVENT or --source"),
        (["evt_1", "--source", "shop"], 2, "give either the id of a stored EVENT or --source"),
        (["evt_1", "--data", "-"], 2, "--data, --type, --path and --header need --source"),
        (["--source", "shpo"], 4, 'unknown source "shpo", did you mean "shop"?'),
        (["--source", "shop", "--type", "image.share"], 4, 'unknown sample "image.share", did you mean'),
        (["--source", "shop", "--data", "body.json"], 2, "expected @FILE or -, as in --data @body.json"),
        (["--source", "shop", "--data", "@absent"], 2, "cannot read absent: No such file"),
        (["--source", "shop", "--header", "x-event-type"], 2, 'expected "NAME: VALUE"'),
        (["--source", "shop", "--path", "/v2"], 1, "POST /acme/v2 would be refused with 404: No such path"),
        (["--source", "shop", "--path", "/v2"], 1, "the source's routes: POST /acme/v1/events"),
        (["--source", "whatsapp", "--type", "register"], 4, "creates no event"),
        (["--source", "moddy", "--path", "/internal/health"], 4, "GET /internal/health creates no event"),
    ],
)
def test_wrong_usage_has_a_hint(config, args, code, message):
    assert message in explain(config, *args, code=code).err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "POST /acme/v1/events would be refused with 400: The body is not valid JSON"),
        (b'{"event_type": "x"}', "would be refused with 400: session_id: field is required"),
        (b'{"event_type": "\\u0007", "session_id": "s"}', "event_type: expected 1 to 200 printable"),
    ],
)
def test_a_refused_body_exits_with_1_and_the_reason(config, body, message):
    result = explain(config, "--source", "shop", "--data", "-", code=1, stdin=body)
    assert message in result.err
    assert "`relay send shop --list`" in result.err


BROKEN = """
from relay.hookspecs import hookimpl
from relay.source import Accepted, Event, Incoming, Source, route

class Odd(Source, kind="odd", owns=("/odd",)):
    @route("POST", "/odd/{what}")
    def take(self, incoming: Incoming):
        if incoming.params["what"] == "nothing":
            return None
        if incoming.params["what"] == "raises":
            raise RuntimeError("broken")
        return Accepted(event=Event(type=incoming.params["what"], data=object()), reply={})

@hookimpl
def relay_sources():
    return [Odd]
"""


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        (["--path", "/odd/nothing"], 1, "the plugin failed: TypeError: a handler returned NoneType"),
        (["--path", "/odd/raises"], 1, "the plugin failed: RuntimeError: broken"),
        (["--path", "/odd/data"], 1, "the plugin failed: TypeError"),
        ([], 2, "choose one with --path: /odd/{what}"),
        (["--type", "x"], 4, 'the plugin of source "odd" has no samples'),
    ],
)
def test_an_error_in_a_plugin_is_reported_as_such(tmp_path, path, code, message):
    (tmp_path / "plugins.d").mkdir()
    (tmp_path / "plugins.d" / "odd.py").write_text(BROKEN)
    config = write_config(tmp_path, '[sources.odd]\nplugin = "odd"\n')
    assert message in explain(config, "--source", "odd", *path, code=code).err


GENERIC = """
[sources.bulk]
plugin = "generic"
path = "/bulk"
verify = "none"
events = "{body:items}"
type = "{query:kind}.{item:type}"
"""


def test_a_request_with_several_events_is_explained_by_its_first(tmp_path):
    config = write_config(tmp_path, GENERIC, ROUTES)
    items = b'{"items": [{"type": "made"}, {"type": "sold"}, {"type": "sold"}]}'
    args = ("--source", "bulk", "--path", "/bulk?kind=sale", "--data", "-")
    result = explain(config, *args, "--json", stdin=items).json
    assert (result["type"], result["more"]) == ("bulk.sale.made", 2)
    result = explain(config, *args, stdin=items)
    assert "the request has 2 more events; only the first one is explained" in result.err
    result = explain(config, *args, stdin=b'{"items": []}', code=4)
    assert "POST /bulk creates no event" in result.err
