"""Mutants of the cluster: faults that several nodes on one database must not have, each found by a test.

Run `python -m tests.torture.mutants`, or with the name of a mutant. For each, it copies the source, changes a
few lines of the copy, and runs the tests that should fail.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
COPIED = ("relay", "plugins", "tests", "bench", "pyproject.toml")
POSTGRES = "relay/store/postgres"
LIMIT = 120.0  # seconds for the tests of one mutant

NODES = "tests/unit/test_postgres_nodes.py"
SHARED = "tests/unit/test_postgres_shared.py"
STORE = "tests/unit/test_postgres_store.py"
OWNER = "tests/unit/test_owner.py"
WORKERS = "tests/unit/test_postgres_workers.py"
SHARDS = "tests/unit/test_postgres_shards.py"
REPLIES = "tests/unit/test_postgres_replies.py"


@dataclass(frozen=True)
class Change:
    """A text that occurs once in a file, and its replacement."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """Changes that make one fault, and the files with tests that must find it."""

    changes: Sequence[Change]
    tests: Sequence[str]


MUTANTS = {
    "renew-by-name": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "WHERE l.name = h.name AND l.epoch = h.epoch AND l.incarnation = $1::uuid AND l.until >"
                " clock_timestamp()\n    RETURNING l.name",
                "WHERE l.name = h.name AND ($1::uuid, h.epoch) IS NOT NULL\n    RETURNING l.name",
            )
        ],
        [NODES],
    ),
    "succeed-another-state-folder": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "WHERE place = $2 AND incarnation <>",
                "WHERE $2 = $2 AND incarnation <>",
            )
        ],
        [NODES],
    ),
    "change-settings-while-former-ones-are-alive": Mutant(
        [
            Change(
                f"{POSTGRES}/leases.py",
                "if len(others) == len(able) and not lease.is_held:",
                "if not lease.is_held:",
            )
        ],
        [NODES],
    ),
    "any-node-changes-settings": Mutant(
        [Change(f"{POSTGRES}/leases.py", "if peer.age < lease.gone_for]", "if peer.age > 0]")],
        [NODES],
    ),
    "take-with-other-settings": Mutant(
        [
            Change(
                f"{POSTGRES}/leases.py",
                "                barred[peer.incarnation].add(lease.name)\n",
                "                pass\n",
            )
        ],
        [NODES],
    ),
    "settle-without-compare-and-set": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "o.attempts = s.before\n        RETURNING o.id, o.event_id, o.destination, s.state",
                "true\n        RETURNING o.id, o.event_id, o.destination, s.state",
            ),
            Change(
                f"{POSTGRES}/commit.py",
                "WHERE o.id = s.id AND o.attempts = s.before\n        RETURNING o.id)",
                "WHERE o.id = s.id\n        RETURNING o.id)",
            ),
        ],
        [SHARED, STORE],
    ),
    "settle-successes-without-compare-and-set": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "o.attempts = s.before\n        RETURNING o.id, o.event_id, o.destination, 'delivered'",
                "true\n        RETURNING o.id, o.event_id, o.destination, 'delivered'",
            )
        ],
        [SHARED, STORE],
    ),
    "notify-in-the-transaction": Mutant(
        [
            Change(
                f"{POSTGRES}/transaction.py",
                """return f"WITH {', '.join(expressions)} {' UNION ALL '.join(results)}\"""",
                """notify = "SELECT length(pg_notify('relay', '')::text)::bigint"
    return f"WITH {', '.join(expressions)} {' UNION ALL '.join([*results, notify])}\"""",
            )
        ],
        [SHARED],
    ),
    "shared-ledger-row": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "counts, sequences.slot, list(batch.ledger)",
                "counts, 0, list(batch.ledger)",
            )
        ],
        [SHARED],
    ),
    "shared-row-of-statistics": Mutant(
        [Change(f"{POSTGRES}/commit.py", "STATS,\n            slot,", "STATS,\n            0 * slot,")],
        [SHARED],
    ),
    "ordered-end-in-one-statement": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "    places = await _lock(transaction, Counter({key: -count for key, count in"
                " Counter(keys).items()}))\n"
                "    rows = await transaction.fetch(FREE_SQL, *places, batch.steady)\n",
                "    counts = sorted((name, text(key), -count) for (name, key), count in"
                " Counter(keys).items())\n"
                "    places = [row[0] for row in counts], [row[1] for row in counts]\n"
                "    sql = f\"WITH locked AS ({LOCK_SQL}) {FREE_SQL.replace('$3', '$4')}\"\n"
                "    changes = [row[2] for row in counts]\n"
                "    rows = await transaction.fetch(sql, *places, changes, batch.steady)\n",
            )
        ],
        [SHARED, STORE],
    ),
    "ordered-end-without-lock": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "    places = await _lock(transaction, Counter({key: -count for key, count in"
                " Counter(keys).items()}))\n",
                "    places = [name for name, _ in keys], [text(key) for _, key in keys]\n",
            )
        ],
        [SHARED, STORE],
    ),
    "ordered-insert-without-lock": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "        places = await _lock(transaction, ordered)\n",
                "        places = [name for name, _ in ordered], [text(key) for _, key in ordered]\n",
            )
        ],
        [SHARED, STORE],
    ),
    "order-keys-one-after-another": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "if keys := keys - transaction.locked:",
                "if keys < transaction.locked:",
            )
        ],
        [SHARED],
    ),
    "backlog-without-lock": Mutant(
        [Change(f"{POSTGRES}/backlog.py", "        await transaction.fetch(LOCK_SQL)\n", "")], [SHARED]
    ),
    "backlog-without-checks": Mutant(
        [Change(f"{POSTGRES}/backlog.py", "batch.checked = set(batch.limits)", "batch.checked = set()")],
        [SHARED],
    ),
    "backlog-without-taking-back": Mutant(
        [
            Change(
                f"{POSTGRES}/backlog.py", "if rooms[name] < wanted[name] and sums[name][1]]:", "if not name]:"
            )
        ],
        [SHARED],
    ),
    "attempts-after-the-deadline": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "or ((until := self.health.owned_until) != FOREVER and until <= self._clock.steady())\n",
                "",
            )
        ],
        [OWNER],
    ),
    "use-deliveries-of-a-former-lease": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "        self._term += 1\n        self._release_windows()\n",
                "        self._term += 1\n",
            )
        ],
        [OWNER],
    ),
    "use-a-claim-of-a-former-lease": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "(shards, term) != (self.shards, self._term)",
                "(shards, term) != (self.shards, term)",
            )
        ],
        [OWNER],
    ),
    "send-under-a-former-lease": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "            or term != self._term\n            or not self._store",
                "            or not self._store",
            )
        ],
        [OWNER],
    ),
    "send-a-group-under-a-former-lease": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "                or term != self._term\n                or not self._store",
                "                or not self._store",
            )
        ],
        [OWNER],
    ),
    "offer-a-delivery-of-a-former-lease": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "if batch.due and batch.scope is not scope:",
                "if batch.due and batch.scope is None:",
            )
        ],
        [SHARED],
    ),
    "late-commits-unannounced": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "nodes.announce(others, since=batch.steady)",
                "nodes.announce(others, since=2**62)",
            )
        ],
        [SHARED],
    ),
    "announcements-lost-during-a-claim": Mutant(
        [
            Change(
                f"{POSTGRES}/deliveries.py",
                "floor = self._floors.pop((destination, retries), None)",
                "floor = self._floors.get((destination, retries))",
            ),
            Change(
                f"{POSTGRES}/deliveries.py",
                "        self._cursors[key] = (now - 1, began)",
                "        self._floors.pop(key, None)\n        self._cursors[key] = (now - 1, began)",
            ),
        ],
        [SHARED],
    ),
    "deliveries-of-a-killed-node-unannounced": Mutant(
        [Change(f"{POSTGRES}/nodes.py", "            self._search_own_lanes()\n", "            pass\n")],
        [SHARED],
    ),
    "former-owner-changes-a-state": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "AND l.incarnation <> ${len(_STATE_COLUMNS) + 1}::uuid AND",
                "AND l.incarnation IS NULL AND ${len(_STATE_COLUMNS) + 1}::uuid IS NULL AND",
            )
        ],
        [SHARED],
    ),
    "former-owner-ends-deliveries": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "(l.incarnation <> $5::uuid OR coalesce",
                "(l.incarnation IS NULL AND $5::uuid IS NULL OR coalesce",
            )
        ],
        [SHARED],
    ),
    "slot-free-before-the-end": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "await self._fetch(LEAVE_SQL, self.incarnation, LEFT)",
                'await self._fetch("DELETE FROM nodes WHERE incarnation = $1::uuid", self.incarnation)',
            )
        ],
        [NODES],
    ),
    "row-ids-by-the-machine's-clock": Mutant(
        [
            Change(
                f"{POSTGRES}/clock.py",
                "self.wall = self.steady = self._follow",
                "self.steady = self._follow",
            ),
            Change(f"{POSTGRES}/clock.py", "self.wall = self.steady = _ahead(", "self.steady = _ahead("),
        ],
        [SHARED],
    ),
    "trust-without-end": Mutant(
        [
            Change(
                f"{POSTGRES}/leases.py",
                "return asked + int((length - timeout) * SECOND)",
                "return asked + int((length + 3600) * SECOND)",
            )
        ],
        [NODES],
    ),
    "trust-from-the-answer": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "            if name in renewed:\n                self._trust(name, asked)",
                "            if name in renewed:\n                self._trust(name, self._clock.steady())",
            )
        ],
        [NODES],
    ),
    "write-an-outdated-worker": Mutant(
        [Change(f"{POSTGRES}/workers.py", "w.id = g.id AND w.version = g.known", "w.id = g.id")],
        [WORKERS],
    ),
    "flush-an-outdated-worker": Mutant(
        [
            Change(
                f"{POSTGRES}/workers.py",
                "WHERE w.version = g.known ORDER BY",
                "WHERE g.known IS NOT NULL ORDER BY",
            )
        ],
        [WORKERS],
    ),
    "sweep-without-the-other-nodes": Mutant(
        [Change(f"{POSTGRES}/workers.py", "return min([moment, ", "return max([moment, ")],
        [WORKERS],
    ),
    "no-extension-after-an-outage": Mutant(
        [
            Change(
                f"{POSTGRES}/workers.py",
                "now if self._owes_extension and was_away else former.resumed",
                "former.resumed",
            )
        ],
        [WORKERS],
    ),
    "read-workers-since-the-latest-transaction": Mutant(
        [Change(f"{POSTGRES}/workers.py", "SELECT pg_snapshot_xmin(", "SELECT pg_snapshot_xmax(")],
        [WORKERS],
    ),
    "late-requests-of-a-frozen-node": Mutant(
        [
            Change(
                f"{POSTGRES}/workers.py",
                "if not isinstance(change, SessionSeen) and self._was_away():",
                "if change is None:",
            )
        ],
        [WORKERS],
    ),
    "take-an-unheard-reply-twice": Mutant(
        [
            Change(
                f"{POSTGRES}/replies.py",
                "DELETE FROM unheard WHERE digest = $1 RETURNING event_ids, expires > clock_timestamp() AS"
                " is_valid",
                "SELECT event_ids, expires > clock_timestamp() AS is_valid FROM unheard WHERE digest = $1",
            )
        ],
        [REPLIES],
    ),
    "take-a-shard-of-a-former-number": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "WHERE (g.standing ->> 'shards')::int = s.shards ORDER BY",
                "WHERE s.shards IS NOT NULL ORDER BY",
            )
        ],
        [NODES],
    ),
    "take-a-shard-while-the-number-changes": Mutant(
        [Change(f"{POSTGRES}/nodes.py", "ORDER BY g.name FOR SHARE OF g", "ORDER BY g.name")],
        [NODES],
    ),
    "change-shards-that-are-held": Mutant(
        [
            Change(
                f"{POSTGRES}/leases.py",
                "return None if any(lease.is_held and lease.name.startswith(begin) for lease in leases)"
                " else wanted",
                "return wanted if begin else None",
            )
        ],
        [NODES],
    ),
    "end-without-the-lease-of-a-shard": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "AND l.incarnation = $5::uuid AND l.until > clock_timestamp()) END",
                "AND l.until < 'infinity') END",
            )
        ],
        [SHARDS],
    ),
    "end-as-if-not-divided": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "AND (l.incarnation <> $5::uuid OR coalesce((l.standing ->> 'shards')::int, 1) <> 1))",
                "AND l.incarnation <> $5::uuid)",
            )
        ],
        [SHARDS],
    ),
    "claim-other-shards": Mutant(
        [
            Change(
                "relay/base/shards.py",
                "slot % self.count in self.numbers",
                "slot % self.count >= min(self.numbers, default=99)",
            )
        ],
        [SHARDS],
    ),
    "hand-over-a-shard-beyond-its-limit": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "return self.in_flight > limit or any(",
                "return self.in_flight > 99 * limit or any(",
            )
        ],
        [OWNER],
    ),
    "begin-a-shard-with-a-full-rate": Mutant(
        [
            Change(
                "relay/base/rate.py",
                "self._tokens = min(self._tokens, self._burst if share else 0.0)",
                "self._tokens = self._burst if share else 0.0",
            )
        ],
        ["tests/unit/test_rate.py"],
    ),
}


def apply(mutant: Mutant, root: Path) -> None:
    """Change the source below a folder; raises ValueError if a text does not occur once."""
    for change in mutant.changes:
        path = root / change.path
        text = path.read_text()
        if text.count(change.old) != 1:
            raise ValueError(f"{change.path}: expected once: {change.old}")
        path.write_text(text.replace(change.old, change.new))


def run(mutant: Mutant) -> str:
    """Return the first test that fails with this mutant; empty: all pass."""
    with tempfile.TemporaryDirectory(prefix="relay-mutant-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        apply(mutant, Path(folder))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *mutant.tests],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    if done.returncode == 0:
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if not failed:
        raise RuntimeError(f"the tests did not run:\n{done.stdout}\n{done.stderr}")
    return failed[0].split(" - ")[0].partition(" ")[2]


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(MUTANTS)))
def main(names: Sequence[str]) -> None:
    """Run the tests against mutants, by default all, and show which test finds each."""
    survived = []
    for name in names or MUTANTS:
        found = run(MUTANTS[name])
        click.echo(f"{name}: {found or 'SURVIVED'}")
        if not found:
            survived.append(name)
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
