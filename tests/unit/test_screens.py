"""Screens: the golden files, the answers that they are made of, and tables that fit the terminal."""

import io
import json
import re
from datetime import datetime
from importlib import import_module

import msgspec
import pytest
from commands import LEAVES

import relay
from relay.api.app import RESOURCES
from relay.api.endpoints import endpoints_of
from relay.api.tail import TailAttempt, TailEvent
from relay.api.top import Top
from relay.base.text import paint
from relay.cli import destinations, screen, tail, top
from relay.cli.screen import Column, cut, table, text, width_of, wrap
from relay.ui import now
from tests.golden import screens

DRAWN = [(name, width) for name in (*screens.SCREENS, *screens.FRAMES) for width in screens.WIDTHS]


@pytest.mark.parametrize(("name", "width"), DRAWN)
def test_a_screen_equals_its_file_and_fits_the_terminal(name, width):
    drawn = screens.draw_any(name, width)
    assert drawn == screens.file_of(name, width).read_text(), "run `python -m tests.golden`"
    fits = drawn.partition("\nPayload\n")[0]
    assert max(map(width_of, fits.splitlines())) <= width


def test_every_file_has_a_screen():
    assert {file.name for file in screens.FOLDER.iterdir()} == {screens.file_of(*each).name for each in DRAWN}


ENDPOINTS = [
    each for resource in RESOURCES for each in endpoints_of(resource).values() if each.method == "GET"
]


def test_every_command_that_lists_or_shows_has_a_screen():
    drawn = [words.split() for words in screens.SCREENS.values()]
    local = {("config", "show"), ("plugins", "list")}  # they do not ask the daemon
    for path in LEAVES:
        if path[-1] in ("list", "show") and path not in local:
            assert any(tuple(words[:2]) == path for words in drawn), path


@pytest.mark.parametrize(("words", "expected"), [("events list", "no events\n"), ("stats", "no rows\n")])
def test_an_empty_list_prints_that(monkeypatch, words, expected):
    monkeypatch.setitem(screens.ANSWERS, words.split()[0], screens.page())
    assert screens.draw(words, 80) == expected


def test_a_daemon_of_another_version_is_named_if_its_response_is_not_understood(monkeypatch):
    monkeypatch.setitem(screens.ANSWERS, "destinations", screens.page({"name": "crm"}))
    message, hint = screens.draw("destinations list", 80).splitlines()
    assert message.startswith(f"the daemon is hookferry 1.4.0, this command is {relay.__version__}: ")
    assert "restart the daemon after an upgrade" in hint
    monkeypatch.setitem(screens.ANSWERS["status"], "version", relay.__version__)
    with pytest.raises(KeyError):
        screens.draw("destinations list", 80)


@pytest.mark.parametrize(
    ("held", "until", "shown"),
    [
        ("paused", 3600, "crm: paused until 2026-01-31 14:00:00 CET (in 1h)\n"),
        ("disabled: operator", None, "crm: disabled (by an operator)\n"),
        (None, None, "crm: delivering\n"),
    ],
)
def test_a_change_of_a_destination_is_confirmed_in_the_reader_s_words_and_zone(held, until, shown):
    answer = {"held": held, "paused_until": until and screens.at(until)}
    with screens.fixed(80) as terminal:
        destinations._print_state(answer, "crm")
    assert terminal.getvalue() == shown


def declared(path):
    """Return the type that the API declares for an answer to GET."""
    for each in sorted(ENDPOINTS, key=lambda each: each.path.count("{")):
        pattern = re.sub(r"{\w+(:[^{}]*)?}", "[^/]+", each.path)
        if re.fullmatch(pattern, f"/api/{path}"):
            return each.answers[200]
    raise AssertionError(path)


@pytest.mark.parametrize("path", screens.ANSWERS)
def test_the_answers_of_the_screens_have_the_types_of_the_api(path):
    answer = screens.ANSWERS[path]
    assert json.loads(msgspec.json.encode(msgspec.convert(answer, declared(path)))) == answer


def test_the_streams_of_the_screens_have_the_types_of_the_api():
    kinds = {"event": TailEvent, "attempt": TailAttempt}
    for what, item in screens.STREAMS["tail"]:
        assert json.loads(msgspec.json.encode(msgspec.convert(item, kinds[what]))) == item
    for snapshot in (screens.top_snapshot(7), screens.cluster_snapshot(7)):
        assert json.loads(msgspec.json.encode(msgspec.convert(snapshot, Top))) == snapshot


@pytest.mark.parametrize(
    ("nodes", "lines"),
    [
        ([], []),
        ([("two", True, True, ())], ["Nodes 2"]),  # by an older daemon
        (
            [
                ("two", False, None, (), False),
                ("three", True, False, ("draining",), False),
                ("four", True, True, (), False),
                ("five", False, None, (), True),
            ],
            [
                "Nodes 5   two does not answer, so its figures are missing",
                "          three is not ready: draining",
                "          five runs another version, so its figures are missing",
            ],
        ),
    ],
)
def test_the_screen_of_top_names_nodes_whose_figures_are_missing(nodes, lines):
    names = ("name", "answers", "ready", "reasons", "unable")
    snapshot = screens.top_snapshot(7) | {"nodes": [dict(zip(names, node, strict=False)) for node in nodes]}
    found = top.lines(snapshot)
    first = next((at for at, each in enumerate(found) if each.startswith("Nodes")), len(found))
    assert found[first : first + max(1, len(lines))] == lines


@pytest.mark.parametrize(
    ("item", "line"),
    [
        ({"nodes": ["two", "three"]}, "no answer from two, three: their events and attempts are missing\n"),
        (
            {"nodes": ["two"], "unable": ["three"]},
            "no answer from two; another version runs on three: their events and attempts are missing\n",
        ),
        ({"nodes": [], "unable": []}, "all nodes answer again\n"),
    ],
)
def test_tail_names_nodes_whose_items_are_missing(capsys, item, line):
    tail._show("silent", item, tail.ShortIds(), as_json=False)
    assert capsys.readouterr() == ("", line)


def test_the_page_now_names_nodes_whose_figures_are_missing():
    assert now._missing({"silent": [], "unable": []}) == []
    [silent, unable] = now._missing({"silent": ["eu-2", "<x>"], "unable": ["eu-3"]})
    assert "No answer from eu-2, &lt;x&gt;: the figures do not include" in silent
    assert "Another version runs on eu-3: the figures do not include" in unable


@pytest.mark.parametrize(
    ("environ", "colours"),
    [({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": "", "TERM": "dumb"}, False)],
)
def test_dead_deliveries_are_red(environ, colours):
    drawn = screens.draw("deliveries list", 80, **{"TERM": "xterm", "FORCE_COLOR": "", **environ})
    assert (paint("dead", "red") in drawn) is colours
    assert ("\x1b" in drawn) is colours


@pytest.mark.parametrize(("words", "shown"), [("stats", "13:00:00 "), ("stats --utc", "12:00:00Z ")])
def test_times_are_local_unless_utc_is_given(words, shown):
    assert f"\n{shown}" in screens.draw(words, 80)


@pytest.mark.parametrize(
    ("others", "shown"),
    [
        ([], "12:59:59"),
        (["2026-01-31T10:00:00.000Z", None], "12:59:59"),
        (["2026-01-30T10:00:00.000Z"], "Jan 31 12:59:59"),
        (["2025-12-31T10:00:00.000Z"], "2026-01-31 12:59:59"),
    ],
)
def test_times_of_a_column_have_a_date_unless_all_are_of_today(others, shown):
    with screens.fixed(80):
        assert screen.clock_times([screens.at(-1), *others])[0] == shown


def test_a_piped_row_has_whole_ids_and_times_in_utc(capsys, monkeypatch):
    monkeypatch.setattr(screens.endpoint, "daemon_at", lambda *_: screens.Canned())
    screens.main.main(["events", "list"], "relay", standalone_mode=False)
    first = capsys.readouterr().out.splitlines()[0].split("\t")
    item = screens.ANSWERS["events"]["items"][0]
    assert first[:4] == [item["id"], item["received_at"], item["type"], item["subject"]]
    assert datetime.fromisoformat(first[1]).utcoffset().total_seconds() == 0


def shape(*columns):
    return [Column(name, name, screen.each(str), **more) for name, more in columns]


ITEM = {"a": "aaaaaaaa", "b": "bbbbbbbbbbbbbbbb", "c": "", "d": "dddd"}


@pytest.mark.parametrize(
    ("width", "headings", "row"),
    [
        (80, "A         B                 C  D", "aaaaaaaa  bbbbbbbbbbbbbbbb     dddd"),
        (30, "A         B            C  D", "aaaaaaaa  bbbbbbbbbb…     dddd"),
        (24, "A         B        D", "aaaaaaaa  bbbbbbb…  dddd"),
        (20, "A         B", "aaaaaaaa  bbbbbbbbb…"),
        (4, "A", "aaaa"),
    ],
)
def test_a_table_that_is_too_wide_cuts_texts_and_then_loses_columns(width, headings, row):
    columns = shape(
        ("a", {}), ("b", {"least": 6, "rank": 3 if width == 4 else 0}), ("c", {"rank": 1}), ("d", {"rank": 2})
    )
    lines = table(columns, [ITEM], width=width, colour=False)
    assert [" ".join(line.split()) for line in lines[:1]] == [" ".join(headings.split())]
    assert lines[1] == row
    assert max(map(len, lines)) <= width


def test_numbers_are_aligned_on_the_right_and_wide_characters_count_twice():
    columns = [text("name"), screen.number("n")]
    lines = table(columns, [{"name": "漢字", "n": 7}, {"name": "a", "n": 1204}], width=80, colour=False)
    assert lines == ["NAME      N", "漢字      7", "a     1 204"]


def test_a_long_text_in_the_last_column_continues_on_the_next_line():
    columns = [text("name"), text("why", long="wrap")]
    items = [{"name": "a", "why": "the address is refused"}, {"name": "b", "why": "ok"}]
    assert table(columns, items, width=16, colour=False) == [
        "NAME  WHY", "a     the", "      address is", "      refused", "b     ok",
    ]  # fmt: skip


def test_colours_do_not_move_columns():
    columns = [screen.word("state"), screen.number("n")]
    items = [{"state": "dead", "n": 1}, {"state": "delivered", "n": 2}]
    plain = table(columns, items, width=80, colour=False)
    painted = table(columns, items, width=80, colour=True)
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in painted] == plain


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("sample", ["漢字漢字漢字", "a漢b字c", "abcdefghij", "e\u0301e\u0301"])
def test_texts_never_exceed_their_width(sample, width):
    assert width_of(cut(sample, width)) <= width
    assert width_of(cut(sample, width, "middle")) <= width
    room = max(width, 2)  # of a wide character
    assert all(width_of(line) <= room for line in wrap(sample, room))
    assert "".join(wrap(sample, room)) == sample


@pytest.mark.parametrize("payload", ["nothing", "{", "[" * 100_000, "", '{"a": 1} x'])
def test_a_payload_that_is_not_json_is_shown_unchanged(payload):
    assert "".join(line.strip() for line in screen.payload_lines(payload, 5)) == payload


def test_a_terminal_without_utf_8_shows_escapes(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", stream)
    import_module("relay.cli.main")._open_standard_streams()
    stream.write("é …")
    stream.flush()
    assert stream.buffer.getvalue() == b"\xe9 \\u2026"
