"""Compiles the scheduler's hot path by mypyc, or removes what was compiled.

    LAPS_COMPILED=0 python -m scheduler_svc.compiled.build [--python PYTHON] [--remove]

Needs a C compiler, the headers of Python, and requirements/compiled.txt; takes a minute. `--python` names the
interpreter whose packages the sources import, where the compiler has an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import version
from pathlib import Path

from scheduler_svc.compiled import BUILT, MANIFEST, ROOT, digest

GROUP = "laps_scheduler"
"""All modules become one shared library of this name, so that calls between them are plain C calls."""

_ALONE = (
    "scheduler_svc/convert.py",
    "scheduler_svc/deliveries.py",
    "scheduler_svc/store/codec.py",
    "scheduler_svc/store/layout.py",
    "scheduler_svc/store/packing.py",
)
_NOT = ("scheduler_svc/core/settings.py",)
"""Not worth it, and it checks types that compiled code would refuse in words of its own."""


def compiled_modules(root: Path = ROOT) -> list[str]:
    """Sources that are compiled, relative to `root`: what runs for every row of a step, and what it calls.
    A package's own file stays plain, for the policies find their modules by its path."""
    core = root / "scheduler_svc" / "core"
    found = {path.relative_to(root).as_posix() for path in core.rglob("*.py") if path.name != "__init__.py"}
    return sorted(found.difference(_NOT).union(_ALONE))


def build(
    sources: Sequence[str],
    root: Path = ROOT,
    built: Path = BUILT,
    python: str = sys.executable,
    optimization: str = "3",
) -> None:
    """Compiles `sources` into the folder `built`, whose content is replaced at the end. `optimization`
    is the C compiler's level. Exits with the compiler's words where they cannot be compiled."""
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    digests = {name: digest(root / name) for name in sources}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(root):
        scratch = Path(folder)
        options = [f"--config-file={root / 'pyproject.toml'}", f"--python-executable={python}"]
        options.append(f"--cache-dir={scratch / 'types'}")
        extensions = mypycify(
            [*options, *sources], opt_level=optimization, group_name=GROUP, target_dir=str(scratch)
        )
        command = build_ext(Distribution({"name": GROUP, "ext_modules": extensions}))
        command.build_lib, command.build_temp = str(scratch / "lib"), str(scratch / "objects")
        command.ensure_finalized()
        command.run()
        fresh = scratch / "built"
        fresh.mkdir()
        suffix = EXTENSION_SUFFIXES[0]
        modules = []
        for path in sorted((scratch / "lib").rglob(f"*{suffix}")):
            inside = path.relative_to(scratch / "lib").as_posix()
            name = inside.removesuffix(suffix).replace("/", ".")
            modules.append(name)
            shutil.copy(path, fresh / (name + suffix))
        manifest = {"mypy": version("mypy"), "suffix": suffix, "sources": digests, "modules": modules}
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        remove(built)
        shutil.move(fresh, built)


def remove(built: Path = BUILT) -> None:
    shutil.rmtree(built, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--remove", action="store_true", help="plain Python runs again")
    arguments = parser.parse_args()
    if arguments.remove:
        remove()
        return
    sources = compiled_modules()
    build(sources, python=arguments.python)
    print(f"{len(sources)} modules compiled into {BUILT}")


if __name__ == "__main__":
    main()
