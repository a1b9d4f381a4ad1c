"""The code on docs/receiving.md, written to files, built and run in each language that is installed here.

A driver (tests/drivers) reads {name: [secrets, headers, body in base64, now]} on stdin, calls the snippet's
`verify` with each, and prints {name: [webhook-id, null]} or {name: [null, why not]}.
"""

import base64
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "receiving.md").read_text()
SECRET = "whsec_aG9va2ZlcnJ5IGV4YW1wbGUga2V5LCAzMiBieXRlcy4="
OTHER = "whsec_" + base64.b64encode(b"another key of 32 bytes, for it.").decode()


def section(heading: str) -> str:
    """Return the text between a heading and the next one."""
    hidden = re.sub(  # hides the # of comments in code, which look like headings
        r"^```.*?^```", lambda block: block[0].replace("#", "\0"), PAGE, flags=re.MULTILINE | re.DOTALL
    )
    pattern = rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)"
    [text] = re.findall(pattern, hidden, re.MULTILINE | re.DOTALL)
    return text.replace("\0", "#")


def blocks(heading: str, fence: str) -> list[str]:
    """Return the code blocks of one language below a heading."""
    return re.findall(rf"^```{fence}\n(.*?)^```", section(heading), re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Language:
    """How the snippets of one language are put into files and run."""

    needs: str  # the required command
    files: dict[str, str]
    driver: tuple[str, ...]
    receiver: tuple[str, ...]
    build: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the snippets and the driver to a folder, and build them."""
        for name, text in self.files.items():
            (folder / name).write_text(text)
        [suffix] = {Path(name).suffix for name in self.files}
        shutil.copy(TESTS / "drivers" / f"driver{suffix}", folder)
        if self.build:
            # Go's own cache is used where there is a home for one: without it net/http takes 20 s.
            cache = {} if os.environ.get("HOME") else {"GOCACHE": str(folder / "cache")}
            run(self.build, folder, GOFLAGS="-mod=mod", GOTOOLCHAIN="local", CGO_ENABLED="0", **cache)


PYTHON = (sys.executable, "-W", "error", "-B")
PYTHON_VERIFY, PYTHON_RECEIVER, LIBRARY_VERIFY = blocks("Python", "python")
JS_VERIFY, JS_RECEIVER = blocks("JavaScript", "js")
PHP_VERIFY, PHP_RECEIVER = blocks("PHP", "php")
GO_VERIFY, GO_RECEIVER = blocks("Go", "go")

LANGUAGES = {
    "python": Language(
        needs=sys.executable,
        files={"verify.py": PYTHON_VERIFY, "receiver.py": PYTHON_RECEIVER},
        driver=(*PYTHON, "driver.py"),
        receiver=(*PYTHON, "receiver.py"),
    ),
    "standardwebhooks": Language(
        needs=sys.executable,
        files={"verify.py": LIBRARY_VERIFY, "receiver.py": PYTHON_RECEIVER},
        driver=(*PYTHON, "driver.py"),
        receiver=(*PYTHON, "receiver.py"),
    ),
    "node": Language(
        needs="node",
        files={"verify.mjs": JS_VERIFY, "receiver.mjs": JS_RECEIVER},
        driver=("node", "driver.mjs"),
        receiver=("node", "receiver.mjs"),
    ),
    "php": Language(
        needs="php",
        files={"verify.php": PHP_VERIFY, "receiver.php": PHP_RECEIVER},
        driver=("php", "driver.php"),
        receiver=("php", "-S", "127.0.0.1:0", "receiver.php"),
    ),
    "go": Language(
        needs="go",
        files={"verify.go": GO_VERIFY, "receiver.go": GO_RECEIVER},
        build=("go", "build", "-o", "program", "verify.go", "receiver.go", "driver.go"),
        driver=("./program", "verify"),
        receiver=("./program",),
    ),
}
HERE = [name for name, language in LANGUAGES.items() if shutil.which(language.needs)]
"""The languages that are installed on this machine."""


def run(command: tuple[str, ...], folder: Path, stdin: str = "", **environ: str) -> str:
    """Run a command, which must succeed, and return its output."""
    done = subprocess.run(
        command,
        cwd=folder,
        input=stdin,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def judge(language: Language, folder: Path, cases: dict[str, tuple[Any, ...]]) -> dict[str, list[str | None]]:
    """Pass cases (secrets, headers, body, now) to `verify`; return [webhook-id, problem] by case."""
    questions = {
        name: (secrets, headers, base64.b64encode(body).decode(), now)
        for name, (secrets, headers, body, now) in cases.items()
    }
    answers: dict[str, list[str | None]] = json.loads(run(language.driver, folder, json.dumps(questions)))
    return answers


@contextmanager
def receiver(language: Language, folder: Path) -> Iterator[str]:
    """Run the receiver in a folder that `write` has filled; yield its URL."""
    environ = {**os.environ, "WEBHOOK_SECRETS": f"{OTHER} {SECRET}", "PORT": "0"}
    process = subprocess.Popen(
        language.receiver,
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        printed = ""
        while not (url := re.search(r"http://127\.0\.0\.1:\d+", printed)):
            line = process.stdout.readline()
            assert line, f"it ended: {printed}"
            printed += line
        yield f"{url[0]}/"
    finally:
        process.kill()
        process.communicate()


def inbox(folder: Path) -> dict[str, bytes]:
    """Return the bodies of unhandled events of a receiver, by id."""
    if (folder / "inbox.db").exists():
        with sqlite3.connect(folder / "inbox.db") as db:
            rows = dict(db.execute("SELECT id, body FROM inbox WHERE NOT done"))
        db.close()
        return rows
    bodies = {path.name: path.read_bytes() for path in (folder / "inbox").iterdir()}
    return {name: body for name, body in bodies.items() if body}


def handle_inbox(folder: Path) -> None:
    """Mark all events as handled, as the workers on the page do."""
    if (folder / "inbox.db").exists():
        with sqlite3.connect(folder / "inbox.db") as db:
            db.execute("UPDATE inbox SET done = 1, body = NULL")
        db.close()
    else:
        for path in (folder / "inbox").iterdir():
            path.write_bytes(b"")


def empty_inbox(folder: Path) -> None:
    """Delete all events of a receiver, which must not run."""
    (folder / "inbox.db").unlink(missing_ok=True)
    if (folder / "inbox").is_file():
        (folder / "inbox").unlink()
    shutil.rmtree(folder / "inbox", ignore_errors=True)


def break_inbox(folder: Path) -> None:
    """Make a running receiver unable to store events."""
    if (folder / "inbox.db").exists():
        with sqlite3.connect(folder / "inbox.db") as db:
            db.execute("DROP TABLE inbox")
        db.close()
    else:
        shutil.rmtree(folder / "inbox", ignore_errors=True)
        (folder / "inbox").write_text("in the way")
