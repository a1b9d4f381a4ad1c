"""Messages for people: one for each service, within its documented limits, without mentions and numbers."""

import html
import json
import re
import time
from pathlib import Path

import pytest
from commands import run
from daemons import write_config
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.base.clock import rfc3339
from relay.config import message as message_config
from relay.config.message import MessageConfig
from relay.config.secrets import Secret
from relay.formats import FORMATS, own_events
from relay.formats.message import MessageWriter, label_of, masked
from relay.formats.services import SERVICES
from relay.model import StoredEvent

URL = "https://a.example"
ROOT = Path(__file__).parents[2]
NOW = 1_700_000_000_123_456
SETTINGS = {
    "telegram": MessageConfig(chat_id=Secret("-1009990001111"), thread_id=7),
    "ntfy": MessageConfig(topic=Secret("alerts")),
    "pagerduty": MessageConfig(routing_key=Secret("abcdef00abcdef00abcdef00abcdef00")),
}
NAMES = [each.name for each in SERVICES]
GROUPING = [each.name for each in SERVICES if each.group is not None]


def event(type_="shop.order", data=None, subject=None, number=1, raw=None, **changes):
    fields = {
        "id": number,
        "public_id": f"evt_018bcfe5-6800-7000-8000-{number:012d}",
        "source": type_.partition(".")[0],
        "type": type_,
        "subject": subject,
        "received_at": NOW,
        "data": json.dumps(data or {}, ensure_ascii=False).encode() if raw is None else raw,
        "context": b"{}",
        "body": b"",
        "content_type": "application/json",
        "sha256": b"",
    }
    return StoredEvent(**fields | changes)


def dead(name="crm", number=1, **changes):
    data = {
        "delivery": f"dlv_{number}", "event": "evt_9", "type": "shop.order", "destination": name,
        "reason": "exhausted", "attempts": 11, "last_status": 500, "last_error": "HTTP 500 Internal Error",
    }  # fmt: skip
    return event("relay.delivery.dead", data | changes, name, number)


def format_of(name, **settings):
    config = SETTINGS.get(name, MessageConfig())
    given = {key: getattr(config, key) for key in config.__struct_fields__} | settings
    return FORMATS[name].with_settings(MessageConfig(**given))


def render(name, *events, **settings):
    format_ = format_of(name, **settings)
    return json.loads(format_.render(events[0]) if len(events) == 1 else format_.group(events))


def units(text):
    return len(text.encode("utf-16-le")) // 2


def texts_in(value):
    """Return every string in a JSON value, also the keys of objects."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [*value, *(text for each in value.values() for text in texts_in(each))]
    inner = value if isinstance(value, list) else ()
    return [text for each in inner for text in texts_in(each)]


# --- the documented limits and shapes ---------------------------------------------------------------


def check_slack(body):
    """docs.slack.dev: "Blocks", "Header block", "Section block", "Context block"."""
    assert 0 < units(body["text"]) <= 16_000  # Slack cuts at 40,000, Mattermost refuses more than 16,383
    assert len(body["blocks"]) <= 50
    for block in body["blocks"]:
        match block["type"]:
            case "header":
                assert block["text"]["type"] == "plain_text"
                assert 1 <= units(block["text"]["text"]) <= 150 + 140
                assert len(block["text"]["text"]) <= 150
            case "section":
                texts = block.get("fields", [block.get("text")])
                assert 1 <= len(texts) <= 10
                assert all(
                    1 <= units(text["text"]) <= (2000 if "fields" in block else 3000) for text in texts
                )
            case "context":
                assert 1 <= len(block["elements"]) <= 10
            case _:
                raise AssertionError(block["type"])


def check_discord(body):
    """docs.discord.com: "Execute Webhook", "Embed Limits"."""
    assert body["allowed_mentions"] == {"parse": []}
    [embed] = body["embeds"]
    assert 1 <= units(embed["title"]) <= 256
    assert units(embed.get("description", "")) <= 4096
    assert len(embed.get("fields", [])) <= 25
    total = units(embed["title"]) + units(embed.get("description", "")) + units(embed["footer"]["text"])
    for field in embed.get("fields", []):
        assert 1 <= units(field["name"]) <= 256
        assert 1 <= units(field["value"]) <= 1024
        total += units(field["name"]) + units(field["value"])
    assert total <= 6000


def check_teams(body):
    """learn.microsoft.com: "Create incoming webhooks with Workflows", "Limits and specifications"."""
    assert body["type"] == "message"
    [attachment] = body["attachments"]
    assert attachment["contentType"] == "application/vnd.microsoft.card.adaptive"
    assert attachment["content"]["type"] == "AdaptiveCard"
    assert len(json.dumps(body, ensure_ascii=False).encode()) <= 28 * 1024
    for block in attachment["content"]["body"]:
        assert block["type"] == "RichTextBlock"  # its text runs do not support Markdown
        assert all(run_["type"] == "TextRun" and run_["text"] for run_ in block["inlines"])


def check_telegram(body):
    """core.telegram.org/bots/api: "sendMessage", "HTML style"."""
    assert body["parse_mode"] == "HTML"
    assert body["chat_id"] == "-1009990001111"
    plain = re.sub(r"</?(?:b|i|code)>|<a href=\"[^\"<>]*\">|</a>", "", body["text"])
    assert "<" not in plain
    assert ">" not in plain
    assert 1 <= units(html.unescape(plain)) <= 4096


def check_ntfy(body):
    """docs.ntfy.sh/publish: "Publish as JSON", "Limitations"."""
    assert body["topic"] == "alerts"
    assert 1 <= len(body["message"].encode()) <= 4096
    assert len(body["title"]) <= 250
    assert 1 <= body.get("priority", 3) <= 5


def check_pagerduty(body):
    """developer.pagerduty.com: "Send an alert event"."""
    assert len(body["routing_key"]) == 32
    assert body["event_action"] in ("trigger", "resolve")
    assert 1 <= len(body["dedup_key"]) <= 255
    assert 1 <= len(body["payload"]["summary"]) <= 1024
    assert body["payload"]["severity"] in ("critical", "error", "warning", "info")
    assert body["payload"]["source"]
    assert len(json.dumps(body).encode()) <= 512 * 1024


CHECKS = {
    "slack": check_slack, "discord": check_discord, "teams": check_teams, "telegram": check_telegram,
    "ntfy": check_ntfy, "pagerduty": check_pagerduty,
}  # fmt: skip

wild = st.text(st.sampled_from("a<>&*_`\\|~[]()@#:/.-\n\r\t 0123456789😀한é\u202e\x00\"'"), max_size=400)
huge = st.sampled_from(["x", "&", "<", "😀", "한", "\\", "*", "@everyone ", "\n"]).map(
    lambda text: text * 3000
)
odd = wild | huge
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | odd, lambda inner: st.lists(inner, max_size=3)
)
datas = st.dictionaries(odd, trees, max_size=12)


@pytest.mark.parametrize("name", NAMES)
class TestLimits:
    @settings(max_examples=30)
    @given(data=datas, subject=st.none() | odd, type_=odd)
    def test_no_event_makes_a_message_beyond_the_limits_of_its_service(self, name, data, subject, type_):
        CHECKS[name](render(name, event(f"shop.{type_}", data, subject)))

    @settings(max_examples=20)
    @given(data=datas, text=odd)
    def test_no_setting_makes_a_message_beyond_the_limits_of_its_service(self, name, data, text):
        fields = {f"field {number}": "{data.a}" for number in range(10)}
        settings = {"title": "{data.a}", "text": "{data.a}\n{data.a}", "fields": fields, "link": "{data.a}"}
        CHECKS[name](render(name, event("shop.order", data | {"a": text}), **settings))

    @pytest.mark.parametrize("raw", [b"null", b"[]", b'"text"', b"7", b"{", b"", b"\xff", b"[" * 100_000])
    def test_data_that_is_not_an_object_is_rendered(self, name, raw):
        CHECKS[name](render(name, event(raw=raw)))

    @pytest.mark.parametrize("source", ["relay", "shop"])
    def test_an_event_with_unexpected_data_for_its_type_is_rendered(self, name, source):
        for type_ in (
            "delivery.dead",
            "destination.disabled",
            "deliveries.expiring",
            "ping",
            "worker.offline",
        ):
            for data in (
                {},
                {"destination": 5},
                {"worker": "w", "reason": []},
                {"worker": {}, "reason": "silent"},
            ):
                CHECKS[name](render(name, event(f"{source}.{type_}", data)))


@pytest.mark.parametrize("name", GROUPING)
@pytest.mark.parametrize("character", ["x", "&", "<", "😀", "한", "\\", "@a/b.c ", "\n"])
@pytest.mark.parametrize("count", [2, 100])
def test_no_group_makes_a_message_beyond_the_limits_of_its_service(name, character, count):
    events = [event("shop.order", {"a": f"{n}"}, f"{n} {character * 1200}", n) for n in range(count)]
    CHECKS[name](render(name, *events))
    CHECKS[name](render(name, *events, title="{subject}", text="{subject} {subject}"))


# --- nothing of a sender becomes markup, a mention or a number to call ---------------------------------

HOSTILE = (
    "@everyone <!channel> <@U123> <at>Bob</at> *b* [x](https://evil.example) </code> &lt; #general /start"
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["subject", "value", "key", "type", "setting", "dead"])
def test_a_sender_s_text_is_neither_markup_nor_a_mention(name, place):
    short = HOSTILE[:78] if place in ("value", "key") else HOSTILE
    sent = {
        "subject": lambda: render(name, event(subject=HOSTILE)),
        "value": lambda: render(name, event(data={"note": short, "more": HOSTILE[78:]})),
        "key": lambda: render(name, event(data={short: "v"})),
        "type": lambda: render(name, event(f"shop.{HOSTILE}")),
        "setting": lambda: render(
            name, event(data={"a": HOSTILE}), title="{data.a}", text="{data.a}", fields={"A": "{data.a}"}
        ),
        "dead": lambda: render(name, dead(last_error=HOSTILE, type=HOSTILE)),
    }[place]()
    CHECKS[name](sent)
    match name:
        case "slack":
            marked = all_of(sent, "type", "mrkdwn")
            assert not any(re.search(r"<(?!!date\^)", each["text"]) for each in marked)
            assert not re.search(r"[<>]|@\w", sent["text"])
        case "discord":
            texts = texts_in(sent["embeds"][0])
            assert not any(re.search(r"(?<!\\)[<>*@#\[\](]", text) for text in texts if "`relay" not in text)
        case "telegram":
            outside = re.sub(r"<code>.*?</code>", "", sent["text"], flags=re.DOTALL)
            assert not re.search(r"[@#/]\w", re.sub(r"</?[bi]>", "", outside))
        case "teams":
            assert "msteams" in sent["attachments"][0]["content"]
            assert "entities" not in json.dumps(sent)
        case _:
            assert "markdown" not in sent


def all_of(value, key, wanted):
    """Return every object in a JSON value that has a key with this value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [each for item in inner for each in all_of(item, key, wanted)]
    return [value, *found] if isinstance(value, dict) and value.get(key) == wanted else found


PERSONAL = {
    "phone": "0812", "customer_email": "a@b.example", "Authorization": "Bearer x", "accessToken": "s3cr3t",
    "note": "call +62 812 3456-7890", "msisdn": 628123456789, "jid": "628123456789@s.whatsapp.net",
    "number": "(0812) 345 678", "plain": 628123456789, "qrCode": "2@abc",
    "customer": {"phone": "628123456789"},
    "list": ["628123456789"], "long": "x" * 81, "empty": "", "nothing": None,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_number_to_call_and_no_secret_is_shown_and_no_raw_data(name):
    output = json.dumps(render(name, event(data=PERSONAL, subject="628123456789@s.whatsapp.net")))
    for secret in ("628123", "3456", "a@b", "Bearer", "s3cr3t", "2@abc", "0812", "x" * 81, "customer", "{\\"):
        assert secret not in output, secret
    assert "7890" in output
    assert "6789" in output


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("+62 812-3456-7890", "…7890"),
        ("628123456789@s.whatsapp.net", "…6789@s.whatsapp.net"),
        ("80351110224678912", "…8912"),
        ("45000.00", "45000.00"),
        ("2026-11-27T01:00:00Z", "2026-11-27T01:00:00Z"),
        ("018bcfe5-6800-7000-8000-000000000001", "018bcfe5-6800-7000-8000-000000000001"),
        ("order 123456", "order 123456"),
    ],
)
def test_long_numbers_are_masked(text, shown):
    assert masked(text) == shown


@pytest.mark.parametrize(
    "text", ["1 " * 200_000, "(" * 400_000, "1-" * 200_000, "+1" * 200_000, "9" * 400_000]
)
def test_a_huge_subject_costs_no_time(text):
    began = time.process_time()
    message = MessageWriter(MessageConfig(title="{data.a}")).write(
        event(data={"a": text, text: 1}, subject=text)
    )
    MessageWriter(MessageConfig()).write(event(data={"a": text, text[:300]: text[:70]}, subject=text))
    assert time.process_time() - began < 2
    assert len(message.title) <= 140


def test_keys_become_labels():
    keys = ("orderId", "sale_amount", "HTTPStatus", "a", "日本", "x-y.z")
    assert [label_of(key) for key in keys] == ["Order id", "Sale amount", "HTTP status", "A", "日本", "X y z"]


# --- the words -----------------------------------------------------------------------------------------


WORKER = {"id": "crn-1", "last_heartbeat": "2023-11-14T22:11:50.000Z", "version": "2.1", "environment": "",
          "description": "front desk"}  # fmt: skip
OWN = [
    (
        dead(),
        "🔴 Delivery to crm is dead",
        "All 11 attempts failed: HTTP 500 Internal Error.",
        (("Event type", "shop.order"), ("Event", "evt_9"), ("Delivery", "dlv_1")),
        "relay deliveries retry dlv_1",
    ),
    (
        dead(reason="final_status", attempts=1, last_error="HTTP 400 Bad Request"),
        "🔴 Delivery to crm is dead",
        "The receiver refused it permanently: HTTP 400 Bad Request.",
        (("Event type", "shop.order"), ("Event", "evt_9"), ("Delivery", "dlv_1")),
        "relay deliveries retry dlv_1",
    ),
    (
        event("relay.destination.circuit_opened", {"destination": "crm", "url": URL, "reason": "no"}),
        "🔴 crm does not respond",
        "Its deliveries wait. The relay sends probes until it responds again.",
        (("Last error", "no"), ("URL", URL)),
        "relay destinations show crm",
    ),
    (
        event("relay.destination.recovered", {"destination": "crm", "url": URL, "reason": "ok"}),
        "🟢 crm responds again",
        "Its deliveries are sent again.",
        (("URL", URL),),
        "",
    ),
    (
        event("relay.destination.disabled", {"destination": "crm", "url": URL, "reason": "gone"}),
        "🔴 crm is disabled",
        "It responded with 410 Gone. Its deliveries are held until you enable it.",
        (("URL", URL),),
        "relay destinations enable crm",
    ),
    (
        event("relay.deliveries.expiring", {"destination": "crm", "expires_in_seconds": 86_400}),
        "🟠 Deliveries to crm expire soon",
        "It accepts nothing. The first delivery expires in 1d.",
        (),
        "relay destinations show crm",
    ),
    (
        event("relay.ping", {"destination": "crm", "message": "An operator is testing this."}),
        "🔵 Test of crm",
        "An operator is testing this.",
        (),
        "",
    ),
    (
        event("whatsapp.worker.offline", {"worker": WORKER, "reason": "silent"}, "crn-1"),
        "🔴 Worker crn-1 is offline",
        "No heartbeat since 2023-11-14 22:11:50 UTC.",
        (("Source", "whatsapp"), ("Version", "2.1"), ("Description", "front desk")),
        "relay workers show whatsapp crn-1",
    ),
    (
        event("whatsapp.worker.online", {"worker": WORKER, "reason": "heard"}, "crn-1"),
        "🟢 Worker crn-1 is online again",
        "",
        (("Source", "whatsapp"), ("Version", "2.1"), ("Description", "front desk")),
        "relay workers show whatsapp crn-1",
    ),
    (
        event("shop.order", {"orderId": "A-1", "total": 45000.5, "paid": True}, "A-1"),
        "shop.order · A-1",
        "",
        (("Order id", "A-1"), ("Total", "45000.5"), ("Paid", "true")),
        "",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("given", "heading", "text", "fields", "command"), OWN)
def test_each_kind_of_event_has_its_words(given, heading, text, fields, command):
    message = MessageWriter(MessageConfig()).write(given)
    assert (message.heading, message.text, message.fields) == (heading, text, fields)
    assert message.command == command
    if command:
        run(*command.split()[1:], "--help")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [each[0] for each in OWN], ids=lambda given: given.type)
def test_each_service_shows_title_text_fields_and_command(name, given):
    message, sent = MessageWriter(MessageConfig()).write(given), render(name, given)
    CHECKS[name](sent)
    output = " ".join(texts_in(sent)).replace("\\", "").replace("\u2060", "")
    for part in (
        message.title,
        message.text,
        message.command,
        *(text for pair in message.fields for text in pair),
    ):
        assert part in html.unescape(output)


def test_every_event_that_the_relay_creates_has_words():
    page = (ROOT / "docs" / "operating.md").read_text()
    assert {*re.findall(r"^\| `relay\.([a-z_.]+)` \|", page, re.MULTILINE), "ping"} == set(own_events._OWN)
    rules = (ROOT / "relay" / "workers" / "rules.py").read_text()
    assert {f"worker.{name}" for name in re.findall(r'_generate\("([a-z]+)"', rules)} == set(
        own_events._WORKERS
    )


# --- settings --------------------------------------------------------------------------------------------

ORDER = event(
    "shop.order", {"order": {"id": "A/1 é"}, "url": "https://shop.example/a(b)", "phone": "0812345678"}
)


def test_an_operator_chooses_title_text_fields_and_link():
    message = MessageWriter(
        MessageConfig(
            title="Order {data.order.id|upper}",
            text="of {data.customer|default:nobody}",
            fields={"Phone": "{data.phone}", "None": "{data.none}", "Whole": "{data.order}"},
            link="https://shop.example/o/{data.order.id}?t={type}",
        )
    ).write(ORDER)
    assert message.title == "Order A/1 É"
    assert message.text == "of nobody"
    assert message.fields == (("Phone", "0812345678"), ("Whole", '{"id": "A/1 é"}'))
    assert message.link == "https://shop.example/o/A%2F1%20%C3%A9?t=shop.order"


@pytest.mark.parametrize(
    ("value", "link"),
    [
        ("https://shop.example/a?b=c#d", "https://shop.example/a?b=c#d"),
        ("javascript:alert(1)", ""),
        ("https://a.example/>|<!channel>", ""),
        ("https://a.example/)[x](https://b.example", ""),
        ("https:///x", ""),
        ("https://[::1", ""),
        ("", ""),
        ("https://a.example/" + "x" * 2000, ""),
    ],
)
def test_a_link_of_a_sender_is_used_only_if_it_is_a_plain_url(value, link):
    message = MessageWriter(MessageConfig(link="{data.url}")).write(event(data={"url": value}))
    assert message.link == link


@pytest.mark.parametrize("name", NAMES)
def test_each_service_leads_to_the_link(name):
    output = json.dumps(render(name, ORDER, link="https://shop.example/{type}"))
    assert "https://shop.example/shop.order" in output


def test_the_settings_of_services_are_sent():
    assert render("telegram", ORDER)["message_thread_id"] == 7
    assert render("ntfy", ORDER, priority=5, tags=("a", "b"))["tags"] == ["a", "b"]
    assert render("ntfy", ORDER, priority=5)["priority"] == 5
    assert render("ntfy", dead())["priority"] == 4
    assert "priority" not in render("ntfy", ORDER)
    assert render("pagerduty", ORDER, severity="info")["payload"]["severity"] == "info"
    assert render("pagerduty", ORDER)["payload"]["severity"] == "error"
    assert render("pagerduty", ORDER, dedup_key="order {data.order.id}")["dedup_key"] == "order A/1 é"
    assert render("pagerduty", ORDER)["dedup_key"] == ORDER.public_id
    assert render("pagerduty", ORDER)["payload"]["timestamp"] == rfc3339(NOW)


def test_the_end_of_a_problem_resolves_its_alert():
    data = {"destination": "crm", "url": URL, "reason": "ok"}
    opened, closed = (
        render("pagerduty", event(f"relay.destination.{what}", data))
        for what in ("circuit_opened", "recovered")
    )
    assert (opened["event_action"], closed["event_action"]) == ("trigger", "resolve")
    assert opened["dedup_key"] == closed["dedup_key"] == "destination/crm/circuit"
    offline, online = (
        render("pagerduty", event(f"wa.worker.{what}", {"worker": WORKER, "reason": "silent"}))
        for what in ("offline", "online")
    )
    assert offline["dedup_key"] == online["dedup_key"] == "worker/wa/crn-1"
    assert (offline["event_action"], online["event_action"]) == ("trigger", "resolve")


def test_a_long_key_of_an_alert_stays_distinct():
    keys = {
        render("pagerduty", event(data={"a": "x" * 400}, number=number), dedup_key="{data.a}")["dedup_key"]
        for number in (1, 2)
    }
    assert len(keys) == 2
    assert {len(key) for key in keys} == {255}


@pytest.mark.parametrize(
    ("config", "line", "problem"),
    [
        ('format = "telegram"', "format", 'message.chat_id: missing; format = "telegram" needs it'),
        (
            'format = "slack"\nmessage = { chat_id = "1" }',
            "message",
            'belongs to format = "telegram", not to "slack"',
        ),
        (
            'message = { title = "x" }',
            "message",
            "needs a message format: slack, discord, teams, telegram",
        ),
        (
            'template = "x"\nformat = "slack"\nmessage = { title = "x" }',
            "message",
            "needs a message format",
        ),
        ('format = "slack"\nmessage = { titel = "x" }', "message", 'did you mean "title"?'),
        ('format = "slack"\nmessage = { title = "{dat.x}" }', "message", 'did you mean "data.x"?'),
        ('format = "slack"\nmessage = { title = "{data.x|uper}" }', "message", 'did you mean "upper"?'),
        (
            'format = "slack"\nmessage = { fields = { "A" = "{data" } }',
            "message",
            "message.fields.A: column 1: no }",
        ),
        ('format = "slack"\nmessage = { fields = { "" = "x" } }', "message", "a field needs a label"),
        (
            'format = "slack"\nmessage = { link = "shop.example" }',
            "message",
            "expected a URL that starts with https",
        ),
        ('format = "ntfy"\nmessage = { topic = "t", priority = 6 }', "message", "must be at most 5, got 6"),
        (
            'format = "pagerduty"\nmessage = { routing_key = { env = "UNSET_KEY" } }',
            "message",
            "UNSET_KEY is not set",
        ),
        ('format = "slak"', "format", 'unknown format "slak", did you mean "slack"?'),
    ],
)
def test_each_mistake_is_a_problem_with_its_line(tmp_path, config, line, problem):
    path = write_config(tmp_path, f'[destinations.chat]\nurl = "https://chat.example/"\n{config}\n')
    output = run("check-config", "-c", path, code=1).err
    assert problem in output
    lines = path.read_text().splitlines()
    assert any(
        f"config.toml:{number}: destinations.chat" in output
        for number, text in enumerate(lines, 1)
        if text.startswith((line, "[destinations"))
    )


@pytest.mark.parametrize(
    ("config", "url", "warning"),
    [
        (
            'format = "ntfy"\nmessage.topic = "t"',
            "https://ntfy.sh/mytopic",
            "set the topic in `message`",
        ),
        ('format = "ntfy"\nmessage.topic = "t"', "https://ntfy.sh", None),
        ('format = "telegram"\nmessage.chat_id = "1"', "https://t.example/bot1", "end with /sendMessage"),
        ('format = "telegram"\nmessage.chat_id = "1"', "https://t.example/bot1/sendMessage", None),
        (
            'format = "pagerduty"\nmessage.routing_key = "k"',
            "https://p.example/v2/change/enqueue",
            "/v2/enqueue",
        ),
        ('format = "slack"', "https://chat.example/hooks/1", None),
    ],
)
def test_a_url_that_is_not_the_service_s_is_a_warning(tmp_path, config, url, warning):
    path = write_config(tmp_path, f'[destinations.chat]\nurl = "{url}"\n{config}\n')
    output = run("check-config", "-c", path).err
    assert ("destinations.chat.url" in output) == (warning is not None)
    assert warning is None or warning in output
    assert "mytopic" not in output


def test_a_message_needs_no_signature(tmp_path):
    assert [each.name for each in SERVICES] == list(message_config.FORMATS)
    for name in ("slack", "standard"):
        path = write_config(tmp_path, f'[destinations.c]\nurl = "https://c.example/"\nformat = "{name}"\n')
        assert ("unsigned" in run("check-config", "-c", path).err) == (name == "standard")


def test_the_secrets_of_a_service_are_not_shown(tmp_path):
    more = 'format = "telegram"\nmessage = { chat_id = "-100555" }'
    path = write_config(tmp_path, f'[destinations.chat]\nurl = "https://chat.example/"\n{more}\n')
    output = run("config", "show", "-c", path).out
    assert "-100555" not in output
    assert 'message = { chat_id = "<secret>" }' in output


# --- several events --------------------------------------------------------------------------------------


def test_a_hundred_dead_deliveries_are_one_message():
    message = MessageWriter(MessageConfig()).write_group(
        [dead(number=n, last_error="HTTP 500" if n < 98 else "timeout") for n in range(1, 101)]
    )
    assert message.heading == "🔴 100 \u00d7 Delivery to crm is dead"
    assert message.lines == (
        "97 \u00d7 Delivery to crm is dead: All 11 attempts failed: HTTP 500.",
        "3 \u00d7 Delivery to crm is dead: All 11 attempts failed: timeout.",
    )
    assert message.command == "relay deliveries retry --destination crm --state dead"


def test_a_message_about_several_events_has_a_line_for_each_kind_and_their_span():
    later = [
        event("shop.order", subject=f"A-{n}", number=n, received_at=NOW + n * 1_000_000) for n in range(20)
    ]
    message = MessageWriter(MessageConfig()).write_group(later)
    assert message.title == "20 \u00d7 shop.order"
    assert len(message.lines) == 16
    assert message.lines[:2] == ("shop.order · A-0", "shop.order · A-1")
    assert message.lines[-1] == "… and 5 more"
    assert message.text == "From 2023-11-14 22:13:20 UTC to 2023-11-14 22:13:39 UTC."
    mixed = MessageWriter(MessageConfig()).write_group([dead(), later[1]])
    assert (mixed.title, mixed.level, mixed.command) == ("2 events of 2 types", None, "")
    assert MessageWriter(MessageConfig()).write_group(later[:1]) == MessageWriter(MessageConfig()).write(
        later[0]
    )


def test_pages_are_not_grouped_because_each_resolves_for_itself():
    assert [each.name for each in SERVICES if each.group is None] == ["pagerduty"]
