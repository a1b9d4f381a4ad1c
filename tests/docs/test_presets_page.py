"""The table of presets in docs/sources.md against the files of the presets; `make docs` rewrites it."""

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from relay.cli.add_source import fill, kind_of, presets
from relay.source import Guide

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "sources.md"
FOLDER = ROOT / "plugins" / "presets"
BEGIN, END = "<!-- begin: presets, written by `make docs` -->\n", "<!-- end -->"
WORDS = {"url": "`URL`", "secret": "`SECRET`", "verify_token": "`VERIFY_TOKEN`"}
ALGORITHMS = {"sha1": "SHA-1", "sha256": "SHA-256", "sha512": "SHA-512"}


def files():
    return {file.stem: tomllib.loads(file.read_text()) for file in sorted(FOLDER.glob("*.toml"))}


def verification(verify):
    """Describe how a preset verifies its sender."""
    if not isinstance(verify, dict):
        return {"bearer": "bearer token", "standard-webhooks": "Standard Webhooks"}[verify]
    [(scheme, table)] = verify.items()
    match scheme:
        case "hmac":
            return f"HMAC-{ALGORITHMS[table['algorithm']]} in `{table['header']}`"
        case "ed25519" | "ecdsa":
            return f"{'Ed25519' if scheme == 'ed25519' else 'ECDSA'} in `{table['header']}`"
        case "api_key":
            return f"`{table['header']}`" if "header" in table else f"query parameter `{table['query']}`"
        case "basic":
            return f"basic authentication, user `{table['user']}`"
        case "standard_webhooks":
            return f"Standard Webhooks with `{table['header_prefix']}` headers"
    raise AssertionError(scheme)


def table():
    """Render the table of presets."""
    lines = ["| preset | sender | verification | steps in the sender's settings |", "|---|---|---|---|"]
    for name, data in files().items():
        preset = data["preset"]
        steps = " ".join(f"{at}. {fill(step, WORDS)}." for at, step in enumerate(preset["steps"], 1))
        steps = steps.replace("|", "\\|").replace("<", "&lt;").replace("..", ".")
        link = f"[{preset['title']}]({preset['docs']})"
        lines.append(f"| `{name}` | {link} | {verification(data['verify'])} | {steps} |")
    return "\n".join(lines) + "\n"


def test_the_table_has_every_preset_as_its_file_describes_it():
    written = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert written == table(), "run `make docs`"


@pytest.mark.parametrize("name", files())
def test_a_file_names_its_source_and_explains_its_setup(name):
    text, data = (FOLDER / f"{name}.toml").read_text(), files()[name]
    comment = text.partition("\n\n")[0]
    assert all(line.startswith("# ") for line in comment.splitlines())
    assert re.search(r"https://|class-wc-webhook", comment), "name the vendor's page in the comment"
    preset = msgspec.convert(data["preset"], Guide)
    assert preset.default_path == f"/hooks/{name}"
    assert preset.docs.startswith("https://")
    steps = " ".join(preset.steps)
    assert "{url}" in steps
    assert set(re.findall(r"\{(\w+)\}", steps)) <= set(WORDS)
    assert (
        ("{verify_token}" in steps) == bool(preset.verify_token) == kind_of(presets()[name]).has_verify_token
    )
    assert not any(step.endswith(".") for step in preset.steps)


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}")
