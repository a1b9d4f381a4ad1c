"""Plugins come from three places; the settings of every source are bound, or all faults are reported."""

import pkgutil
import sys
from pathlib import Path

import msgspec
import pytest

from relay import __version__
from relay.config.effective import digests, effective, fill
from relay.config.problems import ConfigError
from relay.formats import FORMATS
from relay.plugin_loading.loader import discover, load

BUNDLED = Path(__file__).parents[2] / "plugins"

PLUGIN = """
from relay.hookspecs import hookimpl
from relay.source import Accepted, Duration, Event, Secrets, Source, route

class Shop(Source, kind="{kind}", owns=("/{kind}",)):
    tokens: Secrets
    patience: Duration = 5.0

    @route("POST", "/{kind}/{{id}}/events")
    def event(self, incoming):
        return Accepted(event=Event(type="sold"), reply={{}})

    def warnings(self):
        return ("is in a hurry",) if self.patience < 1 else ()

@hookimpl
def relay_sources():
    return [Shop]
"""
FORMAT = """
from relay.formats import Format
from relay.hookspecs import hookimpl

@hookimpl
def relay_formats():
    return [Format(name={name!r}, content_type={content_type!r}, render={render})]
"""
PRESETS = """
from relay.source import Guide, Preset, Rules

GUIDE = Guide(title="Stall", docs="https://stall.test", secret="a token", default_path="/x", steps=())

@hookimpl
def relay_presets():
    return [
        Preset(name="stall", source=Shop, read=lambda: Rules(guide=GUIDE, defaults={"patience": "0.5s"})),
        Preset(name="broken", source=Shop, read=lambda: 1 / 0, file="/broken.toml"),
        Preset(name="wrong", source=Shop, read=lambda: Rules(guide=GUIDE, defaults={"patience": "soon"})),
    ]
"""
HEAD = "from relay.hookspecs import hookimpl\nfrom relay.source import Source, Invalid, Secrets, route\n"
SHOP = "[sources.shop]\nplugin = 'shop'\ntokens = [{ env = 'TOKEN' }]\n"


@pytest.fixture
def plugins(tmp_path):
    folder = tmp_path / "plugins.d"
    folder.mkdir()
    return folder


@pytest.fixture
def setup(tmp_path):
    def run(text):
        path = tmp_path / "config.toml"
        path.write_text(text)
        return load(path, {"TOKEN": "hush"})

    return run


@pytest.fixture
def problems_of(setup, tmp_path):
    def run(text):
        with pytest.raises(ConfigError) as caught:
            setup(text)
        assert "hush" not in str(caught.value)
        return [str(problem).replace(f"{tmp_path}/", "") for problem in caught.value.problems]

    return run


def install(folder, monkeypatch, name, source, entry):
    """Put an installed distribution into a folder on the path."""
    info = folder / f"{name}-3.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 3.2\n")
    (info / "entry_points.txt").write_text(f"[relay]\n{entry}\n")
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))


# --- places -------------------------------------------------------------------------------------


def test_the_bundled_sources_are_always_there():
    offers, problems = discover([])
    assert problems == []
    kinds = {name for name, kind in offers.kinds.items() if kind.preset is None}
    assert kinds == {module.name for module in pkgutil.iter_modules([str(BUNDLED)])}
    assert {"adorn", "generic", "lazychat"} <= kinds
    assert {"github", "stripe", "standard-webhooks"} <= set(offers.kinds)
    moddy = offers.kinds["moddy"]
    assert (moddy.door, moddy.version, Path(moddy.file).name) == ("bundled", __version__, "moddy.py")


def test_a_file_in_a_plugin_folder_offers_a_kind(plugins):
    (plugins / "shop.py").write_text("__version__ = '1.2'\n" + PLUGIN.format(kind="shop"))
    (plugins / "_helper.py").write_text("raise RuntimeError")
    offers, problems = discover([plugins, plugins / "missing"])
    assert problems == []
    shop = offers.kinds["shop"]
    assert (shop.door, shop.file, shop.version) == ("dirs", str(plugins / "shop.py"), "1.2")
    assert not (plugins / "__pycache__").exists()


def test_an_installed_package_offers_a_kind(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, "acme_relay", PLUGIN.format(kind="acme"), "acme = acme_relay")
    offers, problems = discover([])
    assert problems == []
    assert (offers.kinds["acme"].door, offers.kinds["acme"].version) == ("entry point", "3.2")


def test_an_earlier_place_of_discovery_hides_the_same_kind_of_a_later_one(plugins, tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, "two_kinds", PLUGIN.format(kind="moddy"), "x = two_kinds")
    assert discover([])[0].kinds["moddy"].door == "entry point"
    (plugins / "mine.py").write_text(PLUGIN.format(kind="moddy"))
    offers, problems = discover([plugins])
    assert offers.kinds["moddy"].door == "dirs"
    assert problems == []


def test_two_plugins_with_one_kind_in_one_place_stop_the_start(plugins):
    (plugins / "a.py").write_text(PLUGIN.format(kind="shop"))
    (plugins / "b.py").write_text(PLUGIN.format(kind="shop"))
    _, (problem,) = discover([plugins])
    assert (
        str(problem)
        == f'{plugins}/b.py: offers the kind "shop", which {plugins}/a.py offers too; keep one of them'
    )


def test_a_folder_named_twice_is_read_once(plugins):
    (plugins / "shop.py").write_text(PLUGIN.format(kind="shop"))
    offers, problems = discover([plugins, plugins.parent / "." / "plugins.d"])
    assert problems == []
    assert "shop" in offers.kinds


def test_only_an_edited_file_gives_a_new_class(plugins):
    file = plugins / "shop.py"
    file.write_text(PLUGIN.format(kind="shop"))
    first = discover([plugins])[0].kinds["shop"].source
    assert discover([plugins])[0].kinds["shop"].source is first
    file.write_text(PLUGIN.format(kind="shop") + "\n# edited\n")
    assert discover([plugins])[0].kinds["shop"].source is not first


# --- presets ------------------------------------------------------------------------------------


def test_a_preset_gives_defaults_that_the_table_replaces(plugins, setup):
    (plugins / "shop.py").write_text(PLUGIN.format(kind="shop") + PRESETS)
    config = setup(
        "[sources.one]\nplugin = 'stall'\ntokens = [{ env = 'TOKEN' }]\nmax_body = '1 MiB'\n"
        "[sources.two]\nplugin = 'stall'\ntokens = [{ env = 'TOKEN' }]\npatience = '9s'\nprefix = '/two'\n"
    ).config
    assert [(source.plugin, source.settings.patience) for source in config.sources.values()] == [
        ("stall", 0.5), ("stall", 9.0),
    ]  # fmt: skip
    assert config.sources["one"].max_body == 2**20
    assert [warning.partition(": ")[2] for warning in config.warnings] == ["sources.one: is in a hurry"]


def test_the_fault_of_a_preset_is_a_problem_of_the_table_that_uses_it(plugins, setup):
    (plugins / "shop.py").write_text(PLUGIN.format(kind="shop") + PRESETS)
    with pytest.raises(ConfigError) as wrong:
        setup(
            "[sources.one]\nplugin = 'broken'\n"
            "[sources.two]\nplugin = 'wrong'\ntokens = [{ env = 'TOKEN' }]\n"
        )
    one, two = wrong.value.problems
    assert (one.line, one.key) == (2, "sources.one.plugin")
    assert one.problem == 'the preset "broken" (/broken.toml) failed: ZeroDivisionError: division by zero'
    assert (two.line, two.key) == (3, "sources.two.patience")


def test_presets_are_listed_behind_sources(plugins):
    (plugins / "shop.py").write_text(PLUGIN.format(kind="shop") + PRESETS)
    offers, problems = discover([plugins])
    assert problems == []
    listed = [(each.what, each.name) for each in offers.listed() if each.plugin.door == "dirs"]
    assert listed == [("source", "shop"), ("preset", "broken"), ("preset", "stall"), ("preset", "wrong")]
    files = {each.name: each.plugin.file for each in offers.listed()}
    assert (files["broken"], files["stall"]) == ("/broken.toml", str(plugins / "shop.py"))


def test_a_plugin_that_cannot_be_imported_leaves_nothing_behind(plugins):
    (plugins / "bad.py").write_text("raise RuntimeError")
    assert discover([plugins])[1] != []
    assert not [name for name in sys.modules if name.startswith("_relay_plugin_bad_")]


@pytest.mark.parametrize(
    ("source", "line", "message"),
    [
        ("import nonsense_module", 1, "cannot be imported: ModuleNotFoundError: No module named"),
        ("x = 1\ndef f(:\n", 2, "cannot be imported: invalid syntax"),
        ("x = 1\n\nraise SystemExit(3)", 3, "cannot be imported: SystemExit: 3"),
        ("def f():\n    return 1 / 0\nf()", 2, "cannot be imported: ZeroDivisionError"),
        ("'\0'", 0, "cannot be imported: "),
        ("x = 1", 0, "offers nothing; define one of relay_sources, relay_presets, relay_formats"),
        (
            HEAD + "@hookimpl\ndef relay_source(): return []",
            0,
            'a hook "relay_source" that does not exist, did you',
        ),
        (
            "def relay_source(): return []",
            0,
            'has a hook "relay_source" that does not exist, did you mean "relay_s',
        ),
        ("def relay_sources(): return []", 0, "defines relay_sources() without @hookimpl"),
        (
            HEAD + "@hookimpl(specname='relay_x')\ndef f(): return []",
            0,
            'has a hook "relay_x" that does not exist',
        ),
        (
            HEAD + "@hookimpl\ndef relay_sources(config): return []",
            0,
            "is not a valid plugin: Argument(s) {'config'}",
        ),
        (
            HEAD + "@hookimpl\ndef relay_sources(): return 3",
            0,
            "returned 3; expected a list of Source classes",
        ),
        (
            HEAD + "@hookimpl\ndef relay_sources(): return [3]",
            0,
            "returned a list with 3, which is not a Source class",
        ),
        (
            HEAD + "@hookimpl\ndef relay_formats(): return ['audit']",
            0,
            "relay_formats() returned a list with 'audit', which is not a Format",
        ),
        (
            HEAD + "@hookimpl\ndef relay_presets(): return [3]",
            0,
            "relay_presets() returned a list with 3, which is not a Preset",
        ),
        (
            HEAD + "@hookimpl(wrapper=True)\ndef relay_sources(): return (yield)",
            0,
            "must define relay_sources() as a plain function",
        ),
        (
            HEAD + "f = hookimpl(specname='relay_sources')(lambda: [])\n"
            "g = hookimpl(specname='relay_sources')(lambda: [])",
            0,
            "defines relay_sources() twice",
        ),
        (
            HEAD + "@hookimpl\ndef relay_events_stored(): pass",
            0,
            "must define relay_events_stored(events) as a plain function",
        ),
        (
            HEAD + "@hookimpl\nasync def relay_attempts_recorded(outcomes): pass",
            0,
            "must define relay_attempts_recorded(outcomes) as a plain function",
        ),
        (HEAD + "@hookimpl\ndef relay_sources(): return 1/0", 0, "relay_sources() raised ZeroDivisionError"),
        (HEAD + "@hookimpl\ndef relay_sources():\n yield 1", 0, "expected a list of Source classes"),
        (
            HEAD + "class Shop(Source): pass\n@hookimpl\ndef relay_sources(): return [Shop]",
            0,
            "Shop has the kind '': a name is 1 to 64",
        ),
        (
            HEAD
            + "class Shop(Source, kind='s'):\n prefix: str\n@hookimpl\ndef relay_sources(): return [Shop]",
            0,
            "Shop has a field `prefix`: that key belongs to every source",
        ),
        (
            HEAD + "class Shop(Source, kind='s'):\n x: 'Nope'\n@hookimpl\ndef relay_sources(): return [Shop]",
            0,
            "Shop has a field of an unknown type: name 'Nope' is not defined",
        ),
    ],
)
def test_a_broken_plugin_is_one_sentence_that_names_its_file(plugins, source, line, message):
    file = plugins / "bad.py"
    file.write_text(source)
    offers, (problem,) = discover([plugins])
    assert problem.file == str(file)
    assert problem.line == line
    assert message in problem.problem
    assert "\n" not in str(problem)
    assert "moddy" in offers.kinds


def test_a_broken_entry_point_is_named(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, "broken_relay", "raise RuntimeError('no')", "b = broken_relay")
    _, (problem,) = discover([])
    assert str(problem) == 'entry point "b = broken_relay": cannot be imported: RuntimeError: no'


def test_one_module_behind_two_entry_points_is_named(tmp_path, monkeypatch):
    entries = "a = twice_relay\nb = twice_relay"
    install(tmp_path / "site", monkeypatch, "twice_relay", PLUGIN.format(kind="twice"), entries)
    _, (problem,) = discover([])
    assert str(problem) == f"{tmp_path}/site/twice_relay.py: is loaded twice; keep one of its entry points"


# --- formats ------------------------------------------------------------------------------------

CRM = "[destinations.crm]\nurl = 'http://x'\nsecrets = []\n"


def offer_format(folder, file="audit.py", name="audit", content_type="text/plain", render="bytes"):
    (folder / file).write_text(FORMAT.format(name=name, content_type=content_type, render=render))


def test_a_destination_may_use_a_plugin_s_format(setup, plugins):
    offer_format(plugins)
    result = setup(CRM + "format = 'audit'")
    assert result.formats["audit"].content_type == "text/plain"
    assert list(result.formats) == [*FORMATS, "audit"]


@pytest.mark.parametrize(
    ("format_", "message"),
    [
        ("audt", 'unknown format "audt", did you mean "audit"?'),
        ("x", 'unknown format "x"; known: standard, raw, cloudevents, slack, discord, teams'),
    ],
)
def test_an_unknown_format_is_reported_with_all_other_problems(problems_of, plugins, format_, message):
    offer_format(plugins)
    levle, audit, where = problems_of(f"log.levle = 1\n{CRM}format = '{format_}'\nwhere = 5")
    assert levle.startswith("config.toml:1: log.levle: unknown key")
    assert audit.startswith(f"config.toml:5: destinations.crm.format: {message}")
    assert where.startswith("config.toml:6: destinations.crm.where: expected a table")


def test_an_unknown_format_is_not_reported_while_a_plugin_is_broken(problems_of, plugins):
    (plugins / "audit.py").write_text("def f(:")
    (problem,) = problems_of(CRM + "format = 'audit'")
    assert problem.startswith("plugins.d/audit.py:1: cannot be imported")


def test_a_format_with_a_taken_name_stops_the_start(plugins):
    offer_format(plugins, "a.py", "slack")
    offer_format(plugins, "b.py", "audit")
    offer_format(plugins, "c.py", "audit")
    assert [str(problem).replace(f"{plugins}/", "") for problem in discover([plugins])[1]] == [
        'a.py: offers the format "slack", which the relay itself offers too; give it another name',
        'c.py: offers the format "audit", which b.py offers too; give it another name',
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": ""}, "has a format called '': a name is 1 to 64"),
        ({"name": 5}, "has a format called 5: expected string"),
        (
            {"content_type": "text/plain\n"},
            "\"audit\" has the content type 'text/plain\\n', which is not a valid head",
        ),
        (
            {"content_type": b"text/plain"},
            "has the content type b'text/plain', which is not a valid header value",
        ),
        ({"render": "None"}, 'the format "audit" has a `render` that is not a plain function'),
        ({"render": "__import__('asyncio').sleep"}, "has a `render` that is not a plain function"),
        ({"render": "bytes, group='x'"}, "has a `group` that is not a plain function"),
    ],
)
def test_an_unusable_format_is_reported_in_one_sentence(plugins, wrong, message):
    offer_format(plugins, **wrong)
    _, (problem,) = discover([plugins])
    assert message in str(problem)


# --- observers ----------------------------------------------------------------------------------


def test_a_plugin_with_hooks_is_one_observer(setup, plugins):
    stored = "@hookimpl\ndef relay_events_stored(events): pass\n"
    recorded = "@hookimpl\ndef relay_attempts_recorded(outcomes): pass\n"
    (plugins / "both.py").write_text(HEAD + stored + recorded)
    (plugins / "one.py").write_text(HEAD + recorded)
    both, one = setup("").observers
    assert (both.plugin, both.events_stored.__name__) == ("both", "relay_events_stored")
    assert both.attempts_recorded.__name__ == "relay_attempts_recorded"
    assert (one.plugin, one.events_stored) == ("one", None)
    assert one.attempts_recorded is not both.attempts_recorded


# --- jobs ---------------------------------------------------------------------------------------

JOBS = """
from functools import partial
from relay.hookspecs import hookimpl
from relay.model import Job

async def work(): pass

@hookimpl
def relay_jobs():
    return [{}]
"""
JOB = "Job(name='tidy', every=60, work=work)"


def test_jobs_are_named_after_their_plugins(setup, plugins):
    (plugins / "a.py").write_text(JOBS.format(JOB + ", Job(name='ping', every=0.5, work=partial(work))"))
    (plugins / "b.py").write_text(JOBS.format(JOB))
    jobs = setup("").jobs
    assert [(job.name, job.every) for job in jobs] == [("a.tidy", 60), ("a.ping", 0.5), ("b.tidy", 60)]


def test_two_jobs_of_one_name_stop_the_start(plugins):
    (plugins / "a.py").write_text(JOBS.format(f"{JOB}, {JOB}"))
    _, (problem,) = discover([plugins])
    assert problem.problem == 'offers the job "a.tidy", which already exists; give it another name'


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("3", "relay_jobs() returned a list with 3, which is not a Job"),
        ("Job(name='a b', every=60, work=work)", "has a job called 'a b': a name is 1 to 64"),
        ("Job(name='tidy', every=0, work=work)", 'the job "tidy" has every = 0; expected seconds'),
        ("Job(name='tidy', every='1h', work=work)", "has every = '1h'; expected seconds, above 0"),
        ("Job(name='tidy', every=1e9, work=work)", "has every = 1000000000.0; expected seconds"),
        ("Job(name='tidy', every=float('nan'), work=work)", "has every = nan; expected seconds"),
        ("Job(name='tidy', every=60, work=print)", "a `work` that is not an `async def` function"),
    ],
)
def test_an_unusable_job_is_reported_in_one_sentence(plugins, job, message):
    (plugins / "a.py").write_text(JOBS.format(job))
    _, (problem,) = discover([plugins])
    assert message in problem.problem


# --- sources ------------------------------------------------------------------------------------


def test_a_source_has_the_common_keys_and_those_of_its_plugin(setup, plugins):
    (plugins / "shop.py").write_text(PLUGIN.format(kind="shop"))
    result = setup(
        "[server]\nmax_body = '1 MiB'\n[workers]\noffline_after = '60s'\n"
        + SHOP
        + "patience = '2m'\nprefix = '/acme'\nworkers = { check_every = '1s' }\nrate_limit = '10/s'\n"
    )
    shop = result.config.sources["shop"]
    assert (shop.name, shop.plugin, shop.prefix, shop.max_body) == ("shop", "shop", "/acme", 2**20)
    assert (shop.workers.offline_after, shop.workers.check_every) == (60.0, 1.0)
    assert type(shop.settings) is result.kinds["shop"].source
    assert shop.settings.patience == 120.0
    assert shop.settings.tokens.find(b"hush") is not None
    assert "hush" not in repr(result)


def test_an_unchanged_config_loads_equal(setup, plugins):
    """A reload relies on this to notice that nothing changed."""
    (plugins / "shop.py").write_text(PLUGIN.format(kind="shop"))
    first, second = setup(SHOP), setup(SHOP)
    assert first == second
    assert first != setup(SHOP + "patience = '9s'")


def test_warnings_of_plugins_and_destinations_do_not_stop_the_start(setup, plugins, tmp_path):
    (plugins / "shop.py").write_text(PLUGIN.format(kind="shop"))
    text = (
        SHOP
        + "patience = '1ms'\n[destinations.crm]\nurl = 'http://x'\nevents = ['shpo.*', 'shop.*', '*.x']\n"
    )
    warnings = [warning.replace(f"{tmp_path}/", "") for warning in setup(text).config.warnings]
    assert warnings == [
        "config.toml:1: sources.shop: is in a hurry",
        (
            "config.toml:5: destinations.crm: unsigned: it has no `secrets`, "
            "so its receiver cannot verify the sender"
        ),
        'config.toml:7: destinations.crm.events[0]: unknown source "shpo", did you mean "shop"?',
    ]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        (SHOP + "patence = '1s'", ['4: sources.shop.patence: unknown key, did you mean "patience"?']),
        (SHOP + "prefx = '/a'", ['4: sources.shop.prefx: unknown key, did you mean "prefix"?']),
        (SHOP + "settings = 1", ["4: sources.shop.settings: unknown key; known here: cors_origins, keep_"]),
        (SHOP + "patience = 5", ['4: sources.shop.patience: expected a duration such as "5s", got 5']),
        (SHOP + "prefix = 'acme/'", ["4: sources.shop.prefix: expected a path"]),
        ("[sources.shop]\nplugin = 'shop'", ["1: sources.shop.tokens: missing; it has no default"]),
        (
            "[sources.shop]\nplugin = 'shop'\ntokens = []",
            ["3: sources.shop.tokens: an empty list refuses every request"],
        ),
        (
            "[sources.shop]\nplugin = 'shop'\ntokens = ['hush']",
            ["3: sources.shop.tokens[0]: a literal secret"],
        ),
        ("[sources.a]", ["1: sources.a.plugin: missing"]),
        ("[sources.a]\nplugin = 5", ["2: sources.a.plugin: expected a string, got 5"]),
        (
            "[sources.a]\nplugin = 'lazychatt'\ntokens = []",
            ['2: sources.a.plugin: no plugin offers the kind "lazychatt", did you mean "lazychat"?'],
        ),
        (
            "[sources.a]\nplugin = 'x'",
            ['2: sources.a.plugin: no plugin offers the kind "x"; `relay plugins list` shows'],
        ),
        ("[sources.relay]\nplugin = 'adorn'", ["1: sources.relay: this name is reserved"]),
        ("[sources.Bad]\nplugin = 'adorn'", ["1: sources.Bad: a name is 1 to 64"]),
        ("sources = 5", ["1: sources: expected tables such as [sources.NAME], got 5"]),
        (
            "[sources.a]\nplugin = 'adorn'\n[sources.b]\nplugin = 'adorn'",
            ['3: sources.b: claims everything below /v1, as source "a" does; give it a `prefix`'],
        ),
        (
            "log.levle = 1\n" + SHOP + "max_body = 1",
            ["1: log.levle: unknown", "5: sources.shop.max_body: exp"],
        ),
        (
            "[destinations.crm]\nurl = 'http://x'\nevents = ['!a']\nformat = 'standart'\nwhere = 5",
            [
                '3: destinations.crm.events: "!a" excludes, but no pattern includes',
                '4: destinations.crm.format: unknown format "standart", did you mean "standard"?',
                "5: destinations.crm.where: expected a table of conditions",
            ],
        ),
        (
            "sources = 5\n[destinations.crm]\nurl = 'http://x'\nevents = ['a.*']",
            ["1: sources: expected tables"],
        ),
    ],
)
def test_a_problem_of_a_source_is_reported_at_its_line(problems_of, plugins, text, problems):
    (plugins / "shop.py").write_text(PLUGIN.format(kind="shop"))
    found = problems_of(text)
    assert len(found) == len(problems)
    for problem, expected in zip(found, problems, strict=True):
        assert problem.startswith(f"config.toml:{expected}")


@pytest.mark.parametrize(
    ("raises", "message"),
    [
        ("raise ValueError('shops need a name')", "shops need a name"),
        ("raise Invalid(field='shop', issue='is closed')", "shop: is closed"),
        ("1 / 0", 'the plugin "shop" ('),
    ],
)
@pytest.mark.parametrize("method", ["__post_init__", "warnings"])
def test_a_plugin_that_refuses_its_settings_is_a_problem_of_its_table(
    problems_of, plugins, method, raises, message
):
    (plugins / "shop.py").write_text(
        HEAD
        + f"class Shop(Source, kind='shop'):\n    def {method}(self):\n        {raises}\n"
        + "@hookimpl\ndef relay_sources(): return [Shop]\n"
    )
    (problem,) = problems_of("\n[sources.shop]\nplugin = 'shop'")
    assert problem.startswith(f"config.toml:2: sources.shop: {message}")


def test_a_plugin_names_the_keys_of_several_wrong_settings(problems_of, plugins):
    (plugins / "shop.py").write_text(
        HEAD
        + "from relay.source import SettingError\n"
        + "class Shop(Source, kind='shop'):\n"
        + "    paths: tuple[str, ...] = ()\n"
        + "    def __post_init__(self):\n"
        + "        wrong = [SettingError(f'no slash: {path}', 'paths', at)"
        + " for at, path in enumerate(self.paths)]\n"
        + "        raise ExceptionGroup('wrong paths', wrong)\n"
        + "@hookimpl\ndef relay_sources(): return [Shop]\n"
    )
    found = problems_of("\n[sources.shop]\nplugin = 'shop'\npaths = ['a',\n'b']")
    assert found == [
        "config.toml:4: sources.shop.paths[0]: no slash: a",
        "config.toml:5: sources.shop.paths[1]: no slash: b",
    ]


def test_a_prefix_allows_a_second_instance_of_a_plugin(setup):
    config = setup("[sources.a]\nplugin = 'adorn'\n[sources.b]\nplugin = 'adorn'\nprefix = '/b'").config
    assert set(config.sources) == {"a", "b"}


@pytest.mark.parametrize(
    ("route", "claim"),
    [
        ("/internal/event/notify", "POST /internal/event/notify"),
        ("/internal/event/notify", "GET /internal/event/notify"),
        ("/health", "GET /health"),
        ("/health", "POST /health"),
    ],
)
def test_two_sources_with_one_route_stop_the_start(problems_of, plugins, route, claim):
    method = claim.split()[0]
    (plugins / "shop.py").write_text(
        HEAD
        + f"class Shop(Source, kind='shop', owns=('/shop',)):\n    @route('{method}', '{route}')\n"
        + "    def event(self, incoming): pass\n@hookimpl\ndef relay_sources(): return [Shop]\n"
    )
    (problem,) = problems_of(
        "[sources.m]\nplugin = 'moddy'\ntokens = [{ env = 'TOKEN' }]\n[sources.s]\nplugin = 'shop'"
    )
    rival = "the relay itself" if route == "/health" else 'source "m"'
    assert problem == f"config.toml:4: sources.s: claims {claim}, as {rival} does; give it a `prefix`"


ROUTED = """
class Routed(Source, kind="routed"):
    path: str
    method: str = "POST"
    handler: str = "event"

    def owned(self):
        return ()

    def routes(self):
        1 / len(self.path)  # fails without a path
        return ((self.method, self.path, self.handler),)

    def event(self, incoming):
        pass

@hookimpl
def relay_sources(): return [Routed]
"""


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("/hooks/a", "/hooks/b", False),
        ("/hooks/a", "/hooks/a", True),
        ("/hooks/{shop}", "/hooks/github", True),
        ("/hooks/github", "/hooks/{shop}", True),
        ("/hooks/{shop}", "/hooks/{other}", True),
        ("/hooks/{shop}", "/hooks", False),
        ("/hooks/{shop}/paid", "/hooks/{shop}/sent", False),
        ("/{any}/paid", "/hooks/{shop}", True),
        ("/files/{name:path}", "/files/a/b", True),
        ("/files/{name:path}", "/files", False),
        ("/files/{name:path}/end", "/files/a/b/other", False),
        ("/files/{name:path}/end", "/{any}/a/b/end", True),
        ("/files/{name:path}/end", "/other/{name:path}", False),
        ("/files/{name:path}/end", "/files/a/{name:path}", True),
    ],
)
def test_two_sources_whose_routes_overlap_are_refused(problems_of, plugins, one, other, meet):
    (plugins / "routed.py").write_text(HEAD + ROUTED)
    two = f"[sources.a]\nplugin = 'routed'\npath = '{one}'\n[sources.b]\nplugin = 'routed'\npath = '{other}'"
    found = problems_of(f"{two}\nmethod = 'GET'\n[sources.c]")
    rival = 'source "a"' if one == other else f'source "a" ({one})'
    advice = "give it another `path`, or a `prefix`"
    problem = f"config.toml:4: sources.b: claims GET {other}, as {rival} does; {advice}"
    assert (problem in found) is meet
    assert len(found) == 1 + meet


def test_a_placeholder_of_a_source_may_not_stand_for_the_path_of_health(problems_of, plugins):
    (plugins / "routed.py").write_text(HEAD + ROUTED)
    (problem,) = problems_of("[sources.a]\nplugin = 'routed'\npath = '/{shop}'")
    assert "claims POST /{shop}, as the relay itself (/health) does" in problem


@pytest.mark.parametrize(
    ("route", "message"),
    [
        (("POST", "hooks", "event"), "the path 'hooks' must begin with a slash"),
        (("POST", "/hooks?a=1", "event"), "the path '/hooks?a=1' must begin with a slash"),
        (("POST", "/hooks/x{shop}", "event"), "the path '/hooks/x{shop}' must begin with a slash"),
        (("POST", "/{a}/{a}", "event"), "the path '/{a}/{a}' has a name"),
        (("POST", "/{a:path}/{b:path}", "event"), "has a name, or {name:path}, twice"),
        (("post", "/hooks", "event"), "the method of /hooks must be in capitals, got 'post'"),
        (("GET", "/none", "none"), "'none', the handler of GET /none, is not a method"),
        (("GET", "", "event"), "ZeroDivisionError"),
    ],
)
def test_a_path_that_the_relay_cannot_serve_stops_the_start(problems_of, plugins, route, message):
    method, path, handler = route
    (plugins / "routed.py").write_text(HEAD + ROUTED)
    table = f"[sources.a]\nplugin = 'routed'\nmethod = '{method}'\npath = '{path}'\nhandler = '{handler}'"
    (problem,) = problems_of(table)
    assert problem.startswith('config.toml:1: sources.a: the plugin "routed" (')
    assert message in problem


def test_an_unknown_kind_is_not_reported_while_a_plugin_is_broken(problems_of, plugins):
    (plugins / "shop.py").write_text("def f(:")
    (problem,) = problems_of(SHOP)
    assert problem.startswith("plugins.d/shop.py:1: cannot be imported")


def test_a_loaded_setup_is_immutable(setup):
    result = setup("")
    with pytest.raises(AttributeError):
        result.config = None
    assert isinstance(result, msgspec.Struct)


# --- several nodes ------------------------------------------------------------------------------


def test_a_cluster_needs_postgresql(problems_of, setup):
    head = 'state_dir = "state"\n[cluster]\nenabled = true\n[storage]\nurl = "{}"\n'
    found = problems_of(head.format("sqlite:relay.db"))
    assert [problem.partition(": ")[2] for problem in found] == [
        "cluster.enabled: several nodes need a postgresql:// URL in [storage] url",
    ]
    whatsapp = '[sources.wa]\nplugin = "whatsapp"\ntokens = [{ env = "TOKEN" }]\n'
    assert setup(head.format("postgresql://db/relay") + whatsapp).config.is_node


@pytest.mark.parametrize(
    ("url", "more", "is_node"),
    [
        ("postgresql://db/relay", "", True),
        ("postgres://db/relay", "[cluster]\nenabled = true\n", True),
        ("postgresql://db/relay", "[cluster]\nenabled = false\n", False),
        ("sqlite:relay.db", "", False),
        ("sqlite:relay.db", "[cluster]\nenabled = false\n", False),
    ],
)
def test_a_daemon_on_postgresql_is_a_node_unless_the_config_says_no(setup, url, more, is_node):
    text = f'[storage]\nurl = "{url}"\n{more}[sources.adorn]\nplugin = "adorn"\n'
    assert setup(text).config.is_node is is_node


NODE = """
[storage]
url = "postgresql://db/relay"
[sources.adorn]
plugin = "adorn"
[destinations.crm]
url = "https://crm.example.com/hook"
[destinations.erp]
url = "https://erp.example.com/hook"
"""


def test_the_effective_configuration_is_made_in_steps_of_one_destination(setup):
    more = "".join(f'[destinations.d{n}]\nurl = "https://d{n}.example.com/"\n' for n in range(20))
    config = setup(f"{NODE}\n{more}").config
    tables, largest = {}, 0
    for _ in fill(tables, config):
        made = len(tables.get("destinations", {}))
        assert made - largest in (0, 1)
        largest = made
    assert largest == len(config.destinations)
    assert tables == effective(config)


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("[storage]", 'state_dir = "other"\n[cluster]\nnode = "b"\n[storage]', set()),
        ("crm.example.com/hook", "crm.example.com/staging", {"crm"}),
        ("crm.example.com/hook", 'crm.example.com/hook"\ntimeout = "15s', set()),  # the default
        ("crm.example.com/hook", 'crm.example.com/hook"\ntimeout = "16s', {"crm"}),
        ("erp", "slack", {"erp", "slack"}),
        ('plugin = "adorn"', 'plugin = "adorn"\nrate_limit = "5/s"', {"jobs"}),
        ("[sources", '[retention]\nevents = "1d"\n[sources', {"jobs"}),
    ],
)
def test_only_shared_settings_that_differ_from_their_defaults_change_the_digests(setup, old, new, changed):
    assert old in NODE
    before = digests(setup(NODE).config)
    after = digests(setup(NODE.replace("[sources", "# a comment\n[sources", 1).replace(old, new)).config)
    found = {
        name
        for name in before.destinations.keys() | after.destinations.keys()
        if before.destinations.get(name) != after.destinations.get(name)
    }
    assert found | ({"jobs"} if before.jobs != after.jobs else set()) == changed
    assert (before.whole != after.whole) is bool(changed)


def test_the_number_of_shards_is_not_in_the_digest_of_a_destination(setup):
    before, after = (digests(setup(f"{NODE}\nshards = {number}\n").config) for number in (1, 4))
    assert before.destinations == after.destinations
    assert before.whole != after.whole


def test_a_secret_url_counts_in_the_digest_and_other_secrets_do_not(setup, tmp_path):
    text = NODE.replace(
        'url = "https://crm.example.com/hook"', "url = { file = 'url' }\nsecrets = [{ file = 'key' }]"
    )
    found = []
    for url, key in (("a", "A"), ("a", "B"), ("b", "B")):
        (tmp_path / "url").write_text(f"https://crm.example.com/{url}")
        (tmp_path / "key").write_text("whsec_" + key * 32)
        found.append(digests(setup(text).config).destinations["crm"])
    assert found[0] == found[1] != found[2]
