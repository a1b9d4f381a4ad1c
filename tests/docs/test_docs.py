"""The pages against the code: commands, links, endpoints, metrics, checks, alerts, conditions.

`make docs` rewrites the table of metrics, and the effects of endpoints from the OpenAPI document, and adds
pages of senders' contracts to the index.
"""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from commands import parse

import relay
from relay.api.app import describe
from relay.api.auth import is_page
from relay.api.query_params import LISTS, filters_of
from relay.app import App
from relay.cli import COMMANDS
from relay.config.schema import DestinationConfig
from relay.config.secrets import Secret, Url
from relay.delivery.http.result import HttpResult
from relay.delivery.ping import explain
from relay.delivery.retry import verdict_of
from relay.demo.run import write_config
from relay.errors import UNROUTABLE
from relay.metrics import Metrics, declared
from relay.plugin_loading.loader import load
from relay.routing.conditions import _OPERATORS

SECRET = Secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
]
README = (ROOT / "README.md").read_text()
OPERATING = (ROOT / "docs" / "operating.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    file = write_config(folder, listen="127.0.0.1:0", receiver="http://127.0.0.1:9", secret=SECRET)
    return App(load(file))


def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_within_the_project_leads_to_a_file_and_a_heading(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_index_has_exactly_the_pages():
    index = DOCS / "index.md"
    rows = re.findall(r"^\| \[(\S+)\]\((\S+)\) \| .+ \|$", index.read_text(), re.MULTILINE)
    assert all(text == target for text, target in rows)
    listed = [(DOCS / target).resolve() for _, target in rows]
    assert sorted(listed) == sorted(set(PAGES) - {index, ROOT / "README.md"})


def test_the_architecture_picture_has_alternative_text_and_both_themes():
    [(source, alt)] = re.findall(r'<img src="(docs/\S+\.svg)" alt="([^"]+)"', README)
    picture = ET.fromstring((ROOT / source).read_text())
    names = {element.tag.rpartition("}")[2]: element.text for element in picture.iter()}
    assert len(alt) > 80
    assert names["title"]
    assert names["desc"]
    assert "prefers-color-scheme: dark" in names["style"]


def test_a_statement_about_another_project_names_its_source():
    page = (DOCS / "comparison.md").read_text()
    others = page.split("\n## ")[1:-1]
    assert [part.split("\n")[0] for part in others] == [
        "Svix", "Convoy", "Outpost", "Hook0", "Hookaido", "adnanh/webhook", "Alertmanager",
    ]  # fmt: skip
    for part in others:
        for heading in ("Purpose", "Strengths"):
            paragraph = part.partition(f"**{heading}.**")[2].partition("\n\n")[0]
            assert "](https://" in paragraph, (part.split("\n")[0], heading)
        assert "**Choose it instead**" in part


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relay_command_on_a_page_exists(page):
    text = page.read_text()
    blocks = "".join(re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE))
    shown = re.findall(r"(?:`|bin/)relay ([a-z][a-z-]*)", text)
    shown += re.findall(r"^relay ([a-z][a-z-]*)", blocks, re.MULTILINE)
    assert set(shown) <= set(COMMANDS)


def command_lines(page):
    """Return the relay commands in the shell blocks of a page, each as its words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()")
        lexer.whitespace_split = True
        words = list(lexer)
        for number, word in enumerate(words):
            first = number == 0 or set(words[number - 1]) <= set("|&;()")
            if first and (word == "relay" or word.endswith("/relay")):
                rest = words[number + 1 :]
                ends = [place for place, each in enumerate(rest) if re.match(r"[|&;()]|\d?>", each)]
                yield rest[: ends[0]] if ends else rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relay_command_in_a_shell_block_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in command_lines(page):
        for name in words:
            if name.endswith(".jsonl"):
                Path(name).touch()
        parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_toml_on_a_page_parses(page):
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        assert tomllib.loads(block)


@pytest.mark.parametrize(
    ("name", "command"),
    [("demo", ".venv/bin/relay serve --demo"), ("test", ".venv/bin/pytest")],
)
def test_ci_runs_the_commands_of_the_readme(name, command):
    run = subprocess.run([ROOT / ".ci" / "readme-command", name], capture_output=True, text=True, check=True)
    line = run.stdout.rstrip("\n")
    assert f"<!-- run: {name} -->\n```sh\n{line}\n```\n" in README
    assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -q ")
    assert line.endswith(f" && {command}")
    assert f'"$(.ci/readme-command {name})' in (ROOT / ".ci" / "run").read_text()


def test_an_unknown_command_of_the_readme_is_an_error():
    run = subprocess.run([ROOT / ".ci" / "readme-command", "nothing"], capture_output=True, check=False)
    assert (run.returncode, run.stdout) == (1, b"")


def test_the_readme_is_short():
    assert len(README.splitlines()) < 150


def test_the_changelog_begins_with_this_version():
    heading = re.search(r"^## (\S+) ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading
    assert heading[1] == relay.__version__


def test_the_pages_for_operators_have_exactly_the_endpoints(app):
    routes = {(route.method, route.resource.canonical) for route in app.api.socket_app().router.routes()}
    documented = re.findall(r"^\| `([A-Z]+) (/\S*)` \|", OPERATING + API, re.MULTILINE)
    endpoints = {(method, path) for method, path in routes if method != "HEAD" and not is_page(path)}
    assert set(documented) == endpoints
    assert len(documented) == len(set(documented))


def test_the_output_of_destinations_test_on_the_page_is_current():
    meaning = verdict_of(410, "4xx", {}, now=0, max_retry_after=1.0)
    result, hint = explain(
        DestinationConfig(name="crm", url=Url("https://crm.example")),
        HttpResult(result="4xx", status=410),
        meaning,
    )
    section = API.partition("## Testing a destination")[2]
    [example] = re.findall(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert example.splitlines()[-2:] == [f"result       {result}", hint]


ENDPOINT = re.compile(r"^\| `([A-Z]+ /\S*)` \| (.*?) \| (.*) \|$", re.MULTILINE)


def effects():
    """Return the first sentence of every endpoint in the OpenAPI document, by method and path."""
    return {
        f"{method.upper()} {path}": operation["summary"].removesuffix(".")
        for path, item in describe()["paths"].items()
        for method, operation in item.items()
        if "summary" in operation
    }


def test_the_pages_describe_each_endpoint_like_the_openapi_document():
    rows = {name: effect for name, effect, _ in ENDPOINT.findall(OPERATING + API)}
    assert rows == effects()


METRIC = re.compile(r"^\| `(relay_\w+)` \| ([\w, ]*) \| (.*) \|$", re.MULTILINE)


def rows_of_metrics():
    """Return the row of the page for each metric of the relay: exported name, labels and help text."""
    endings = {"counter": "_total", "info": "_info"}
    families = {each.name: each for each in Metrics().registry.collect() if each.name.startswith("relay_")}
    labels = {each.name: each.labels for each in declared().values()}
    labels["relay_build"] = families["relay_build"].samples[0].labels
    return [
        (
            name + endings.get(each.type, ""),
            ", ".join(sorted(labels[name])),
            each.documentation.removesuffix("."),
        )
        for name, each in families.items()
    ]


def test_the_page_for_operators_has_every_metric_with_its_labels_and_help():
    assert METRIC.findall(OPERATING) == rows_of_metrics()


def test_every_filter_of_a_list_is_on_the_page_of_the_api():
    for kind in LISTS.keys() - {"selection"}:
        [row] = re.findall(rf"^\| `GET /api/{kind}` \| [^|]* \|(.*)\|$", API, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == {each.name for each in filters_of(kind)}
    section = API.partition("| field of a filter |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \|", section, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", "".join(rows))) == {each.name for each in filters_of("selection")}


def test_the_page_for_operators_has_every_reason_of_an_unroutable_request():
    paragraph = OPERATING.partition("**Unroutable requests**")[2].partition("\n\n")[0]
    assert all(f"`{reason}`" in paragraph for reason in UNROUTABLE)


def test_the_page_of_the_store_has_every_check_of_the_doctor():
    code = "".join(file.read_text() for file in (ROOT / "relay").rglob("*.py"))
    checks = set(re.findall(r'(?:Check\(\s*name=|\bfailed\(\s*|\bpassed\(\s*)"(\w+)"', code))
    table = (DOCS / "storage.md").read_text().partition("## `relay doctor`")[2]
    assert set(re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE)) == checks


def test_the_page_of_monitoring_has_every_alert():
    rules = (ROOT / "systemd" / "prometheus" / "alerts.yml").read_text()
    rows = re.findall(r"^\| `(Relay\w+)` \| ", (DOCS / "monitoring.md").read_text(), re.MULTILINE)
    assert rows == re.findall(r"alert: (\w+)", rules)


def test_the_page_of_configuration_has_every_operator_of_a_condition():
    section = (DOCS / "configuration.md").read_text().partition("### Conditions")[2].partition("\n### ")[0]
    cells = re.findall(r"^\| (`.+?`) \| ", section, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"\w+", cell)} == set(_OPERATORS)


def rewrite():
    """Write metrics and effects of endpoints into the pages; a new endpoint goes to the end of its table."""
    rows = list(METRIC.finditer(OPERATING))
    table = "\n".join(f"| `{name}` | {labels} | {text} |" for name, labels, text in rows_of_metrics())
    operating = OPERATING[: rows[0].start()] + table + OPERATING[rows[-1].end() :]
    texts = effects()

    def row(old):
        return f"| `{old[1]}` | {texts.pop(old[1], old[2])} | {old[3]} |"

    (DOCS / "operating.md").write_text(ENDPOINT.sub(row, operating))
    api = ENDPOINT.sub(row, API)
    end = list(ENDPOINT.finditer(api))[-1].end()
    new = "".join(f"\n| `{name}` | {text} |  |" for name, text in texts.items())
    (DOCS / "api.md").write_text(api[:end] + new + api[end:])
    add_contracts(DOCS / "index.md")


def add_contracts(index):
    """Add a row with the title of each page of a sender's contract that the index lacks."""
    before, last, after = index.read_text().rpartition("| [contracts/")
    row, _, after = after.partition("\n")
    before += f"{last}{row}\n"
    for page in sorted(DOCS.glob("contracts/*.md")):
        name = f"contracts/{page.name}"
        if f"({name})" not in before:
            title = page.read_text().splitlines()[0].removeprefix("# ")
            before += f"| [{name}]({name}) | {title} |\n"
    index.write_text(before + after)


if __name__ == "__main__":
    rewrite()
