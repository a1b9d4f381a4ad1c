"""docs/sources.md against the code: its configuration loads, and it names every route and code."""

import re
from pathlib import Path

import msgspec
import pytest
from samples import sources

from relay import errors
from relay.plugin_loading.loader import load

PAGE = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()
SECTIONS = {
    heading: part
    for part in PAGE.split("\n## ")[1:]
    if (heading := part.split("\n", 1)[0]) in sources()  # the others describe any sender
}


def test_there_is_a_section_for_every_bundled_source():
    assert set(SECTIONS) == set(sources())


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_section_names_each_key_of_its_source(kind):
    for field in msgspec.structs.fields(type(sources()[kind])):
        key = field.encode_name
        assert re.search(rf"^(# )?{key} = |`{key}`", SECTIONS[kind], re.MULTILINE), key


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_configuration_of_a_section_loads(kind, tmp_path):
    [block] = re.findall(r"```toml\n(.*?)```", SECTIONS[kind], re.DOTALL)
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "user.created.json").write_text("{}")
    (tmp_path / "config.toml").write_text(block)
    environ = dict.fromkeys(re.findall(r'env = "(\w+)"', block), "s3cret-enough-to-pass")
    config = load(tmp_path / "config.toml", environ).config
    assert type(config.sources[kind].settings) is type(sources()[kind])


@pytest.mark.parametrize("kind", sorted(set(SECTIONS) - {"whatsapp"}))
def test_the_overview_names_every_route(kind):
    for method, path, _ in sources()[kind].routes():
        assert f"`{method} {path}`" in PAGE


def test_the_section_of_whatsapp_names_every_route_once_for_both_bases():
    for _, path, _ in sources()["whatsapp"].routes():
        words = (
            re.sub(r"^/api(/v1)?/", "", path)
            .replace("{worker:path}", "{id}")
            .replace("webhooks/session-", "session-")
        )
        assert f"{words}`" in SECTIONS["whatsapp"]


def test_the_section_of_whatsapp_names_the_codes_of_all_refusals():
    classes = [
        cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.Refusal)
    ]
    possible = {cls.code.upper() for cls in classes} - {"FORBIDDEN"}  # its tokens have no scopes
    paragraph = SECTIONS["whatsapp"].rpartition("Errors:")[2]
    assert set(re.findall(r"`([A-Z_]+)`", paragraph)) == possible
