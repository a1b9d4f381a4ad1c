"""The pages in docs/contracts against the recorded samples and the references to them."""

import re
from pathlib import Path

import msgspec
import pytest
from samples import Sample, read_samples, sources

from relay import errors
from relay.source import Incoming

ROOT = Path(__file__).parents[2]
PAGES = {page.stem: page.read_text() for page in (ROOT / "docs" / "contracts").glob("*.md")}
SAMPLES = read_samples()
REFERENCE = re.compile(r"docs/contracts/([a-z]+)\.md#([a-z0-9-]+)(: .+)?")


def anchors(page: str) -> set[str]:
    return {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^##+ (.+)$", page, re.MULTILINE)
    }


def answers(page: str) -> set[str]:
    """Return the lines `STATUS BODY` of the page's blocks."""
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return {line for block in blocks for line in block.splitlines()}


def as_on_the_page(sample: Sample) -> str:
    """Return the answer of a sample as its page writes it: with one worker, and one event type of Moddy's."""
    body = msgspec.json.encode(sample.expect.body).decode()
    body = re.sub(r'"workerId":"[^"]*"', '"workerId":"worker-001"', body)
    body = re.sub(r"Event \w+ processed", "Event member_joined processed", body)
    return f"{sample.expect.status} {body}"


def test_every_bundled_source_has_a_page():
    assert set(PAGES) == {*sources(), "common"}


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_a_sample_names_a_section_of_its_contract(sample: Sample):
    reference = REFERENCE.fullmatch(sample.expect.why)
    assert reference, sample.expect.why
    assert reference[1] in (sample.kind, "common")
    assert reference[2] in anchors(PAGES[reference[1]])


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_the_reply_to_a_sample_is_on_the_page_of_its_contract(sample: Sample):
    assert as_on_the_page(sample) in answers(PAGES[sample.kind])


@pytest.mark.parametrize("kind", sources())
def test_a_page_shows_only_replies_that_the_relay_gives(kind: str):
    given = {as_on_the_page(sample) for sample in SAMPLES if sample.kind == kind}
    for refusal in refusals():
        reply = sources()[kind].refuse(refusal, Incoming.of("POST", "/", {}))
        given.add(f"{reply.status} {msgspec.json.encode(reply.body).decode()}")
    assert answers(PAGES[kind]) <= given


def test_the_common_page_has_every_refusal_with_its_status_code_message_and_pause():
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \| (.+?) \| ?(.*?) ?\|$", PAGES["common"], re.MULTILINE)
    assert sorted((int(status), code, text) for status, code, text, _ in rows) == sorted(
        (refusal.status, refusal.code, refusal.message) for refusal in refusals()
    )
    pauses = {text: int(pause) for _, _, text, pause in rows if pause.isdigit()}
    assert pauses == {refusal.message: refusal.retry_after for refusal in refusals() if refusal.retry_after}


def test_comments_that_name_a_contract_lead_to_a_section():
    folders = ("relay", "plugins", "tests", "bench")
    text = "".join(file.read_text() for folder in folders for file in (ROOT / folder).rglob("*.py"))
    found = re.findall(r"docs/contracts/([a-z]+)\.md#([a-z0-9-]+)", text)
    assert found
    for name, anchor in found:
        assert anchor in anchors(PAGES[name]), f"{name}.md#{anchor}"


def refusals() -> list[errors.Refusal]:
    """Build every refusal of a sender's request that the relay itself raises."""
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type)]
    others = (errors.Refusal, errors.Unavailable, errors.AlreadyRetried)  # the last one is for operators
    return [cls() for cls in classes if issubclass(cls, errors.Refusal) and cls not in others]
