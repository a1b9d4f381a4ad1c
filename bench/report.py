"""Comparisons as a table for people, or as JSON."""

from collections.abc import Sequence
from typing import Any

import msgspec

from bench.rounds import Comparison, Spread


def table(comparison: Comparison) -> str:
    """Render one comparison in five lines, and a sixth for its target."""
    columns = [
        _column("events/s (min-max)", comparison.rates(), ",.0f"),
        _column("CPU us/event (min-max)", comparison.costs(), ".0f"),
    ]
    judged = [comparison.costs()[2] if comparison.is_of_cost else comparison.rates()[2]]
    if (delays := comparison.delays()) is not None:
        columns.append(_column("p99 ms (min-max)", delays, ".1f"))
        judged.append(delays[2])
    names = ("", comparison.us, comparison.rival, "ratio")
    rows = zip(names, *columns, strict=True)
    lines = [f"  {name:<22}" + "".join(f"{cell:>28}" for cell in cells) for name, *cells in rows]
    lines = [f"{comparison.name}: {comparison.title}", *lines]
    if (target := comparison.target) is not None:
        met = "met" if all(ratio.median >= target for ratio in judged) else "missed"
        what = "ratio of CPU" if comparison.is_of_cost else "ratio"
        lines.append(f"  target for the {what}: {target:.2f}, {met}")
    return "\n".join(lines)


def as_json(comparisons: Sequence[Comparison]) -> str:
    """Render all comparisons, with every round."""
    return msgspec.json.format(msgspec.json.encode([_plain(each) for each in comparisons])).decode()


def _plain(comparison: Comparison) -> dict[str, Any]:
    rates, costs = comparison.rates(), comparison.costs()
    return {
        **msgspec.structs.asdict(comparison),
        "rate": dict(zip(("ours", "theirs", "ratio"), rates, strict=True)),
        "cpu_micros": dict(zip(("ours", "theirs", "ratio"), costs, strict=True)),
    }


def _column(head: str, spreads: tuple[Spread, Spread, Spread], form: str) -> tuple[str, str, str, str]:
    ours, theirs, ratio = spreads
    return head, _figures(ours, form), _figures(theirs, form), _figures(ratio, ".2f")


def _figures(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.least:{form}}-{spread.most:{form}})"
