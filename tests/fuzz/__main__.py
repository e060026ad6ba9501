"""Runs the fuzzer on every target in turn, each in a process of its own.

python -m tests.fuzz --seconds 60 [--target worker]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("grpc", "http", "submissions", "worker", "records")


def run_one(name: str, arguments: list[str]) -> None:
    import atheris

    with atheris.instrument_imports(include=["gateway", "scheduler_svc", "laps"]):
        from tests.fuzz.targets import TARGETS

    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--target", choices=NAMES)
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args()
    if given.one:
        run_one(given.one, rest)
        return 0
    names = [given.target] if given.target else list(NAMES)
    with tempfile.TemporaryDirectory(prefix="laps-fuzz-") as folder:
        for name in names:
            print(f"{name}: {given.seconds // len(names)} s", flush=True)
            corpus = Path(folder) / name
            corpus.mkdir()
            write_seeds(name, corpus)
            command = [sys.executable, "-m", "tests.fuzz", "--one", name, str(corpus)]
            command += [f"-max_total_time={max(1, given.seconds // len(names))}", "-print_final_stats=1"]
            command += [
                "-max_len=4096",
                "-timeout=10",
                "-rss_limit_mb=2048",
                f"-artifact_prefix=fuzz-{name}-",
            ]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            told = [line for line in ended.stderr.splitlines() if "stat::" in line or "cov:" in line]
            print("\n".join(f"  {line}" for line in told[-8:]), flush=True)
            if ended.returncode:
                print(ended.stdout + ended.stderr, file=sys.stderr)
                return 1
    return 0


def write_seeds(name: str, corpus: Path) -> None:
    """Something good to begin with: the fuzzer changes it bit by bit."""
    from tests.fuzz.seeds import SEEDS

    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed-{number}").write_bytes(seed)


if __name__ == "__main__":
    sys.exit(main())
