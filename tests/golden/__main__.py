"""`python -m tests.golden` rewrites the help pages, the table of docs/cli.md, and the screens."""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import_module("tests.golden.pages").write()
import_module("tests.golden.screens").write()
