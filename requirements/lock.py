"""Pins every package of the running services (run.txt), development (dev.txt) the fuzzer (fuzz.txt), and
what compiles the scheduler's hot path (compiled.txt).

    python requirements/lock.py

pip itself resolves, so what is pinned is what an installation would take. No hashes: a CPU
build of torch is another file than the default one, under the same version.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
TORCH = "torch==2.13.0"


def resolve(requirements: list[str]) -> dict[str, str]:
    """Name to version of everything that pip would install for `requirements`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
             "--report", report.name, *requirements],
            check=True,
        )  # fmt: skip
        installs = json.loads(Path(report.name).read_text())["install"]
    return {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"].split("+")[0]
        for item in installs
    }


def write(path: Path, pins: dict[str, str], header: str) -> None:
    lines = [f"{name}=={version}" for name, version in sorted(pins.items())]
    path.write_text("\n".join([f"# {header}", "# Made by requirements/lock.py.", *lines, ""]))


def main() -> None:
    run = resolve([TORCH, *PROJECT["dependencies"]])
    write(HERE / "run.txt", run, "What the services run on.")
    extras = PROJECT["optional-dependencies"]
    everything = resolve([TORCH, *PROJECT["dependencies"], *extras["dev"], *extras["plot"]])
    dev = {name: version for name, version in everything.items() if name not in run}
    write(HERE / "dev.txt", dev, "What tests, types and style need beyond run.txt.")
    write(HERE / "fuzz.txt", resolve(extras["fuzz"]), "What `make fuzz` needs beyond both.")
    write(HERE / "compiled.txt", resolve(extras["compiled"]), "What `make compiled` needs, by itself.")


if __name__ == "__main__":
    main()
