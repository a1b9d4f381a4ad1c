"""Parts of the dashboard's pages: bars, times, and texts in place of an empty list."""

from types import SimpleNamespace

import pytest

from relay.base.clock import SECOND
from relay.ui.markup import join
from relay.ui.parts import exact, linked, nothing, spark


def visit(**query):
    return SimpleNamespace(now=1_700_000_060 * SECOND, query=query, link=lambda *path: "/".join((".", *path)))


@pytest.mark.parametrize(
    ("values", "failed", "paths"),
    [
        ([0, 19, 38], (), ["M0 20V19h1V10h1V0h1V20"]),
        ([0, 0], (), ["M0 20V19h2V20"]),
        ([None, 1], (), ["M0 20V20h1V0h1V20"]),  # a gap is lower than a bar of zero
        ([1, 1], [0, 0], ["M0 20V0h2V20"]),
        (
            [10, 9],
            [0, 10],
            ["M0 20V9h1V0h1V20", "M0 20V9h1V10h1V20"],
        ),  # all attempts, behind those that succeeded
        ([None, 1], [None, None], ["M0 20V20h1V0h1V20"]),
    ],
)
def test_bars_have_heights_in_proportion(values, failed, paths):
    drawn = spark(values, "Attempts", failed)
    assert [each.partition('"')[0] for each in drawn.split(' d="')[1:]] == paths
    assert f'viewbox="0 0 {len(values)} 20"' in drawn
    assert drawn.count('class="bad"') == len(paths) - 1


def test_bars_name_their_largest_value_and_unknown_figures_have_none():
    assert 'aria-label="Attempts, at most 1,019"' in spark([1000, 3], "Attempts", [19, 0])
    assert spark([None, None], "Attempts") is None
    assert spark((), "Attempts") is None


def test_a_time_in_full_has_its_milliseconds_and_its_zone():
    shown = join(exact(visit(), "2023-11-14T22:13:20.123Z"))
    assert shown.startswith(
        '<time datetime="2023-11-14T22:13:20.123Z" data-exact>2023-11-14 22:13:20.123 UTC</time>'
    )
    assert ">59 s ago<" in shown


def test_ids_in_a_text_are_links():
    id_ = "evt_01a21c7b-5afe-7a23-b4e1-81dc51b1cb8f"
    assert join(linked(visit(), f"matches: {id_}, …")) == f'matches: <a href="./events/{id_}">{id_}</a>, …'
    assert join(linked(visit(), "<b>evt_0")) == "&lt;b&gt;evt_0"


@pytest.mark.parametrize(
    ("query", "more", "text"),
    [
        ({}, None, "Send one."),
        ({"limit": "5", "type": ""}, None, "Send one."),
        ({"type": "x"}, None, 'No event matches. <a href="?">Remove the filters</a>'),
        ({"type": "x"}, "abc", "No event matches on this page; there may be more."),
    ],
)
def test_an_empty_list_says_why(query, more, text):
    assert join(nothing(visit(**query), "event", more, "Send one.")) == text
