"""All problems of a configuration are reported at once: none of them hides another."""

import re

import pytest
from commands import run

TEXT = """\
[server]
listen = "127.0.0.1:99999"  # 2: server.listen: expected "host:port"
max_body = "lots"  # 3: server.max_body: expected a size
max_boddy = 1  # 4: server.max_boddy: unknown key, did you mean "max_body"?
[admin]
listn = "x"  # 6: admin.listn: unknown key, did you mean "listen"?
[retention]
held = 5  # 8: retention.held: expected a duration
[sources.moddy]
plugin = "moddy"
tokens = [
  { env = "ALL_AT_ONCE" },  # 12: sources.moddy.tokens[0]: the environment variable ALL_AT_ONCE is not set
  "literal",  # 13: sources.moddy.tokens[1]: a literal secret needs
]
max_body = "x"  # 15: sources.moddy.max_body: expected a size
schemas = { sold = "absent.json" }  # 16: sources.moddy.schemas.sold: HERE/absent.json: No such file
[sources.one]
plugin = "adorn"
rate_limit = "fast"  # 19: sources.one.rate_limit: expected a rate
[sources.two]  # 20: sources.two: claims everything below /v1, as source "one" does
plugin = "adorn"
retention = "x"  # 22: sources.two.retention: expected a table
[sources.misspelt]
plugin = "modi"  # 24: sources.misspelt.plugin: no plugin offers the kind "modi", did you mean "moddy"?
[sources.shop]
plugin = "generic"
path = "/shop"
verify = "none"
type = "{nothing:x}"  # 29: sources.shop.type: column 1: unknown placeholder
subject = "{path:nope}"  # 30: sources.shop.subject: column 1: {path:nope}: no path has this segment
[destinations.crm]
url = "crm.example.com"  # 32: destinations.crm.url: expected a URL
format = "standart"  # 33: destinations.crm.format: unknown format "standart"
events = ["!a"]  # 34: destinations.crm.events: "!a" excludes, but no pattern includes
where = { "dta.x" = 1 }  # 35: destinations.crm.where: "dta.x": a path starts with
timeout = 5  # 36: destinations.crm.timeout: expected a duration
order_by = "nope"  # 37: destinations.crm.order_by: "nope": a path starts with
on_dead = "cmr"  # 38: destinations.crm.on_dead: unknown destination "cmr", did you mean "crm"?
[destinations.erp]
url = "https://erp.example"
secrets = ["short"]  # 41: destinations.erp.secrets[0]: a literal secret needs
content_type = "text/plain"  # 42: destinations.erp.content_type: needs `template`
signatures = [{ scheme = "githb" }]  # 43: destinations.erp.signatures[0]: unknown signature scheme
retry = { schedule = ["soon"] }  # 44: destinations.erp.retry.schedule[0]: expected a duration
on_dead = "erp"  # 45: destinations.erp.on_dead: forms a cycle
concurrency = 0  # 46: destinations.erp.concurrency: must be at least 1
ca_file = "absent.pem"  # 47: destinations.erp.ca_file: HERE/absent.pem cannot be read
events = ["shpo.*"]
"""
"""Comments contain the problem of their line, or its beginning."""

EXPECTED = re.findall(r"  # (\d+: .*)", TEXT)


def test_every_problem_is_found_beside_all_others(tmp_path):
    (tmp_path / "config.toml").write_text(TEXT)
    result = run("check-config", tmp_path / "config.toml", code=1)
    *lines, last = result.err.splitlines()
    place = f"{tmp_path}/config.toml:"
    problems = [line.removeprefix(place) for line in lines if line.startswith(place)]
    for problem, expected in zip(problems, EXPECTED, strict=True):
        assert problem.startswith(expected.replace("HERE", str(tmp_path)))
    assert last.startswith(f"{len(EXPECTED)} problems; correct and run")
    assert f'warning: {place}48: destinations.erp.events[0]: unknown source "shpo", did you' in result.err
    shown = run("check-config", tmp_path / "config.toml", "--json", code=1).json
    assert (len(shown["problems"]), len(shown["warnings"])) == (len(EXPECTED), result.err.count("warning: "))


def test_a_source_with_a_wrong_prefix_claims_no_path(tmp_path):
    file = tmp_path / "config.toml"
    adorn = '[sources.{}]\nplugin = "adorn"\n'
    file.write_text(adorn.format("one") + adorn.format("two") + 'prefix = "two"\n')
    assert run("check-config", file, code=1).err.splitlines()[0].startswith(f"{file}:5: sources.two.prefix: ")
    assert "claims" not in run("check-config", file, code=1).err


@pytest.mark.parametrize("broken", ["x = ", "[server", "\xff"])
def test_problems_of_several_included_files_are_reported_together(tmp_path, broken):
    file = tmp_path / "config.toml"
    file.write_text("[log]\nlevel = 'info'\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "1.toml").write_bytes(broken.encode("latin-1"))
    (tmp_path / "conf.d" / "2.toml").write_text("[log]\nlevel = 'debug'\n")
    (tmp_path / "conf.d" / "3.toml").write_text("a = [")
    result = run("check-config", file, code=1).err
    assert [name for name in ("1.toml:", "2.toml:", "3.toml:") if name in result] == [
        "1.toml:", "2.toml:", "3.toml:"
    ]  # fmt: skip
    assert result.splitlines()[-1].startswith("3 problems")
