"""`relay doctor`."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click
import msgspec

from relay.cli.api_client import Daemon, run_operation
from relay.cli.endpoint import reader_options
from relay.cli.main import CommandError
from relay.cli.options import json_option
from relay.cli.output import count, print_json, print_table
from relay.model import Check

if TYPE_CHECKING:
    from relay.cli.offline import Offline


@click.command()
@json_option
@reader_options
def doctor(daemon: "Daemon | Offline", *, as_json: bool) -> None:
    """Check database, disk, clock, backlog, jobs and backups.

    Example: relay doctor

    Read-only. Checks every page of an SQLite database (slow for a large one), the ledger, bodies, disk space,
    the clock, pending and dead deliveries, failed jobs, backups and file permissions. It also checks whether
    the daemon uses the current config.toml. For each problem it prints the next command. The exit code is 1
    if a check fails.
    """
    if not isinstance(daemon, Daemon):
        print_checks(map(msgspec.structs.asdict, daemon.examine()), as_json=as_json)
        return
    found = run_operation(
        daemon, "doctor", method="GET",
        describe=lambda _: "checking every page", stopped="nothing was changed",
    )  # fmt: skip
    print_checks(found["checks"], as_json=as_json)


def print_checks(checks: Iterable[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print the results of checks.

    Raises:
        CommandError: a check failed.
    """
    checks = list(checks)
    failed = [check for check in checks if not check["ok"]]
    if as_json:
        print_json({"ok": not failed, "checks": checks})
    else:
        rows = [(check["name"], "ok" if check["ok"] else "FAILED", check["detail"]) for check in checks]
        print_table(("check", "result", "detail"), rows)
    if failed:
        hint = "\n  ".join(
            f"{check['name']}: {step}" for check in failed for step in check["hint"].split("; ")
        )
        raise CommandError(f"{count(len(failed), 'check')} failed", hint=hint)


def named(checks: Iterable[Check], names: Iterable[str]) -> list[dict[str, Any]]:
    """Return the checks that have one of these names."""
    wanted = set(names)
    return [msgspec.structs.asdict(check) for check in checks if check.name in wanted]
