"""docs/sources.md#generic: its examples run, and its tables match the records."""

import hmac
import json
import re
from pathlib import Path

import msgspec
import pytest
from generic import event_of, incoming, load_table

from relay.base.template import FILTERS
from relay.config.effective import _unit, _value, _written
from relay.plugin_loading.loader import load
from relay.source import Refusal
from relay.sources.generic import settings
from relay.sources.generic.checks import REQUEST
from relay.sources.generic.keys import Keys

FILE = Path(__file__).parents[2] / "docs" / "sources.md"
PAGE = FILE.read_text()
SECTION = PAGE[PAGE.index("\n## generic\n") :]
SIGNED = settings.Signed.__struct_encode_fields__
TABLES = {
    "Everything is checked": (Keys, ()),
    "`verify.basic`": (settings.Basic, ()),
    "`verify.api_key`": (settings.ApiKey, ()),
    "have these keys:": (settings.Signed, ()),
    "`verify.hmac` has these as well": (settings.Hmac, SIGNED),
    "`verify.standard_webhooks`": (settings.StandardWebhooks, ()),
    "### Handshakes": (settings.Handshake, ()),
    "`reply` of a source or a handshake:": (settings.ReplySettings, ()),
}
"""The tables of keys: text before each of them, its record, and keys that it leaves out."""

HEAD = "| key | default | meaning |\n|---|---|---|\n"
NAMES = (
    "SHOP_SECRET", "BILLING_SECRET", "PRINTER_PASSWORD", "MAIL_KEY", "GRAPH_SECRET", "GRAPH_VERIFY_TOKEN",
)  # fmt: skip


def rows_of(record, without):
    """Return the rows of a record's keys."""
    for field in msgspec.structs.fields(record):
        if field.encode_name not in without:
            notes = [note for note in field.type.__metadata__ if isinstance(note, msgspec.Meta)]
            [text] = [note.description for note in notes if note.description]
            yield f"| `{field.encode_name}` | {default_of(field)} | {text} |"


def default_of(field):
    if field.required:
        return "required"
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return "none" if default is None else f"`{_written(_value(default, _unit(field.type)))}`"


def place_of(page, before):
    """Return where the rows of the table after a text begin and end."""
    start = page.index(HEAD, page.index(before, page.index("\n## generic\n"))) + len(HEAD)
    return start, re.compile(r"\n(?!\|)").search(page, start).start()


@pytest.mark.parametrize("before", TABLES)
def test_a_table_has_every_key_with_its_default(before):
    start, end = place_of(PAGE, before)
    assert PAGE[start:end].splitlines() == list(rows_of(*TABLES[before]))


def test_the_placeholders_and_filters_are_those_of_the_code():
    assert set(re.findall(r"^\| `\{(\w+)", SECTION, re.MULTILINE)) >= {*REQUEST, "item", "event_id"}
    rows = SECTION[SECTION.index("| filter | result |") :].partition("\n\n")[0]
    named = re.findall(r"^\| (.+?) \|", rows, re.MULTILINE)
    assert set(re.findall(r"`(\w+)", " ".join(named))) == FILTERS | {"hmac"}


EXAMPLES = re.findall(
    r"^\| `([^\n]+?)` \| ((?:header|body) [^\n]+?) \| (?:(400): )?`([^\n]+)` \|$", SECTION, re.MULTILINE
)


def test_there_are_examples_of_templates():
    assert len(EXAMPLES) == 10


@pytest.mark.parametrize(("template", "parts", "status", "result"), EXAMPLES)
def test_an_example_of_a_template_has_the_stated_result(template, parts, status, result):
    text = template.replace(r"\|", "|")
    source = load_table(f"type = '''{text}'''")
    headers = dict(re.findall(r"header `(.+?): (.+?)`", parts))
    [body] = re.findall(r"body `(.+)`", parts)
    if status:
        with pytest.raises(Refusal) as refused:
            event_of(source, body.encode(), headers)
        assert (str(refused.value.status), refused.value.detail) == (status, result)
    else:
        assert event_of(source, body.encode(), headers).type == result


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "config.toml"
    path.write_text("\n".join(re.findall(r"```toml\n(.*?)```", SECTION, re.DOTALL)))
    config = load(path, dict.fromkeys(NAMES, "s3cret")).config
    return {name: each.settings for name, each in config.sources.items()}


def test_the_first_example_makes_the_event_that_the_page_describes(sources):
    [body] = re.findall(r"the body\n`(.+?)`", SECTION)
    event = event_of(sources["shop"], body.encode(), {"X-Shop-Topic": "order.paid"})
    assert (event.type, event.subject, event.key) == ("order.paid", "berlin", "7")
    assert bytes(event.data) == b'{"total": 45.00}'
    assert f"`shop.{event.type}`" in SECTION


def test_the_batch_of_the_page_becomes_two_events(sources):
    [body] = re.findall(r'^`(\{"events": .+?)` becomes', SECTION, re.MULTILINE)
    accepted = sources["mail"].receive(incoming(body.encode()))
    assert [each.type for each in accepted.events] == ["open", "click"]


def test_the_other_examples_verify_requests(sources):
    body = b'{"type": "invoice.paid", "id": "in_1"}'
    signature = hmac.digest(b"s3cret", b"1700000000." + body, "sha256").hex()
    request = incoming(body, {"Billing-Signature": f"t=1700000000,v1={signature}"}, at=1_700_000_100)
    sources["billing"].verify(request)
    assert sources["billing"].receive(request).event.key == "in_1"
    asked = "hub.mode=subscribe&hub.verify_token=s3cret&hub.challenge=42"
    assert sources["graph"].handshake(incoming(b"", method="GET", query=asked)).body == b"42"
    question = json.dumps({"type": "url_verification", "challenge": "c"}).encode()
    assert sources["graph"].receive(incoming(question)).body == b'{"challenge":"c"}'
    signed = sources["printer"].sign(incoming(b"", method="GET", query="event=empty"))
    sources["printer"].verify(signed)
    assert sources["printer"].receive(signed).event.type == "empty"
    assert not sources["calls"].is_open()


def test_the_samples_of_the_page_are_requests():
    [text] = re.findall(r"^`(samples = .+?)`", SECTION, re.MULTILINE)
    [sample] = load_table(text).samples()
    assert (sample.label, sample.header("X-Shop-Topic")) == ("paid", "order.paid")


def rewrite():
    """Write the tables of keys into the page."""
    page = FILE.read_text()
    for before, (record, without) in TABLES.items():
        start, end = place_of(page, before)
        page = page[:start] + "\n".join(rows_of(record, without)) + page[end:]
    FILE.write_text(page)


if __name__ == "__main__":
    rewrite()
