"""A file that cannot be used is one clear problem."""

from pathlib import Path

import pytest

from relay.config.document import read
from relay.config.problems import ConfigError


def problem_of(path):
    with pytest.raises(ConfigError) as caught:
        read(path)
    (problem,) = caught.value.problems
    return problem


def test_a_valid_file_has_its_values_and_their_lines(tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text("\n[server]\nlisten = 'x'\n")
    monkeypatch.chdir(tmp_path)
    document = read(Path("config.toml"))
    assert document.data == {"server": {"listen": "x"}}
    assert document.problem(("server", "listen"), "").line == 3
    assert document.problem(("server", "missing", "deeper"), "").line == 2
    assert document.problem(("absent",), "").line == 1
    assert document.path == tmp_path / "config.toml"
    assert document.file == "config.toml"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"a = 1\nb = \n", 2, "not valid TOML: invalid value"),
        (b"a = 1\na = 2\n", 2, "not valid TOML: cannot overwrite a value"),
        (b"a = 1\n[a]\n", 2, "not valid TOML"),
        (b"a = 1\nb = [1,\n", 3, "not valid TOML"),
        (b"a = 1\n\nb = '\xff'\n", 3, "not UTF-8"),
        (b"a = " + b"9" * 5000, 0, "not valid TOML"),
        (b"a = " + b"[" * 9000 + b"]" * 9000, 0, "nested too deeply"),
    ],
)
def test_a_broken_file_is_a_problem_with_its_line(tmp_path, content, line, message):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    problem = problem_of(path)
    assert problem.line == line
    assert message in problem.problem
    assert str(problem).startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_a_missing_file_is_a_problem(tmp_path):
    assert str(problem_of(tmp_path / "no.toml")).endswith(
        "no.toml: cannot be read: No such file or directory"
    )


def test_a_folder_is_a_problem(tmp_path):
    assert "cannot be read: Is a directory" in str(problem_of(tmp_path))


def test_an_unreadable_file_is_a_problem(tmp_path):
    """A link to itself, because permissions do not apply to root."""
    path = tmp_path / "loop.toml"
    path.symlink_to(path)
    assert "cannot be read: " in str(problem_of(path))


# --- included files -----------------------------------------------------------------------------------


def write(folder, files):
    """Write files by name; returns the config file."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "config.toml"


def problems_of(path):
    with pytest.raises(ConfigError) as caught:
        read(path)
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


def test_files_in_conf_d_add_to_the_configuration_in_the_order_of_their_names(tmp_path):
    path = write(
        tmp_path,
        {
            "config.toml": "[destinations.a]\nurl = '1'\n",
            "conf.d/20.toml": "\n[destinations.c]\nurl = '3'\n",
            "conf.d/10.toml": "[destinations.b]\nurl = '2'\n[destinations.a]\nmethod = 'PUT'\n",
            "conf.d/.hidden.toml": "broken",
            "conf.d/notes.txt": "broken",
        },
    )
    document = read(path)
    assert document.data["destinations"] == {
        "a": {"url": "1", "method": "PUT"},
        "b": {"url": "2"},
        "c": {"url": "3"},
    }
    assert document.included == (tmp_path / "conf.d" / "10.toml", tmp_path / "conf.d" / "20.toml")
    found = [
        str(document.problem(("destinations", *key), "wrong")).replace(f"{tmp_path}/", "")
        for key in (("c", "url"), ("c", "events"), ("a", "method"), ("a", "url"), ())
    ]
    assert found == [
        "conf.d/20.toml:3: destinations.c.url: wrong",
        "conf.d/20.toml:2: destinations.c.events: wrong",
        "conf.d/10.toml:4: destinations.a.method: wrong",
        "config.toml:2: destinations.a.url: wrong",
        "config.toml:1: destinations: wrong",
    ]


def test_a_key_may_be_set_in_one_file_only(tmp_path):
    path = write(
        tmp_path,
        {
            "config.toml": "development = true\n[destinations.a]\nurl = '1'\n",
            "conf.d/a.toml": "[destinations.a]\n\nurl = '2'\n",
            "conf.d/b.toml": "development = false\ndestinations = 5\n[sources.s]\nplugin = 'x'\n",
            "conf.d/c.toml": "[sources.s]\nplugin = 'x'\n",
        },
    )
    assert problems_of(path) == [
        "conf.d/a.toml:3: destinations.a.url: is set in config.toml:3 as well",
        "conf.d/b.toml:1: development: is set in config.toml:1 as well",
        "conf.d/b.toml:2: destinations: is set in config.toml:2 as well",
        "conf.d/c.toml:2: sources.s.plugin: is set in conf.d/b.toml:4 as well",
    ]


def test_include_names_files_and_patterns(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    path = write(
        tmp_path / "main",
        {
            "config.toml": f"include = ['one.toml', 'more/*.toml', '{elsewhere}/*']\n",
            "one.toml": "one = 1",
            "more/two.toml": "two = 2",
            "conf.d/not.toml": "broken",
            "../elsewhere/three.conf": "three = 3",
        },
    )
    document = read(path)
    assert {"one": 1, "two": 2, "three": 3}.items() <= document.data.items()
    assert [file.name for file in document.included] == ["one.toml", "two.toml", "three.conf"]
    path.write_text("include = []\n")
    assert read(path).included == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("include = ['none.toml']", "none.toml: cannot be read: No such file or directory"),
        ("include = 'a.toml'", "config.toml:1: include: expected a list of patterns, got a string"),
        ("include = ['broken.toml']", "broken.toml:1: not valid TOML"),
        ("include = ['nested.toml']", "nested.toml:1: include: only config.toml may include files"),
    ],
)
def test_a_wrong_inclusion_is_a_problem(tmp_path, text, problem):
    files = {"config.toml": text, "broken.toml": "x", "nested.toml": "include = []"}
    [found] = problems_of(write(tmp_path, files))
    assert found.startswith(problem)
