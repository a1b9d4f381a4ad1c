"""The token bucket as a value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.base.clock import SECOND
from relay.base.rate import TokenBucket
from relay.base.units import Rate

NOW = 1_700_000_000 * SECOND


def taken(bucket, now):
    """Take all tokens and return their number."""
    count = 0
    while not bucket.take(now):
        count += 1
    return count


@pytest.mark.parametrize(
    ("rate", "burst"),
    [
        (Rate(50, 1), 50),
        (Rate(1, 1), 1),
        (Rate(300, 60), 5),
        (Rate(90, 60), 1),  # a second's worth would be 1.5: no two at once
        (Rate(5, 3600), 1),  # a second's worth would be nothing at all
    ],
)
def test_a_full_bucket_has_tokens_for_a_second_and_at_least_one(rate, burst):
    assert taken(TokenBucket(rate, NOW), NOW) == burst


def test_the_burst_is_configurable():
    assert taken(TokenBucket(Rate(60, 60), NOW, burst=60), NOW) == 60


@pytest.mark.parametrize(
    ("rate", "seconds"), [(Rate(50, 1), 0.02), (Rate(1, 1), 1), (Rate(30, 60), 2), (Rate(1, 3600), 3600)]
)
def test_an_empty_bucket_returns_the_wait_for_the_next_token(rate, seconds):
    bucket = TokenBucket(rate, NOW)
    taken(bucket, NOW)
    assert bucket.take(NOW) == pytest.approx(seconds)
    half = NOW + int(seconds * SECOND / 2)
    assert bucket.take(half) == pytest.approx(seconds / 2)


def test_asking_for_the_wait_takes_no_token():
    bucket = TokenBucket(Rate(1, 1), NOW)
    assert [bucket.wait(NOW), bucket.wait(NOW), bucket.take(NOW)] == [0, 0, 0]
    assert bucket.wait(NOW) == bucket.wait(NOW) == pytest.approx(1)


def test_idle_time_saves_up_no_more_than_the_burst():
    bucket = TokenBucket(Rate(10, 1), NOW)
    assert taken(bucket, NOW) == 10
    assert taken(bucket, NOW + 3600 * SECOND) == 10


rates = st.builds(Rate, st.integers(1, 10_000), st.sampled_from([1, 60, 3600]))


@given(rate=rates, pauses=st.lists(st.floats(0, 100), max_size=50))
def test_no_period_has_more_than_the_burst_and_its_rate_allow(rate, pauses):
    bucket, now, times = TokenBucket(rate, NOW), NOW, []
    for pause in pauses:
        now += int(pause * SECOND)
        times += [now] * taken(bucket, now)
    burst = max(1.0, rate.count / rate.seconds)
    for first in range(0, len(times), max(1, len(times) // 20)):
        length = (times[-1] - times[first]) / SECOND
        assert len(times) - first <= burst + length * rate.count / rate.seconds + 1e-6


@given(rate=rates, idle=st.floats(0, 10_000))
def test_the_reported_wait_is_long_enough(rate, idle):
    bucket = TokenBucket(rate, NOW)
    now = NOW + int(idle * SECOND)
    taken(bucket, now)
    now += int(bucket.wait(now) * SECOND) + 1
    assert bucket.wait(now) < 1e-6


@pytest.mark.parametrize(
    ("rate", "nodes"), [(Rate(30, 60), 3), (Rate(300, 1), 2), (Rate(1, 60), 3), (Rate(7, 60), 4)]
)
def test_nodes_that_share_a_rate_allow_no_more_than_the_rate_together(rate, nodes):
    buckets = [TokenBucket(rate, NOW, burst=max(rate.count, nodes)) for _ in range(nodes)]
    at_once = sum(_bought(bucket, NOW, nodes) for bucket in buckets)
    assert at_once == max(nodes, rate.count // nodes * nodes)  # each node allows at least one
    steps = [NOW + step * rate.seconds * SECOND // 10 for step in range(1, 601)]  # 60 periods
    later = sum(_bought(bucket, now, nodes) for now in steps for bucket in buckets)
    assert 0.9 * 60 * rate.count - nodes <= later <= 60 * rate.count + max(nodes, rate.count) - at_once


def test_a_bucket_whose_price_rises_allows_requests_again():
    bucket = TokenBucket(Rate(1, 60), NOW, burst=1)
    assert bucket.take(NOW) == 0
    assert bucket.take(NOW, 3) == pytest.approx(180)
    assert bucket.take(NOW + 180 * SECOND, 3) == 0
    assert bucket.take(NOW + 240 * SECOND) == 0


def _bought(bucket, now, price):
    count = 0
    while not bucket.take(now, price):
        count += 1
    return count


@given(st.lists(st.tuples(st.floats(0, 2), st.booleans(), st.integers(0, 4)), max_size=30))
def test_shares_of_a_rate_never_allow_more_than_the_whole(steps):
    rate, now, count, quarters = Rate(40, 1), NOW, 0, [4, 0]
    buckets = [TokenBucket(rate, now) for _ in quarters]
    buckets[1].resize(rate, now, 0.0)
    for seconds, takes, moved in steps:
        now += int(seconds * SECOND)
        if takes:
            count += sum(taken(each, now) for each, part in zip(buckets, quarters, strict=True) if part)
        loser = 0 if moved < quarters[0] else 1
        quarters = [moved, 4 - moved]
        for index in (loser, 1 - loser):
            buckets[index].resize(rate, now, quarters[index] / 4)
    count += sum(taken(each, now) for each, part in zip(buckets, quarters, strict=True) if part)
    assert count <= 40 + 40 * (now - NOW) / SECOND + 1
