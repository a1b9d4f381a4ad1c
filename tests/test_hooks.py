"""docs/hooks.md against the code: every hook is there, exactly as it is declared."""

import ast
import inspect
import re
from pathlib import Path

from relay import hookspecs

PAGE = (Path(__file__).parent.parent / "docs" / "hooks.md").read_text()


def test_the_page_has_every_hook_with_its_exact_signature_and_no_other():
    declared = [
        ast.unparse(node).partition(":\n")[0].rpartition("def ")[2]
        for node in ast.parse(inspect.getsource(hookspecs)).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert re.findall(r"^## `(relay_.*)`$", PAGE, re.MULTILINE) == declared
