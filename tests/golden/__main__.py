"""`python -m tests.golden` rewrites the help pages and the table of docs/cli.md."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import_module("tests.golden.pages").write()
