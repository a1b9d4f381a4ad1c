"""Replays as they go: how far, how fast, how long still; and ending one with Ctrl-C."""

import time
from collections.abc import Mapping
from typing import Any

import click

from relay.cli.api_client import Daemon
from relay.cli.exit_codes import BATCH, FAILED, INTERRUPTED, CommandError
from relay.cli.output import count, print_json
from relay.cli.progress import pace, show

EVERY = 0.2
"""Seconds between two looks."""


def follow(daemon: Daemon, replay: Mapping[str, Any], *, as_json: bool) -> None:
    """Wait for the end of a replay, and say what came of it.

    Raises:
        CommandError: it failed, skipped something, or the operator ended it.
    """
    try:
        while replay["ended_at"] is None:
            _show(replay)
            time.sleep(EVERY)
            replay = daemon.get("replays", replay["id"])
    except KeyboardInterrupt:
        replay = daemon.delete("replays", replay["id"])
        since = f"; go on with the same command and --since {replay['reached']}" if replay["reached"] else ""
        raise CommandError(f"cancelled after {_done(replay)}{since}", code=INTERRUPTED) from None
    finally:
        _show(None)
    if as_json:
        print_json(replay)
    else:
        click.echo(f"{_done(replay)}: {count(replay['created'], 'delivery')}")
    if replay["error"] is not None or replay["state"] == "cancelled":
        why = replay["error"] or "it was cancelled"
        hint = f"go on with --since {replay['reached']}" if replay["reached"] else "begin it again"
        raise CommandError(f"the replay ended early: {why}", hint=hint, code=FAILED)
    if replay["skipped"]:
        skipped = count(replay["skipped"], "event")
        raise CommandError(f"skipped {skipped}: owed to nobody, or pending already", code=BATCH)


def _done(replay: Mapping[str, Any]) -> str:
    return f"{replay['done']:,} of {count(replay['count'], 'event')}".replace(",", " ")


def _show(replay: Mapping[str, Any] | None) -> None:
    """Tell how far it is; None: clear that for what is said next."""
    text = ""
    if replay is not None:
        text = f"{_done(replay)}, {pace(replay['per_second'], replay['eta_seconds'])}"
    show(text)
