"""CPU time of starting commands: `python -m bench.startup [TIMES]`."""

import os
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from bench.rounds import Spread

TIMES = 20
LIMIT = 120.0
"""Milliseconds of CPU that `relay --help` may take."""

COMMANDS: tuple[tuple[str, ...], ...] = (
    ("--help",),
    ("--version",),
    ("status", "--help"),
    ("events", "list", "--help"),
    ("verify", "--help"),
    ("plugins", "list"),
    ("status", "--socket", "absent.sock"),
)
"""The last two do work: one imports every plugin, the other one connects to a daemon that does not run."""


def main(times: int = TIMES) -> None:
    program = Path(sysconfig.get_path("scripts"), "relay")
    print(f"CPU per command, user and system, {times} times each after one that warms the cache")
    bare = spread([sys.executable, "-c", "pass"], times)
    print(f"  {'python -c pass':<32}{_figures(bare)}")
    for words in COMMANDS:
        taken = spread([str(program), *words], times)
        judged = "" if words != ("--help",) else f"  limit {LIMIT:.0f} ms, {_met(taken)}"
        print(f"  {' '.join(('relay', *words)):<32}{_figures(taken)}{judged}", flush=True)


def spread(command: Sequence[str], times: int) -> Spread:
    """Return the CPU time of a command in several runs, in milliseconds."""
    cpu(command)
    return Spread.of([cpu(command) for _ in range(times)])


def cpu(command: Sequence[str]) -> float:
    """Run a command and return the milliseconds of CPU time of the command and its children."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RELAY_")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, timeout=60, env=environ
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def _met(taken: Spread) -> str:
    return "met" if taken.median <= LIMIT else "missed"


def _figures(taken: Spread) -> str:
    return f"{taken.median:6.0f} ms ({taken.least:.0f}-{taken.most:.0f})"


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
