"""Times as operators write them."""

import pytest

from relay.base.clock import SECOND, instant, moment, rfc3339

NOW = 1_700_000_000 * SECOND


@pytest.mark.parametrize(
    ("text", "ago"),
    [
        ("2h", 7200),
        ("1h30m", 5400),
        ("14d", 14 * 86_400),
        ("2023-11-14T22:13:20Z", 0),
        ("2023-11-14T23:13:20+01:00", 0),
        ("2023-11-14T22:13:10.5Z", 9.5),
        ("2023-11-15T00:13:20Z", -7200),
    ],
)
def test_a_time_argument_is_a_duration_ago_or_a_time_with_a_zone(text, ago):
    assert moment(text, NOW) == NOW - int(ago * SECOND)


@pytest.mark.parametrize("text", ["", "yesterday", "2", "2023-11-14T22:13:20", "2023-11-14", "-2h"])
def test_an_invalid_time_argument_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r'such as "2026-01-31T12:00:00Z"|append Z for UTC'):
        moment(text, NOW)


def test_rendered_times_can_be_parsed_to_the_millisecond():
    assert moment(rfc3339(NOW + 123_456), 0) == NOW + 123_000


@pytest.mark.parametrize(
    "text",
    ["2023-11-14T22:13:20Z", "2023-11-14T22:13:20.000Z", "2023-11-15T00:13:20+02:00",
     "2023-11-14 22:13:20+00:00", 1_700_000_000, 1_700_000_000.0, "1700000000", 1_700_000_000_000,
     "1700000000000"],
)  # fmt: skip
def test_every_time_format_of_senders_is_parsed(text):
    assert instant(text) == 1_700_000_000_000_000


@pytest.mark.parametrize(
    "text",
    ["", "soon", "2h", "2023-11-14T22:13:20", "2023-11-14", "2023-13-45T00:00:00Z", "9" * 400, 10**400, 1e300,
     -1, 0, None, [], {}, float("nan"), float("inf")],
)  # fmt: skip
def test_an_invalid_time_of_a_sender_is_none(text):
    assert instant(text) is None
