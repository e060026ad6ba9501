"""Makes the Python stubs in `laps/v1` from `protos/`; `--check` only tells whether they are current.

python protos/generate.py [--check]
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent
STUBS = PROTOS.parent / "laps" / "v1"


def generate(into: Path) -> None:
    """Writes `laps/v1/*_pb2.py`, `*_pb2_grpc.py` and their `.pyi` below `into`."""
    sources = sorted(str(path) for path in (PROTOS / "laps" / "v1").glob("*.proto"))
    well_known = files("grpc_tools") / "_proto"
    bin_dir = Path(sys.executable).parent  # the mypy plugins live beside the interpreter
    code = protoc.main(
        [
            "protoc",
            f"-I{PROTOS}",
            f"-I{well_known}",
            f"--plugin=protoc-gen-mypy={bin_dir / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={bin_dir / 'protoc-gen-mypy_grpc'}",
            f"--python_out={into}",
            f"--grpc_python_out={into}",
            f"--mypy_out=quiet:{into}",
            f"--mypy_grpc_out=quiet:{into}",
            *sources,
        ]
    )
    if code != 0:
        raise SystemExit(code)
    (into / "laps" / "v1" / "__init__.py").write_text(
        '"""Generated from protos/laps/v1 by protos/generate.py. Do not edit."""\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the committed stubs are not current")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = Path(scratch) / "laps" / "v1"
        names = {path.name for path in fresh.iterdir()}
        if check:
            present = {path.name for path in STUBS.iterdir() if path.is_file()}
            _, differing, missing = filecmp.cmpfiles(fresh, STUBS, sorted(names | present), shallow=False)
            if differing or missing:
                raise SystemExit(f"stubs not current: {', '.join(differing + missing)}; run `make protos`")
            return
        STUBS.mkdir(parents=True, exist_ok=True)
        for stale in STUBS.glob("*.py*"):
            stale.unlink()
        for path in fresh.iterdir():
            (STUBS / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
