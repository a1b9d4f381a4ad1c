"""config.toml as a whole, without its sources."""

import pytest

from relay.config.binding import Binder
from relay.config.document import read
from relay.config.schema import AdminToken, Config, RetryConfig
from relay.config.secrets import Secret
from relay.config.tables import bind_tables, named_tables

CRM = '[destinations.crm]\nurl = "https://crm.example/hooks"\n'
KEY = "whsec_bGlrZSBhIHNlY3JldCwgYnV0IGxvbmdlciB0aGFuIHRoYXQ="


@pytest.fixture
def bind(tmp_path):
    def run(text, **environ):
        path = tmp_path / "config.toml"
        path.write_text(text)
        binder = Binder(read(path), environ)
        return bind_tables(binder), binder

    return run


def reported(binder):
    return [f"{problem.line}: {problem.key}: {problem.problem}" for problem in sorted(binder.problems)]


def test_an_empty_file_gives_the_defaults(bind, tmp_path):
    config, binder = bind("")
    assert binder.problems == []
    assert config.path == tmp_path / "config.toml"
    assert config.state_dir == tmp_path
    assert config.plugins.dirs == (tmp_path / "plugins.d",)
    assert config.server == Config(path=tmp_path, state_dir=tmp_path).server


def test_every_table_is_read(bind, tmp_path):
    config, binder = bind(
        """
        state_dir = "state"
        server.listen = "[::1]:0"
        admin = { listen = "", tokens = [{ env = "ADMIN" }] }
        storage.durability = "normal"
        log.level = "debug"
        plugins.dirs = ["mine", "/ours"]
        workers.offline_after = "2m"
        """,
        ADMIN="hush",
    )
    assert binder.problems == []
    assert config.state_dir == tmp_path / "state"
    assert config.server.listen == "[::1]:0"
    assert (config.admin.listen, config.admin.tokens) == ("", (AdminToken(secret=Secret("hush")),))
    assert config.storage.durability == "normal"
    assert config.log.level == "debug"
    assert [str(path) for path in config.plugins.dirs] == [str(tmp_path / "mine"), "/ours"]
    assert config.workers.offline_after == 120


@pytest.mark.parametrize(
    ("text", "environ", "folder"),
    [
        ("", {}, ""),
        ("", {"STATE_DIRECTORY": "/var/lib/relay"}, "/var/lib/relay"),
        ("", {"STATE_DIRECTORY": "/var/lib/relay:/var/lib/other"}, "/var/lib/relay"),
        ('state_dir = "here"', {"STATE_DIRECTORY": "/var/lib/relay"}, "here"),
    ],
)
def test_the_state_directory_comes_from_config_systemd_or_the_folder_of_the_config(
    bind, tmp_path, text, environ, folder
):
    config, _ = bind(text, **environ)
    assert config.state_dir == tmp_path / folder


def test_a_destination_has_its_keys_and_the_defaults(bind, tmp_path):
    (tmp_path / "ca.pem").write_text("x")
    config, binder = bind(
        "sources.adorn.plugin = 'adorn'\n"
        + CRM
        + """
        events = ["adorn.*", "!adorn.attire.*"]
        where = [{ "data.sale_made" = true }]
        secrets = [{ env = "NEXT" }, { env = "KEY" }]
        headers = { Authorization = { env = "AUTH" }, X-Team = "blue" }
        timeout = "3s"
        ca_file = "ca.pem"
        retry = { jitter = 0 }
        """,
        KEY=KEY,
        NEXT=KEY.removeprefix("whsec_"),
        AUTH="Bearer hush",
    )
    assert binder.problems == []
    assert binder.warnings == []
    crm = config.destinations["crm"]
    assert crm.name == "crm"
    assert crm.where == [{"data.sale_made": True}]
    assert [secret.reveal() for secret in crm.secrets] == [KEY.removeprefix("whsec_"), KEY]
    assert crm.headers == {"Authorization": Secret("Bearer hush"), "X-Team": Secret("blue")}
    assert (crm.timeout, crm.connect_timeout, crm.concurrency) == (3.0, 5.0, 8)
    assert crm.ca_file == tmp_path / "ca.pem"
    assert crm.retry == RetryConfig(jitter=0.0)
    assert KEY not in repr(config)
    assert "hush" not in repr(config)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("developmen = true", '1: developmen: unknown key, did you mean "development"?'),
        ("development = 'yes'", '1: development: expected true or false, got "yes"'),
        ("path = 'x'", "1: path: unknown key"),
        ("state_dir = 5", "1: state_dir: expected a path, got 5"),
        ("server = 5", "1: server: expected a table, got 5"),
        ("[server]\nmax_boddy = '2 MiB'", '2: server.max_boddy: unknown key, did you mean "max_body"?'),
        ("[server]\nmax_body = '0 B'", "2: server.max_body: must be more than 0"),
        ("[server]\nlisten = ''", '2: server.listen: expected "host:port"'),
        ("[server]\ntrusted_proxies = ['x']", "2: server.trusted_proxies[0]: expected an address"),
        ('[admin]\nsocket = "a\\n"', "2: admin.socket: a file name must not contain control characters"),
        ('[backup]\ndir = "a\\n"', "2: backup.dir: a file name must not contain control characters"),
        ("[admin]\nlisten = '127.0.0.1:8080'", "2: admin.listen: the same address as [server] listen"),
        (
            "[storage]\nurl = 'postgresql://db/relay'\n[backup]\nevery = '1d'",
            "4: backup.every: the relay makes no backups of a PostgreSQL database",
        ),
        ("[storage]\nurl = 'pg:x'", '2: storage.url: expected "sqlite:"'),
        ("[workers]\noffline_after = '0s'", "2: workers.offline_after: must be more than 0"),
        ("destinations = 5", "1: destinations: expected tables such as [destinations.NAME], got 5"),
        ("\n[destinations.CRM]\nurl = 'http://x'", "2: destinations.CRM: a name is 1 to 64"),
        ("\n[destinations.crm]", "2: destinations.crm.url: missing"),
        ("[destinations.crm]\nurl = 'crm'", "2: destinations.crm.url: expected a URL"),
        (CRM + "name = 'x'", "3: destinations.crm.name: unknown key"),
        (CRM + "timeout = 15", '3: destinations.crm.timeout: expected a duration such as "15s", got 15'),
        (CRM + "shards = 17", "3: destinations.crm.shards: must be at most 16, got 17"),
        (
            CRM + "shards = 9",
            "3: destinations.crm.shards: 9 shards need a `concurrency` of at least 9, not 8",
        ),
        (
            CRM + 'shards = 4\nrate_limit = "3/s"',
            "3: destinations.crm.shards: 4 shards need a `rate_limit` of at least 4 attempts per period",
        ),
        (
            CRM + "shards = 2\ngroup_by = []",
            "3: destinations.crm.shards: `group_by = []` makes one group of all deliveries",
        ),
        (CRM + "concurrency = 0", "3: destinations.crm.concurrency: must be at least 1, got 0"),
        (CRM + "retry = { jitter = 1.5 }", "3: destinations.crm.retry.jitter: must be at most 1, got 1.5"),
        (CRM + "events = ['a.*', '']", "3: destinations.crm.events[1]: a pattern must not be empty"),
        (CRM + "headers = { Host = 'x' }", "3: destinations.crm.headers.Host: the relay sets this"),
        (CRM + 'headers = { X = "hush\\n" }', "3: destinations.crm.headers.X: a header's value"),
        (CRM + "secrets = [{ env = 'SHORT' }]", "3: destinations.crm.secrets[0]: expected a signing secret"),
        (CRM + "ca_file = 'no.pem'", "3: destinations.crm.ca_file: "),
    ],
)
def test_an_invalid_value_is_a_problem_at_its_line(bind, text, problem):
    _, binder = bind(text, SHORT="hush")
    (found,) = reported(binder)
    assert found.startswith(problem)
    assert "hush" not in found


def test_one_wrong_table_does_not_hide_the_problems_of_the_others(bind):
    _, binder = bind("[server]\nlisten = 1\n[log]\nlevel = 'x'\n[destinations.a]\n[destinations.b]\n")
    keys = [problem.key for problem in sorted(binder.problems)]
    assert keys == ["server.listen", "log.level", "destinations.a.url", "destinations.b.url"]


def test_a_connection_for_notifications_without_postgresql_is_a_warning(bind):
    _, binder = bind("[storage]\nlisten_url = 'postgresql://db/relay'")
    (warning,) = map(str, binder.warnings)
    assert "2: storage.listen_url: no effect: `url` is not a PostgreSQL database" in warning


def test_a_destination_without_secrets_is_a_warning(bind, tmp_path):
    _, binder = bind(CRM)
    assert binder.problems == []
    (warning,) = map(str, binder.warnings)
    assert warning.startswith(f"{tmp_path}/config.toml:1: destinations.crm: unsigned")


def test_shards_without_a_cluster_are_a_warning(bind, tmp_path):
    postgres = '[storage]\nurl = "postgresql://db/relay"\n'
    for cluster, number in ((postgres, 1), (f"{postgres}[cluster]\nenabled = false\n", 2), ("", 2)):
        _, binder = bind(f"{CRM}shards = 2\n{cluster}")
        assert binder.problems == []
        assert len(binder.warnings) == number
    expected = f"{tmp_path}/config.toml:3: destinations.crm.shards: no effect: this daemon sends all"
    assert any(str(warning).startswith(expected) for warning in binder.warnings)
    _, binder = bind(f'{CRM}shards = 2\n[storage]\nurl = "postgresql://relay:secret@db/relay"\n')
    assert [problem.key for problem in binder.problems] == ["storage.url"]
    assert len(binder.warnings) == 1  # nothing is known about the cluster


def test_invalid_names_are_reported_at_their_lines(bind):
    _, binder = bind("[sources.good]\n[sources.'bad name']\n")
    assert set(named_tables(binder, "sources")) == {"good", "bad name"}
    assert [problem.key for problem in binder.problems] == ['sources."bad name"']
