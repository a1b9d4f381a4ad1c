"""`relay doctor`."""

from collections.abc import Iterable, Mapping
from typing import Any

import click
import msgspec

from relay.cli.api_client import Daemon, work
from relay.cli.exit_codes import CommandError
from relay.cli.offline import Offline, reader_options
from relay.cli.options import json_option
from relay.cli.output import count, print_json, print_table
from relay.model import Check


@click.command()
@json_option
@reader_options
def doctor(daemon: Daemon | Offline, *, as_json: bool) -> None:
    """Look for everything that could be wrong, and say what to do.

    Example: relay doctor

    Only reads. Checks every page of the database, which takes a while with a large one, the books,
    bodies, the disk and the clock; deliveries that wait or are dead, jobs and backups that fail; files
    that anybody may write to; and whether config.toml is what the relay goes by. Says for each problem
    which command comes next. The exit code is 1 if anything is wrong.
    """
    if isinstance(daemon, Offline):
        tell(map(msgspec.structs.asdict, daemon.examine()), as_json=as_json)
        return
    found = work(
        daemon, "doctor", method="GET", tell=lambda _: "looking at every page", stopped="nothing was changed"
    )
    tell(found["checks"], as_json=as_json)


def tell(checks: Iterable[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print checks.

    Raises:
        CommandError: something is wrong.
    """
    checks = list(checks)
    wrong = [check for check in checks if not check["ok"]]
    if as_json:
        print_json({"ok": not wrong, "checks": checks})
    else:
        rows = [(check["name"], "ok" if check["ok"] else "WRONG", check["detail"]) for check in checks]
        print_table(("check", "", "found"), rows)
    if wrong:
        todo = "\n  ".join(f"{check['name']}: {check['hint']}" for check in wrong)
        raise CommandError(f"{count(len(wrong), 'check')} found something", hint=todo)


def named(checks: Iterable[Check], names: Iterable[str]) -> list[dict[str, Any]]:
    """Choose some checks by their names."""
    wanted = set(names)
    return [msgspec.structs.asdict(check) for check in checks if check.name in wanted]
