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
    assert document.line(("server", "listen")) == 3
    assert document.line(("server", "missing", "deeper")) == 2
    assert document.line(("absent",)) == 1
    assert document.path == tmp_path / "config.toml"
    assert document.file == "config.toml"


@pytest.mark.parametrize(
    ("content", "line", "says"),
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
def test_a_broken_file_is_a_problem_with_its_line(tmp_path, content, line, says):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    problem = problem_of(path)
    assert problem.line == line
    assert says in problem.problem
    assert str(problem).startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_a_missing_file_is_a_problem(tmp_path):
    assert str(problem_of(tmp_path / "no.toml")).endswith(
        "no.toml: cannot be read: No such file or directory"
    )


def test_a_folder_is_a_problem(tmp_path):
    assert "cannot be read: Is a directory" in str(problem_of(tmp_path))


def test_an_unreadable_file_is_a_problem(tmp_path):
    """A link to itself: what permissions deny to others, this denies also to root."""
    path = tmp_path / "loop.toml"
    path.symlink_to(path)
    assert "cannot be read: " in str(problem_of(path))
