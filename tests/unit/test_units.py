"""Rates as operators write and read them."""

import pytest

from relay.base.clock import moment
from relay.base.units import parse_duration, parse_rate, parse_size, render_rate


@pytest.mark.parametrize("text", ["100/s", "1000/m", "5000/h", "50/10s", "3/90s"])
def test_a_rendered_rate_can_be_parsed(text):
    assert render_rate(parse_rate(text)) == text


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_duration, "1h 30m"),
        (parse_size, "2 MiB"),
        (parse_rate, "50/10s"),
        (lambda text: moment(text, 0), "2h"),
        (lambda text: moment(text, 0), "2026-01-31T12:00:00Z"),
    ],
)
@pytest.mark.parametrize("blank", ["\n", "\t", "\r\n", "\v", "\u00a0"])
def test_blanks_in_a_value_are_spaces_not_line_ends(parse, text, blank):
    parse(text)
    for odd in (text + blank, blank + text):
        with pytest.raises(ValueError, match="expected"):
            parse(odd)
