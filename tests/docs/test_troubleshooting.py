"""docs/troubleshooting.md against the commands, checks, alerts and texts that it names."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest
from commands import parse

from relay import doctor as machine
from relay.api.words import _ADVICE, held_text
from relay.delivery.destination_health import ELSEWHERE, NO_STORAGE
from relay.store.postgres import doctor as server_checks
from relay.store.sqlite import doctor as database_checks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SECTIONS = {part.split("\n", 1)[0]: part for part in PAGE.split("\n### ")[1:]}
SPANS = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
LINES = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).splitlines()
COMMANDS = sorted(
    {span for span in SPANS if span.startswith("relay ") and not span.endswith(":")}
    | {line.partition("#")[0].strip() for line in LINES if line.startswith("relay ")}
)
OTHERS = {"Start request repeated too quickly"}  # texts of systemd
PLACEHOLDERS = {"FILE": "request.http", "PATH": "relay.sock", "TIME": "now"}


def test_the_page_has_enough_symptoms_and_each_has_a_check_a_cause_and_a_cure():
    assert len(SECTIONS) >= 25
    for title, section in SECTIONS.items():
        assert re.search(r"^\* \*\*Check\*\*: .*`.+`|\* \*\*Check\*\*: the file", section, re.MULTILINE), (
            title
        )
        assert "**Cause**" in section, title
        assert "**Cure**" in section or "**cure**" in section, title


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_the_page_parses(command: str):
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:]]
    if words != ["--version"]:
        parse(words)


def test_a_command_that_does_not_exist_fails_to_parse():
    for words in (["stats", "--nonsense"], ["events", "retry", "evt_1"], ["nonsense"]):
        with pytest.raises(click.UsageError):
            parse(words)


def test_every_check_of_the_doctor_and_every_alert_on_the_page_exists():
    rules = (ROOT / "systemd" / "prometheus" / "alerts.yml").read_text()
    alerts = set(re.findall(r"alert: (\w+)", rules))
    assert set(re.findall(r"`(Relay[A-Za-z]+)`", PAGE)) <= alerts
    checks = {
        check.__name__
        for check in (*database_checks.SURROUNDINGS, *database_checks.INSIDE, *server_checks.CHECKS)
    }
    checks |= {"database", "held", "jobs", "ready", "writable", "backups", "config"}
    assert {machine.held.__name__, machine.jobs.__name__, machine.ready.__name__} <= checks
    assert set(re.findall(r"[Cc]hecks? `(\w+)`", PAGE)) <= checks


def test_every_alert_has_a_symptom_on_the_page():
    rules = (ROOT / "systemd" / "prometheus" / "alerts.yml").read_text()
    known = {"RelayDown", "RelayRejectingSource"}  # the page as a whole, and its section on senders
    assert set(re.findall(r"alert: (\w+)", rules)) - known <= set(re.findall(r"`(Relay[A-Za-z]+)`", PAGE))


def texts_of_the_program():
    """Return every text in the code of the relay, including the parts of f-strings."""
    return {
        node.value
        for folder in ("relay", "plugins")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_a_quoted_text_on_the_page_exists_in_the_program():
    texts = texts_of_the_program()
    titles = [span for title in SECTIONS for span in re.findall(r"`([^`]+)`", title)]
    titles += re.findall(r"^\| `([^`]+)` \|", SECTIONS["`GET /ready` returns 503"], re.MULTILINE)
    for quoted in titles:
        if " " not in quoted or quoted.startswith(("relay ", "GET ")) or quoted in OTHERS:
            continue
        if re.fullmatch(r"(dead|expired): \w+", quoted):
            assert quoted.partition(": ")[2] in texts, quoted
            continue
        for part in re.split(r"\s*…\s*", quoted):
            assert any(part in text for text in texts), quoted


def test_every_reason_to_hold_deliveries_on_the_page_is_one_of_the_program():
    [table] = re.findall(r"^\| `held` \|.*?\n\n", PAGE, re.DOTALL | re.MULTILINE)
    states = dict(re.findall(r"^\| `([^`]+)` \| (.*?) \|", table, re.MULTILINE))
    states.pop("held")
    assert states == {
        held: held_text(held) for held in (*_ADVICE, ELSEWHERE, NO_STORAGE) if held != "retried"
    }
