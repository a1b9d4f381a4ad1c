"""Adds to pyproject.toml what depends on the project's public address, `[tool.hookferry] repository`.

With an address, the package has its URLs, and the links of the README on PyPI lead to the repository's files.
Without one, it has no URLs, and the relative links become plain text, because PyPI has no such files.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
URLS = {
    "Source": "",
    "Documentation": "docs/index.md",
    "Changelog": "CHANGELOG.md",
    "Security": "SECURITY.md",
}
"""Labels that PyPI knows, each with a file of the repository; "": the repository itself."""

_LINK = re.compile(r"(!?)\[([^\]\n]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")
_IMAGE = re.compile(r'<img src="(?!https?:)([^"]+)"[^>]*>\n*')
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)


def addresses(project: dict[str, Any]) -> tuple[str, str, str]:
    """Return the addresses of the repository, of its files, and of its files as raw bytes; "" if unknown."""
    own = project["tool"]["hookferry"]
    repository = own["repository"].rstrip("/")
    if not repository:
        return "", "", ""
    return repository, own["files"].format(repository=repository), own["raw"].format(repository=repository)


def urls(repository: str, files: str) -> dict[str, str]:
    """Return the URLs of the package by their labels."""
    if not repository:
        return {}
    return {label: f"{files}/{file}" if file else repository for label, file in URLS.items()}


def readme(text: str, files: str, raw: str) -> str:
    """Return the README for a page outside of the repository."""

    def link(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        if files:
            return f"{mark}[{label}]({raw if mark else files}/{target})"
        return "" if mark else label

    def image(match: re.Match[str]) -> str:
        return match[0].replace(f'"{match[1]}"', f'"{raw}/{match[1]}"') if raw else ""

    return _IMAGE.sub(image, _LINK.sub(link, _COMMENT.sub("", text)))


if __name__ == "__main__":
    repository, files, raw = addresses(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    setup(
        project_urls=urls(repository, files),
        long_description=readme((ROOT / "README.md").read_text(), files, raw),
        long_description_content_type="text/markdown",
    )
