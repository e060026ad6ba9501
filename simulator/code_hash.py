"""A hash of code that decides figures, so that figures of other code can be told from those of this one."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = ROOT / "scheduler_svc" / "core"


def policy_files(policy: str) -> list[Path]:
    """The files that decide which request a policy puts first."""
    return [
        *(CORE / "policies" / f"{name}.py" for name in ("base", policy.replace("-", "_"))),
        *(
            [CORE / "learning.py", CORE / "class_records.py", CORE / "hints.py"]
            if policy == "laps-sd"
            else []
        ),
    ]


def code_hash(paths: Iterable[Path]) -> str:
    """Of what the files do, in this order: comments, docstrings and hints to mypyc aside."""
    digest = hashlib.sha256()
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                # Strings that stand alone are docstrings.
                node.body = [
                    entry
                    for entry in node.body
                    if not (isinstance(entry, ast.Expr) and isinstance(entry.value, ast.Constant))
                    and not (isinstance(entry, ast.ImportFrom) and entry.module == "mypy_extensions")
                ]
            if isinstance(node, ast.ClassDef):
                node.decorator_list = [
                    hint for hint in node.decorator_list if "mypyc_attr" not in ast.unparse(hint)
                ]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]
