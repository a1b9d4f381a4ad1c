"""The days until the disk is full, from samples of the size of the database."""

import math
import os

import pytest

from relay.jobs.disk_forecast import DiskForecast
from relay.metrics import Metrics
from relay.store import DiskSpace

GIB = 2**30


def resize(file, size):
    file.touch()
    os.truncate(file, size)


@pytest.mark.parametrize(
    ("growth", "samples", "days"),
    [
        (0, 200, None),  # no growth
        (-1, 200, None),
        (100, 6, None),  # less than an hour
        (100, 7, GIB / (100 * 6 * 24)),
        (100, 500, GIB / (100 * 6 * 24)),
    ],
)
def test_the_days_left_follow_the_growth_of_the_last_day(tmp_path, clock, growth, samples, days):
    metrics, file = Metrics(), tmp_path / "relay.db"
    forecast = DiskForecast(clock, metrics, file)
    assert forecast.days_left is None
    space = DiskSpace(tmp_path, free=3 * GIB, floor=2 * GIB, is_full=False)
    for number in range(samples):
        resize(file, 50_000 + growth * number)
        for _ in range(2):  # every other one is too early for a sample
            forecast.note(space)
            clock.advance(300)
    value = metrics.registry.get_sample_value
    assert value("relay_disk_free_bytes") == 3 * GIB
    assert value("relay_disk_min_free_bytes") == 2 * GIB
    if days is None:
        assert forecast.days_left is None
        assert value("relay_disk_full_in_seconds") == math.inf
    else:
        assert forecast.days_left == pytest.approx(days)
        assert value("relay_disk_full_in_seconds") == pytest.approx(days * 86_400)


def test_a_change_of_pace_is_followed_within_a_day(tmp_path, clock):
    file = tmp_path / "relay.db"
    forecast = DiskForecast(clock, Metrics(), file)
    space = DiskSpace(tmp_path, free=GIB, floor=0, is_full=False)
    for number in range(300):
        resize(file, 1000 * min(number, 100))
        forecast.note(space)
        clock.advance(600)
    assert forecast.days_left is None
    full = DiskSpace(tmp_path, free=0, floor=GIB, is_full=True)
    resize(file, 200_000)
    forecast.note(full)
    assert forecast.days_left == 0


def test_a_store_without_a_file_has_no_forecast(tmp_path, clock):
    forecast = DiskForecast(clock, Metrics(), None)
    for _ in range(10):
        forecast.note(DiskSpace(tmp_path, free=GIB, floor=0, is_full=False))
        clock.advance(3600)
    assert forecast.days_left is None
