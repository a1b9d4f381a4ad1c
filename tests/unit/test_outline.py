"""The tree of a JSON body: it shows exactly the text of the sender, within the limits."""

import asyncio
import json
import random

import pytest

from relay.base.turns import Turns
from relay.ui import outline as module
from relay.ui.outline import NotReadableError, outline, plain


def read(text, **options):
    return asyncio.run(outline(text, Turns(), **options))


def shown(value):
    """Return a value and those below it as lists of keys and texts."""
    if value.place < 0:
        return value.text
    return [value.text, *[(each.key, shown(each)) for each in value.children]]


def test_keys_numbers_and_their_order_are_those_of_the_sender():
    text = '{"b": 12345678901234567890, "1": 45.00, "a": [1e400, "K\\u00f6ln", null], "b": {}}'
    root = read(text).root
    assert shown(root) == [
        "{", ('"b"', "12345678901234567890"), ('"1"', "45.00"),
        ('"a"', ["[", (None, "1e400"), (None, '"K\\u00f6ln"'), (None, "null")]), ('"b"', ["{"]),
    ]  # fmt: skip
    assert (root.count, [each.count for each in root.children]) == (4, [0, 0, 3, 0])
    assert plain(root.children[2].children[1].text) == "Köln"


VALID = (
    "5",
    ' "x" ',
    "[ ]",
    "{}",
    "[{}]",
    "[[],[]]",
    '{"a":{"b":[]}}',
    "-1.5e+10",
    "true",
    '["\\ud83d"]',
    "[0]",
)
INVALID = (
    "", " ", '{"a" 1}', "[1,]", "{,}", "[1", "1 2", '{"a":1,}', "01", "[1}", "nul", "]", ",", '"abc',
    '{"a":}', "{1:2}", "[,1]", "[1 2]", '"\n"', "NaN", "\ufeff1", "[1]]", '{"a":1 "b":2}', "+1", ".5", "1.",
)  # fmt: skip


@pytest.mark.parametrize("text", VALID, ids=range(len(VALID)))
def test_valid_json_is_read(text):
    json.loads(text)
    assert text.strip().startswith(read(text).root.text)


@pytest.mark.parametrize("text", INVALID, ids=range(len(INVALID)))
def test_invalid_json_is_refused(text):
    with pytest.raises(NotReadableError, match="not valid JSON"):
        read(text)


def test_the_error_has_the_place_of_the_first_wrong_character():
    with pytest.raises(NotReadableError, match="not valid JSON from character 11 on"):
        read('{"a": [1,2}')


def test_random_texts_are_accepted_exactly_if_a_json_parser_accepts_them():
    chance = random.Random(3)
    parts = ["{", "}", "[", "]", ",", ":", '"a"', "1", "null", " ", "-0.5"]

    def is_json(text):
        try:
            json.loads(text)
        except ValueError:
            return False
        return True

    async def compare():
        accepted = 0
        for _ in range(5000):
            text = "".join(chance.choices(parts, k=chance.randint(1, 9)))
            try:
                await outline(text, Turns())
            except NotReadableError:
                assert not is_json(text), text
            else:
                assert is_json(text), text
                accepted += 1
        assert accepted > 50

    asyncio.run(compare())


def test_a_search_finds_keys_and_values_with_their_paths():
    text = '{"order": {"id": 4711, "items": [{"sku": "A"}, {"Sku": "K\\u00d6LN"}]}, "note": "köln, sku"}'
    found = read(text, find="SKU")
    assert [(each.path, each.text) for each in found.found] == [
        ("order.items[0].sku", '"A"'),
        ("order.items[1].Sku", '"K\\u00d6LN"'),
        ("note", '"köln, sku"'),
    ]
    assert [each.path for each in read(text, find="köln").found] == ["order.items[1].Sku", "note"]
    assert [each.path for each in read(text, find="4711").found] == ["order.id"]
    part = read(text, at=found.found[1].place)
    assert (part.path, shown(part.root)) == ("order.items[1]", ["{", ('"Sku"', '"K\\u00d6LN"')])
    many = read(json.dumps(["x"] * 500), find="x")
    assert (many.matches, len(many.found)) == (500, module.MOST_FOUND)


def test_a_place_that_does_not_begin_a_value_shows_the_whole():
    for at in (1, 3, 99, 2**40):
        assert read('{"a": [1]}', at=at).path == ""
    assert read('{"a": [1]}', at=6).path == "a"


def count(value):
    return 1 + sum(map(count, value.children))


HUGE = {
    "numbers": "[" + "1," * 60_000 + "1]",
    "objects": json.dumps([{"id": number, "tags": ["a", "b"], "text": "x" * 300} for number in range(1000)]),
    "keys": json.dumps({f"key {number}": {"a": [number]} for number in range(5000)}),
    "nested": json.dumps([[[[[number] * 20] * 20] * 5] for number in range(50)]),
    "long": json.dumps({"a" * 100_000: "b" * 500_000}),
    "deep": "[" * module.MOST_DEPTH + "]" * module.MOST_DEPTH,
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
def test_the_part_of_a_huge_text_is_bounded_and_the_rest_is_counted(text):
    found = read(text)
    assert count(found.root) <= module.MOST_VALUES + module.MOST_CHILDREN + 1
    assert found.root.count == (1 if text == HUGE["deep"] else len(json.loads(text)))
    later = read(text, skip=100).root
    assert (later.first, len(later.children)) == (100, min(100, max(0, later.count - 100)))


def test_texts_beyond_the_bounds_are_refused():
    for text, problem in (
        ("[" * 100_000, "nested deeper than 1,000 levels"),
        ('"' + "a" * module.MOST_TEXT + '"', "longer than 1,048,576 characters"),
    ):
        with pytest.raises(NotReadableError, match=problem):
            read(text, find="a")


def test_skipping_hidden_values_does_not_change_the_result():
    """A search reads every value, so it is the reference."""
    chance = random.Random(5)

    def make(level):
        kind = chance.random()
        if level > 4 or kind < 0.3:
            return chance.choice([1, -2.5, None, "a", 'b"]{', "c\\", "ä\n" * chance.choice([1, 3000])])
        count = chance.choice([0, 1, 3, 120, 1100] if level < 1 else [0, 1, 3])
        if kind < 0.6:
            return {f"k{number}": make(level + 1) for number in range(count)}
        if kind < 0.8:
            return [chance.choice([1, "x,", None])] * count
        return [make(level + 1) for _ in range(count)]

    texts = [json.dumps(make(0), ensure_ascii=False) for _ in range(40)]
    texts = [text for text in texts if len(text) < 20_000]
    assert len(texts) > 15
    for text in [*texts, "[" * 100_000 + "]" * 100_000]:
        for skip in (0, 777):
            try:
                whole = read(text, skip=skip, find="nothing")
            except NotReadableError:
                assert text.startswith("[[[")
                whole = None
            quick = read(text, skip=skip)
            assert whole is None or whole.root == quick.root
    for broken in (
        '{"a": [' + "1," * 2000 + "]}",
        "[" * 20 + "1" + "]" * 19,
        '[[[[[[[[[[[[[["a]]]]]]]]]]]]]]]',
    ):
        with pytest.raises(NotReadableError, match="not valid JSON"):
            read(broken)


def test_other_tasks_run_while_a_huge_text_is_read():
    async def both():
        turns = 0

        async def count_turns():
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        other = asyncio.create_task(count_turns())
        await outline(HUGE["numbers"], Turns(), find="7")
        other.cancel()
        return turns

    assert asyncio.run(both()) > 20
