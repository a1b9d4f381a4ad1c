"""config.toml and docs/configuration.md have every key of the configuration, with its default."""

import re
import shutil
import tomllib
from pathlib import Path

import msgspec
import pytest

from relay.config import effective
from relay.config.binding import Binder
from relay.config.client_cert import ClientCert
from relay.config.document import read
from relay.config.message import MessageConfig
from relay.config.problems import ConfigError
from relay.config.schema import (
    Admin,
    BackupConfig,
    CircuitConfig,
    Cluster,
    Config,
    DestinationConfig,
    Log,
    Plugins,
    RefusedConfig,
    Retention,
    RetryConfig,
    Server,
    SourceConfig,
    Storage,
    WorkerRules,
)
from relay.config.signatures import SignatureConfig
from relay.plugin_loading.loader import discover, load

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "config.toml"
DOCS = ROOT / "docs"
TABLES = {
    "": Config,
    "server": Server,
    "admin": Admin,
    "storage": Storage,
    "cluster": Cluster,
    "retention": Retention,
    "refused": RefusedConfig,
    "backup": BackupConfig,
    "log": Log,
    "plugins": Plugins,
    "workers": WorkerRules,
    "sources.NAME": SourceConfig,
    "destinations.NAME": DestinationConfig,
    "destinations.NAME.retry": RetryConfig,
    "destinations.NAME.circuit": CircuitConfig,
    "destinations.NAME.client_cert": ClientCert,
    "[destinations.NAME.signatures]": SignatureConfig,
    "destinations.NAME.message": MessageConfig,
}
ELSEWHERE = {"destinations.NAME.message": "messages.md"}
"""Tables on other pages than configuration.md."""
NO_KEYS = {
    "path",
    "included",
    "origins",
    "warnings",
    "name",
    "settings",
    "compiled",
}  # filled by the relay, not by the operator
OWN_TABLES = {
    "server",
    "admin",
    "storage",
    "cluster",
    "refused",
    "backup",
    "log",
    "retention",
    "plugins",
    "workers",
    "sources",
    "destinations",
    "retry",
    "circuit",
    "client_cert",
}
SETTING = re.compile(r"(?P<key>[a-z_]+) = (?P<value>.*?)(?: +# (?P<comment>.*))?")
ROW = re.compile(r"^\| `([a-z_]+)` \| (.+?) \| (.+) \|$", re.MULTILINE)
NONE, REQUIRED = "none", "required"


class Line(msgspec.Struct):
    """A setting as the reference shows it."""

    value: str  # TOML
    comment: str

    @property
    def default(self):
        stated = re.search(r"\(default: (.*)\)$|\((required)\)$", self.comment)
        return (stated[1] or stated[2]) if stated else self.value


def shown():
    """Return the settings of config.toml by table, whether commented out or not."""
    tables, table, several, remark = {"": {}}, "", "", ""
    for raw in REFERENCE.read_text().splitlines():
        line = raw[1:] if re.match(r"#[a-z\[]", raw) else raw
        if several or line.endswith(" = ["):
            several += line
            if line != "]":
                continue
            line, several = f"{several} # {remark}", ""
        elif header := re.match(r"\[(\[?[a-z_.]+\]?)\]", line):
            table = header[1]
            tables.setdefault(table, {})
        remark = line.removeprefix("# ")
        if setting := SETTING.fullmatch(line):
            line = Line(setting["value"], setting["comment"] or "")
            tables[table].setdefault(setting["key"], line)
    return tables


SHOWN = shown()


def general(table):
    """Return the settings of a table of TABLES; NAME is the first table that shows the key."""
    pattern = re.compile(re.escape(table).replace("NAME", "[a-z]+"))
    tables = [lines for name, lines in SHOWN.items() if pattern.fullmatch(name)]
    return {key: line for lines in reversed(tables) for key, line in lines.items()}


def section(table):
    """Return the section of the page for a table."""
    heading = rf"\[{re.escape(table)}\]" if table else "Top-level keys"
    page = (DOCS / ELSEWHERE.get(table, "configuration.md")).read_text()
    found = re.search(rf"^##+ `?{heading}`?\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    assert found is not None, table
    return found[1]


def documented(table):
    """Return key, default and help text of each row of a section of the page."""
    return [(row[1], row[2], row[3]) for row in ROW.finditer(section(table))]


def described(table):
    """Return the same from the model."""
    return [(field.name, default_of(field), help_of(field.type)) for name, field in keys() if name == table]


def default_of(field):
    """Return the default of a field as the page shows it."""
    if field.name == "state_dir":  # a required field of the record, which the relay fills
        return '`"."`'
    if field.required:
        return REQUIRED
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if default is None:
        return NONE
    if isinstance(default, msgspec.Struct):
        return "`{}`"
    return f"`{effective._written(effective._value(default, effective._unit(field.type)))}`"


def help_of(type_):
    """Return the help text of a field."""
    metas = [each for each in getattr(type_, "__metadata__", ()) if isinstance(each, msgspec.Meta)]
    [text] = [meta.description for meta in metas if meta.description is not None]
    return text


def keys():
    for table, type_ in TABLES.items():
        for field in msgspec.structs.fields(type_):
            if field.name not in NO_KEYS and (field.name not in OWN_TABLES or table.startswith("sources")):
                yield table, field


KEYS = [pytest.param(table, field, id=f"{table}.{field.name}") for table, field in keys()]


def bundled():
    """Return the bundled kinds of source, without presets: these have the keys of `generic`."""
    return [kind for kind in discover([])[0].kinds.values() if kind.name == kind.source.kind]


def in_reference():
    """Return the bundled kinds that config.toml has a table for; docs/sources.md has every kind."""
    return [kind for kind in bundled() if f"sources.{kind.name}" in SHOWN]


def true_default(field, stated, tmp_path):
    """Return whether TOML text stands for a field's default."""
    if stated in (NONE, REQUIRED):
        return field.required if stated == REQUIRED else not field.required and field.default is None
    path = tmp_path / "config.toml"
    path.write_text(f"{field.name} = {stated}\n")
    binder = Binder(read(path), {})
    value = binder.value(field.type, binder.document.data[field.name], ())
    assert binder.problems == []
    if field.name == "state_dir":  # a required field of the record, which the relay fills
        return value == tmp_path
    default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if field.name == "dirs":
        default = tuple(tmp_path / path for path in default)
    return value == default


@pytest.mark.parametrize(("table", "field"), KEYS)
def test_config_toml_shows_each_key_with_its_default_and_a_comment(table, field, tmp_path):
    line = general(table)[field.name]
    assert line.comment
    assert true_default(field, line.default, tmp_path), line.default


@pytest.mark.parametrize("table", TABLES)
def test_the_page_has_each_key_with_its_default_and_help(table):
    assert documented(table) == described(table)


@pytest.mark.parametrize(("table", "field"), KEYS)
def test_each_default_on_the_page_is_true(table, field, tmp_path):
    [stated] = [default for key, default, _ in documented(table) if key == field.name]
    assert true_default(field, stated.strip("`"), tmp_path), stated


@pytest.mark.parametrize("table", TABLES)
def test_config_toml_has_no_unknown_key(table):
    known = {field.name for name, field in keys() if name == table}
    plugins = {key for kind in in_reference() for key in kind.source.__struct_encode_fields__}
    assert set(general(table)) - known == (plugins if table == "sources.NAME" else set())


def test_config_toml_shows_each_key_of_each_source_that_it_has(tmp_path):
    for kind in in_reference():
        for field in msgspec.structs.fields(kind.source):
            line = SHOWN[f"sources.{kind.name}"][field.encode_name]
            assert line.comment, f"{kind.name}.{field.encode_name}"
            assert true_default(field, line.default, tmp_path), f"{kind.name}.{field.encode_name}"


def test_config_toml_runs_unchanged():
    setup = load(REFERENCE, {})
    config = setup.config
    assert config.development
    assert (
        {source.plugin for source in config.sources.values()}
        == set(config.sources)
        == {kind.name for kind in in_reference()}
    )
    assert set(config.sources) <= set(setup.kinds)
    assert set(config.destinations) == {"crm"}
    assert len(config.warnings) == 1  # Adorn's clients send no token


def test_config_toml_is_valid_with_every_setting_enabled(certificates, tmp_path):
    text = re.sub(r"^#(?=[a-z\[])", "", REFERENCE.read_text(), flags=re.MULTILINE)
    assert tomllib.loads(text)["destinations"]["crm"]["retry"]["jitter"] == 0.1
    for name, made in [("ca.pem", "ca.pem"), ("client.pem", "client.pem"), ("client-key.pem", "key.pem")]:
        shutil.copy(certificates.ca.with_name(made), tmp_path / name)
    path = tmp_path / "config.toml"
    path.write_text(text)
    crm = load(path, {}).config.destinations["crm"]
    assert crm.ca_file == tmp_path / "ca.pem"
    assert crm.client_cert.cert == tmp_path / "client.pem"


def test_without_development_each_substitute_is_a_problem(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(REFERENCE.read_text().replace("\ndevelopment = true", "\ndevelopment = false"))
    with pytest.raises(ConfigError, match="LAZYCHAT_TOKEN is not set") as caught:
        load(path, {})
    assert len(caught.value.problems) == 6


def rewrite():
    """Write the tables of keys into the page."""
    for table in TABLES:
        file = DOCS / ELSEWHERE.get(table, "configuration.md")
        part = section(table)
        rows = list(ROW.finditer(part))
        new = "\n".join(f"| `{key}` | {default} | {text} |" for key, default, text in described(table))
        text = file.read_text()
        file.write_text(text.replace(part, part[: rows[0].start()] + new + part[rows[-1].end() :]))


if __name__ == "__main__":
    rewrite()
