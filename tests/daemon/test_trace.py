"""One event's way through the code stays short enough to follow: `python -m bench.trace`."""

import re
import subprocess
import sys
from pathlib import Path

from bench.trace import Function, Tracer

ROOT = Path(__file__).parents[2]
FILES = 30
FUNCTIONS = 110


TRIES = 3  # on a busy machine, other work may run during most of the traces


def trace():
    """Return the lines of a trace, and its numbers of files and functions."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.trace"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *files, total = done.stdout.splitlines()
    counted = re.fullmatch(r"(\d+) files, (\d+) functions, (\d+) calls across files", total)
    assert counted is not None, total
    return files, int(counted[1]), int(counted[2])


def test_an_event_runs_through_few_files_and_functions():
    for _ in range(TRIES):
        lines, files, functions = trace()
        assert files == len(lines)
        assert functions == sum(int(line.split()[1]) for line in lines)
        assert {"relay/delivery/dispatcher.py", "plugins/moddy.py"} <= {
            line.split()[0] for line in lines
        }  # the trace sees every part
        if files <= FILES and functions <= FUNCTIONS:
            break
    assert files <= FILES, lines
    assert functions <= FUNCTIONS, lines


def test_work_that_runs_beside_most_traces_does_not_count():
    job, way = Function("relay/jobs/scheduler.py", "run"), Function("relay/app.py", "App.run")
    tracer = Tracer()
    tracer.traces = [({job, way}, 2), ({job, way}, 2), ({way}, 1)]
    assert tracer.way().functions == (way,)
