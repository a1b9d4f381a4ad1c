"""Headers of a reply are fields of one line each, and none that frames the answer."""

import pytest

from relay.ingest.replies import Response, allow_origin, render
from relay.source import Reply


@pytest.mark.parametrize(
    "name", ["X\r\nSet-Cookie", "X:", "X Y", "", "\u00e9", "connection", "Content-Length"]
)
def test_a_header_name_that_is_invalid_or_changes_the_framing_is_refused(name):
    with pytest.raises(ValueError, match="may not have a header"):
        render(Reply(headers={name: "x"}))


@pytest.mark.parametrize("value", ["a\r\nB: c", "a\n", "\0", "\x7f", "\udcff"])
def test_a_header_value_with_line_ends_or_invalid_utf_8_is_refused(value):
    with pytest.raises(ValueError, match="X-More must not contain line breaks"):
        render(Reply(headers={"X-More": value}))


def test_any_other_header_value_is_accepted():
    assert render(Reply(headers={"X-More": "a\tb \u00e9 \u2713"})).headers["x-more"] == "a\tb \u00e9 \u2713"


@pytest.mark.parametrize(("origin", "echoed"), [("https://a.example", True), ("https://a\udcff", False)])
def test_an_origin_is_echoed_only_if_it_is_text(origin, echoed):
    """Otherwise, a sender's odd bytes would make its answer fail after its event is stored."""
    response = Response(200, b"{}")
    allow_origin(("*",), origin, response)
    assert ("Access-Control-Allow-Origin" in response.headers) is echoed
