"""The daemon's state on one page: backups, disk, and the problems that an operator should know.

In a cluster, the problems are those of all nodes: only the owner of a lane knows why it does not deliver.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Annotated, Literal

import msgspec

from relay import __version__
from relay.api.context import Context
from relay.api.views import Time, about
from relay.api.words import held_text
from relay.base.clock import SECOND, rfc3339
from relay.base.units import render_duration, render_size
from relay.delivery.destination_health import NO_STORAGE
from relay.delivery.lane import Lane
from relay.doctor import FAILING
from relay.store import DiskSpace

FEW_DAYS = 7
"""With fewer days until the disk is full, the disk is a problem."""


class BackupsView(msgspec.Struct):
    """The backups in `[backup] dir`."""

    last_success: Annotated[Time | None, about("Time of the latest backup; null if there is none.")]
    bytes: Annotated[int | None, about("Size of the latest backup.")]
    kept: Annotated[int, about("Number of backups.")]
    interval: Annotated[str, about('Interval of backups, such as "24h".')]
    overdue: Annotated[bool, about("Whether the latest backup is older than the interval allows.")]
    error: Annotated[str | None, about("Why the last attempt failed; null if it succeeded.")]


class DiskView(msgspec.Struct):
    """The disk that holds the database."""

    folder: str
    free: Annotated[int, about("Free bytes.")]
    min_free: Annotated[int, about("`[storage] min_free_disk`: with less, senders get 503.")]
    full: Annotated[bool, about("Whether senders get 503 because of the disk.")]
    days_left: Annotated[
        float | None,
        about("Days until `min_free` is reached at the pace of the last day; null: unknown, or no growth."),
    ]


Kind = Literal["destination", "source", "job"]


class StatusProblem(msgspec.Struct, frozen=True):
    """A reason why the relay is not healthy."""

    what: str
    next: Annotated[str, about("The next command to run.")]
    kind: Annotated[Kind | None, about("Kind of the object that has the problem.")] = None
    name: Annotated[str | None, about("Name of this object.")] = None
    node: Annotated[str | msgspec.UnsetType, about("The other node of the cluster that has the problem.")] = (
        msgspec.UNSET
    )

    def is_same(self, other: "StatusProblem") -> bool:
        """Return whether two nodes report the same problem: all nodes share the sources."""
        return self.what == other.what or (self.kind == other.kind == "source" and self.name == other.name)


Problems = tuple[tuple[StatusProblem, ...], ...]
"""Problems in groups, the most severe group first."""

SHOW = "show problems"
"""The request by which a node asks the others for their problems."""

PATIENCE = 2.0  # seconds within which the other nodes must answer


class StatusView(msgspec.Struct):
    """The daemon's state."""

    version: str
    ready: bool
    reasons: list[str]
    uptime_seconds: int
    sources: list[str]
    destinations: list[str]
    addresses: Annotated[
        dict[str, str], about("URLs of the listeners `public` and `admin`, as they are open.")
    ]
    backups: Annotated[BackupsView | None, about("null: `[backup] every` is not set.")]
    disk: Annotated[DiskView | None, about("null: not checked yet.")]
    problems: Annotated[list[StatusProblem], about("The most severe first; empty if there are no problems.")]


async def status_of(context: Context, began: int) -> StatusView:
    """Return the daemon's state; `began` is the time of its start (steady clock)."""
    problems = await _all_problems(context)
    reasons = context.health.reasons()
    return StatusView(
        version=__version__,
        ready=not reasons,
        reasons=reasons,
        uptime_seconds=(context.clock.steady() - began) // SECOND,
        sources=sorted(context.ingest.mounts),
        destinations=sorted(context.dispatcher.lanes),
        addresses=context.addresses,
        backups=_backups(context),
        disk=_disk(context),
        problems=problems,
    )


async def _all_problems(context: Context) -> list[StatusProblem]:
    """Return the problems of all nodes. Without the database, a node cannot ask the others."""
    groups = [list(group) for group in problems_of(context)]
    if context.store.failure is not None:
        return [each for group in groups for each in group]
    others = await context.store.nodes.ask_others(SHOW, None, PATIENCE)
    parts, unable = others.read(Problems)
    for node, theirs in parts:
        for mine, more in zip_longest(groups, theirs[: len(groups)], fillvalue=()):
            assert isinstance(mine, list)  # noqa: S101 - there are at least as many groups here
            mine += [_from(node, each) for each in more if not any(map(each.is_same, mine))]
    missing = [
        StatusProblem(f"node {name} does not answer, so its problems are unknown", "relay nodes")
        for name in others.silent
    ]
    missing += [
        StatusProblem(f"node {name} runs another version, so its problems are unknown", "relay nodes")
        for name in unable
    ]
    return [*missing, *(each for group in groups for each in group)]


def _from(node: str, problem: StatusProblem) -> StatusProblem:
    return msgspec.structs.replace(problem, node=node)


def _backups(context: Context) -> BackupsView | None:
    every = context.state.config.backup.every
    if every is None:
        return None
    found = context.backups.summary
    return BackupsView(
        last_success=None if found.last_success is None else rfc3339(found.last_success),
        bytes=found.bytes,
        kept=found.kept,
        interval=render_duration(every),
        overdue=context.backups.overdue,
        error=context.backups.failed,
    )


def _disk(context: Context) -> DiskView | None:
    space, days = context.disk.space, context.disk.days_left
    if space is None:
        return None
    return DiskView(
        folder=str(space.folder),
        free=space.free,
        min_free=space.floor,
        full=space.is_full,
        days_left=None if days is None else round(days, 1),
    )


def problems_of(context: Context) -> Problems:
    """Return the problems that this node knows."""
    pending = context.store.ledger.pending()
    lanes = sorted(context.dispatcher.lanes.values(), key=lambda lane: -pending.get(lane.name, 0))
    cautions = [each for each in context.database_watch.cautions if not each.is_choice]
    groups = (
        _problems_of_disk(context, context.health.reasons()),
        _problems_of_ledger(context),
        (
            each
            for lane in lanes
            for each in _problems_of_destination(context, lane, pending.get(lane.name, 0))
        ),
        (StatusProblem(each.what, each.next) for each in cautions),
        _problems_of_jobs(context),
        _problems_of_config(context),
        _problems_of_sources(context),
        _problems_of_certificates(context, lanes),
    )
    return tuple(map(tuple, groups))


def _problems_of_ledger(context: Context) -> Iterator[StatusProblem]:
    """Yield destinations with deliveries that are not accounted for."""
    for name, count in sorted(context.ledger_check.unaccounted.items()):
        what = f"the ledger of {name} does not balance, a bug in the relay; difference: {count}"
        yield StatusProblem(what, "relay doctor")


def _problems_of_config(context: Context) -> Iterator[StatusProblem]:
    """Yield a failed reload."""
    if context.reloads.failed is not None:
        what = f"the last reload failed: {context.reloads.failed}"
        yield StatusProblem(what, f"relay check-config {context.state.config.path}")


def _problems_of_certificates(context: Context, lanes: Sequence[Lane]) -> Iterator[StatusProblem]:
    """Yield certificates of destinations that expire soon."""
    for lane in lanes:
        now, certificate = context.clock.wall(), lane.certificate
        if certificate is not None and now > certificate.renewal_overdue:
            left = certificate.ends - now
            when = f"expires in {_roughly(left / SECOND)}" if left > 0 else "has expired"
            yield StatusProblem(
                f"the certificate of {lane.name} {when}",
                f"relay destinations test {lane.name}",
                "destination",
                lane.name,
            )


def _problems_of_disk(context: Context, reasons: list[str]) -> Iterator[StatusProblem]:
    """Yield the reasons why the relay is not ready, and whether its disk will be full soon."""
    disk, is_full = context.disk.space, context.ingest.admission.disk_full
    for reason in reasons:
        if disk is not None and reason.startswith("less free space"):
            yield StatusProblem(f"not ready: {reason}; {_space(disk)}", f"df -h {disk.folder}")
        else:
            yield StatusProblem(f"not ready: {reason}", "relay doctor")
    if disk is not None and disk.lacking and not is_full:
        what = f"large requests are refused with 503, because the disk has no room for them; {_space(disk)}"
        yield StatusProblem(what, f"df -h {disk.folder}")
    days = context.disk.days_left
    if days is not None and days < FEW_DAYS and not is_full:
        what = f"at the pace of the last day, the disk will be full in {_roughly(days * 86_400)}"
        yield StatusProblem(what, "relay db status")


def _space(disk: DiskSpace) -> str:
    free, floor = render_size(disk.free), render_size(disk.floor)
    return f"{free} free in {disk.folder}, min_free_disk is {floor}"


def _problems_of_jobs(context: Context) -> Iterator[StatusProblem]:
    """Yield failed backups and other failed jobs; while the store fails, jobs fail for the same reason."""
    if context.store.failure is not None:
        return
    if context.backups.failed is not None:
        yield StatusProblem(
            f"the last backup failed: {context.backups.failed}", "relay jobs run backup", "job", "backup"
        )
    elif context.backups.overdue:
        yield StatusProblem(
            "the latest backup is too old, or there is none", "relay jobs run backup", "job", "backup"
        )
    for past in context.jobs.all():
        if past.error and not past.running and past.name != "backup":
            what = f"the job {past.name} failed: {past.error}"
            yield StatusProblem(what, f"relay jobs run {past.name}", "job", past.name)


def _problems_of_sources(context: Context) -> Iterator[StatusProblem]:
    """Yield paused and silent sources."""
    for name, mount in sorted(context.ingest.mounts.items()):
        of: tuple[Kind, str] = ("source", name)
        if mount.paused:
            yield StatusProblem(f"{name} is paused: its senders get 503", f"relay sources resume {name}", *of)
        elif context.activity.is_silent(name):
            silence = _roughly(context.activity.silence(name))
            usual = _roughly(context.activity.usual_gap(name))
            what = f"{name} is silent: no event for {silence}; usually one arrives within {usual}"
            yield StatusProblem(what, f"relay sources show {name}", *of)


def _problems_of_destination(context: Context, lane: Lane, pending: int) -> Iterator[StatusProblem]:
    """Yield the problem of a destination that does not get its deliveries."""
    if not lane.is_owned or lane.config.paused:  # another node reports it; or a pause before going live
        return
    name, since = lane.name, lane.health.state.failing_since
    held = lane.held or ("circuit open" if lane.health.circuit.is_open else None)  # a probe is no recovery
    waiting = f"{pending} deliveries wait" if pending != 1 else "1 delivery waits"

    def problem(what: str, verb: str) -> StatusProblem:
        return StatusProblem(what, f"relay destinations {verb} {name}", "destination", name)

    if held is None or held == NO_STORAGE:
        now = context.clock.steady()
        if since is not None and now - since >= FAILING:
            what = f"{name} has been failing for {_roughly((now - since) / SECOND)}; {waiting}"
            yield problem(what, "test")
    elif held == "paused":
        if pending:
            yield problem(f"{name} is paused; {waiting}", "resume")
    elif held.startswith("disabled"):
        yield problem(f"{name} is {held_text(held)}; {waiting}", "enable")
    else:
        yield problem(f"{name} is held ({held_text(held)}); {waiting}", "show")


def _roughly(seconds: float) -> str:
    """Render a duration in one unit, of which there are two or more, such as "36 hours"."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
