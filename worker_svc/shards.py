"""One worker as several processes, each with a shard of the target on its own GPU.

`laps worker --tensor-parallel N` becomes torchrun, which starts itself N times. Rank 0 is the worker that the
scheduler knows; the others repeat what its engine does, and end when it ends.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

import structlog
import torch

from laps import runtime
from laps.settings import Settings
from worker_svc.engine import Engine, Group, ModelError
from worker_svc.engine.errors import first_line

log = structlog.get_logger()

_MARK = "LOCAL_RANK"
"""torchrun sets it in each process that it starts."""


def launch(settings: Settings) -> NoReturn:
    """Replaces this process by torchrun over the same command line."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "0",
        "--nproc-per-node", str(settings.tensor_parallel), "-m", "laps.cli", *sys.argv[1:],
    ]  # fmt: skip
    # Neither torchrun nor its processes import what lies in the folder where this one happens to run.
    variables = {"OMP_NUM_THREADS": str(settings.threads), "PYTHONSAFEPATH": "1"}
    os.execve(sys.executable, command, os.environ | variables)


def wanted(settings: Settings) -> bool:
    """Whether this process is still to become several."""
    return settings.tensor_parallel > 1 and _MARK not in os.environ


def join(settings: Settings, device: str) -> Group | None:
    """This process's group, None without tensor parallelism. Waits until all have come."""
    if settings.tensor_parallel == 1:
        return None
    if device not in ("cpu", "cuda"):
        raise ModelError(
            f"tensor parallelism takes device 'cuda' or 'cpu', not {device!r}: each process has its own"
        )
    if device == "cuda" and torch.cuda.device_count() < settings.tensor_parallel:
        raise ModelError(
            f"tensor parallelism over {settings.tensor_parallel} GPUs asked for, but this machine shows "
            f"{torch.cuda.device_count()}"
        )
    return Group(torch.device("cuda", int(os.environ[_MARK])) if device == "cuda" else torch.device("cpu"))


def follow(engine: Engine) -> int:
    """The life of a process that does not lead; returns its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # torchrun signals all; the lead needs the others until it has drained.
        signal.signal(number, signal.SIG_IGN)
    try:
        engine.follow()
    except RuntimeError as error:
        log.error("the lead is gone", error=first_line(error))
        return runtime.EXIT_FAILED
    return 0
