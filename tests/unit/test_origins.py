"""The origin of each setting: `relay.config.origins`."""

import pytest

from relay.config.binding import Binder
from relay.config.document import read
from relay.config.effective import effective, with_origins
from relay.config.origins import origins_of
from relay.config.tables import bind_tables

MAIN = """\
development = true

[server]
listen = "127.0.0.1:0"

[destinations.crm]
url = { env = "CRM_URL" }
secrets = [
  { file = "crm.secret" },
  { credential = "old" },
]
events = ["*"]

[destinations.crm.retry]
schedule = ["1s"]
"""
PART = """\
log.level = "debug"

[destinations.erp]
url = "http://localhost"
events = ["*"]
"""
PLACES = {
    "development": "config.toml:1",
    "server.listen": "config.toml:4",
    "destinations.crm.url": "config.toml:7, environment variable CRM_URL",
    "destinations.crm.secrets": "config.toml:8, file crm.secret, credential old",
    "destinations.crm.events": "config.toml:12",
    "destinations.crm.retry": "config.toml:14",
    "log.level": "conf.d/erp.toml:1",
    "destinations.erp.url": "conf.d/erp.toml:4",
    "destinations.erp.events": "conf.d/erp.toml:5",
}


@pytest.fixture
def bound(tmp_path):
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "config.toml").write_text(MAIN)
    (tmp_path / "conf.d" / "erp.toml").write_text(PART)

    def bind(**environ):
        return bind_tables(Binder(read(tmp_path / "config.toml"), environ, lenient=True))

    return bind


def test_each_key_that_is_set_has_its_file_line_and_the_place_of_its_secret(bound):
    assert bound().origins == PLACES
    assert bound(STATE_DIRECTORY="/var/lib/relay").origins == {
        **PLACES, "state_dir": "environment variable STATE_DIRECTORY",
    }  # fmt: skip


def test_other_keys_have_their_default(bound):
    config = bound()
    lines = dict(with_origins(effective(config), config.origins))
    assert lines['level = "debug"'] == "conf.d/erp.toml:1"
    assert lines['url = "<secret>"'].endswith("CRM_URL")
    assert {place for line, place in lines.items() if line.startswith("concurrency = ")} == {"default"}
    assert (lines["[server]"], lines[""]) == ("", "")


@pytest.mark.parametrize("name", ["credential", "env", "file"])
def test_the_value_of_a_header_is_not_the_place_of_a_secret(tmp_path, name):
    path = tmp_path / "config.toml"
    path.write_text(f"""[destinations.crm]\nheaders = {{ {name} = "hunter2" }}\n""")
    assert origins_of(read(path), {}) == {"destinations.crm.headers": "config.toml:2"}
    path.write_text(f"""[destinations.crm.headers]\n{name} = {{ file = "token" }}\n""")
    assert origins_of(read(path), {}) == {"destinations.crm.headers": "config.toml:1, file token"}
