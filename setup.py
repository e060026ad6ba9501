"""What pyproject.toml cannot say: `LAPS_COMPILE=1 pip install .` installs the compiled build as well.

Without the variable nothing is compiled, and neither a compiler nor mypy is needed.
"""

import os
import sys
import tomllib
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
COMPILE = os.environ.get("LAPS_COMPILE") == "1"


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        if COMPILE:
            os.environ["LAPS_COMPILED"] = "0"
            sys.path.insert(0, str(ROOT))
            from scheduler_svc.compiled import build

            into = ROOT if self.editable_mode else Path(self.build_lib).resolve()
            build.build(build.compiled_modules(), built=into / "scheduler_svc" / "compiled" / "built")


class WithLibrary(Distribution):
    def has_ext_modules(self) -> bool:
        """The wheel is for one platform and one Python."""
        return COMPILE


project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
setup(
    cmdclass={"build_py": BuildPy},
    distclass=WithLibrary,
    setup_requires=project["optional-dependencies"]["compiled"] if COMPILE else [],
)
