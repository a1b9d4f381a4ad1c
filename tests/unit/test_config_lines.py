"""Every value of a TOML text is found at its line."""

import random
import tomllib

import pytest

from relay.config.document import find_lines

TRICKY = '''\
# a comment with [brackets] and "quotes"
title = "a # no comment" # but this is one
"quoted.key" = 1
'lit.eral' = 2
"esc\\u0061ped" = 3
a.b . "c d" = { x = 1, y.z = [1, { w = "}" }] }

[server]  # trailing
listen = "[not.a.table]"
text = """
[not_a_table]
key = "value" \\"""
""""
literal = \'\'\'
[nor_this]
it''s = 1\'\'\'
when = 1979-05-27 07:32:00Z
many = [
  "one",   # [x]
  # between

  [ 2,
    3 ],
  { a = 1, b = """
two lines""" },
]
after = -1_000.5e3

[[jobs]]
name = "first"
[jobs.inner]
deep = true
[[jobs.list]]
n = 1
[[jobs.list]]
n = 2
[[jobs]]
name = 'second'
[ jobs . "in ner" ]
deep = false

[x.y.z]
k = ""
[x]
k = \'\'\'\'\'\'
'''


def every_path(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from every_path(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from every_path(item, (*path, index))


def test_only_keys_tables_and_elements_have_a_line():
    assert set(find_lines(TRICKY)) == set(every_path(tomllib.loads(TRICKY)))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("title",), "title ="),
        (("quoted.key",), '"quoted.key"'),
        (("escaped",), '"esc'),
        (("a", "b", "c d", "y", "z", 1, "w"), "a.b . "),
        (("server",), "[server]"),
        (("server", "literal"), "literal ="),
        (("server", "many", 0), '"one"'),
        (("server", "many", 1), "[ 2,"),
        (("server", "many", 1, 1), "3 ],"),
        (("server", "many", 2, "b"), "{ a = 1"),
        (("server", "after"), "after ="),
        (("jobs", 0), "[[jobs]]"),
        (("jobs", 0, "inner", "deep"), "deep = true"),
        (("jobs", 0, "list", 1, "n"), "n = 2"),
        (("jobs", 1, "name"), "name = 'second'"),
        (("jobs", 1, "in ner", "deep"), "deep = false"),
        (("x", "y"), "[x.y.z]"),
        (("x",), "[x]"),
        (("x", "k"), "k = '"),
    ],
)
def test_the_line_is_the_one_that_an_editor_shows(path, text):
    line = find_lines(TRICKY)[path]
    assert text in TRICKY.split("\n")[line - 1]


def test_every_key_that_tomllib_accepts_has_a_line():
    """Make thousands of random changes to a complex text; a quarter of the results is still valid TOML."""
    chance, valid = random.Random(7), 0
    pieces = [
        '"',
        "'",
        "[",
        "]",
        "{",
        "}",
        "#",
        "\n",
        ",",
        "=",
        ".",
        '"""',
        "'''",
        "a",
        "\\",
        "\r\n",
        "x = 1\n",
    ]
    for _ in range(2000):
        text = TRICKY
        for _ in range(chance.randint(1, 3)):
            at, end = chance.randrange(len(text)), chance.choice([0, 0, 1, 6])
            text = text[:at] + chance.choice([*pieces, ""]) + text[at + end :]
        try:
            data = tomllib.loads(text)
        except ValueError:
            continue
        valid += 1
        assert set(find_lines(text)) == set(every_path(data)), text
    assert valid > 200


def test_windows_line_ends_count_once():
    lines = find_lines('a = 1\r\n[b]\r\nc = """x\r\ny"""\r\nd = 2\r\n')
    assert lines[("b", "d")] == 5


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# only a comment", "a = 1", "[a]", "[[a]]", "a = []", "a = {}"]
)
def test_unfinished_toml_does_not_raise(text):
    assert set(find_lines(text)) == set(every_path(tomllib.loads(text)))
