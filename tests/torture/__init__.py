"""Harnesses that run for as long as one likes; short forms of them are in the suite.

From the root of the repository: `python -m tests.torture.kill --cycles 1000`.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS)]  # as pytest's `pythonpath` setting does in the suite
