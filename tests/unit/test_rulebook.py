"""The rules that apply to a worker."""

from datetime import datetime

import pytest

from relay.base.clock import SECOND
from relay.config.maintenance import MaintenanceWindow
from relay.config.schema import WorkerOverride, WorkerRules
from relay.workers.watch import Rulebook

RULES = WorkerRules(
    offline_after=60.0,
    check_every=5.0,
    ids={"batch-*": WorkerOverride(offline_after=600.0), "*": WorkerOverride(recover_after=2)},
)
BOOK = Rulebook(WorkerRules(), {"whatsapp": RULES})


def test_the_first_matching_pattern_overrides_only_its_own_keys():
    assert BOOK.of("whatsapp", "batch-7").offline_after == 600.0
    assert BOOK.of("whatsapp", "batch-7").recover_after == 1
    assert BOOK.of("whatsapp", "worker-1").recover_after == 2
    assert BOOK.of("whatsapp", "worker-1").offline_after == 60.0


def test_an_unknown_source_has_the_default_rules():
    assert BOOK.of("gone", "batch-7") == WorkerRules()


def test_the_sweep_uses_the_shortest_interval_of_all_rules():
    assert BOOK.shortest_interval == 5.0
    ids = {"quick-*": WorkerOverride(check_every=1.0)}
    assert Rulebook(WorkerRules(), {"whatsapp": WorkerRules(ids=ids)}).shortest_interval == 1.0
    assert Rulebook(WorkerRules(), {}).shortest_interval == 10.0


def test_every_rule_can_be_overridden_for_a_pattern():
    assert set(WorkerOverride.__struct_fields__) == set(WorkerRules.__struct_fields__) - {
        "ids",
        "maintenance",
    }


def test_a_worker_has_the_planned_windows_whose_pattern_matches():
    nightly = MaintenanceWindow(ids="batch-*", start="02:00", end="04:00")
    weekly = MaintenanceWindow(days=("sun",), start="02:00", end="04:00")
    book = Rulebook(WorkerRules(), {"whatsapp": WorkerRules(maintenance=(nightly, weekly), ids=RULES.ids)})
    assert book.of("whatsapp", "batch-7").maintenance == (nightly, weekly)
    assert book.of("whatsapp", "batch-7").offline_after == 600.0
    assert book.of("whatsapp", "worker-1").maintenance == (weekly,)
    assert book.of("adorn", "batch-7").maintenance == ()


def micros(text):
    return int(datetime.fromisoformat(text).timestamp() * SECOND)


NIGHT = {"start": "22:00", "end": "06:00", "zone": "Europe/Berlin"}
SATURDAY_NIGHT = {**NIGHT, "days": ("sat",)}


@pytest.mark.parametrize(
    ("window", "now", "end"),
    [
        ({"start": "02:00", "end": "04:00"}, "2026-01-31T01:59:59+00:00", None),
        ({"start": "02:00", "end": "04:00"}, "2026-01-31T02:00:00+00:00", "2026-01-31T04:00:00+00:00"),
        ({"start": "02:00", "end": "04:00"}, "2026-01-31T04:00:00+00:00", None),
        # Over midnight: the days are those on which it begins. 2026-01-31 is a Saturday.
        (SATURDAY_NIGHT, "2026-01-31T22:30:00+01:00", "2026-02-01T06:00:00+01:00"),
        (SATURDAY_NIGHT, "2026-02-01T05:59:59+01:00", "2026-02-01T06:00:00+01:00"),
        (SATURDAY_NIGHT, "2026-02-01T06:00:00+01:00", None),
        (SATURDAY_NIGHT, "2026-02-01T22:30:00+01:00", None),
        (SATURDAY_NIGHT, "2026-01-31T05:00:00+01:00", None),
        # The zone decides the day and the time.
        (SATURDAY_NIGHT, "2026-01-31T21:30:00+00:00", "2026-02-01T05:00:00+00:00"),
        # The whole day, and midnight as its end.
        ({"start": "00:00", "end": "00:00"}, "2026-01-31T12:00:00+00:00", "2026-02-01T00:00:00+00:00"),
        # The clock goes forward at 02:00 (2026-03-29), and back at 03:00 (2026-10-25).
        (NIGHT, "2026-03-29T00:30:00+00:00", "2026-03-29T06:00:00+02:00"),
        (NIGHT, "2026-10-25T04:30:00+00:00", "2026-10-25T06:00:00+01:00"),
        (NIGHT, "2026-10-25T05:30:00+00:00", None),
        ({**NIGHT, "start": "02:30", "end": "03:30"}, "2026-03-29T01:29:00+00:00", None),
    ],
)
def test_a_window_is_open_between_its_times_in_its_zone(window, now, end):
    found = MaintenanceWindow(**window).open_until(micros(now))
    assert found == (None if end is None else micros(end))
