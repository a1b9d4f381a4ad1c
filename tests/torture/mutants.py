"""Mutants of the cluster: faults that several nodes on one database must not have, each found by a test.

Run `python -m tests.torture.mutants`, or with the name of a mutant. For each, it copies the source, changes a
few lines of the copy, and runs the tests that should fail.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from postgres import start

ROOT = Path(__file__).parents[2]
COPIED = ("relay", "plugins", "tests", "bench", "pyproject.toml")
POSTGRES = "relay/store/postgres"
LIMIT = 600.0  # seconds for the tests of one mutant

NODES = "tests/unit/test_postgres_nodes.py"
SHARED = "tests/unit/test_postgres_shared.py"
STORE = "tests/unit/test_postgres_store.py"
OWNER = "tests/unit/test_owner.py"
WORKERS = "tests/unit/test_postgres_workers.py"
SHARDS = "tests/unit/test_postgres_shards.py"
REPLIES = "tests/unit/test_postgres_replies.py"
FAILOVER = "tests/torture/test_failover.py"
CONNECTION = "tests/unit/test_postgres_connection.py"
CLOCK = "tests/unit/test_server_clock.py"
CLUSTER_API = "tests/daemon/test_cluster_api.py"
WAKE_UPS = "tests/unit/test_postgres_wakeups.py"
REQUESTS = "tests/unit/test_postgres_requests.py"


@dataclass(frozen=True)
class Change:
    """A text that occurs once in a file, and its replacement."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutant:
    """Changes that make one fault, and the tests that must find it."""

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
        [f"{NODES}::test_a_node_renews_only_the_epoch_that_it_took"],
    ),
    "succeed-another-state-folder": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "WHERE place = $2 AND incarnation <>",
                "WHERE $2 = $2 AND incarnation <>",
            )
        ],
        [f"{NODES}::test_a_node_takes_over_at_once_from_a_dead_one_with_the_same_state_folder"],
    ),
    "change-settings-while-former-ones-are-alive": Mutant(
        [
            Change(
                f"{POSTGRES}/leases.py",
                "if len(others) == len(able) and not lease.is_held:",
                "if not lease.is_held:",
            )
        ],
        [f"{NODES}::test_an_operators_change_comes_into_force_at_once_when_the_former_settings_are_gone"],
    ),
    "any-node-changes-settings": Mutant(
        [Change(f"{POSTGRES}/leases.py", "if peer.age < lease.gone_for]", "if peer.age > 0]")],
        [f"{NODES}::test_an_operators_change_comes_into_force_at_once_when_the_former_settings_are_gone"],
    ),
    "take-with-other-settings": Mutant(
        [
            Change(
                f"{POSTGRES}/leases.py",
                "                barred[peer.incarnation].add(lease.name)\n",
                "                pass\n",
            )
        ],
        [f"{NODES}::test_only_nodes_with_the_settings_in_force_may_have_a_lease"],
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
                "AND o.attempts = s.before\n        RETURNING o.id)",
                "\n        RETURNING o.id)",
            ),
        ],
        [f"{SHARED}::test_an_outcome_after_another_nodes_retry_does_not_count"],
    ),
    "count-late-retries": Mutant(
        [Change(f"{POSTGRES}/commit.py", "l.incarnation <> $8::uuid AND", "false AND $8::uuid IS NULL AND")],
        [f"{SHARED}::test_a_late_failure_does_not_count_while_the_new_owner_sends"],
    ),
    "count-late-ends": Mutant(
        [Change(f"{POSTGRES}/commit.py", "l.incarnation <> $9::uuid AND", "false AND $9::uuid IS NULL AND")],
        [f"{SHARED}::test_a_late_failure_does_not_count_while_the_new_owner_sends"],
    ),
    "settle-successes-without-compare-and-set": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "o.attempts = s.before\n        RETURNING o.id, o.event_id, o.destination, 'delivered'",
                "true\n        RETURNING o.id, o.event_id, o.destination, 'delivered'",
            )
        ],
        [f"{STORE}::test_an_outcome_with_another_number_of_attempts_is_refused"],
    ),
    "keep-attempts-of-deleted-events": Mutant(
        [Change(f"{POSTGRES}/deliveries.py", "if event_id not in stored]", "if event_id < 0]")],
        [f"{SHARED}::test_a_late_attempt_stays_only_if_its_event_does"],
    ),
    "look-for-an-event-that-is-being-deleted": Mutant(
        [Change(f"{POSTGRES}/deliveries.py", "BETWEEN $2 AND $3 FOR KEY SHARE", "BETWEEN $2 AND $3")],
        [f"{SHARED}::test_an_attempt_that_is_stored_while_its_event_is_deleted_does_not_stay"],
    ),
    "forget-a-cancellation-with-its-owner": Mutant(
        [Change(f"{POSTGRES}/transitions.py", "SET expires_at = $2 WHERE", "SET id = id WHERE $2 < 9 AND")],
        [f"{SHARED}::test_a_cancellation_during_an_attempt_survives_its_owner"],
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
        [f"{SHARED}::test_a_wake_up_is_not_part_of_the_commit"],
    ),
    "shared-ledger-row": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "counts, sequences.slot, list(batch.ledger)",
                "counts, 0, list(batch.ledger)",
            )
        ],
        [f"{SHARED}::test_commits_of_two_nodes_do_not_wait_for_each_other"],
    ),
    "shared-row-of-statistics": Mutant(
        [Change(f"{POSTGRES}/commit.py", "STATS,\n            slot,", "STATS,\n            0 * slot,")],
        [f"{SHARED}::test_commits_of_two_nodes_do_not_wait_for_each_other"],
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
        [f"{SHARED}::test_no_delivery_is_stuck_behind_one_that_ends_at_another_node"],
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
        [f"{SHARED}::test_no_delivery_is_stuck_behind_one_that_ends_at_another_node"],
    ),
    "ordered-insert-without-lock": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "        places = await _lock(transaction, ordered)\n",
                "        places = [name for name, _ in ordered], [text(key) for _, key in ordered]\n",
            )
        ],
        [f"{SHARED}::test_no_delivery_is_stuck_behind_one_that_ends_at_another_node"],
    ),
    "order-keys-one-after-another": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "if keys := keys - transaction.locked:",
                "if keys < transaction.locked:",
            )
        ],
        [f"{SHARED}::test_nodes_that_end_and_add_deliveries_of_the_same_keys_do_not_deadlock"],
    ),
    "keys-before-the-ledger": Mutant(
        [
            Change(
                f"{POSTGRES}/transaction.py",
                "return f\"WITH {', '.join(expressions)}",
                "if not results[1:]:\n        expressions.reverse()\n"
                "    return f\"WITH {', '.join(expressions)}",
            )
        ],
        [SHARED],
    ),
    "backlog-without-lock": Mutant(
        [Change(f"{POSTGRES}/backlog.py", "        await transaction.fetch(LOCK_SQL)\n", "")],
        [f"{SHARED}::test_the_backlog_limit_is_exact_for_nodes_that_race_to_it"],
    ),
    "backlog-without-checks": Mutant(
        [Change(f"{POSTGRES}/backlog.py", "batch.checked = set(batch.limits)", "batch.checked = set()")],
        [f"{SHARED}::test_room_that_a_node_does_not_use_is_taken_back_from_it"],
    ),
    "backlog-without-taking-back": Mutant(
        [
            Change(
                f"{POSTGRES}/backlog.py", "if rooms[name] < wanted[name] and sums[name][1]]:", "if not name]:"
            )
        ],
        [f"{SHARED}::test_room_that_a_node_does_not_use_is_taken_back_from_it"],
    ),
    "report-a-change-of-a-destination-again": Mutant(
        [Change("relay/store/transitions.py", "        if after != before:\n", "        if state:\n")],
        [SHARED, OWNER],
    ),
    "report-a-change-without-the-lease": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "mine = {row[0] for row in rows if not row[3]}",
                "mine = {row[0] for row in rows}",
            )
        ],
        [SHARED],
    ),
    "warn-of-expiry-without-lock": Mutant(
        [Change(f"{POSTGRES}/transitions.py", "    await transaction.fetch(WARNING_LOCK_SQL)\n", "")],
        [SHARDS],
    ),
    "forget-the-standing-of-the-former-owner": Mutant(
        [
            Change(
                "relay/delivery/owner.py",
                "lane.own(until, state, owned.standing.get(name))",
                "lane.own(until, state)",
            )
        ],
        [OWNER],
    ),
    "take-a-lane-with-other-settings-and-its-standing": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "lease.definition not in (None, self._definition(lease.name))",
                "lease.definition is self",
            )
        ],
        [NODES],
    ),
    "retry-of-a-refused-request-without-key": Mutant(
        [
            Change(
                "relay/store/batch.py",
                "            self.keys.add(key, receipt.event_id, self.steady + DEDUPE_FOR)\n"
                "            self.retried",
                "            self.retried",
            ),
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
        [f"{OWNER}::test_a_lease_that_ends_while_a_body_is_read_stops_the_attempt"],
    ),
    "use-deliveries-of-a-former-lease": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "        self._term += 1\n        self._release_windows()\n",
                "        self._term += 1\n",
            )
        ],
        [f"{OWNER}::test_a_lane_that_was_lost_and_taken_again_empties_its_window"],
    ),
    "use-a-claim-of-a-former-lease": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "(shards, term) != (self.shards, self._term)",
                "(shards, term) != (self.shards, term)",
            )
        ],
        [f"{OWNER}::test_a_lane_that_was_lost_and_taken_again_sends_nothing_that_it_had_claimed_before"],
    ),
    "send-under-a-former-lease": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "            or term != self._term\n            or not self._store",
                "            or not self._store",
            )
        ],
        [f"{OWNER}::test_a_lane_that_was_lost_and_taken_again_sends_nothing_that_it_had_claimed_before"],
    ),
    "send-a-group-under-a-former-lease": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "                or term != self._term\n                or not self._store",
                "                or not self._store",
            )
        ],
        [f"{OWNER}::test_a_lane_that_was_lost_and_taken_again_sends_nothing_that_it_had_claimed_before"],
    ),
    "offer-a-delivery-of-a-former-lease": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "if batch.due and batch.scope is not scope:",
                "if batch.due and batch.scope is None:",
            )
        ],
        [
            f"{SHARED}::test_a_new_delivery_that_another_node_has_sent_before_its_commit_was_answered_is_not_sent_again"
        ],
    ),
    "keep-a-short-lease-for-a-longer-timeout": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "if longer > 0 and self.health.owned_until not in {0, FOREVER}:",
                "if longer > 86_400:",
            )
        ],
        [f"{OWNER}::test_after_a_reload_with_a_longer_timeout_attempts_wait_for_a_longer_lease"],
    ),
    "late-commits-unannounced": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "nodes.announce(others, since=batch.steady)",
                "nodes.announce(others, since=2**62)",
            )
        ],
        [f"{SHARED}::test_deliveries_of_a_commit_that_took_some_time_are_claimed_at_once"],
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
        [f"{SHARED}::test_deliveries_that_are_announced_during_a_claim_are_found_by_the_next_one"],
    ),
    "deliveries-of-a-killed-node-unannounced": Mutant(
        [Change(f"{POSTGRES}/nodes.py", "            self._search_own_lanes()\n", "            pass\n")],
        [f"{SHARED}::test_the_others_look_for_deliveries_that_a_killed_node_has_not_announced"],
    ),
    "former-owner-changes-a-state": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "AND l.incarnation <> ${len(_STATE_COLUMNS) + 1}::uuid AND",
                "AND l.incarnation IS NULL AND ${len(_STATE_COLUMNS) + 1}::uuid IS NULL AND",
            )
        ],
        [f"{SHARED}::test_a_frozen_node_ends_nothing_and_changes_no_state_of_a_lane_that_it_has_lost"],
    ),
    "former-owner-ends-deliveries": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "(l.incarnation <> $5::uuid OR coalesce",
                "(l.incarnation IS NULL AND $5::uuid IS NULL OR coalesce",
            )
        ],
        [f"{SHARED}::test_a_frozen_node_ends_nothing_and_changes_no_state_of_a_lane_that_it_has_lost"],
    ),
    "slot-free-before-the-end": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "await self._fetch(LEAVE_SQL, self.incarnation, LEFT)",
                'await self._fetch("DELETE FROM nodes WHERE incarnation = $1::uuid", self.incarnation)',
            )
        ],
        [f"{NODES}::test_slots_are_unique_and_used_again"],
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
        [f"{SHARED}::test_the_times_of_a_node_whose_clock_is_wrong_are_those_of_the_server"],
    ),
    "trust-without-end": Mutant(
        [
            Change(
                f"{POSTGRES}/leases.py",
                "return asked + int((length - timeout) * SECOND)",
                "return asked + int((length + 3600) * SECOND)",
            )
        ],
        [f"{NODES}::test_without_the_database_a_node_trusts_its_leases_until_their_times"],
    ),
    "trust-from-the-answer": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "            if name in renewed:\n                self._trust(name, asked)",
                "            if name in renewed:\n                self._trust(name, self._clock.steady())",
            )
        ],
        [f"{NODES}::test_trust_in_a_lease_counts_from_before_the_request"],
    ),
    "write-an-outdated-worker": Mutant(
        [Change(f"{POSTGRES}/workers.py", "w.id = g.id AND w.version = g.known", "w.id = g.id")],
        [f"{WORKERS}::test_a_change_of_a_row_that_another_node_has_changed_is_repeated"],
    ),
    "flush-an-outdated-worker": Mutant(
        [
            Change(
                f"{POSTGRES}/workers.py",
                "WHERE w.version = g.known ORDER BY",
                "WHERE g.known IS NOT NULL ORDER BY",
            )
        ],
        [f"{WORKERS}::test_a_quiet_heartbeat_revives_a_worker_that_another_node_has_marked"],
    ),
    "sweep-without-the-other-nodes": Mutant(
        [Change(f"{POSTGRES}/workers.py", "return min([moment, ", "return max([moment, ")],
        [f"{WORKERS}::test_a_sweep_waits_for_heartbeats_that_another_node_has_not_written"],
    ),
    "no-extension-after-an-outage": Mutant(
        [
            Change(
                f"{POSTGRES}/workers.py",
                "now if self._owes_extension and was_away else former.resumed",
                "former.resumed",
            )
        ],
        [f"{WORKERS}::test_an_extension_is_made_up_for_when_the_database_is_back"],
    ),
    "read-workers-since-the-latest-transaction": Mutant(
        [Change(f"{POSTGRES}/workers.py", "SELECT pg_snapshot_xmin(", "SELECT pg_snapshot_xmax(")],
        [f"{WORKERS}::test_a_row_of_a_long_transaction_is_read_after_its_end"],
    ),
    "late-requests-of-a-frozen-node": Mutant(
        [
            Change(
                f"{POSTGRES}/workers.py",
                "if not isinstance(change, SessionSeen) and self._was_away():",
                "if change is None:",
            )
        ],
        [f"{WORKERS}::test_a_node_that_was_frozen_refuses_requests_from_that_time"],
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
        [f"{REPLIES}::test_a_repetition_at_another_node_is_recognized_once"],
    ),
    "take-a-shard-of-a-former-number": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "WHERE (g.standing ->> 'shards')::int = s.shards ORDER BY",
                "WHERE s.shards IS NOT NULL ORDER BY",
            )
        ],
        [f"{NODES}::test_a_held_shard_delays_a_change_and_a_node_that_has_missed_it_takes_none"],
    ),
    "take-a-shard-while-the-number-changes": Mutant(
        [Change(f"{POSTGRES}/nodes.py", "ORDER BY g.name FOR SHARE OF g", "ORDER BY g.name")],
        [f"{NODES}::test_no_shard_is_taken_while_the_number_is_being_changed"],
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
        [f"{NODES}::test_the_number_of_shards_changes_when_no_shard_is_held"],
    ),
    "end-without-the-lease-of-a-shard": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "AND l.incarnation = $5::uuid AND l.until > clock_timestamp()) END",
                "AND l.until < 'infinity') END",
            )
        ],
        [f"{SHARDS}::test_a_node_that_was_frozen_ends_nothing_of_another_number_of_shards"],
    ),
    "end-as-if-not-divided": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "AND (l.incarnation <> $5::uuid OR coalesce((l.standing ->> 'shards')::int, 1) <> 1))",
                "AND l.incarnation <> $5::uuid)",
            )
        ],
        [f"{SHARDS}::test_a_node_that_was_frozen_ends_nothing_of_another_number_of_shards"],
    ),
    "claim-other-shards": Mutant(
        [
            Change(
                "relay/base/shards.py",
                "slot % self.count in self.numbers",
                "slot % self.count >= min(self.numbers, default=99)",
            )
        ],
        [f"{SHARDS}::test_a_claim_reads_only_its_shards_and_all_together_read_everything"],
    ),
    "hand-over-a-shard-beyond-its-limit": Mutant(
        [
            Change(
                "relay/delivery/lane.py",
                "return self.in_flight > limit or any(",
                "return self.in_flight > 99 * limit or any(",
            )
        ],
        [f"{OWNER}::test_a_shard_is_handed_over_when_its_part_of_the_limits_is_free"],
    ),
    "begin-a-shard-with-a-full-rate": Mutant(
        [
            Change(
                "relay/base/rate.py",
                "self._tokens = min(self._tokens, self._burst if share else 0.0)",
                "self._tokens = self._burst if share else 0.0",
            )
        ],
        ["tests/unit/test_rate.py::test_shares_of_a_rate_never_allow_more_than_the_whole"],
    ),
    "hand-over-before-the-last-outcome": Mutant(
        [
            Change(
                "relay/delivery/owner.py",
                "            await self._dispatcher.drained(destination_of(name))\n",
                "            pass\n",
            )
        ],
        [f"{OWNER}::test_a_lane_is_handed_over_after_its_attempts_in_flight"],
    ),
    "hand-over-a-shard-before-the-last-outcome": Mutant(
        [Change("relay/delivery/owner.py", "            await lane.released()\n", "            pass\n")],
        [f"{OWNER}::test_a_shard_is_handed_over_when_its_part_of_the_limits_is_free"],
    ),
    "begin-at-a-failing-destination-with-full-concurrency": Mutant(
        [
            Change(
                "relay/delivery/destination_health.py",
                "careful=state.failing_since is not None",
                "careful=False",
            )
        ],
        [f"{OWNER}::test_a_gained_lane_has_the_state_that_the_other_node_stored"],
    ),
    "take-a-lease-that-is-held": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "SELECT name FROM leases WHERE name = ANY($2::text[]) AND until <= clock_timestamp()",
                "SELECT name FROM leases WHERE name = ANY($2::text[])",
            )
        ],
        [f"{NODES}::test_a_lease_that_another_node_takes_at_the_same_moment_or_holds_is_not_taken"],
    ),
    "take-a-lease-without-a-lock": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "until <= clock_timestamp()\n         ORDER BY name FOR UPDATE SKIP LOCKED",
                "until <= clock_timestamp()",
            )
        ],
        [f"{NODES}::test_a_lease_that_another_node_takes_at_the_same_moment_or_holds_is_not_taken"],
    ),
    "move-lanes-to-a-node-that-has-just-started": Mutant(
        [Change(f"{POSTGRES}/leases.py", "due.age >= settle_in:", "due.age >= 0:")],
        [f"{NODES}::test_a_joining_node_gets_its_share_one_by_one_after_it_has_settled_in"],
    ),
    "leave-a-neglected-lease": Mutant(
        [Change(f"{POSTGRES}/leases.py", "lease.free_for > NEGLECTED", "lease.free_for > ABSENT")],
        [f"{NODES}::test_a_node_takes_keeps_or_hands_over_a_lease"],
    ),
    "bar-other-settings-for-ever": Mutant(
        [Change(f"{POSTGRES}/leases.py", "(lease.free_for or 0.0) > ABSENT", "(lease.free_for or 0.0) < 0")],
        [f"{NODES}::test_a_node_with_other_settings_gets_nothing_until_those_in_force_are_gone"],
    ),
    "one-node-agrees-with-itself": Mutant(
        [
            Change(
                f"{POSTGRES}/leases.py",
                "if counts[peer.defines(lease.name)] > 1]",
                "if counts[peer.defines(lease.name)] > 0]",
            )
        ],
        [f"{NODES}::test_an_operators_change_comes_into_force_at_once_when_the_former_settings_are_gone"],
    ),
    "two-groups-agree-on-different-settings": Mutant(
        [Change(f"{POSTGRES}/leases.py", "for peer in found}) == 1:", "for peer in found}) >= 1:")],
        [f"{NODES}::test_an_operators_change_comes_into_force_at_once_when_the_former_settings_are_gone"],
    ),
    "leave-without-notice": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "            await self._fetch(LEAVE_SQL, self.incarnation, LEFT)\n",
                "            pass\n",
            )
        ],
        [f"{NODES}::test_a_node_that_leaves_keeps_its_leases_until_it_gives_them"],
    ),
    "lead-after-the-deadline": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "return self._trusted.get(_job(job), 0) > self._clock.steady()",
                "return self._trusted.get(_job(job), 0) > 0",
            )
        ],
        [f"{NODES}::test_without_the_database_a_node_trusts_its_leases_until_their_times"],
    ),
    "overwrite-a-key-of-another-node": Mutant(
        [
            Change(
                f"{POSTGRES}/commit.py",
                "expires_at = CASE WHEN d.expires_at <= $6::bigint THEN excluded.expires_at END)",
                "expires_at = CASE WHEN $6::bigint > 0 THEN excluded.expires_at END)",
            )
        ],
        [f"{STORE}::test_a_key_that_another_node_stores_meanwhile_is_found"],
    ),
    "fail-without-a-partition": Mutant(
        [Change(f"{POSTGRES}/writer.py", '"40P01", "23502", "23514"}', '"40P01", "23502"}')],
        [f"{STORE}::test_a_missing_partition_is_made_and_the_batch_written_again"],
    ),
    "a-lost-answer-is-a-failure": Mutant(
        [
            Change(
                f"{POSTGRES}/writer.py",
                "            if not await self._find_out(transaction):\n",
                "            if transaction is not None:\n",
            )
        ],
        [f"{STORE}::test_a_commit_whose_answer_is_lost_is_found_and_published"],
    ),
    "a-cancelled-wait-for-a-standby-is-a-commit": Mutant(
        [
            Change(
                f"{POSTGRES}/writer.py",
                "            if self._connection.is_unconfirmed:\n                await",
                "            if transaction is None:\n                await",
            )
        ],
        [f"{FAILOVER}::test_a_failover_loses_only_events_that_an_asynchronous_standby_did_not_have"],
    ),
    "durability-of-the-session": Mutant(
        [
            Change(
                f"{POSTGRES}/transaction.py",
                "(set_config('synchronous_commit', $1, true) = '')",
                "($1::text = '')",
            )
        ],
        [f"{STORE}::test_every_transaction_sets_its_durability"],
    ),
    "keep-the-locks-of-a-lost-machine": Mutant(
        [
            Change(
                f"{POSTGRES}/connection.py",
                "idle_in_transaction_session_timeout = 5000",
                "idle_in_transaction_session_timeout = 0",
            )
        ],
        [
            f"{CONNECTION}::test_a_transaction_of_a_lost_machine_ends_by_itself",
            f"{SHARED}::test_a_node_that_is_suspended_in_a_transaction_stops_the_others_only_for_a_while",
        ],
    ),
    "set-the-clock-by-the-first-comparison": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "self._clock.compare(*min(found, key=lambda each: each[1] - each[0]))",
                "for each in found:\n            self._clock.compare(*each)",
            )
        ],
        [f"{NODES}::test_a_slow_connect_at_the_start_does_not_set_the_clock"],
    ),
    "jump-to-the-time-of-the-server": Mutant(
        [
            Change(
                f"{POSTGRES}/clock.py",
                "return now + self._offset + max(-most, min(most, missing))",
                "return now + self._offset + missing + 0 * most",
            )
        ],
        [f"{CLOCK}::test_a_step_of_the_server_is_followed_slowly_and_never_back"],
    ),
    "allow-the-whole-rate-at-each-node": Mutant(
        [
            Change(
                "relay/ingest/admission.py",
                "key, rate, now, self.nodes).take(now, self.nodes)",
                "key, rate, now, self.nodes).take(now, 1)",
            )
        ],
        [f"{CLUSTER_API}::test_the_nodes_share_the_rate_limits_and_pauses_of_sources"],
    ),
    "read-a-regained-lane-from-the-cursor": Mutant(
        [
            Change(
                f"{POSTGRES}/nodes.py",
                "        self.on_due(map(destination_of, taken), 0, retries=True)\n",
                "        del taken\n",
            )
        ],
        [f"{SHARED}::test_a_lane_that_returns_to_a_node_is_read_from_the_beginning"],
    ),
    "no-poll-without-notifications": Mutant(
        [
            Change(
                f"{POSTGRES}/wakeups.py",
                "            if not self.arrives:\n                self._on_wake_up",
                "            if not self._tasks:\n                self._on_wake_up",
            )
        ],
        [f"{WAKE_UPS}::test_a_lost_connection_is_noticed_at_once_and_polls_replace_it"],
    ),
    "lose-announcements-while-disconnected": Mutant(
        [
            Change(
                f"{POSTGRES}/wakeups.py",
                "        if not self._can_send.is_set():  # sent once it is connected\n",
                "        if not self._can_send.is_set():\n            self._lanes = {False: {}, True: {}}\n",
            )
        ],
        [f"{WAKE_UPS}::test_announcements_without_a_connection_are_sent_later"],
    ),
    "no-second-look-after-a-claim": Mutant(
        [Change(f"{POSTGRES}/deliveries.py", "if not retries and (latest :=", "if retries and (latest :=")],
        [f"{SHARED}::test_a_claim_without_a_look_back_asks_for_another_claim_soon"],
    ),
    "cancel-without-the-lane": Mutant(
        [
            Change(
                f"{POSTGRES}/deliveries.py",
                "            if not scope.covers(name, slot):\n",
                "            if scope is None:\n",
            )
        ],
        [f"{SHARED}::test_a_cancellation_at_any_node_is_done_by_the_owner"],
    ),
    "delete-an-event-that-is-sent-again": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "\n       FOR KEY SHARE OF e  -- so that retention does not drop the event meanwhile\n",
                "\n",
            )
        ],
        [f"{SHARED}::test_an_event_that_another_node_sends_again_is_not_deleted"],
    ),
    "import-without-a-lock": Mutant(
        [
            Change(
                f"{POSTGRES}/transitions.py",
                "        await transaction.fetch(IMPORT_LOCK_SQL)\n",
                "        pass\n",
            )
        ],
        [f"{SHARED}::test_two_nodes_that_import_the_same_event_store_it_once"],
    ),
    "execute-a-request-twice": Mutant(
        [
            Change(
                f"{POSTGRES}/requests.py",
                "AND taken IS NULL\n         ORDER BY asked FOR UPDATE SKIP LOCKED",
                "AND answered IS NULL\n         ORDER BY asked",
            )
        ],
        [f"{REQUESTS}::test_two_owners_execute_a_request_once"],
    ),
    "remove-columns-that-older-nodes-use": Mutant(
        [
            Change(
                f"{POSTGRES}/store.py",
                "                if wanted > least and (\n",
                "                if wanted < least and (\n",
            )
        ],
        [f"{STORE}::test_a_migration_that_removes_something_waits_for_nodes_of_older_versions"],
    ),
    "join-a-daemon-that-is-alone": Mutant(
        [Change(f"{POSTGRES}/store.py", "            await refuse_single(connection, self._folder)\n", "")],
        [f"{SHARED}::test_a_cluster_does_not_join_a_daemon_alone"],
    ),
    "sweep-at-once-after-a-node-has-vanished": Mutant(
        [
            Change(
                f"{POSTGRES}/workers.py",
                "(flushed for (flushed,) in flushes), self._hold)",
                "(flushed for (flushed,) in flushes), 0)",
            )
        ],
        [f"{WORKERS}::test_after_a_node_vanished_a_sweep_waits_for_one_lease"],
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


@contextmanager
def shared_server() -> Iterator[dict[str, str]]:
    """Run a server for the tests of all mutants; yields the variable by which `postgres.server` finds it."""
    name = f"mutants-{os.getpid()}"
    folder = Path(tempfile.gettempdir()) / f"relay-postgres-{name}"
    server = start(folder)
    (folder / "port").write_text(str(server.port))
    try:
        yield {"PYTEST_XDIST_TESTRUNUID": name}
    finally:
        server.crash()


def run(mutant: Mutant, environment: Mapping[str, str]) -> str:
    """Return the first test that fails with this mutant; empty: all pass."""
    with tempfile.TemporaryDirectory(prefix="relay-mutant-") as folder:
        for name in COPIED:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target)  # with compiled modules: of unchanged files, they are valid
            else:
                shutil.copy(source, target)
        apply(mutant, Path(folder))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *mutant.tests],
            cwd=folder,
            env={**os.environ, **environment, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    if done.returncode == 0:
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
    if not failed:
        raise RuntimeError(f"the tests did not run:\n{done.stdout}\n{done.stderr}")
    return failed[0].split(" - ")[0].partition(" ")[2]


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(MUTANTS)))
def main(names: Sequence[str]) -> None:
    """Run the tests against mutants, by default all, and show which test finds each."""
    survived = []
    with shared_server() as environment:
        for name in names or MUTANTS:
            found = run(MUTANTS[name], environment)
            click.echo(f"{name}: {found or 'SURVIVED'}")
            if not found:
                survived.append(name)
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
