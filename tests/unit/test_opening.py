"""The storage that a URL names."""

import pytest

from relay.errors import RelayError
from relay.store import Stop
from relay.store.opening import make_store, offline_store, path_of


@pytest.mark.parametrize("url", ["mysql://db/relay", "sqlite", "sqlite:", "relay.db", ""])
def test_an_unsupported_url_is_named_with_one_that_works(tmp_path, clock, url):
    for use in (
        lambda: make_store(url, tmp_path, clock),
        lambda: offline_store(url, tmp_path),
        lambda: path_of(url, tmp_path),
    ):
        with pytest.raises(RelayError) as caught:
            use()
        assert str(caught.value) == (
            f'[storage] url: unsupported storage "{url}"\n  write url = "sqlite:relay.db" in config.toml'
        )


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("postgresql://db/relay?pooler=yes", 'pooler: expected one of true, false, got "yes"'),
        ("postgresql://[::1/relay", "its hosts or options cannot be read"),
        ("postgresql://", "names no database, as in"),
        ("postgresql://u:geheim@db1:5432", "names no database"),
    ],
)
def test_a_faulty_url_of_postgresql_is_named_without_its_password(tmp_path, clock, url, fault):
    with pytest.raises(RelayError) as caught:
        make_store(url, tmp_path, clock)
    assert fault in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_a_store_in_postgresql_shows_neither_user_nor_password(tmp_path, clock):
    url = "postgresql://relay:geheim@db1:5432,db2/events?sslmode=verify-full&pooler=true"
    store = make_store(url, tmp_path, clock)
    assert store.location == "postgresql://db1:5432,db2/events"
    assert [host.dsn for host in store.database.address.hosts] == [
        f"postgresql://relay:geheim@{host}/events?sslmode=verify-full" for host in ("db1:5432", "db2")
    ]
    assert store.database.address.options["statement_cache_size"] == 0
    assert store.database.address.options["target_session_attrs"] == "read-write"


def test_a_name_is_relative_to_the_state_folder(tmp_path):
    assert path_of("sqlite:relay.db", tmp_path) == tmp_path / "relay.db"
    assert path_of(f"sqlite:{tmp_path}/other.db", tmp_path / "state") == tmp_path / "other.db"


async def test_the_offline_store_reads_measures_checks_and_copies_a_closed_store(tmp_path, clock):
    store = make_store("sqlite:relay.db", tmp_path, clock)
    await store.open()
    await store.close()
    offline = offline_store("sqlite:relay.db", tmp_path)
    async with offline.read() as stored:
        assert (await stored.queries.page("events")).rows == []
    assert offline.measure(Stop()).events == 0
    failed = [check for check in offline.examine(Stop(), now=clock.wall()) if not check.ok]
    assert failed == []
    assert offline.back_up(tmp_path / "copy.db", Stop()).events == 0
