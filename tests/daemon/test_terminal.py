"""When output has colour; and text of a sender never reaches a terminal as escape sequences."""

import io

import pytest
from commands import Terminal
from daemons import SOURCES, adorn, destination, running, write_config
from wire import request

from relay.base.text import paint, printable, wants_colour
from relay.cli import output
from relay.cli.output import print_fields, print_table


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environ", "terminal", "piped"),
    [
        ({}, True, False),
        ({"TERM": "xterm"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colour_is_for_terminals_unless_the_environment_decides(monkeypatch, environ, terminal, piped):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert (wants_colour(Screen()), wants_colour(io.StringIO())) == (terminal, piped)


def shown(monkeypatch, screen, *table):
    monkeypatch.setattr("sys.stdout", screen)
    print_table(*table)
    return screen.getvalue()


def test_a_table_colours_states_and_stays_aligned(monkeypatch):
    rows = [("a", "dead", ""), ("b", "delivered", "paused")]
    assert shown(monkeypatch, Screen(), ("id", "state", "held"), rows) == (
        "ID  STATE      HELD\n"
        f"a   {paint('dead', 'red')}\n"
        f"b   {paint('delivered', 'green')}  {paint('paused', 'yellow')}\n"
    )


@pytest.mark.parametrize("environ", [{}, {"TERM": "xterm"}])
def test_a_piped_table_has_no_colour(monkeypatch, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert shown(monkeypatch, io.StringIO(), ("id", "state"), [("a", "dead")]) == "a\tdead\n"


def test_a_piped_table_has_colour_where_it_is_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = shown(monkeypatch, io.StringIO(), ("id", "state"), [("a", "dead")])
    assert text == f"a\t{paint('dead', 'red')}\n"


@pytest.mark.parametrize("text", ["one\ntwo", "\x1b[2J", "\x9b31m", "\u2028", "\r", "\x00", "\ud800"])
def test_unprintable_text_is_written_as_escapes(text):
    assert printable(text).isprintable()
    assert printable(f"é {text} 漢") == f"é {printable(text)} 漢"


@pytest.mark.parametrize("screen", [Screen, io.StringIO])
def test_a_sender_cannot_send_escape_sequences_to_the_terminal(monkeypatch, screen):
    text = shown(monkeypatch, screen(), ("id", "subject"), [("a", "\x1b[31mred\x07")])
    assert "\x1b" not in text
    assert "\\x1b[31mred\\x07" in text
    shows = screen()
    monkeypatch.setattr("sys.stdout", shows)
    print_fields({"subject": "\x1b]0;title\x07"})
    assert "\x1b" not in shows.getvalue()


def test_every_state_with_a_colour_exists():
    for heading, cell in (
        ("state", "dead"),
        ("held", "disabled: gone"),
        ("result", "5xx"),
        ("paused", "yes"),
    ):
        assert "\x1b[" in paint(cell, output.colour_of(heading, cell))


@pytest.mark.parametrize(
    ("environ", "colours"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
async def test_lists_and_status_have_colour_on_a_terminal(tmp_path, environ, colours):
    config = write_config(tmp_path, SOURCES, destination("crm", "http://127.0.0.1:9/", "max_pending = 1"))
    async with running(config) as relay:
        await relay.operator("POST", "/api/destinations/crm/pause")
        for _ in range(2):
            await relay.exchange(request("POST", "/v1/events", adorn()))
        screens = {}
        for command in (("deliveries", "list"), ("destinations", "list"), ("status",)):
            where = ("--socket", relay.addresses.socket)
            async with Terminal(*command, *where, **environ) as terminal:
                assert await terminal.exit() == 0
            screens[command[0]] = terminal.out
    assert ("\x1b[31mdead\x1b[0m" in screens["deliveries"]) is colours
    assert ("\x1b[33mpaused\x1b[0m" in screens["destinations"]) is colours
    assert ("\x1b[32mready\x1b[0m" in screens["status"]) is colours
    assert all("\x1b" not in text for text in screens.values()) is not colours
