"""Connections to PostgreSQL: URLs, hosts, TLS, passwords, PgBouncer, and servers that do not answer."""

import asyncio
import os
import re
import shutil
import signal
import socket
import time
from abc import ABCMeta
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest
from certificates import Certificates
from click.testing import CliRunner
from postgres import USER, Pooler, database_of, name_of, needs_pooler, needs_postgres, server, start
from stores import accept
from support import FakeClock, until

from relay.base.clock import SystemClock
from relay.cli import main
from relay.config import validators
from relay.config.secrets import Url
from relay.errors import RelayError, StorageError, StorageUnavailableError
from relay.store import opening
from relay.store.postgres import connection, wakeups, writer
from relay.store.postgres.connection import Connection, Database, connect, read_url, refused

PASSWORD = "hunter2"


# --- URLs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "hosts", "database"),
    [
        ("postgresql://relay@db/relay", ["db"], "relay"),
        ("postgres://relay@db1,db2:5433/relay?sslmode=verify-full", ["db1", "db2:5433"], "relay"),
        ("postgresql://relay@[::1]:5433,db/relay", ["[::1]:5433", "db"], "relay"),
        ("postgresql:///relay?host=/run/postgresql", ["/run/postgresql"], "relay"),
        ("postgresql:///?host=a,b&port=1,2&dbname=x", ["a", "b"], "x"),
        ("postgresql://relay@/relay", ["the local server"], "relay"),
    ],
)
def test_each_host_of_a_url_gets_its_own_address(url, hosts, database):
    address = read_url(url)
    assert [host.name for host in address.hosts] == hosts
    assert address.database == database
    assert all(len(host.dsn.split("@")) <= 2 for host in address.hosts)
    assert "db2" not in address.hosts[0].dsn
    if "port=" in url:
        assert [host.dsn.partition("?")[2] for host in address.hosts] == [
            "host=a&port=1&dbname=x",
            "host=b&port=2&dbname=x",
        ]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (f"postgresql://relay:12/{PASSWORD}@db/relay", "%2F"),
        (f"postgresql://relay:{PASSWORD}/1@db/relay", "%2F"),
        (f"postgresql://relay:{PASSWORD}@1@db/relay", "%40"),
        (f"postgresql://relay:12#{PASSWORD}@db/relay", "%23"),
        (f"postgresql://relay:12?{PASSWORD}@db/relay", "%3F"),
        (f"postgresql://relay:{PASSWORD}@db:port/relay", "cannot be read"),
        (f"postgresql://relay:{PASSWORD}@db:70000/relay", "a port is not between 1 and 65535"),
        (f"postgresql://relay:{PASSWORD}@db", "names no database"),
        (f"postgresql://relay:{PASSWORD}@db/relay?sslmode=verify", "sslmode: expected one of disable, allow"),
        (f"postgresql://relay:{PASSWORD}@db/relay?target_session_attrs=rw", "target_session_attrs: expected"),
        (f"postgresql://relay:{PASSWORD}@db/relay?pooler=yes", "pooler: expected one of true, false"),
        (f"postgresql://relay:{PASSWORD}@db:0/relay", "a port is not between 1 and 65535"),
        (f"postgresql://relay:{PASSWORD}@db..example/relay", "a part of a host name is empty"),
        (f"postgresql://relay:{PASSWORD}@db1,{'d' * 64}.example:1/relay", "or longer than 63"),
        (f"postgresql:///relay?host={'d' * 64}&password={PASSWORD}", "or longer than 63"),
        (f"postgresql:///relay?host=db&port=x&password={PASSWORD}", "cannot be read"),
        (f"postgresql:///relay?host=db&port=70000&password={PASSWORD}", "a port is not between"),
        (
            f"postgresql:///relay?host=a,b&port=1,2,3&password={PASSWORD}",
            "expected one port, or one for each",
        ),
        (f"postgresql://relay:{PASSWORD}@db/re%00lay", "contains %00"),
        (f"postgresql://relay:{PASSWORD}@db/relay?channel_binding=require", "option channel_binding: remove"),
        (f"postgresql://relay:{PASSWORD}@db/relay?connect_timeout=10", "option connect_timeout: remove it"),
        (f"postgresql://relay:{PASSWORD}@db/relay?sslrootcert=ca.pem", "sslrootcert: expected an absolute"),
    ],
)
def test_an_invalid_url_is_refused_without_its_password(url, problem):
    with pytest.raises(RelayError) as caught:
        read_url(url)
    with pytest.raises(ValueError, match=r".") as checked:  # what config.toml is checked with
        validators.storage(Url(url, is_hidden=True))
    for text in (str(caught.value), str(checked.value)):
        assert problem in text
        assert PASSWORD not in text


def test_a_missing_certificate_file_is_reported_by_the_check_of_the_configuration(tmp_path):
    url = f"postgresql://db/relay?sslmode=verify-full&sslrootcert={tmp_path}/ca.pem"
    with pytest.raises(ValueError, match=r"ca\.pem cannot be read: No such file"):
        validators.storage(Url(url))
    assert validators.storage(Url("postgresql://db/relay?sslrootcert=system"))


def test_certificate_files_that_cannot_be_used_are_reported_by_the_check_of_the_configuration(certificates):
    def check(**options):
        files = "&".join(f"{name}={path}" for name, path in options.items())
        return validators.storage(Url(f"postgresql://db/relay?sslmode=verify-full&{files}"))

    assert check(sslrootcert=certificates.ca, sslcert=certificates.path("client"), sslkey=certificates.key)
    assert check(sslrootcert="system", sslcert=certificates.path("client"), sslkey=certificates.key)
    with pytest.raises(ValueError, match=r"key\.pem has no certificate in PEM form"):
        check(sslrootcert=certificates.key)
    with pytest.raises(ValueError, match=r"ca\.pem has no private key in PEM form"):
        check(sslcert=certificates.path("client"), sslkey=certificates.ca)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://relay@[::1]:5433/relay",
        "postgresql://relay@db1,db2.example:5433/relay",
        "postgresql:///relay?host=/run/postgresql&port=5433",
        "postgresql:///relay?host=db1,db2&port=5432,5433",
        "postgresql://relay@bücher.example/relay",
    ],
)
def test_valid_hosts_of_postgresql_are_accepted(url):
    assert validators.storage(Url(url)).reveal() == url


def test_an_address_hides_its_password():
    address = read_url(f"postgresql://relay:{PASSWORD}@db1,db2/relay?sslpassword={PASSWORD}")
    assert PASSWORD not in repr(address)
    assert PASSWORD not in address.location


@pytest.mark.parametrize(
    "url", [f"postgresql://relay:{PASSWORD}@db/relay", f"postgresql://db/x?password={PASSWORD}"]
)
def test_a_password_among_the_arguments_of_a_command_is_refused(url):
    """Other users see the arguments of a process."""
    for arguments in (["db", "move", "sqlite:relay.db", url], ["db", "move", url, "sqlite:relay.db"]):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert "the URL contains a password" in result.output
        assert PASSWORD not in result.output


# --- several hosts ------------------------------------------------------------------------------------


@pytest.fixture
def silent():
    """The address of a host that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def database(tmp_path):
    return name_of(database_of(tmp_path)).partition("?")[0]


async def test_a_host_that_does_not_answer_leaves_time_for_the_next_one(silent, database, monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 2.0)
    address = read_url(f"postgresql://{USER}@{silent},127.0.0.1:{server().port}/{database}")
    assert address.ordered()[0].name == silent
    async with asyncio.timeout(60):
        opened = await connect(address, writes=True)
    assert await opened.value("SELECT 1") == 1
    await opened.close()
    assert address.ordered()[0].name == f"127.0.0.1:{server().port}"  # it comes first the next time


async def test_an_error_names_every_host_and_a_refused_login_decides_the_hint(silent, monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 1.0)
    address = read_url(f"postgresql://{USER}@{silent},127.0.0.1:{server().port}/nowhere")
    with pytest.raises(OSError, match="no answer within") as caught:
        await connect(address, writes=True)
    error = refused(address, caught.value)
    assert f"{silent}: no answer within 0.5 s" in error.message
    assert 'database "nowhere" does not exist' in error.message
    assert error.hint.endswith("createdb --owner=postgres --encoding=UTF8 --template=template0 nowhere")


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("28P01", "in ~/.pgpass with mode 0600"),
        ("3F000", "CREATE SCHEMA"),
        ("42501", 'ALTER DATABASE "Relay" OWNER TO relay;'),
        ("42P01", "restore a backup"),
        ("53300", "max_connections"),
        ("42601", "the server's log"),
    ],
)
def test_an_error_of_the_server_has_a_hint_to_type(code, hint):
    address = read_url("postgresql://relay:hunter2@db/Relay")
    error = asyncpg.PostgresError.new({"C": code, "M": "something failed"})
    assert hint in refused(address, error).hint
    assert "hunter2" not in refused(address, error).hint


def test_a_standby_is_not_reported_as_a_server_that_does_not_run():
    error = asyncpg.TargetServerAttributeNotMatched("none matches")
    assert "promote this server" in refused(read_url("postgresql://db/relay"), error).hint


async def test_a_store_that_cannot_be_opened_gives_its_hint_to_every_use(tmp_path, clock):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"postgresql://{USER}@127.0.0.1:{closed.getsockname()[1]}/relay"
        store = opening.make_store(url, tmp_path, clock)
        with pytest.raises(StorageUnavailableError):
            await store.open()
    for use in (store.queries.find("events", limit=1), store.events.append(accept(clock))):
        with pytest.raises(StorageUnavailableError, match=r"the store cannot be opened: ") as caught:
            await use
        assert caught.value.hint == "check that PostgreSQL runs and accepts connections from this machine"


@needs_postgres
async def test_a_database_that_accepts_no_connections_may_accept_them_later(tmp_path, database):
    server().run(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
    store = opening.make_store(server().url(database), tmp_path, SystemClock())
    with pytest.raises(StorageUnavailableError, match="not currently accepting connections"):
        await store.open()


async def test_a_port_without_a_server_is_reported_in_words():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = read_url(f"postgresql://{USER}@127.0.0.1:{closed.getsockname()[1]}/relay")
        with pytest.raises((OSError, RelayError)) as caught:
            await connect(address, writes=True)
    assert refused(address, caught.value).message.endswith(": Connection refused")


# --- TLS and passwords --------------------------------------------------------------------------------

HBA = "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server that accepts only TLS and a password over TCP, and its certificates."""
    folder = tmp_path_factory.mktemp("guarded")
    made = Certificates(folder)
    base = server().folder.parent / f"relay-guarded-{os.getpid()}"
    base.mkdir()
    for source, name in ((made.path("good"), "cert.pem"), (made.key, "key.pem")):
        shutil.copy(source, base / name)
        (base / name).chmod(0o600)
        if os.geteuid() == 0:
            shutil.chown(base / name, USER, USER)
    tls = ("ssl=on", f"ssl_cert_file={base}/cert.pem", f"ssl_key_file={base}/key.pem", "shared_buffers=4MB")
    running = start(base, settings=tls)
    running.run(f"CREATE ROLE relay LOGIN PASSWORD '{PASSWORD}'")
    running.run("CREATE DATABASE relay OWNER relay")
    (base / "data" / "pg_hba.conf").write_text(HBA)
    running.run("SELECT pg_reload_conf()")
    return running, made


async def test_tls_and_the_password_come_from_the_url(guarded, tmp_path, monkeypatch):
    running, made = guarded
    monkeypatch.setenv("HOME", str(tmp_path))

    def url(password=PASSWORD, host="127.0.0.1", **options):
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://relay:{password}@{host}:{running.port}/relay?{query}"

    await until(lambda: "hostssl" in (running.folder / "data" / "pg_hba.conf").read_text())
    verified = {"sslmode": "verify-full", "sslrootcert": made.ca}
    opened = await connect(read_url(url(**verified)), writes=True)
    assert await opened.value("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()") is True
    await opened.close()

    for wrong, problem, hint in (
        (url(sslmode="verify-full", sslrootcert="system"), "certificate verify failed", "sslrootcert"),
        (url(sslmode="verify-full", sslrootcert=made.path("self_signed")), "verify failed", "sslrootcert"),
        (url(sslmode="verify-full"), "root certificate file", "sslrootcert=system"),
        (url(sslmode="disable"), "no pg_hba.conf entry", "pg_hba.conf"),
        (url("wrong-hunter3", **verified), "password authentication failed", "check the user"),
    ):
        store = opening.make_store(wrong, tmp_path, SystemClock())
        with pytest.raises(StorageError) as caught:
            await store.open()
        shown = f"{caught.value.message} {caught.value.hint}"
        assert problem in shown
        assert hint in shown
        assert PASSWORD not in shown
        assert "hunter3" not in shown


# --- calls that get no answer -------------------------------------------------------------------------


async def test_every_call_ends_when_nothing_answers(silent, monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.5)
    database = Database(read_url(f"postgresql://{USER}@{silent}/relay"))
    database.set_open()
    began = time.monotonic()
    with pytest.raises(StorageUnavailableError, match=r"no answer within 0\.5 s"):
        await database.value("SELECT 1")
    assert time.monotonic() - began < 5


@needs_postgres
async def test_a_reader_that_is_lent_when_the_database_closes_is_closed_afterwards(database):
    readers = Database(read_url(server().url(database)))
    readers.set_open()
    async with readers.reader() as lent:
        await readers.close()
        assert await lent.value("SELECT 1") == 1
    assert lent.is_closed


@needs_pooler
async def test_a_suspended_pooler_stops_writes_and_reads_until_it_continues(tmp_path, monkeypatch):
    pooler = Pooler(server())
    store = opening.make_store(pooler.url(name_of(database_of(tmp_path))), tmp_path, clock := FakeClock())
    try:
        await store.open()
        await store.events.append(accept(clock, b"{}"))
        for call in (Connection.fetch, Connection.execute):
            monkeypatch.setitem(call.__kwdefaults__, "seconds", 2.0)
        monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 2.0)
        monkeypatch.setattr(writer, "RESOLVE_FOR", 2.0)
        os.kill(pooler.process.pid, signal.SIGSTOP)
        async with asyncio.timeout(30):
            with pytest.raises(StorageUnavailableError):
                await store.events.append(accept(clock, b"{}"))
            with pytest.raises(StorageUnavailableError):
                await store.upkeep.measure()
        assert store.failure == f"{store.location}: no answer within 2 s"
        monkeypatch.undo()
        os.kill(pooler.process.pid, signal.SIGCONT)
        await until(lambda: store.failure is None)
        await store.events.append(accept(clock, b"{}"))
        assert (await store.upkeep.measure()).events == 2
    finally:
        os.kill(pooler.process.pid, signal.SIGCONT)
        await store.close()
        pooler.stop()


@needs_postgres
async def test_the_values_of_an_array_are_sent_without_a_look_at_abstract_classes(tmp_path, monkeypatch):
    database = await connect(read_url(database_of(tmp_path)), writes=False)
    check, checked = ABCMeta.__instancecheck__, []
    try:
        values = [f"value {number}" for number in range(500)]
        await database.fetch("SELECT unnest($1::text[])", values)
        monkeypatch.setattr(ABCMeta, "__instancecheck__", lambda *args: checked.append(args) or check(*args))
        rows = await database.fetch("SELECT unnest($1::text[])", values)
        monkeypatch.undo()
    finally:
        await database.close()
    assert [value for (value,) in rows] == values
    assert len(checked) < 100


def test_the_types_of_all_arrays_in_statements_are_known():
    folder = Path(connection.__file__).parent
    used = {name for file in folder.glob("*.py") for name in re.findall(r"::(\w+)\[\]", file.read_text())}
    assert used == set(connection.ARRAYS)


@needs_postgres
async def test_no_session_asks_for_the_types_of_arrays(database, monkeypatch):
    """With JIT, the answer takes seconds."""
    asked = []

    async def ask(_raw, types, _timeout):
        asked.append(types)
        raise AssertionError(types)

    monkeypatch.setattr(asyncpg.Connection, "_introspect_types", ask)
    opened = await connect(read_url(server().url(database)), writes=False)
    try:
        for name, (oid, element) in connection.ARRAYS.items():
            found = await opened.fetch(
                f"SELECT '{name}[]'::regtype::oid, '{name}'::regtype::oid, $1::{name}[]", []
            )
            assert tuple(found[0]) == (oid, element, [])
        assert await opened.value("SELECT $1::bigint[]", [1, None, -(2**63)]) == [1, None, -(2**63)]
    finally:
        await opened.close()


# --- PgBouncer ----------------------------------------------------------------------------------------


@needs_pooler
async def test_nodes_behind_a_pooler_share_its_sessions_and_poll(tmp_path):
    """Every transaction may get another session, so nothing may depend on a session."""
    pooler = Pooler(server(), sessions=3)
    url = pooler.url(name_of(database_of(tmp_path)))
    clock = SystemClock()
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    stores = [opening.make_store(url, folder, clock, node=folder.name, cluster=30.0) for folder in folders]
    try:
        for store in stores:
            await store.open()
        polled = []
        stores[0].nodes._wake_ups._on_wake_up = polled.append
        owned = await asyncio.gather(*(store.nodes.own({"crm": 1.0}, ["retention"]) for store in stores))
        assert {node.name for node in await stores[1].nodes.all()} == {"a", "b"}
        sent = [store.events.append(accept(clock, b"{}")) for store in stores for _ in range(40)]
        reads = [store.upkeep.measure() for store in stores for _ in range(10)]
        await asyncio.gather(*sent, *reads)
        assert (await stores[0].upkeep.measure()).events == 80
        assert sum(len(each.until) for each in owned) <= 1
        await until(lambda: polled)
        assert polled[0].is_poll
        assert not stores[0].nodes._wake_ups.arrives
    finally:
        for store in stores:
            await store.close()
        pooler.stop()


class Wire:
    """A TCP proxy on loopback in front of a server, which can be cut."""

    async def __aenter__(self):
        self.ends = []
        self.listener = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        self.port = self.listener.sockets[0].getsockname()[1]
        return self

    async def connect(self, reader, writer):
        if self.ends is None:
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection("127.0.0.1", server().port)
        self.ends += [writer, back]
        await asyncio.gather(self.copy(reader, back), self.copy(there, writer))

    async def copy(self, reader, writer):
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.transport.abort()

    def cut(self):
        """Reset all connections, and refuse new ones until `mend`."""
        for end in self.ends or ():
            end.transport.abort()
        self.ends = None

    def mend(self):
        self.ends = []

    async def __aexit__(self, *_):
        self.cut()
        self.listener.close()


@needs_pooler
async def test_a_node_behind_a_pooler_listens_on_a_direct_connection(tmp_path, caplog):
    """While that is lost, the node polls, and its announcements still reach the other nodes."""
    pooler = Pooler(server())
    name = name_of(database_of(tmp_path))
    options = {"node": "a", "cluster": 30.0}
    (tmp_path / "b").mkdir()
    async with Wire() as wire:
        listen = f"postgresql://{USER}@127.0.0.1:{wire.port}/{name}?sslmode=disable"
        stores = [
            opening.make_store(pooler.url(name), tmp_path, SystemClock(), listen_url=listen, **options),
            opening.make_store(server().url(name), tmp_path / "b", SystemClock(), **options),
        ]
        try:
            for store in stores:
                await store.open()
            wake_ups = [store.nodes._wake_ups for store in stores]
            heard = [[], []]
            for each, messages in zip(wake_ups, heard, strict=True):
                each._on_wake_up = messages.append

            async def exchange(*, polls):
                """Let each node announce a lane to the other."""
                for sender, messages, lane in ((1, heard[0], "to-a"), (0, heard[1], "to-b")):
                    stores[sender].nodes.announce([lane])
                    await until(
                        lambda messages=messages, lane=lane: any(
                            lane in each.lanes or (polls and each.is_poll) for each in messages
                        )
                    )
                assert any("to-b" in each.lanes for each in heard[1])
                heard[0].clear()
                heard[1].clear()

            await until(lambda: all(each.arrives for each in wake_ups))
            assert stores[0].nodes.cautions() == ()
            heard[0].clear()
            await exchange(polls=False)
            wire.cut()
            await until(stores[0].nodes.cautions)
            assert "notifications of PostgreSQL do not arrive" in stores[0].nodes.cautions()[0].what
            assert not wake_ups[0].arrives
            await exchange(polls=True)
            wire.mend()
            await until(lambda: wake_ups[0].arrives)
            assert stores[0].nodes.cautions() == ()
            assert "polling every 0.25 s instead" in caplog.text
        finally:
            for store in stores:
                await store.close()
            pooler.stop()


@needs_pooler
async def test_a_node_that_listens_in_another_database_reports_it(tmp_path, monkeypatch):
    monkeypatch.setattr(wakeups, "PROBE_TIMEOUT", 0.1)
    pooler = Pooler(server())
    url, other = pooler.url(name_of(database_of(tmp_path))), server().url("postgres")
    store = opening.make_store(url, tmp_path, SystemClock(), listen_url=other, cluster=30.0)
    try:
        await store.open()
        await until(store.nodes.cautions)
        assert "a test notification was not received within 0.1 s" in store.nodes.cautions()[0].what
    finally:
        await store.close()
        pooler.stop()


@needs_pooler
@pytest.mark.parametrize(
    ("options", "hint"), [("", "add pooler=true"), ("pooler=true&search_path=x", "ALTER ROLE … SET")]
)
async def test_a_pooler_that_is_not_declared_is_recognized(tmp_path, options, hint):
    pooler = Pooler(server())
    url = pooler.url(name_of(database_of(tmp_path))).replace("pooler=true", options)
    try:
        with pytest.raises(StorageError) as caught:
            await opening.make_store(url, tmp_path, SystemClock()).open()
        assert hint in caught.value.hint
    finally:
        pooler.stop()


async def test_a_transaction_of_a_lost_machine_ends_by_itself(database):
    """Its locks would stop the other nodes until the end of TCP's keepalive."""
    opened = await connect(read_url(server().url(database)), writes=True)
    async with opened.transaction():
        assert await opened.value("SHOW idle_in_transaction_session_timeout") == "5s"
    assert await opened.value("SHOW idle_in_transaction_session_timeout") == "0"
    await opened.close()


@pytest.mark.parametrize("ending", ["timeout", "cancel"])
async def test_a_call_that_is_given_up_leaves_no_session_on_the_server(ending):
    """Otherwise each renewal of a lease leaves one while no standby answers, until the server is full."""
    folder = server().folder.parent / f"relay-unanswered-{ending}-{os.getpid()}"
    private = start(folder, settings=("synchronous_standby_names=nowhere", "shared_buffers=4MB"))
    address = read_url(private.url("postgres"))
    observer = await connect(address, writes=False)
    sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'UPDATE t %'"

    async def wait_for(count):
        deadline = time.monotonic() + 20
        while await observer.value(sql) != count:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    try:
        await observer.execute("SET synchronous_commit = local; CREATE TABLE t AS SELECT 1 AS x")
        opened = [await connect(address, writes=True) for _ in range(3)]
        seconds = 2.0 if ending == "timeout" else 30.0
        update = "UPDATE t SET x = x + 1"  # the first one waits for a standby, the others for its lock
        calls = [asyncio.create_task(each.execute(update, seconds=seconds)) for each in opened]
        await wait_for(3)
        if ending == "cancel":
            for call in calls:
                call.cancel()
        results = await asyncio.gather(*calls, return_exceptions=True)
        expected = TimeoutError if ending == "timeout" else asyncio.CancelledError
        assert [type(result) for result in results] == [expected] * 3
        assert all(each.is_closed for each in opened)
        await wait_for(0)
    finally:
        await observer.close()
        private.crash()


pytestmark = needs_postgres
