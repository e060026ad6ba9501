"""The compiled build of the scheduler's hot path: is it there, is it of these sources, does it run?

Plain Python is the default. `make compiled` compiles the modules of `build.compiled_modules` into `built/`,
beside this file and never beside the sources. When this package is imported, before any other of the
scheduler's, each source that was compiled is compared with its digest in the manifest: a build of other
sources, or for another Python, never runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

VARIABLE = "LAPS_COMPILED"
"""Environment variable. 0: plain Python runs; 1: the compiled build runs, or nothing; anything else: the
compiled build if it is there and fits."""

ROOT = Path(__file__).resolve().parent.parent.parent
BUILT = Path(__file__).resolve().parent / "built"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Build:
    """What there is of a compiled build. `modules` is empty where plain Python is to run."""

    why: str
    """In words, for whoever starts the scheduler."""
    modules: Mapping[str, Path] = field(default_factory=dict)
    """Files to import, by the module's full name."""
    stale: bool = False
    """There is one, and it cannot be used."""

    @property
    def usable(self) -> bool:
        return bool(self.modules)


def digest(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def examine(built: Path = BUILT, root: Path = ROOT) -> Build:
    """Whether the build in `built` can stand for the sources under `root`. Reads every source once."""
    try:
        manifest = json.loads((built / MANIFEST).read_text())
    except FileNotFoundError:
        return Build("there is no compiled build")
    except (OSError, ValueError) as error:
        return _stale(f"the manifest of the compiled build cannot be read: {error}")
    suffix = manifest["suffix"]
    if suffix != EXTENSION_SUFFIXES[0]:
        return _stale(f"the compiled build is for {suffix}, not for this Python ({EXTENSION_SUFFIXES[0]})")
    for name, expected in manifest["sources"].items():
        try:
            differs = digest(root / name) != expected
        except OSError:
            differs = True
        if differs:
            return _stale(f"{name} is not what was compiled")
    modules = {name: built / (name + suffix) for name in manifest["modules"]}
    missing = [path.name for path in modules.values() if not path.is_file()]
    if missing:
        return _stale(f"the compiled build lacks {missing[0]}")
    return Build(f"compiled by mypyc {manifest['mypy']}", modules)


def _stale(why: str) -> Build:
    return Build(why, stale=True)


class _Finder(MetaPathFinder):
    """Finds the compiled modules before the sources of the same name."""

    def __init__(self, modules: Mapping[str, Path]) -> None:
        self._modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self._modules.get(fullname)
        if file is None:
            return None
        return spec_from_file_location(fullname, file, loader=ExtensionFileLoader(fullname, str(file)))


_running = Build("plain Python")


def install(built: Path = BUILT, root: Path = ROOT) -> None:
    """Decides for this process. Called once, before any module is imported that may have been compiled.
    Raises ImportError, its name that of the variable, where the compiled build must run and cannot."""
    global _running
    wish = os.environ.get(VARIABLE, "")
    if wish == "0":
        _running = Build(f"{VARIABLE} is 0")
        return
    _running = examine(built, root)
    if _running.usable:
        sys.meta_path.insert(0, _Finder(_running.modules))
    elif wish == "1":
        raise ImportError(f"{VARIABLE} is 1, but {_running.why}; `make compiled` makes it", name=VARIABLE)


def running() -> Build:
    """What this process runs."""
    return _running
