"""Which rules hold for a worker."""

from relay.config.model import WorkerOverride, WorkerRules
from relay.workers import Rulebook

RULES = WorkerRules(
    offline_after=60.0,
    check_every=5.0,
    ids={"batch-*": WorkerOverride(offline_after=600.0), "*": WorkerOverride(recover_after=2)},
)
BOOK = Rulebook(WorkerRules(), {"whatsapp": RULES})


def test_the_first_pattern_that_fits_decides_and_changes_only_what_it_says():
    assert BOOK.of("whatsapp", "batch-7").offline_after == 600.0
    assert BOOK.of("whatsapp", "batch-7").recover_after == 1
    assert BOOK.of("whatsapp", "worker-1").recover_after == 2
    assert BOOK.of("whatsapp", "worker-1").offline_after == 60.0


def test_an_unknown_source_has_the_general_rules():
    assert BOOK.of("gone", "batch-7") == WorkerRules()


def test_the_sweep_is_as_frequent_as_the_most_impatient_source_needs():
    assert BOOK.shortest_interval == 5.0
