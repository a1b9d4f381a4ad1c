import json
from fnmatch import fnmatchcase

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import make_event

import relay.routing.envelope
import relay.routing.router
from relay.model import Target
from relay.routing.conditions import Mismatch
from relay.routing.envelope import EnvelopeView
from relay.routing.router import Router
from relay.routing.subscription import Explanation, Patterns, Subscription, SubscriptionOptions


def event(type_="adorn.attire.sold", data=b'{"total":45000.00}', subject="s-1"):
    return make_event(type=type_, data=data, subject=subject)


@pytest.mark.parametrize(
    ("patterns", "full_type", "matches"),
    [
        (("*",), "moddy.member_joined", True),
        (("moddy.*",), "moddy.member_joined", True),
        (("moddy.*",), "moddy", False),
        (("moddy.*",), "adorn.moddy.x", False),
        (("lazychat.*",), "lazychat.plugin.updated", True),  # * crosses dots
        (("*.updated",), "lazychat.plugin.updated", True),
        (("moddy.member_?oined",), "moddy.member_joined", True),
        (("moddy.[!x]*",), "moddy.member_joined", True),
        (("Moddy.*",), "moddy.member_joined", False),  # case counts
        (("adorn.*", "moddy.*"), "moddy.member_joined", True),
        (("adorn.*", "!adorn.attire.*"), "adorn.attire.sold", False),
        (("!adorn.attire.*", "adorn.*"), "adorn.attire.sold", False),  # in any order
        (("adorn.*", "!adorn.attire.*", "adorn.attire.sold"), "adorn.attire.sold", False),
        (("adorn.*", "!adorn.attire.*"), "adorn.session", True),
        (("*",), "relay.delivery.dead", False),
        (("r*",), "relay.delivery.dead", False),
        (("[r]elay.*",), "relay.delivery.dead", False),
        (("relay*",), "relay.delivery.dead", False),
        (("relay.*",), "relay.delivery.dead", True),
        (("*", "relay.delivery.*"), "relay.delivery.dead", True),
        (("relay.*", "!*.dead"), "relay.delivery.dead", False),
        (("relay.*", "!*"), "relay.delivery.dead", False),
        (("*",), "relayed.x", True),
        ((), "moddy.member_joined", False),
    ],
)
def test_patterns_are_shell_patterns_and_operator_events_need_their_prefix(patterns, full_type, matches):
    assert Patterns(patterns).matches(full_type) is matches


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("",), "a pattern is empty"),
        (("*", "!"), "a pattern is empty"),
        (("!adorn.*",), '"!adorn.*" excludes, but no pattern includes'),
    ],
)
def test_useless_patterns_are_refused(patterns, words):
    with pytest.raises(ValueError, match=words.replace("*", r"\*")):
        Patterns(patterns)


@given(
    wanted=st.lists(st.text("ab.*?[]", min_size=1, max_size=5), min_size=1, max_size=3),
    unwanted=st.lists(st.text("ab.*?[]", min_size=1, max_size=5), max_size=2),
    full_type=st.text("ab.", min_size=1, max_size=6),
)
def test_patterns_match_like_fnmatchcase(wanted, unwanted, full_type):
    expected = any(fnmatchcase(full_type, each) for each in wanted) and not any(
        fnmatchcase(full_type, each) for each in unwanted
    )
    for patterns in (wanted + ["!" + each for each in unwanted], ["!" + each for each in unwanted] + wanted):
        assert Patterns(tuple(patterns)).matches(full_type) is expected


@pytest.mark.parametrize(
    ("subscription", "explanation", "lines"),
    [
        (
            Subscription.of(("moddy.*", "adorn.*")),
            Explanation(matches=True, reason="matched", pattern="adorn.*"),
            ('yes: "adorn.*" matches',),
        ),
        (
            Subscription.of(("moddy.*",)),
            Explanation(matches=False, reason="no_pattern"),
            ("no: no pattern matches this type",),
        ),
        (
            Subscription.of(("*", "!*.sold")),
            Explanation(matches=False, reason="taken_away", pattern="!*.sold"),
            ('no: "!*.sold" excludes it',),
        ),
        (
            Subscription.of(("*",), {"data.total": {"gte": 45000}}),
            Explanation(matches=True, reason="matched", pattern="*"),
            ('yes: "*" matches',),
        ),
        (
            Subscription.of(("*",), {"data.total": {"gt": 45000}}),
            Explanation(
                matches=False,
                reason="where",
                pattern="*",
                misses=((Mismatch(path="data.total", expected="> 45000", found="45000.0"),),),
            ),
            ("no: data.total is 45000.0, expected > 45000",),
        ),
        (
            Subscription.of(("*",), [{"data.total": 1}, {"subject": "s-2", "data.x": True}]),
            Explanation(
                matches=False,
                reason="where",
                pattern="*",
                misses=(
                    (Mismatch(path="data.total", expected="1", found="45000.0"),),
                    (
                        Mismatch(path="subject", expected='"s-2"', found='"s-1"'),
                        Mismatch(path="data.x", expected="true", found="absent"),
                    ),
                ),
            ),
            (
                "no: alternative 1: data.total is 45000.0, expected 1",
                'no: alternative 2: subject is "s-1", expected "s-2"',
                "no: alternative 2: data.x is absent, expected true",
            ),
        ),
    ],
)
def test_every_decision_can_be_explained(subscription, explanation, lines):
    view = EnvelopeView(event())
    assert subscription.explain(view) == explanation
    assert subscription.explain(view).lines() == lines
    assert subscription.matches(view) is explanation.matches


def test_an_explanation_is_data_for_json():
    explanation = Subscription.of(("*",), {"data.total": 1}).explain(EnvelopeView(event()))
    assert json.loads(msgspec.json.encode(explanation)) == {
        "matches": False,
        "reason": "where",
        "pattern": "*",
        "misses": [[{"path": "data.total", "expected": "1", "found": "45000.0"}]],
    }


def test_an_invalid_subscription_is_refused():
    with pytest.raises(ValueError, match="unknown operator"):
        Subscription.of(("*",), {"data.total": {"gte_": 1}})


def test_an_event_goes_to_all_subscribed_destinations_in_the_order_of_the_config():
    router = Router(
        {
            "crm": Subscription.of(("adorn.*",)),
            "bot": Subscription.of(("moddy.*",)),
            "big": Subscription.of(("*",), {"data.total": {"gte": 1000}}),
            "all": Subscription.of(("*",)),
        }
    )
    for _ in range(2):  # computed, then cached
        assert router.route(event()) == (Target("crm"), Target("big"), Target("all"))
        assert router.route(event(data=b'{"total":1}')) == (Target("crm"), Target("all"))
        assert router.route(event("moddy.x", data=b"{}")) == (Target("bot"), Target("all"))
        assert router.route(event("relay.delivery.dead")) == ()


def test_an_operator_can_send_an_event_to_an_unsubscribed_destination_by_its_options():
    terms = {"big": SubscriptionOptions.of("big", order_by="subject", ttl=1.0)}
    router = Router({"big": Subscription.of(("moddy.*",), {"data.total": 1})}, terms)
    assert router.route(event()) == ()
    assert router.resolve("big", event()) == Target("big", order_key="s-1", ttl=1_000_000)
    assert router.resolve("gone", event()) is None
    assert router.destinations == ("big",)


def test_data_is_decoded_only_if_a_condition_needs_it(monkeypatch):
    decoded = []
    monkeypatch.setattr(relay.routing.envelope, "_decode", decoded.append)
    asks = Subscription.of(("adorn.*",), {"data.total": 1})
    router = Router({"a": asks, "b": asks, "c": Subscription.of(("*",), {"subject": "s-1"})})
    router.route(event("moddy.x"))
    assert decoded == []
    router.route(event())
    assert decoded == [b'{"total":45000.00}']


def test_many_different_types_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(relay.routing.router, "MAX_ROUTES", 8)
    router = Router({"all": Subscription.of(("*",))})
    for number in range(50):
        assert router.route(event(f"moddy.{number}")) == (Target("all"),)
        assert len(router._routes) <= 8


patterns = st.lists(
    st.sampled_from(["*", "adorn.*", "moddy.*", "*.sold", "relay.*", "adorn.attire.sold"]),
    min_size=1,
    max_size=2,
)
conditions = st.none() | st.lists(
    st.dictionaries(
        st.sampled_from(["data.total", "subject", "data.x"]),
        st.sampled_from([1, 45000, "s-1", True, {"exists": False}, {"gte": 2}, {"not": "s-1"}]),
        min_size=1,
    ),
    min_size=1,
    max_size=2,
)
subscriptions = st.builds(
    lambda wanted, unwanted, where: Subscription.of((*wanted, *("!" + each for each in unwanted)), where),
    patterns,
    st.just([]) | patterns,
    conditions,
)
events = st.builds(
    event,
    st.sampled_from(["adorn.attire.sold", "adorn.session", "moddy.x", "relay.delivery.dead"]),
    st.sampled_from([b"{}", b'{"total":1}', b'{"total":45000.00,"x":true}', b"[]", b"nonsense"]),
    st.sampled_from([None, "s-1", "s-2"]),
)


@given(st.dictionaries(st.sampled_from("abcd"), subscriptions), st.lists(events, min_size=1, max_size=4))
def test_matching_routing_and_explaining_agree(by_name, some):
    router = Router(by_name)
    for each in some:
        view = EnvelopeView(each)
        explained = router.explain(each)
        wanted = [name for name, subscription in by_name.items() if subscription.matches(view)]
        assert [owed.destination for owed in router.route(each)] == wanted
        assert [name for name, explanation in explained.items() if explanation.matches] == wanted
        for explanation in explained.values():
            assert explanation.lines()
            assert all(
                line.startswith("yes" if explanation.matches else "no") for line in explanation.lines()
            )
