"""Recorded passes: on a GPU a decoding step of a small batch spends its time in starting kernels one by one;
a CUDA graph starts all of them at once.

A recording has fixed shapes and fixed addresses. So a pass is recorded for a bucket (rows, tokens of each
row, positions read), each at least what is asked for, over buffers that never move: the tokens, where each
row begins, and the logits. A call copies its inputs into them, replays, and takes its part of the logits.
What the padding writes lies behind every row's length, where it may.

What cannot be recorded (passes that ask the device on the way, as mixtures of experts may) runs as it always
did, and so does what is too wide, and all of a model whose recording gives other logits than the pass itself.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache import SlotCache, StaticWindow
from .config import MAX_DRAFT_TOKENS
from .errors import first_line
from .forward import WindowRunner, picked, tolerance
from .transfers import upload

log = logging.getLogger(__name__)

_WIDTHS = (1, 2, 3, 5, 9, MAX_DRAFT_TOKENS + 1)
_LEAST_REACH_TOKENS = 128
_MAX_GRAPHS = 128
# The second use has other begins than the first: it would show a number of the host in a recording.
_CHECKED_USES = 2

Replay = Callable[[], None]


class Recorder(Protocol):
    """Makes a recording of what a function does to tensors that stay where they are."""

    def record(self, run: Callable[[], None]) -> Replay:
        """Raises RuntimeError where `run` cannot be recorded. May run it."""
        ...

    def begin_anew(self) -> None:
        """To be called when all recordings made so far are let go."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: what one replay leaves there, the next may overwrite.

    The workspace of the matrix library belongs to the stream and lies in the pool of the graph that first
    needed it there; torch frees it when any graph of that stream goes. So the streams are the recorder's own,
    and no recorder's graphs lean on the pool of another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            # Made once: torch hands out few streams in turns, and one that was warmed up elsewhere has its
            # workspace outside the pool.
            self._aside, self._capturing = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.begin_anew()

    def begin_anew(self) -> None:
        # A pool without graphs is dead, but not gone while the stream's workspace lies in it: torch takes no
        # further graph into it.
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, run: Callable[[], None]) -> Replay:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            # A capture that fails leaves its stream the current one.
            with torch.cuda.stream(current):
                self._aside.wait_stream(current)
                # Libraries set themselves up at their first call, which must not be recorded.
                with torch.cuda.stream(self._aside):
                    run()
                current.wait_stream(self._aside)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._capturing, capture_error_mode="thread_local"
                ):
                    run()
        replay: Replay = graph.replay
        return replay


def recorder_for(device: torch.device) -> Recorder | None:
    """None where passes are not recorded: anywhere but on a GPU."""
    return CudaRecorder(device) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class Bucket:
    """Shape of a recording."""

    rows: int
    width: int
    reach: int


@dataclass(slots=True)
class _Graph:
    """begins: int64 [rows]. tokens: int64 [rows, width]. logits: [rows, width, vocabulary]."""

    begins: Tensor
    tokens: Tensor
    logits: Tensor
    replay: Replay
    uses: int = 0


class GraphRunner:
    """A Runner that replays recordings of another's passes where it can. Logits hold until the next pass."""

    def __init__(self, runner: WindowRunner, vocabulary_size: int, recorder: Recorder) -> None:
        self.cache: SlotCache = runner.cache
        self._runner = runner
        self._vocabulary_size = vocabulary_size
        self._recorder: Recorder | None = recorder
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()
        self._wanted: set[Bucket] = set()
        self._logits = torch.empty(0)
        self._generation = runner.cache.generation

    def forward(
        self,
        tokens: Tensor,
        slots: Sequence[int],
        starts: Sequence[int],
        logits: int,
        pick: Tensor | None = None,
    ) -> Tensor:
        rows, queries = tokens.shape
        bucket = None
        if self._recorder is not None and all(slot == row for row, slot in enumerate(slots)):
            bucket = find_bucket(self.cache, rows, queries, max(starts))
        begins = padded_begins(self.cache, starts, bucket) if bucket is not None else None
        if bucket is None or begins is None:
            return self._runner.forward(tokens, slots, starts, logits, pick)
        graph = self._graph(bucket, begins)
        if graph is None:
            return self._runner.forward(tokens, slots, starts, logits, pick)
        for slot, start in enumerate(starts):
            self.cache.written[slot] = max(self.cache.written[slot], start + queries)
        graph.begins.copy_(upload(begins, graph.begins.device))
        if graph.tokens.shape != tokens.shape:
            # Padding with tokens of other requests could write their NaN behind rows of this batch.
            graph.tokens.zero_()
        graph.tokens[:rows, :queries] = tokens
        graph.replay()
        graph.uses += 1
        every = graph.logits[:rows, :queries]
        result = every[:, -logits:] if pick is None else picked(every, pick)
        if graph.uses <= _CHECKED_USES:
            return self._checked(result.clone(), self._runner.forward(tokens, slots, starts, logits, pick))
        return result

    def _graph(self, bucket: Bucket, begins: Sequence[int]) -> _Graph | None:
        """The recording of a bucket that is wanted for the second time at least, made if need be; it is made
        while rows begin at `begins`.
        """
        if self._generation != self.cache.generation:
            # The cache has moved; recordings know its old place.
            self._forget()
            self._generation = self.cache.generation
        graph = self._graphs.get(bucket)
        if graph is not None:
            self._graphs.move_to_end(bucket)
            return graph
        if bucket not in self._wanted:
            self._wanted.add(bucket)
            return None
        if len(self._graphs) == _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        try:
            graph = self._recorded(bucket, begins)
        except RuntimeError as error:
            self._give_up(first_line(error))
            return None
        self._graphs[bucket] = graph
        return graph

    def _recorded(self, bucket: Bucket, begins: Sequence[int]) -> _Graph:
        recorder, cache = self._recorder, self.cache
        assert recorder is not None
        held = self._logits_of(bucket)
        static_begins = torch.tensor(begins, device=cache.device)
        tokens = torch.zeros((bucket.rows, bucket.width), dtype=torch.long, device=cache.device)

        def run() -> None:
            window = StaticWindow(cache, static_begins, bucket.width, bucket.reach)
            held.copy_(self._runner.run(tokens, window, bucket.width))

        return _Graph(static_begins, tokens, held, recorder.record(run))

    def _logits_of(self, bucket: Bucket) -> Tensor:
        """The bucket's view of the one buffer for logits, which recordings share."""
        shape = bucket.rows, bucket.width, self._vocabulary_size
        count = bucket.rows * bucket.width * self._vocabulary_size
        if count > self._logits.numel():
            self._forget()
            self._logits = torch.empty(count, dtype=self.cache.dtype, device=self.cache.device)
        return self._logits[:count].view(shape)

    def _checked(self, replayed: Tensor, own: Tensor) -> Tensor:
        scale = float(own.abs().max().clamp_min(1e-6))
        error = float((replayed.float() - own.float()).abs().max()) / scale
        if not error <= tolerance(self.cache.dtype):
            self._give_up(f"recorded logits differ by {error:.2g} of the largest")
        return own

    def _forget(self) -> None:
        self._graphs.clear()
        if self._recorder is not None:
            self._recorder.begin_anew()

    def _give_up(self, reason: str) -> None:
        log.warning("passes are not recorded: %s", reason)
        self._recorder = None
        self._graphs.clear()


def find_bucket(cache: SlotCache, rows: int, queries: int, last_start: int) -> Bucket | None:
    """The least bucket for so many rows and queries, of which the last begins at `last_start`; None if there
    is none.
    """
    width = next((width for width in _WIDTHS if width >= queries), None)
    if width is None or last_start + width > cache.limit_tokens:
        return None
    padded_rows = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
    # Four steps from one power of two to the next: at most a quarter is read in vain.
    end = max(last_start + queries, _LEAST_REACH_TOKENS)
    step = max(1 << (end - 1).bit_length() - 3, 1)
    reach = min(-(-end // step) * step, cache.limit_tokens)
    return Bucket(min(padded_rows, cache.slots), width, reach)


def padded_begins(cache: SlotCache, starts: Sequence[int], bucket: Bucket) -> list[int] | None:
    """Where each row of a bucket writes: the given ones, and behind all KV of the slots after them. None if
    one of those slots is full.
    """
    cache.reserve(max(max(starts) + bucket.width, bucket.reach))
    # The last positions of a slot never hold KV that counts: they are the margin that padding may fill.
    free_from = [min(written, cache.limit_tokens - bucket.width) for written in cache.written]
    begins = [*starts, *free_from[len(starts) : bucket.rows]]
    return begins if max(begins) + bucket.width <= cache.capacity_tokens else None
