"""Comparisons as a table for people, or as JSON."""

from collections.abc import Sequence
from typing import Any

import msgspec

from bench.rounds import Comparison, Spread


def table(comparison: Comparison) -> str:
    """Render one comparison in five lines."""
    rates, costs = comparison.rates(), comparison.costs()
    rows = [("", "events/s (least-most)", "CPU us/event (least-most)")]
    names = ("relay", comparison.rival)
    rows += [
        (name, _figures(rate, ",.0f"), _figures(cost, ".0f"))
        for name, rate, cost in zip(names, rates, costs, strict=False)
    ]
    rows.append(("ratio", _figures(rates[2], ".2f"), _figures(costs[2], ".2f")))
    met = "met" if rates[2].median >= comparison.target else "missed"
    lines = [f"  {name:<22}{rate:>26}{cost:>28}" for name, rate, cost in rows]
    lines = [f"{comparison.name}: {comparison.title}", *lines]
    return "\n".join([*lines, f"  target of the ratio: {comparison.target:.2f}, {met}"])


def as_json(comparisons: Sequence[Comparison]) -> str:
    """Render all of them, with every round."""
    return msgspec.json.format(msgspec.json.encode([_plain(each) for each in comparisons])).decode()


def _plain(comparison: Comparison) -> dict[str, Any]:
    rates, costs = comparison.rates(), comparison.costs()
    return {
        **msgspec.structs.asdict(comparison),
        "rate": dict(zip(("ours", "theirs", "ratio"), rates, strict=True)),
        "cpu_micros": dict(zip(("ours", "theirs", "ratio"), costs, strict=True)),
    }


def _figures(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.least:{form}}-{spread.most:{form}})"
