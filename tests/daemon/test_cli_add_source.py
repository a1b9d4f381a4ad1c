"""`relay sources add`: the new table, the unchanged rest of the file, and the printed steps."""

import stat
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import run
from daemons import HEAD

from relay.cli import add_source
from relay.cli.add_source import presets
from relay.plugin_loading.loader import load

CONFIG = HEAD.format(port=0) + "# the end of the file, with a comment\n"
EXAMPLE = "https://hooks.example"
SET = (
    "Set GITHUB_WEBHOOK_SECRET in the environment of `relay serve`: the webhook's secret, a random text that"
    " you choose (for example the output of `openssl rand -hex 32`)"
)


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(CONFIG)
    return file


def add(config, *args, **options):
    return run("sources", "add", *args, "-c", config, **options)


@pytest.mark.parametrize("name", [*presets(), "generic"])
def test_the_added_table_loads_and_the_rest_of_the_file_stays(config, name):
    result = add(config, name, "--public-url", EXAMPLE)
    before, added = CONFIG, config.read_text().removeprefix(CONFIG)
    assert config.read_text().startswith(before)
    assert added.startswith(f"\n[sources.{name}]\n")
    source = load(config, {}, lenient=True).config.sources[name]
    assert source.plugin == name
    assert tomllib.loads(added)["sources"][name]["path"] == f"/hooks/{name}"
    assert result.out.startswith(f"{config}: added the source {name}\n")
    assert f"{EXAMPLE}/hooks/{name}" in result.out


def test_the_output_names_table_secret_and_next_steps(config):
    result = add(config, "github", "--public-url", EXAMPLE)
    assert (
        result.out
        == f"""\
{config}: added the source github

[sources.github]
plugin = "github"
path = "/hooks/github"
secrets = [{{ env = "GITHUB_WEBHOOK_SECRET" }}]

On this machine:

1. {SET}
2. Restart `relay serve`, which reads environment and credentials

At GitHub, https://docs.github.com/en/webhooks:

1. Open Settings → Webhooks → Add webhook of the repository, organization or app
2. Payload URL: {EXAMPLE}/hooks/github
3. Content type: application/json
4. Secret: the value of GITHUB_WEBHOOK_SECRET
5. Choose the events and keep Active checked; GitHub sends a `ping` at once

Then try it: relay send github
"""
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--secret-env", "TOKEN"], "1. Set TOKEN in /etc/relay/environment, as a line TOKEN='…': the"),
        (["--secret-env", "TOKEN"], "2. Run `relay reload`"),
        (["--secret-credential", "hub"], "2. Run `systemctl restart relay.service`"),
    ],
)
def test_an_installed_service_gets_its_secrets_from_its_own_files(config, monkeypatch, option, message):
    files = ((Path("/etc/relay/environment"), False),)
    service = SimpleNamespace(name="relay.service", env_files=files)
    monkeypatch.setattr(add_source, "service_of", lambda _: service)
    assert message in add(config, "github", *option).out


def test_json_has_the_same(config):
    item = add(config, "meta", "--name", "pages", "--public-url", EXAMPLE, "--json").json
    assert item["url"] == f"{EXAMPLE}/hooks/pages"
    assert item["written"] is True
    assert [(secret["place"], secret["name"]) for secret in item["secrets"]] == [
        ("env", "PAGES_WEBHOOK_SECRET"),
        ("env", "PAGES_VERIFY_TOKEN"),
    ]
    assert item["table"] in config.read_text()


@pytest.mark.parametrize("kind", ["moddy", "adorn", "compozy"])
def test_a_kind_with_its_own_paths_gets_a_token(config, kind):
    result = add(config, kind, "--public-url", EXAMPLE)
    assert load(config, {}, lenient=True).config.sources[kind].plugin == kind
    table = tomllib.loads(config.read_text())["sources"][kind]
    assert table == {"plugin": kind, "tokens": [{"env": f"{kind.upper()}_TOKEN"}]}
    assert f"Set its base URL to {EXAMPLE}" in result.out


@pytest.mark.parametrize(
    ("option", "value", "table", "step"),
    [
        ("--secret-env", "TOKEN", '{ env = "TOKEN" }', "Set TOKEN in the environment"),
        ("--secret-file", "key.txt", '{ file = "key.txt" }', "Write key.txt: "),
        ("--secret-credential", "hub", '{ credential = "hub" }', "Add LoadCredential=hub:… to the unit"),
    ],
)
def test_a_secret_comes_from_the_place_that_the_operator_names(config, option, value, table, step):
    result = add(config, "github", option, value)
    assert f"secrets = [{table}]" in config.read_text()
    assert step in result.out


def test_print_writes_nothing(config):
    result = add(config, "stripe", "--print")
    assert result.out.startswith("[sources.stripe]\n")
    assert config.read_text() == CONFIG
    assert "https://YOUR-HOST" in result.err


def test_two_sources_of_one_preset_need_two_names(config):
    add(config, "github")
    wrong = add(config, "github", code=1)
    assert f'the source "github" already exists in {config}' in wrong.err
    assert "--name" in wrong.err
    add(config, "github", "--name", "github-ops")
    sources = load(config, {}, lenient=True).config.sources
    assert {name: source.plugin for name, source in sources.items()} == {
        "github": "github",
        "github-ops": "github",
    }


def test_a_table_that_does_not_load_is_not_written(config):
    add(config, "github")
    written = config.read_text()
    wrong = add(config, "gitlab", "--path", "/hooks/github", code=1)
    assert "/hooks/github" in wrong.err
    assert "nothing was written" in wrong.err
    wrong = add(config, "gitlab", "--set", "typo=1", code=1)
    assert f"{config}:" in wrong.err
    assert "typo" in wrong.err
    assert config.read_text() == written
    assert sorted(path.name for path in config.parent.iterdir()) == ["config.toml"]


def test_a_file_with_other_problems_stays_unchanged(config):
    config.write_text(f"{CONFIG}\n[sources.broken]\nplugin = 'nothing'\n")
    before = config.read_text()
    wrong = add(config, "github", code=1)
    assert "nothing was written" in wrong.err
    assert config.read_text() == before


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_line_ends_permissions_and_links_stay(tmp_path, end):
    real = tmp_path / "real.toml"
    text = CONFIG.rstrip("\n")
    if end == "\r\n":
        text = text.replace("\n", "\r\n")
    real.write_bytes((text + end).encode())
    real.chmod(0o640)
    link = tmp_path / "config.toml"
    link.symlink_to(real)
    add(link, "github")
    content = real.read_bytes()
    assert content.startswith((text + end).encode())
    assert (b"\r\n" in content) == (end == "\r\n")
    assert content.count(b"\r\n") in (0, content.count(b"\n"))
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    load(link, {}, lenient=True)


def test_settings_replace_those_of_the_preset(config):
    add(
        config, "generic", "--name", "shop", "--verify", "hmac", "--set", "verify.hmac.header=X-Shop",
        "--set", 'type="{header:X-Topic}"', "--set", "max_body=5 MiB",
    )  # fmt: skip
    table = tomllib.loads(config.read_text())["sources"]["shop"]
    assert table["verify"] == {"hmac": {"header": "X-Shop"}}
    assert (table["type"], table["max_body"]) == ("{header:X-Topic}", "5 MiB")
    assert load(config, {}, lenient=True).config.sources["shop"].max_body == 5 * 2**20


@pytest.mark.parametrize("verify", ["bearer", "hmac", "api-key", "basic", "standard-webhooks", "none"])
def test_a_generic_source_loads_with_every_verification(config, verify):
    result = add(config, "generic", "--name", "any", "--verify", verify)
    load(config, {}, lenient=True)
    assert ("secrets" in tomllib.loads(config.read_text())["sources"]["any"]) == (verify != "none")
    assert ("ANY_WEBHOOK_SECRET" in result.out) == (verify != "none")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["githb"], 4, 'unknown kind of source "githb", did you mean "github"?'),
        ([], 2, "name the kind of source: adorn, alertmanager"),
        (["twilio"], 2, "--public-url https://hooks.example"),
        (["github", "--name", "Git Hub"], 2, "a name is 1 to 64"),
        (["github", "--verify", "hmac"], 2, "--verify applies only to generic"),
        (["github", "--secret-env", "A", "--secret-file", "b"], 2, "give only one of"),
        (["generic", "--verify", "none", "--secret-env", "A"], 2, "no secret"),
        (["github", "--set", "x"], 2, "KEY=VALUE"),
    ],
)
def test_wrong_usage_has_a_hint(config, args, code, words):
    assert words in add(config, *args, code=code).err
    assert config.read_text() == CONFIG


def test_a_missing_file_is_named(tmp_path):
    assert "config init" in run("sources", "add", "github", "-c", tmp_path / "no.toml", code=1).err


def test_on_a_terminal_the_command_asks(config, monkeypatch):
    monkeypatch.setattr(add_source, "is_terminal", lambda: True)
    answers = ["square", "till", "/in/till", EXAMPLE, "TILL_KEY"]
    result = add(config, stdin="\n".join(answers) + "\n")
    table = tomllib.loads(config.read_text())["sources"]["till"]
    assert table == {
        "plugin": "square",
        "path": "/in/till",
        "public_url": EXAMPLE,
        "secrets": [{"env": "TILL_KEY"}],
    }
    assert "Notification URL: https://hooks.example/in/till" in result.out
    config.write_text(CONFIG)
    add(config, stdin="generic\nany\napi-key\n\n\n\n")
    assert tomllib.loads(config.read_text())["sources"]["any"]["verify"] == {
        "api_key": {"header": "X-API-Key"}
    }
