from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.base.clock import SECOND
from relay.config.schema import RetryConfig
from relay.delivery.http.result import of_status
from relay.delivery.retry import RetryPolicy, Verdict, parse_retry_after, verdict_of

NOW = 1_700_000_000 * SECOND  # Tue, 14 Nov 2023 22:13:20 GMT
DEFAULT = RetryPolicy.of(RetryConfig())

policies = st.builds(
    RetryPolicy,
    schedule=st.lists(st.floats(0, 100_000), max_size=12).map(tuple),
    jitter=st.floats(0, 1),
    max_retry_after=st.floats(0, 10_000),
)
hints = st.none() | st.floats(0, 1e9)
rands = st.floats(0, 1, exclude_max=True)


def judge(status, result="", headers=None):
    return verdict_of(
        status,
        result or (of_status(status) if status is not None else "connect"),
        headers or {},
        now=NOW,
        max_retry_after=3600.0,
    )


def test_the_default_schedule_is_eleven_attempts_over_three_days():
    delays = []
    while (delay := DEFAULT.next_delay(len(delays) + 1, None, 0.0)) is not None:
        delays.append(delay)
    assert delays == [5, 30, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400]
    assert sum(delays) / 3600 == pytest.approx(75.6, abs=0.05)


@pytest.mark.parametrize(
    ("done", "hint", "rand", "delay"),
    [
        (1, None, 0.0, 5.0),
        (1, None, 0.5, 5.25),
        (0, None, 0.0, 5.0),  # a failed probe is not counted
        (1, 0.0, 0.0, 5.0),
        (1, 3.0, 0.0, 5.0),  # the schedule is longer
        (1, 60.0, 0.0, 60.0),
        (1, 60.0, 0.5, 63.0),
        (1, 999_999_999.0, 0.0, 3600.0),  # the hint is capped …
        (10, 999_999_999.0, 0.0, 86_400.0),  # … and never shortens the schedule
        (11, None, 0.0, None),
        (11, 60.0, 0.0, None),
        (99, None, 0.0, None),
    ],
)
def test_a_delay_is_the_scheduled_one_or_a_capped_hint_plus_jitter(done, hint, rand, delay):
    got = DEFAULT.next_delay(done, hint, rand)
    assert got == (None if delay is None else pytest.approx(delay))


def test_an_empty_schedule_means_a_single_attempt():
    once = RetryPolicy(schedule=(), jitter=0.1, max_retry_after=60.0)
    assert once.next_delay(1, 30.0, 0.0) is None


@given(policy=policies, done=st.integers(0, 15), hint=hints, rand=rands)
def test_jitter_is_only_added_and_never_more_than_its_share(policy, done, hint, rand):
    delay, bare = policy.next_delay(done, hint, rand), policy.next_delay(done, hint, 0.0)
    if bare is None:
        assert delay is None
    else:
        assert delay is not None
        assert bare <= delay <= bare * (1 + policy.jitter)


@given(policy=policies, done=st.integers(1, 15), hint=hints, rand=rands)
def test_a_hint_neither_shortens_a_delay_nor_lengthens_it_beyond_its_cap(policy, done, hint, rand):
    hinted, plain = policy.next_delay(done, hint, rand), policy.next_delay(done, None, rand)
    assert (hinted is None) == (plain is None) == (done > len(policy.schedule))
    if hinted is not None and plain is not None:
        assert plain <= hinted <= max(plain, policy.max_retry_after * (1 + policy.jitter))


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("007", 7.0),
        ("999999999", 999_999_999.0),
        ("9999999999", None),
        ("", None),
        ("-1", None),
        ("+1", None),
        ("1.5", None),
        ("1_0", None),
        ("1e3", None),
        ("0x10", None),
        ("١٢٠", None),
        ("²", None),
        ("120\n", None),
        (" 120", None),
        ("soon", None),
        ("\ud800", None),
        ("9" * 100_000, None),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 60.0),
        ("Tue, 14 Nov 2023 22:13:20 GMT", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Tue, 14 Nov 2023 22:14:20", None),
        ("Tue, 14 Nov 2023 22:14:20 +0000", None),
        ("Tue, 14 Nov 2023 22:14:20 EST", None),
        ("Tue, 14 Nov 2023 22:14:20 GMT\n", None),
        ("Tuesday, 14-Nov-23 22:14:20 GMT", 60.0),
        ("Wednesday, 15-Nov-23 22:13:20 GMT", 86_400.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0.0),
        ("Tuesday, 14-Nov-73 22:13:20 GMT", 1_577_923_200.0),  # 50 years ahead
        ("Wednesday, 14-Nov-74 22:13:20 GMT", 0.0),  # more than 50: it is 1974
        ("Tuesday, 14-Nov-23 22:14:20", None),
        ("Tuesday, 14-Nov-2023 22:14:20 GMT", None),
        ("Tuesday, 31-Feb-23 22:14:20 GMT", None),
        ("Tue Nov 14 22:14:20 2023", 60.0),
        ("Sun Dec  3 22:13:20 2023", 1_641_600.0),
        ("Sun Nov  6 08:49:37 1994", 0.0),
        ("Tue Nov 14 22:14:20 2023 GMT", None),
        ("Tue Nov 14 22:14:20 23", None),
        ("Tue Nov    22:14:20 2023", None),
        ("2023-11-14T22:14:20Z", None),
        ("tue, 14 nov 2023 22:14:20 gmt", None),
        ("Tue, 14 Foo 2023 22:14:20 GMT", None),
        ("Tue, 31 Feb 2023 22:14:20 GMT", None),
        ("Tue, 14 Nov 0000 22:14:20 GMT", None),
        ("Tue, 14 Nov 2023 24:14:20 GMT", None),
        ("Tue, 14 Nov 2023 22:14:20 GMT".replace("4", "٤"), None),
    ],
)
def test_retry_after_accepts_whole_seconds_and_the_three_http_dates(value, seconds):
    assert parse_retry_after(value, NOW) == seconds


@given(st.text())
def test_no_text_in_retry_after_raises_or_gives_a_negative_wait(value):
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or seconds >= 0


@given(st.integers(0, 4_000_000_000))
def test_every_date_the_standard_library_writes_is_read_back(at):
    assert parse_retry_after(formatdate(at, usegmt=True), NOW) == max(0, at - NOW // SECOND)


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (200, "ok"), (204, "ok"), (299, "ok"), (300, "3xx"), (304, "3xx"), (400, "4xx"), (410, "4xx"),
        (428, "4xx"), (429, "429"), (430, "4xx"), (499, "4xx"), (500, "5xx"), (503, "5xx"), (599, "5xx"),
        (100, "protocol"), (101, "protocol"), (600, "protocol"), (999, "protocol"), (0, "protocol"),
    ],
)  # fmt: skip
def test_every_status_has_a_label(status, name):
    assert of_status(status) == name


FINAL = Verdict(kind="abort", reason="final_status")


@pytest.mark.parametrize(
    ("status", "result", "headers", "meaning"),
    [
        (400, "4xx", {}, FINAL),
        (302, "3xx", {}, FINAL),
        (503, "5xx", {"retry-after": "60"}, Verdict(kind="abort", reason="final_status", pause=60.0)),
        (400, "4xx", {"webhook-delivery": "disable"}, Verdict(kind="disable", reason="asked")),
        (400, "4xx", {"webhook-delivery": "abort-message"}, Verdict(kind="abort", reason="aborted")),
        (404, "4xx", {}, Verdict(kind="retry")),
        (410, "4xx", {}, Verdict(kind="disable", reason="gone")),
        (200, "ok", {}, Verdict(kind="ok")),
        (None, "timeout", {}, Verdict(kind="retry")),
    ],
)
def test_a_destination_s_final_statuses_end_a_delivery(status, result, headers, meaning):
    final = (200, 302, 400, 410, 503)  # 2xx and 410 keep their meaning
    assert (
        verdict_of(status, result, headers, now=NOW, max_retry_after=3600.0, final_statuses=final) == meaning
    )


OK = Verdict(kind="ok")
RETRY = Verdict(kind="retry")
GONE = Verdict(kind="disable", reason="gone")
ASKED = Verdict(kind="disable", reason="asked")
ABORTED = Verdict(kind="abort", reason="aborted")
HELD = Verdict(kind="hold", reason="blocked")


@pytest.mark.parametrize(
    ("status", "result", "headers", "meaning"),
    [
        (200, "ok", {}, OK),
        (204, "ok", {"webhook-delivery": "disable", "retry-after": "60"}, OK),
        (301, "3xx", {"location": "http://169.254.169.254/"}, RETRY),
        (400, "4xx", {}, RETRY),
        (401, "4xx", {}, RETRY),
        (404, "4xx", {}, RETRY),
        (410, "4xx", {}, GONE),
        (410, "4xx", {"webhook-delivery": "abort-message"}, GONE),
        (500, "5xx", {}, RETRY),
        (999, "protocol", {}, RETRY),
        (400, "4xx", {"webhook-delivery": "abort-message"}, ABORTED),
        (500, "5xx", {"webhook-delivery": " Abort-Message "}, ABORTED),
        (500, "5xx", {"webhook-delivery": "disable"}, ASKED),
        (500, "5xx", {"webhook-delivery": "disabled"}, RETRY),
        (500, "5xx", {"webhook-delivery": "\ud800"}, RETRY),
        (500, "5xx", {"retry-after": "60"}, Verdict(kind="retry", hint=60.0)),
        (404, "4xx", {"retry-after": "60"}, Verdict(kind="retry", hint=60.0)),
        (429, "429", {}, RETRY),
        (429, "429", {"retry-after": "60"}, Verdict(kind="retry", hint=60.0, pause=60.0)),
        (503, "5xx", {"retry-after": "60"}, Verdict(kind="retry", hint=60.0, pause=60.0)),
        (503, "5xx", {"retry-after": "7200"}, Verdict(kind="retry", hint=7200.0, pause=3600.0)),
        (503, "5xx", {"retry-after": "0"}, Verdict(kind="retry", hint=0.0)),
        (503, "5xx", {"retry-after": "1_0"}, RETRY),
        (503, "5xx", {"retry-after": "Tue, 14 Nov 2023 22:14:20 GMT"},
         Verdict(kind="retry", hint=60.0, pause=60.0)),
        (503, "5xx", {"retry-after": "60", "webhook-delivery": "abort-message"},
         Verdict(kind="abort", reason="aborted", pause=60.0)),
        (None, "connect", {}, RETRY),
        (None, "tls", {}, RETRY),
        (None, "dns", {}, RETRY),
        (None, "timeout", {}, RETRY),
        (None, "protocol", {}, RETRY),
        (None, "blocked", {}, HELD),
    ],
)  # fmt: skip
def test_the_table_of_verdicts_is_complete(status, result, headers, meaning):
    assert judge(status, result, headers) == meaning


@given(status=st.integers(0, 999), headers=st.dictionaries(st.text(), st.text()))
def test_only_a_2xx_is_a_success_and_only_a_410_is_gone(status, headers):
    meaning = judge(status, headers=headers)
    assert (meaning.kind == "ok") == (200 <= status <= 299)
    assert (meaning.reason == "gone") == (status == 410)


@given(status=st.integers(200, 599), after=st.text() | st.integers().map(str))
def test_a_destination_rests_only_after_429_or_503_and_never_beyond_the_cap(status, after):
    meaning = judge(status, headers={"retry-after": after})
    if meaning.pause is not None:
        assert status in (429, 503)
        assert 0 < meaning.pause <= 3600
