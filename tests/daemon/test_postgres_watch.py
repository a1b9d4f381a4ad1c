"""A PostgreSQL server and a cluster in metrics, `/ready`, status and doctor."""

import asyncio
import logging
import os
import re
from unittest.mock import ANY

import asyncpg
import pytest
from commands import Commands, run
from daemons import adorn, destination, running, write_config
from postgres import BINARIES, database_of, drop_databases, needs_postgres, server, start
from support import until
from torture.nodes import Proxy
from wire import exchange, request

from relay.base.clock import SystemClock
from relay.store import Stop
from relay.store.postgres import doctor, observing
from relay.store.postgres.connection import connect, read_url
from relay.store.postgres.offline import PostgresOffline

pytestmark = needs_postgres


@pytest.fixture
def url(tmp_path):
    yield database_of(tmp_path)
    drop_databases()


def config(folder, url, *, events="*", cluster=""):
    folder.mkdir(exist_ok=True)
    parts = [
        '[sources.adorn]\nplugin = "adorn"\n',
        destination("crm", "http://127.0.0.1:9/x").replace('["*"]', f'["{events}"]'),
        cluster,
    ]
    return write_config(folder, *parts, url=url)


async def test_metrics_status_and_doctor_describe_the_server(tmp_path, url):
    async with running(config(tmp_path / "a", url)) as relay:
        answer = await relay.exchange(request("POST", "/v1/events", adorn()))
        assert answer.status == 200
        await relay.app.database_watch.check()
        assert relay.counted("relay_storage_size_bytes", file="database") > 1_000_000
        assert relay.counted("relay_storage_size_bytes", file="pending") > 0
        assert 0 < relay.counted("relay_database_connections_used_ratio") < 1
        assert relay.counted("relay_cluster_nodes") == 1
        samples = list(relay.app.metrics.registry.restricted_registry(["relay_build_info"]).collect())
        [build] = [sample.labels for family in samples for sample in family.samples]
        assert build["postgresql"].split(".")[0].isdigit()
        ready = (await exchange(relay.addresses.socket, request("GET", "/ready"))).json
        # The tests' server runs without fsync.
        what = (
            "fsync or full_page_writes of the PostgreSQL server is off: a power failure damages the database"
        )
        assert ready == {"ready": True, "reasons": [], "warnings": [what]}
        status = await relay.operator("GET", "/api/status")
        assert (what, "relay doctor") in [(each["what"], each["next"]) for each in status["problems"]]
        for verb, reason in (("backup", "makes no backups"), ("compact", "returns free space by itself")):
            refused = await exchange(relay.addresses.socket, request("POST", f"/api/db/{verb}"))
            assert (refused.status, refused.json["error"]["code"]) == (409, "unsupported")
            assert reason in refused.json["error"]["message"]
        assert await relay.operator("GET", "/api/status") == {**status, "uptime_seconds": ANY}


OLDER_NODE = """
    INSERT INTO nodes (incarnation, slot, name, version, schema, config_digest, destinations, started, seen,
                       shards)
    SELECT gen_random_uuid(), slot, name, '0.9', 1, '', '{}', clock_timestamp(), clock_timestamp(), shards
      FROM (VALUES (254, 'old', NULL), (255, 'new', '{"crm": 4}'::jsonb)) AS n (slot, name, shards)
"""


async def test_nodes_with_different_configurations_are_reported(tmp_path, url):
    cluster = '[cluster]\nenabled = true\nlease = "5s"\nnode = "{}"\n'
    one = config(tmp_path / "a", url, cluster=cluster.format("one"))
    two = config(tmp_path / "b", url, events="adorn.*", cluster=cluster.format("two"))
    async with running(one) as first, running(two) as second:
        await until(lambda: first.counted("relay_cluster_nodes") == 2)
        await until(lambda: first.counted("relay_cluster_config_differs") == 1)
        assert first.counted("relay_cluster_lanes") + second.counted("relay_cluster_lanes") <= 1
        assert first.counted("relay_cluster_renewal_age_seconds") < 15
        await until(lambda: first.counted("relay_cluster_wakeup_delay_seconds") > 0)
        what = "nodes with a configuration that differs from this node's: two"
        ready = (await exchange(first.addresses.socket, request("GET", "/ready"))).json
        assert what in ready["warnings"]
        status = await first.operator("GET", "/api/status")
        assert (what, "relay nodes") in [(each["what"], each["next"]) for each in status["problems"]]
        found = await connect(read_url(url), writes=False)
        check = await doctor.nodes(doctor.Examined(location="", now=0), found)
        assert not check.ok
        each = r"nodes with different configurations: [0-9a-f]{12} on one; [0-9a-f]{12} on two"
        assert re.fullmatch(each, check.detail)
        async with found.transaction():
            await found.execute("UPDATE nodes SET name = 'twin', config_digest = ''")
            check = await doctor.nodes(doctor.Examined(location="", now=0), found)
            assert (check.ok, check.detail) == (False, "several nodes have the name twin")
            await found.execute("UPDATE nodes SET name = name || slot")
            assert (await doctor.nodes(doctor.Examined(location="", now=0), found)).ok
            await found.roll_back()
        await found.execute(OLDER_NODE)
        check = await doctor.nodes(doctor.Examined(location="", now=0), found)
        await found.close()
        what = "destinations are not divided into shards while older versions run: old (0.9)"
        assert (check.ok, check.detail) == (False, what)


async def observed(url, clock=SystemClock()):  # noqa: B008 - it has no state
    opened = await connect(read_url(url), writes=False)
    try:
        found = await observing.observe(opened, clock.wall())
        examined = doctor.Examined(location="", now=clock.wall())
        checks = {check.__name__: await check(examined, opened) for check in (doctor.replication,)}
    finally:
        await opened.close()
    return found, checks["replication"]


async def observed_once(url, condition):
    """Return what is observed as soon as a condition is true."""
    async with asyncio.timeout(30):
        while not condition(*(found := await observed(url))):  # noqa: ASYNC110 - only the server knows
            await asyncio.sleep(0.05)
    return found


async def test_an_outage_of_the_server_is_shown_with_the_next_commands(tmp_path, url):
    proxy = await Proxy(url).__aenter__()
    async with running(config(tmp_path / "a", proxy.url)) as relay:
        await relay.operator("POST", "/api/destinations/crm/pause")
        assert (await relay.exchange(request("POST", "/v1/events", adorn()))).status == 200
        destinations = await relay.operator("GET", "/api/destinations")
        await proxy.__aexit__()  # ends all connections; new ones are refused
        await until(lambda: relay.app.store.failure is not None)
        assert (await relay.exchange(request("POST", "/v1/events", adorn("s-2")))).status == 503
        commands, hint = (
            Commands(relay.addresses.socket),
            "check that PostgreSQL runs and accepts connections",
        )
        shown = await commands("status", code=1)
        assert "not ready: the store cannot write: " in shown.out
        assert "backlog: 1 delivery\ncrm\tpaused\t1\t" in shown.out
        assert shown.err.startswith(f"not ready: the store cannot write: {relay.app.store.location}: ")
        assert "\n  relay doctor\n" in shown.err
        assert "the job" not in shown.err  # jobs fail for the same reason
        for words in (("doctor",), ("nodes",), ("events", "list"), ("destinations", "show", "crm")):
            assert hint in (await commands(*words, code=1)).err, words
        page = await exchange(relay.addresses.socket, request("GET", "/ui/"))
        assert page.status == 200
        assert b"not ready: the store cannot write: " in page.body
        known = (await relay.operator("GET", "/api/destinations"))["items"]
        assert (
            [each["pending"] for each in known] == [each["pending"] for each in destinations["items"]] == [1]
        )


async def test_a_node_without_the_database_reports_no_other_node(tmp_path, url):
    proxy = await Proxy(url).__aenter__()
    one = config(tmp_path / "a", proxy.url, cluster='[cluster]\nnode = "one"\n')
    two = config(tmp_path / "b", url, cluster='[cluster]\nnode = "two"\n')
    async with running(one) as relay, running(two):
        await until(lambda: relay.counted("relay_cluster_nodes") == 2)
        await proxy.__aexit__()
        await until(lambda: relay.app.store.failure is not None)
        shown = (await Commands(relay.addresses.socket)("status", code=1)).err
        assert shown.startswith("not ready: the store cannot write: ")
        assert "node two" not in shown


async def test_doctor_says_why_there_are_no_tables_to_check(tmp_path, url):
    """One result replaces those of the data, which would all fail."""
    admin = await asyncpg.connect(url)
    name = "".join(re.findall(r"\w+$", url))
    role = f"plain_{os.getpid()}"
    plain = url.replace("postgres@", f"{role}@")

    async def version_of(address):
        examine = PostgresOffline(read_url(address)).examine
        checks = {check.name: check for check in await asyncio.to_thread(examine, Stop(), now=0)}
        assert "durability" in checks
        assert ("conservation" in checks) == checks["version"].detail.startswith("schema version")
        return checks["version"]

    try:
        await admin.execute(f"CREATE ROLE {role} LOGIN")
        check = await version_of(url)
        assert (check.ok, check.detail[:13]) == (True, "no tables yet")
        check = await version_of(plain)
        assert (check.ok, check.hint) == (
            False, f"let the user create tables: ALTER DATABASE {name} OWNER TO {role}"
        )  # fmt: skip
        check = await version_of(f"{url}?search_path=nowhere")
        assert (check.ok, check.hint) == (False, "CREATE SCHEMA … AUTHORIZATION postgres")
        await admin.execute("CREATE TABLE events (x int)")
        check = await version_of(url)
        assert not check.ok
        assert "belong to another program" in check.detail
        await admin.execute("DROP TABLE events")

        async with running(config(tmp_path / "a", url)) as relay:
            assert (await version_of(url)).ok
            check = await version_of(plain)
            assert (check.ok, check.hint) == (
                False, f"name postgres in [storage] url, or GRANT postgres TO {role}"
            )  # fmt: skip
            await admin.execute("INSERT INTO meta VALUES ('moving', '{}')")
            check = await version_of(url)
            assert (check.ok, "relay db move" in check.hint) == (False, True)
            await admin.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
            checks = {check.name: check for check in await relay.app.store.upkeep.examine()}
            assert (checks["version"].ok, checks["version"].detail[:19]) == (False, "the tables are gone")
            commands = Commands(relay.addresses.socket)
            assert "restore a backup" in (await commands("events", "list", code=1)).err
    finally:
        await admin.execute(f"DROP ROLE {role}")
        await admin.close()


async def test_the_password_of_listen_url_is_never_shown(tmp_path, url, monkeypatch, caplog):
    """Neither the daemon nor a command shows it, although the connection fails."""
    caplog.set_level(logging.DEBUG)
    secret = re.sub(r"//postgres@(.*):[0-9]+/", r"//postgres:hunter2@\1:9/", url)
    monkeypatch.setenv("RELAY_LISTEN_URL", secret)
    path = config(tmp_path / "a", url)
    key = '[storage]\nlisten_url = { env = "RELAY_LISTEN_URL" }'
    path.write_text(path.read_text().replace("[storage]", key, 1))
    shown = []
    async with running(path) as relay:
        commands = Commands(relay.addresses.socket)
        nodes = relay.app.store.nodes
        await until(lambda: any("do not arrive" in each.what for each in nodes.cautions()))
        for where in ("/ready", "/metrics", "/api/config", "/api/status", "/api/nodes", "/ui/", "/ui/config"):
            answer = await exchange(relay.addresses.socket, request("GET", where))
            assert answer.status == 200, where
            shown.append(answer.body.decode())
        result = await commands("doctor", code=1)
        shown += [result.out, result.err]
        await commands("reload")
    for words in (
        ("config", "show"),
        ("config", "show", "--json"),
        ("check-config",),
        ("doctor", "--offline"),
    ):
        result = await asyncio.to_thread(run, *words, "--config", path, code=1 if words[0] == "doctor" else 0)
        shown += [result.out, result.err]
    path.write_text(path.read_text().replace("[storage]", "[storage]\nunknown = 1", 1))
    result = await asyncio.to_thread(run, "check-config", "--config", path, code=1)
    shown += [result.out, result.err, caplog.text]
    assert any("listen_url" in text for text in shown)
    assert not [text for text in shown if "hunter2" in text]


async def test_an_asynchronous_standby_is_reported_before_a_failover(tmp_path):
    """A stream of WAL to pg_receivewal is a standby for the server, without the cost of a second server."""
    base = server().folder.parent / f"relay-primary-{os.getpid()}"
    primary = start(base, settings=("shared_buffers=4MB", "fsync=on", "full_page_writes=on"))
    primary.run("CREATE TABLE owed (id bigint)")
    url = primary.url("postgres")
    found, check = await observed(url)
    assert (found.cautions, check.detail) == ((), "no standbys")

    wal = tmp_path / "wal"
    wal.mkdir()
    receive = await asyncio.create_subprocess_exec(
        f"{BINARIES}/pg_receivewal", "-D", str(wal), "-d", url, "--no-password",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        found, check = await observed_once(url, lambda found, _: found.figures["standbys_async"])
        [caution] = found.cautions
        assert caution.is_choice
        assert caution.what.startswith("all standbys of the PostgreSQL server are asynchronous (")
        assert (check.ok, check.detail[:22]) == (False, "asynchronous standbys:")
        lagging = observing.LAGGING_BYTES
        try:
            observing.LAGGING_BYTES = -1
            found, _ = await observed(url)
        finally:
            observing.LAGGING_BYTES = lagging
        assert [caution.is_choice for caution in found.cautions] == [True, False]

        primary.run("CREATE ROLE plain LOGIN")  # it may not see the details of standbys
        primary.run("GRANT SELECT ON owed TO plain")
        found, check = await observed(url.replace("postgres@", "plain@"))
        assert [caution.is_choice for caution in found.cautions] == [True]
        assert not check.ok

        primary.run("ALTER SYSTEM SET synchronous_standby_names = 'nowhere'")
        primary.run("SELECT pg_reload_conf()")
        found, check = await observed_once(url, lambda found, _: "commits wait" in str(found.cautions))
        assert "commits wait" in check.detail
        assert "commits wait" in found.cautions[0].what
    finally:
        receive.kill()
        await receive.wait()


async def test_an_old_snapshot_is_reported(url, monkeypatch):
    setup = await asyncpg.connect(url)
    await setup.execute("CREATE TABLE owed (id bigint)")
    monkeypatch.setattr(observing, "OLD_SNAPSHOT", 0.2)
    await setup.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM owed")
    try:
        found, _ = await observed_once(url, lambda found, _: found.figures["oldest_snapshot"] > 0.5)
    finally:
        await setup.close()
    assert any("has had a snapshot for" in caution.what for caution in found.cautions)
