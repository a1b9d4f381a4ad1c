"""Rates as operators write and read them."""

import pytest

from relay.units import parse_rate, render_rate


@pytest.mark.parametrize("text", ["100/s", "1000/m", "5000/h", "50/10s", "3/90s"])
def test_a_rate_is_written_as_it_can_be_read(text):
    assert render_rate(parse_rate(text)) == text
