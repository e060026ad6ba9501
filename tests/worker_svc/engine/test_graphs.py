"""Recorded passes on the CPU: a tape of the kernels that ran stands in for a CUDA graph.

Like a graph it knows tensors and no Python: it repeats the same kernels on the same memory, and whatever
number of the host entered them stays as it was.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from worker_svc.engine import EngineRequest, SamplingConfig, StoppingConfig, load_pair
from worker_svc.engine.cache import LayerShape, SlotCache
from worker_svc.engine.graphs import Bucket, GraphRunner, Replay, find_bucket, padded_begins

PROMPTS = [[random.Random(n).randrange(2, 64) for _ in range(n)] for n in (1, 7, 40, 90, 33, 12)]
MAX_TOKENS = 16
# What makes the host wait for a result, which cannot be recorded.
_WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    def replay(self) -> None:
        for func, args, kwargs, held in self._calls:
            for old, new in zip(held, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.begun_anew = 0

    def record(self, run: Callable[[], None]) -> Replay:
        run()
        tape = _Tape()
        with tape:
            run()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay

    def begin_anew(self) -> None:
        self.begun_anew += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> TapeRecorder:
    made = TapeRecorder()
    monkeypatch.setattr("worker_svc.engine.engine.recorder_for", lambda device: made)
    return made


def _drain(tools: Any, pair: Any, sampling: SamplingConfig, **changes: Any) -> list[list[int]]:
    """Three rows at a time, each preempted now and then, beside idle ones in the slots that padding uses."""
    engine = tools.engine(pair, **({"slots": 3, "spare_slots": 2, "draft_tokens": 3} | changes))
    outputs: dict[str, Any] = {str(n): tools.Output([]) for n in range(len(PROMPTS))}
    queue = list(outputs)
    steps = 0
    while queue or engine.running:
        while queue and engine.free_slots:
            name = queue.pop(0)
            stopping = StoppingConfig(max_tokens=MAX_TOKENS)
            engine.add(EngineRequest(name, PROMPTS[int(name)], outputs[name].tokens, sampling, stopping))
        tools.collect(outputs, engine.step())
        steps += 1
        if steps % 5 == 0 and engine.running:
            queue.append(engine.running[0])
            engine.preempt(engine.running[0])
    return [output.tokens for output in outputs.values()]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_replays_say_what_generate_says(
    tools: Any, make_folders: Any, recorder: TapeRecorder, family: str
) -> None:
    folders = make_folders(family)
    pair = load_pair(folders.target, folders.draft)
    outputs = _drain(tools, pair, SamplingConfig())
    assert outputs == [tools.greedy_reference(pair, prompt, MAX_TOKENS) for prompt in PROMPTS]
    assert recorder.replayed > 4 * recorder.recorded > 0


def test_the_general_path_and_growing_caches(
    tools: Any, pair: Any, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lazy memory: the cache moves while it grows, and recordings are made anew."""
    monkeypatch.setattr("worker_svc.engine.cache.HAS_LAZY_PAGES", False)
    outputs = _drain(tools, pair, SamplingConfig(), fast_path=False, kv_limit_bytes=1 << 24)
    assert outputs == [tools.greedy_reference(pair, prompt, MAX_TOKENS) for prompt in PROMPTS]
    assert recorder.replayed > 0
    assert recorder.begun_anew > len(("target", "draft")), "not only when the caches are first seen"
    seeded = SamplingConfig(temperature=0.9, seed=3, top_p=0.9)
    replayed = recorder.replayed
    told = _drain(tools, pair, seeded, fast_path=False, kv_limit_bytes=1 << 24)
    assert recorder.replayed > replayed
    assert told == _drain(tools, pair, seeded, fast_path=False, kv_limit_bytes=1 << 24, cuda_graphs=False)


@pytest.fixture
def whole_caches(monkeypatch: pytest.MonkeyPatch) -> list[SlotCache]:
    """Caches as on a GPU: neither lazy nor growing. They are listed as they are made."""
    made: list[SlotCache] = []

    def noted(*given: Any, **named: Any) -> SlotCache:
        made.append(SlotCache(*given, **named))
        return made[-1]

    for module in ("cache", "engine"):
        monkeypatch.setattr(f"worker_svc.engine.{module}.lazy_memory", lambda layers, device: False)
    monkeypatch.setattr("worker_svc.engine.engine.SlotCache", noted)
    return made


def test_caches_on_a_gpu_stay_where_they_are(
    tools: Any, pair: Any, recorder: TapeRecorder, whole_caches: list[SlotCache]
) -> None:
    """All memory is taken at the start and within the budget; what calibration has recorded is used later."""
    limit_bytes = 5 * 100 * 512
    engine = tools.engine(
        pair,
        slots=3,
        spare_slots=2,
        draft_tokens=3,
        fast_path=False,
        kv_limit_bytes=limit_bytes,
        adaptive=True,
    )
    assert engine.context_tokens < pair.context_tokens
    taken_bytes = sum(cache.allocated_bytes for cache in whole_caches)
    assert 0.9 * limit_bytes < taken_bytes <= limit_bytes
    engine.calibrate(30.0)
    recorded = [dict(runner._graphs) for runner in engine._runners]
    assert all(recorded)
    prompts = [prompt[: engine.context_tokens - MAX_TOKENS] for prompt in PROMPTS]
    requests = [
        EngineRequest(str(n), prompt, stopping=StoppingConfig(max_tokens=MAX_TOKENS))
        for n, prompt in enumerate(prompts)
    ]
    outputs = tools.drain(engine, requests)
    assert [outputs[str(n)].tokens for n in range(len(prompts))] == [
        tools.greedy_reference(pair, prompt, MAX_TOKENS) for prompt in prompts
    ]
    engine.forget_kept()
    for cache, runner, before in zip(whole_caches, engine._runners, recorded, strict=True):
        assert cache.generation == 1
        assert cache.capacity_tokens == cache.limit_tokens
        assert before.items() <= runner._graphs.items()
    assert sum(cache.allocated_bytes for cache in whole_caches) == taken_bytes


def test_what_asks_the_device_runs_as_it_did(
    tools: Any, make_folders: Any, recorder: TapeRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """A mixture of experts reads which experts are wanted."""
    folders = make_folders("mixtral")
    pair = load_pair(folders.target, None)
    pair.target.set_experts_implementation("eager")
    with caplog.at_level(logging.WARNING):
        outputs = _drain(tools, pair, SamplingConfig())
    assert outputs == [tools.greedy_reference(pair, prompt, MAX_TOKENS) for prompt in PROMPTS]
    assert recorder.recorded == recorder.replayed == 0
    assert [record.getMessage() for record in caplog.records] == [
        "passes are not recorded: operation not permitted when stream is capturing"
    ]


def test_a_recording_that_differs_is_not_used(
    tools: Any, pair: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent(TapeRecorder):
        def record(self, run: Callable[[], None]) -> Replay:
            super().record(run)
            return lambda: None

    monkeypatch.setattr("worker_svc.engine.engine.recorder_for", lambda device: Silent())
    outputs = _drain(tools, pair, SamplingConfig())
    assert outputs == [tools.greedy_reference(pair, prompt, MAX_TOKENS) for prompt in PROMPTS]
    assert any("recorded logits differ" in record.getMessage() for record in caplog.records)


def test_recordings_are_chosen_by_the_device_and_the_setting(
    tools: Any, pair: Any, recorder: TapeRecorder
) -> None:
    assert all(isinstance(runner, GraphRunner) for runner in tools.engine(pair)._runners)
    engine = tools.engine(pair, cuda_graphs=False)
    assert not any(isinstance(runner, GraphRunner) for runner in engine._runners)


def test_a_cpu_records_nothing(tools: Any, pair: Any) -> None:
    assert not any(isinstance(runner, GraphRunner) for runner in tools.engine(pair)._runners)


def _cache(slots: int, limit_tokens: int = 4096) -> SlotCache:
    shapes = [LayerShape(1, 2, 2)]
    cpu = torch.device("cpu")
    return SlotCache(shapes, slots, limit_tokens, 64, torch.float32, cpu, lazy=False, grows=True)


def test_buckets() -> None:
    cache = _cache(12)
    assert find_bucket(cache, 1, 1, 0) == Bucket(1, 1, 128)
    assert find_bucket(cache, 3, 4, 100) == Bucket(4, 5, 128)
    assert find_bucket(cache, 9, 6, 124) == Bucket(12, 9, 160)
    assert find_bucket(cache, 5, 17, 1500) == Bucket(8, 17, 1536)
    assert find_bucket(cache, 1, 18, 0) is None
    # The padding of a row at the end of its context must still fit.
    assert find_bucket(cache, 1, 6, 4096 - 9) == Bucket(1, 9, 4096)
    assert find_bucket(cache, 1, 6, 4096 - 8) is None
    for end in range(1, 4000, 7):
        bucket = find_bucket(cache, 1, 1, end - 1)
        assert bucket is not None
        assert end <= bucket.reach <= max(1.25 * end + 1, 128)


def test_padding_writes_behind_what_others_hold() -> None:
    cache = _cache(4)
    cache.reserve(300)
    cache.written[:] = [5, 6, 30, cache.capacity_tokens - 4]
    bucket = Bucket(4, 3, 128)
    assert padded_begins(cache, [2, 4], bucket) == [2, 4, 30, cache.capacity_tokens - 4]
    # The last slot has no room for five.
    assert padded_begins(cache, [2, 4], Bucket(4, 5, 128)) is None
    assert padded_begins(cache, [2, 4, 9, 9], Bucket(4, 5, 128)) == [2, 4, 9, 9]


def test_padding_has_no_tokens_of_earlier_passes() -> None:
    class Model:
        cache = _cache(4)

        def forward(self, tokens: torch.Tensor, *given: Any) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 7)

        def run(self, tokens: torch.Tensor, window: Any, logits: int) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 7)

    runner = GraphRunner(Model(), 7, TapeRecorder())  # type: ignore[arg-type]
    for rows, queries in ((4, 5), (4, 5), (4, 5), (3, 4)):
        tokens = torch.full((rows, queries), 6)
        runner.forward(tokens, range(rows), [0] * rows, queries)
    (graph,) = runner._graphs.values()
    assert graph.uses > 1
    assert bool((graph.tokens[:3, :4] == 6).all())
    assert int(graph.tokens.sum()) == 3 * 4 * 6
