"""Harnesses that run for any length of time; the suite has short forms of them.

From the root of the repository: `python -m tests.torture.kill --cycles 1000`.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS)]  # as pytest's `pythonpath` setting does in the suite
