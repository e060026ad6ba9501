"""The recorder of CUDA graphs over torch's own `torch.cuda.graph`, with the rest of CUDA made up.

What is made up follows torch's rules: the first matrix product of a stream takes a workspace, from the pool
of the graph that is being captured, and the stream keeps it; a pool without graphs takes no further one, and
its memory goes when nothing in it is kept; streams come from a small ring.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from worker_svc.engine.graphs import CudaRecorder, Replay

_STREAMS_OF_TORCH = 32
DEVICE = torch.device("cuda", 0)


class _Stream:
    def __init__(self, number: int) -> None:
        self.number = number
        self.device = DEVICE

    def wait_stream(self, other: _Stream) -> None:
        pass


@dataclass
class _Workspace:
    """pool: None is the memory beside all pools."""

    pool: int | None
    kept: bool = True
    mapped: bool = True


class _Current:
    """Like torch's, it restores nothing when it is merely forgotten."""

    def __init__(self, cuda: FakeCuda, stream: _Stream) -> None:
        self._cuda, self._stream = cuda, stream

    def __enter__(self) -> None:
        self._before, self._cuda.current = self._cuda.current, self._stream

    def __exit__(self, *error: object) -> None:
        self._cuda.current = self._before


class FakeCuda:
    """frees_workspaces: a graph that goes takes the workspace of its stream along, as from torch 2.12 on."""

    def __init__(self, frees_workspaces: bool) -> None:
        self.frees_workspaces = frees_workspaces
        self.current = _Stream(0)
        self.capturing: Any = None
        self.graphs_in: dict[int, int] = {}
        self.fails = False
        self._workspace_of: dict[int, _Workspace] = {}
        self._workspaces: list[_Workspace] = []
        self._numbers = itertools.count(1)
        self._pools = itertools.count(1)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "Stream": lambda *given: _Stream(next(self._numbers) % _STREAMS_OF_TORCH),
            "stream": lambda stream: _Current(self, stream),
            "current_stream": lambda *given: self.current,
            "device": lambda device: contextlib.nullcontext(),
            "synchronize": lambda *given: None,
            "empty_cache": self.empty_cache,
            "graph_pool_handle": lambda: next(self._pools),
            "CUDAGraph": lambda: _Graph(self),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)

    def product(self) -> None:
        """A matrix product on the current stream."""
        workspace = self._workspace_of.get(self.current.number)
        if workspace is None:
            workspace = _Workspace(self.capturing.pool if self.capturing else None)
            self._workspace_of[self.current.number] = workspace
            self._workspaces.append(workspace)
        if self.capturing:
            self.capturing.workspaces.append(workspace)

    def forget(self, graph: Any) -> None:
        self.graphs_in[graph.pool] -= 1
        if self.frees_workspaces and graph.stream in self._workspace_of:
            self._workspace_of.pop(graph.stream).kept = False

    def empty_cache(self) -> None:
        for pool in [None, *(pool for pool, graphs in self.graphs_in.items() if graphs == 0)]:
            inside = [workspace for workspace in self._workspaces if workspace.pool == pool]
            if pool is None:
                inside = [workspace for workspace in inside if not workspace.kept]
            elif any(workspace.kept for workspace in inside):
                continue
            else:
                del self.graphs_in[pool]
            for workspace in inside:
                workspace.mapped = False


class _Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.pool: int = 0
        self.workspaces: list[_Workspace] = []

    def capture_begin(self, pool: int, **modes: Any) -> None:
        if self._cuda.graphs_in.get(pool) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self._cuda.graphs_in[pool] = self._cuda.graphs_in.get(pool, 0) + 1
        self.pool, self.stream = pool, self._cuda.current.number
        self._cuda.capturing = self

    def capture_end(self) -> None:
        self._cuda.capturing = None
        if self._cuda.fails:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        assert all(workspace.mapped for workspace in self.workspaces), "illegal memory access"

    def __del__(self) -> None:
        if self.pool:
            self._cuda.forget(self)


@pytest.fixture(params=[True, False], ids=["workspaces-freed", "workspaces-kept"])
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda(request.param)
    made.install(monkeypatch)
    return made


def _replay(replays: list[Replay]) -> None:
    for replay in replays:
        replay()


def test_one_models_graphs_survive_the_others(cuda: FakeCuda) -> None:
    """Target and draft record alike; each is let go and recorded anew while the other's are replayed."""
    recorders = [CudaRecorder(DEVICE), CudaRecorder(DEVICE)]
    graphs: list[list[Replay]] = [[], []]
    for turn in range(6):
        mine, others = graphs[turn % 2], graphs[1 - turn % 2]
        mine.clear()
        recorders[turn % 2].begin_anew()
        for _ in range(_STREAMS_OF_TORCH):
            mine.append(recorders[turn % 2].record(cuda.product))
            _replay([*mine, *others])
    # One graph less does not spoil the rest.
    del graphs[0][0]
    graphs[0].append(recorders[0].record(cuda.product))
    _replay([*graphs[0], *graphs[1]])


def test_recording_leaves_the_stream_as_it_was(cuda: FakeCuda) -> None:
    seen: list[int] = []

    def run() -> None:
        seen.append(cuda.current.number)

    record: Callable[[Callable[[], None]], Replay] = CudaRecorder(DEVICE).record
    record(run)
    record(run)
    assert cuda.current.number == 0
    warmed_up, captured = seen[0], seen[1]
    assert len({0, warmed_up, captured}) == 3
    assert seen == [warmed_up, captured] * 2


def test_a_recording_that_fails_leaves_the_stream_as_it_was(cuda: FakeCuda) -> None:
    """torch ends the capture first, and does not come to restore the stream where that raises."""
    recorder = CudaRecorder(DEVICE)
    cuda.fails = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        recorder.record(cuda.product)
    assert cuda.current.number == 0
