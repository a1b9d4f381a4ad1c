"""The changes of config.toml that a running relay applies, and those that need a start."""

import msgspec
import pytest

from relay.config.problems import ConfigError
from relay.errors import RestartNeededError
from relay.plugin_loading.loader import load, load_again

SHOP = '[sources.shop]\nplugin = "adorn"\n'
CRM = '[destinations.crm]\nurl = "https://crm.example"\nsecrets = [{ file = "secret" }]\n'
PLUGIN = """
from relay.hookspecs import hookimpl
from relay.source import Source

class Mine(Source, kind="mine"):
    speed: int = 1

@hookimpl
def relay_sources():
    return [Mine]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret").write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    (tmp_path / "plugins.d").mkdir()
    (tmp_path / "plugins.d" / "mine.py").write_text(PLUGIN)
    return tmp_path


@pytest.fixture
def setup(folder):
    (folder / "config.toml").write_text(SHOP + CRM)
    return load(folder / "config.toml", {})


@pytest.fixture
def again(setup, folder):
    def run(text):
        (folder / "config.toml").write_text(text)
        return load_again(setup, {})

    return run


@pytest.fixture
def needed(again, folder):
    def run(text=SHOP + CRM):
        with pytest.raises(RestartNeededError) as caught:
            again(text)
        assert "undo these changes" in caught.value.hint
        assert caught.value.message == f"restart needed: {', '.join(caught.value.keys)}"
        return [key.replace(f"{folder}/", "") for key in caught.value.keys]

    return run


def test_the_same_file_gives_an_equal_config(setup, again):
    assert again(SHOP + CRM).config == setup.config


def test_a_reload_adopts_sources_destinations_and_settings(again):
    text = '[retention]\nworker_metrics = "1d"\n[sources.other]\nplugin = "mine"\nspeed = 2\n'
    config = again(text).config
    assert config.retention.worker_metrics == 86_400
    assert config.sources["other"].settings.speed == 2
    assert config.destinations == {}


def test_a_reload_reads_secrets_again(setup, again, folder):
    (folder / "secret").write_text("whsec_bm90IGEgc2VjcmV0LCBmb3IgZGV2ZWxvcG1lbnQ=")
    assert again(SHOP + CRM).config.destinations != setup.config.destinations


def test_a_reload_reads_schemas_again(folder, again):
    text = f'{SHOP}schemas = {{ "*" = "schema.json" }}\n'
    (folder / "schema.json").write_text("{}")
    before = again(text).config
    assert again(text).config == before
    (folder / "schema.json").write_text('{"type": "object"}')
    assert again(text).config != before


def test_a_reload_reports_every_problem_like_a_start(again):
    with pytest.raises(ConfigError) as caught:
        again('[server]\nmax_boddy = 1\n[sources.shop]\nplugin = "nothing"\n')
    assert [problem.key for problem in caught.value.problems] == ["server.max_boddy", "sources.shop.plugin"]


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ('state_dir = "elsewhere"\n', ["state_dir"]),
        ('[server]\nlisten = "127.0.0.1:1"\n', ["server.listen"]),
        ('[admin]\nlisten = ""\nsocket = "s"\n', ["admin.listen", "admin.socket"]),
        ('[admin]\ntokens = [{ file = "secret" }]\n', ["admin.tokens"]),
        ('[storage]\nurl = "sqlite:other.db"\n', ["storage.url"]),
        ('[storage]\ndurability = "normal"\nmin_free_disk = "1 GiB"\n',
         ["storage.durability", "storage.min_free_disk"]),
        ("[plugins]\ndirs = []\n", ["plugins.dirs"]),
    ],
)  # fmt: skip
def test_settings_that_need_a_restart_are_named(needed, text, keys):
    assert needed(text) == keys


def test_problems_are_reported_before_needed_restarts(again):
    with pytest.raises(ConfigError):
        again('[server]\nlisten = "127.0.0.1:1"\nmax_boddy = 1\n')


def test_an_edited_plugin_needs_a_restart(needed, folder):
    (folder / "plugins.d" / "mine.py").write_text(PLUGIN.replace("speed", "pace"))
    assert needed('[sources.other]\nplugin = "mine"\npace = 2\n') == ["plugins.d/mine.py"]


def test_a_new_plugin_needs_a_restart_and_is_not_run(needed, folder):
    (folder / "plugins.d" / "new.py").write_text("raise SystemExit")
    assert needed('[sources.other]\nplugin = "new"\n') == ["plugins.d/new.py"]


def test_a_removed_plugin_needs_a_restart(needed, folder):
    (folder / "plugins.d" / "mine.py").unlink()
    assert needed() == ["plugins.d/mine.py"]


def test_problems_of_the_relay_s_own_keys_are_reported_despite_broken_plugins(again, folder):
    (folder / "plugins.d" / "mine.py").unlink()
    with pytest.raises(ConfigError) as caught:
        again('[server]\nmax_boddy = 1\n[sources.other]\nplugin = "mine"\n')
    assert [problem.key for problem in caught.value.problems] == ["server.max_boddy"]


def test_a_bundled_plugin_replaced_on_disk_needs_a_restart(setup):
    assert load_again(setup, {}).config == setup.config
    [adorn] = [file for file in setup.code if file.endswith("adorn.py")]
    before = msgspec.structs.replace(setup, code={**setup.code, adorn: b"as it was imported"})
    with pytest.raises(RestartNeededError) as caught:
        load_again(before, {})
    assert caught.value.keys == (adorn,)
