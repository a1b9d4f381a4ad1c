"""One event's way through the code stays short enough to follow: `python -m bench.trace`."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = 30
FUNCTIONS = 110


def test_an_event_runs_through_few_files_and_functions():
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
    assert int(counted[1]) == len(files) <= FILES, done.stdout
    assert int(counted[2]) == sum(int(line.split()[1]) for line in files) <= FUNCTIONS, done.stdout
    assert {"relay/delivery/dispatcher.py", "plugins/moddy.py"} <= {
        line.split()[0] for line in files
    }  # the trace sees every part
