"""Harnesses that run for as long as one likes; short forms of them are in the suite.

From the root of the repository: `python -m tests.torture.kill --cycles 1000`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # what pytest's `pythonpath` setting does in the suite
