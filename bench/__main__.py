"""`python -m bench`: list the benchmarks, or run the ones in the arguments."""

import importlib
import signal

import click

from bench.loop import run
from bench.report import as_json, table
from bench.rounds import Plan

BENCHMARKS = ("ingest", "relay", "generic", "zoo", "cluster")
"""One module each, with a docstring of one line and `run(plan)`, which returns its comparisons."""


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(BENCHMARKS))
@click.option("--rounds", default=Plan().rounds, show_default=True, help="Rounds per side.")
@click.option("--requests", default=Plan().requests, show_default=True, help="Requests per round.")
@click.option("--connections", default=Plan().connections, show_default=True, help="Connections at once.")
@click.option("--json", "json", is_flag=True, help="Print every round as JSON.")
def main(names: tuple[str, ...], rounds: int, requests: int, connections: int, *, json: bool) -> None:
    """Run the benchmarks in the arguments; without arguments, list all."""
    modules = [(name, importlib.import_module(f"bench.{name}")) for name in names or BENCHMARKS]
    if not names:
        for name, module in modules:
            print(f"{name:<10}{module.__doc__}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the servers as well
    plan = Plan(rounds=rounds, requests=requests, connections=connections)
    comparisons = []
    for _, module in modules:
        for comparison in run(module.run(plan)):
            comparisons.append(comparison)
            if not json:
                print(table(comparison), flush=True)
    if json:
        print(as_json(comparisons))


main(prog_name="python -m bench")
