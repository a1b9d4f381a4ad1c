"""Checks of `relay doctor` other than those of the database: held deliveries, jobs, permissions.

The running daemon and the offline command use the same checks, as far as files allow.
"""

import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from relay.api.words import held_text
from relay.base.clock import SECOND, rfc3339
from relay.config.schema import Config
from relay.jobs.scheduler import Past
from relay.model import PAUSED_IN_CONFIG, Caution, Check

FAILING = 600 * SECOND
"""Microseconds: a destination that has failed for longer is reported, although retries continue."""

_NOT_READY = "the table of reasons in docs/troubleshooting.md says what to do"

_ADVICE = {
    "paused": "relay destinations resume {name}",
    PAUSED_IN_CONFIG: "set `paused = false` in [destinations.{name}], then: relay reload",
    "disabled": "repair the receiver, then: relay destinations enable {name}",
    "circuit open": "relay destinations test {name} --close-circuit",
    "failing": "relay destinations test {name}",
}


class DestinationBacklog(msgspec.Struct, frozen=True, kw_only=True):
    """The pending deliveries of a destination, and why they are held."""

    name: str
    held: str | None  # why deliveries are held; None if they are not
    pending: int
    failing_since: int | None = None  # steady clock


def held(destinations: Iterable[DestinationBacklog], now: int, patience: int = FAILING) -> Check:
    """Check for held deliveries, by destination; `now` is steady clock."""
    found, hints = [], []
    for each in destinations:
        if not each.pending:
            continue
        since = each.failing_since
        if each.held is not None:
            kind, why = each.held.partition(":")[0], held_text(each.held)
        elif since is not None and now - since >= patience:
            kind, why = "failing", f"failing since {rfc3339(since)}"
        else:
            continue
        found.append(f"{each.name}: {each.pending} pending, {why}")
        hints.append(_ADVICE.get(kind, _ADVICE["failing"]).format(name=each.name))
    if found:
        return Check(name="held", ok=False, detail="; ".join(found), hint="; ".join(hints))
    return Check(name="held", ok=True, detail="no deliveries are held")


def wakeups(figures: Mapping[str, float], cautions: Iterable[Caution]) -> Check:
    """Check that a node of a cluster learns soon of deliveries that another node accepted."""
    for caution in cautions:
        if "notifications" in caution.what:
            hint = (
                "[storage] listen_url (if unset, url) must be a direct connection to the database; if url is "
                "the address of a pooler, add pooler=true to it"
            )
            return Check(name="wakeups", ok=False, detail=caution.what, hint=hint)
    milliseconds = figures["wakeup_delay"] * 1000
    return Check(
        name="wakeups", ok=True, detail=f"deliveries of other nodes are noticed in {milliseconds:.0f} ms"
    )


def jobs(pasts: Iterable[Past]) -> Check:
    """Check for periodic jobs whose latest run failed."""
    failing = [past for past in pasts if past.error and not past.running]
    if failing:
        found = [
            f"{past.name} failed in {past.failures} of {past.runs} runs: {past.error}" for past in failing
        ]
        hint = "; ".join(f"relay jobs run {past.name}" for past in failing)
        return Check(name="jobs", ok=False, detail="; ".join(found), hint=f"{hint}; the log has the details")
    return Check(name="jobs", ok=True, detail="the latest run of every job succeeded")


def ready(reasons: Iterable[str]) -> Check:
    """Check whether a running daemon is ready."""
    if found := list(reasons):
        return Check(name="ready", ok=False, detail="; ".join(found), hint=_NOT_READY)
    return Check(name="ready", ok=True, detail="the relay accepts events")


def writable(config: Config, state_dir: Path) -> Check:
    """Check for files of the relay that every user of the machine can change."""
    found = sorted({str(path) for path in _of_the_relay(config, state_dir) if _is_open(path)})
    for folder in sorted({path.parent for path in (config.path, *config.included)}):
        if _is_open(folder, sticky=True):
            found.append(str(folder))
    if found:
        detail = f"writable for every user: {', '.join(found)}"
        return Check(name="writable", ok=False, detail=detail, hint=f"chmod o-w {' '.join(found)}")
    return Check(
        name="writable", ok=True, detail="only owner and group may write to state, plugins and configuration"
    )


def _of_the_relay(config: Config, state_dir: Path) -> Iterator[Path]:
    yield config.path
    yield from config.included
    yield state_dir
    for folder in (state_dir, state_dir / config.backup.dir):
        yield folder
        yield from (path for path in _listed(folder) if path.name.startswith("relay"))
    for folder in config.plugins.dirs:
        yield folder
        yield from (path for path in _listed(folder) if path.suffix == ".py")


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _is_open(path: Path, *, sticky: bool = False) -> bool:
    """Return whether every user can write a file or folder; with `sticky`, a sticky folder does not count."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISSOCK(mode) or not mode & stat.S_IWOTH:
        return False
    return not (sticky and stat.S_ISDIR(mode) and mode & stat.S_ISVTX)
