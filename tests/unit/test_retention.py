"""How long an event is kept, by its source and type."""

import pytest

from relay.base.clock import SECOND
from relay.config.schema import Retention, SourceRetention
from relay.store.retention_policy import Keep, Policy

HOUR, DAY = 3600 * SECOND, 86_400 * SECOND
RULES = {
    "whatsapp": SourceRetention(
        events=7 * 86_400.0, types={"qr_ready": 3600.0, "session.*": 86_400.0, "session.lost": 1.0}
    ),
    "shop": SourceRetention(types={"audit.*": 400 * 86_400.0}),
    "quiet": SourceRetention(events=60.0),
}


@pytest.fixture
def policy():
    return Policy(Retention(), RULES)


@pytest.mark.parametrize(
    ("source", "full_type", "keep"),
    [
        ("lazychat", "lazychat.order", Keep(14 * DAY, 30 * DAY)),
        ("relay", "relay.delivery.dead", Keep(14 * DAY, 30 * DAY)),
        ("whatsapp", "whatsapp.message", Keep(7 * DAY, 30 * DAY)),
        ("whatsapp", "whatsapp.qr_ready", Keep(HOUR, HOUR)),
        ("whatsapp", "whatsapp.session.lost", Keep(DAY, DAY)),
        ("whatsapp", "whatsapp.qr_ready.not", Keep(7 * DAY, 30 * DAY)),
        ("shop", "shop.audit.login", Keep(400 * DAY, 400 * DAY)),
        ("shop", "shop.order", Keep(14 * DAY, 30 * DAY)),
        ("quiet", "quiet.anything", Keep(60 * SECOND, 30 * DAY)),
    ],
)
def test_a_type_s_rule_overrides_its_source_s_and_the_first_match_counts(policy, source, full_type, keep):
    assert policy.of(source, full_type) == keep


def test_only_sources_with_own_rules_are_queried_separately(policy):
    assert set(policy.sources) == {"whatsapp", "quiet"}
    assert set(policy.by_type) == {"whatsapp", "shop"}


def test_retention_in_seconds_is_applied_in_microseconds():
    policy = Policy(Retention(events=1.5, dead=2.0, held=3.0, attempts=4.0, stats=5.0))
    assert policy.default == Keep(1_500_000, 2_000_000)
    assert (policy.held, policy.attempts, policy.stats) == (3_000_000, 4_000_000, 5_000_000)
