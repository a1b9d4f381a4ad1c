"""`relay nodes`: with SQLite, one node that runs everything."""

import pytest
from daemons import SOURCES, running, write_config

CONFIG = """
[cluster]
node = "eu-1"

[destinations.crm]
url = "http://127.0.0.1:9/"
allow_private = true
"""


@pytest.fixture
async def relay(tmp_path):
    async with running(write_config(tmp_path, SOURCES + CONFIG)) as relay:
        yield relay


async def test_a_daemon_on_sqlite_is_a_node_that_runs_every_lane_and_job(commands):
    [node] = (await commands("nodes", "--json")).json["items"]
    assert (node["name"], node["is_self"], node["lanes"]) == ("eu-1", True, ["crm"])
    assert {"backup", "forget"} <= set(node["jobs"])
    assert len(node["config"]) == 12
    assert (await commands("nodes", "-q")).out == "eu-1\n"
