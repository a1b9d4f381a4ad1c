"""Secrets are read from the places in config.toml, and no message ever contains a secret."""

import pytest

from relay.config.secrets import Origin, Secret


def origin(tmp_path, development=False, **environ):
    return Origin(environ=environ, folder=tmp_path, development=development)


def refused(tmp_path, value, development=False, **environ):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the text
        origin(tmp_path, development, **environ).secret(value)
    return str(caught.value)


def test_a_secret_comes_from_the_environment(tmp_path):
    assert origin(tmp_path, TOKEN="s3cret").secret({"env": "TOKEN"}) == Secret("s3cret")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_secret_comes_from_a_file_beside_the_config_without_its_last_newline(tmp_path, end):
    (tmp_path / "token").write_bytes(b"s3cret" + end)
    assert origin(tmp_path).secret({"file": "token"}) == Secret("s3cret")
    assert origin(tmp_path / "elsewhere").secret({"file": str(tmp_path / "token")}) == Secret("s3cret")


def test_a_secret_comes_from_a_systemd_credential(tmp_path):
    (tmp_path / "crm").write_text("s3cret\n")
    found = origin(tmp_path / "etc", CREDENTIALS_DIRECTORY=str(tmp_path)).secret({"credential": "crm"})
    assert found == Secret("s3cret")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"env": "TOKEN"}, ["TOKEN is not set", "set it"]),
        ({"env": "EMPTY"}, ["EMPTY is empty", "set it"]),
        ({"file": "gone"}, ["the file gone does not exist", "write the secret into it"]),
        ({"file": "blank"}, ["the file blank is empty"]),
        ({"file": "."}, ["cannot be read: Is a directory"]),
        ({"file": "a\0b"}, ["cannot be read: not a valid path"]),
        ({"file": "binary"}, ["not UTF-8"]),
        ({"file": "huge"}, ["larger than 64 KiB"]),
        ({"credential": "crm"}, ["$CREDENTIALS_DIRECTORY is not set", "LoadCredential=crm:"]),
        ({"credential": "../crm"}, ["not a path"]),
        ({"env": "what is this?"}, ["must be the name of an environment variable"]),
        ({"env": "TOKEN", "file": "x"}, ["exactly one of"]),
        ({"development": "x"}, ["exactly one of"]),
        ({}, ["exactly one of"]),
        ({"enf": "TOKEN"}, ['unknown key "enf", did you mean "env"?']),
        ({"env": 5}, ["`env` must be a string"]),
        ({"env": ""}, ["`env` must be a string that is not empty"]),
        (5, ['expected { env = "NAME" }', "got 5"]),
        (["x"], ["got a list"]),
    ],
)
def test_a_missing_secret_has_a_hint(tmp_path, value, text):
    (tmp_path / "blank").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "huge").write_bytes(b"x" * 65_537)
    message = refused(tmp_path, value, EMPTY=" ")
    for words in text:
        assert words in message


def test_an_unloaded_credential_has_a_hint_with_the_line_that_loads_it(tmp_path):
    message = refused(tmp_path, {"credential": "crm"}, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert "the credential crm does not exist; add `LoadCredential=crm:" in message


def test_a_literal_needs_development_and_the_message_does_not_repeat_it(tmp_path):
    assert origin(tmp_path, development=True).secret("s3cret") == Secret("s3cret")
    message = refused(tmp_path, "s3cret")
    assert "development = true" in message
    assert '{ env = "NAME" }' in message
    assert "s3cret" not in message


def test_a_literal_is_allowed_where_most_values_are_not_secret(tmp_path):
    assert origin(tmp_path).secret("application/json", literal=True) == Secret("application/json")


def test_an_empty_literal_is_refused_as_a_secret(tmp_path):
    assert "empty" in refused(tmp_path, " ", development=True)


@pytest.mark.parametrize("place", [{"env": "GONE"}, {"file": "gone"}, {"credential": "gone"}])
def test_the_development_value_is_used_only_without_the_other(tmp_path, place):
    value = place | {"development": "dev-token"}
    (tmp_path / "held").write_text("real")
    assert origin(tmp_path, development=True).secret(value) == Secret("dev-token")
    assert "dev-token" not in refused(tmp_path, value)
    held = origin(tmp_path, True, GONE="real", CREDENTIALS_DIRECTORY=str(tmp_path))
    (tmp_path / "gone").write_text("real")
    assert held.secret(value) == Secret("real")


def test_bytes_that_are_not_utf_8_are_refused_without_showing_them(tmp_path):
    message = refused(tmp_path, {"env": "TOKEN"}, TOKEN="s3cret\udcff")
    assert message == "the environment variable TOKEN is not UTF-8 text"
