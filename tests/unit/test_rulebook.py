"""Which rules hold for a worker."""

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
    assert set(WorkerOverride.__struct_fields__) == set(WorkerRules.__struct_fields__) - {"ids"}
