"""The engine on a GPU: what it says, where its KV lies, and how often the host waits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from worker_svc.engine import Engine, EngineConfig, EngineRequest, ModelPair, StoppingConfig, load_pair
from worker_svc.engine import decoding as decoding_module
from worker_svc.engine.clock import BusyClock, PhaseClock
from worker_svc.engine.graphs import CudaRecorder, GraphRunner
from worker_svc.engine.memory import pinned_bytes

PROMPTS = [[random.Random(n).randrange(2, 256) for _ in range(n)] for n in (1, 7, 40, 90, 150, 33)]
MAX_TOKENS = 24


def _engine(pair: ModelPair, **changes: Any) -> Engine:
    settings = {"slots": 4, "spare_slots": 1, "draft_tokens": 3, "adaptive": False, "kv_block_tokens": 64}
    return Engine(pair, EngineConfig(**(settings | changes)))


def _request(name: str, output: list[int]) -> EngineRequest:
    stopping = StoppingConfig(max_tokens=MAX_TOKENS, ignore_eos=True)
    return EngineRequest(name, PROMPTS[int(name)], output, stopping=stopping)


def _run(engine: Engine, preempting: bool) -> list[list[int]]:
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(PROMPTS))}
    queue = list(outputs)
    while queue or engine.running:
        while queue and engine.free_slots:
            name = queue.pop(0)
            engine.add(_request(name, outputs[name]))
        told = engine.step()
        for row, name in enumerate(told.request_ids):
            outputs[name] += told.tokens_of(row)
        if preempting and engine.running and queue:
            queue.append(engine.running[0])
            engine.preempt(engine.running[0])
    return list(outputs.values())


def _reference(pair: ModelPair) -> list[list[int]]:
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device=pair.device)
        given = pair.target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False,
            eos_token_id=1 << 30, pad_token_id=0,
        )  # fmt: skip
        outputs.append(given[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("preempting", [False, True])
def test_float32_equals_generate(save: Any, family: str, preempting: bool) -> None:
    folder = save(family)
    torch.backends.cuda.matmul.allow_tf32 = False
    pair = load_pair(folder, folder, dtype="float32", device="cuda")
    assert _run(_engine(pair), preempting) == _reference(pair)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_recorded_passes(save: Any, family: str) -> None:
    """They are used, they say what generate says, and the cache that they know stays where it is."""
    folder = save(family)
    torch.backends.cuda.matmul.allow_tf32 = False
    pair = load_pair(folder, folder, dtype="float32", device="cuda")
    engine = _engine(pair, fast_path=False)
    assert _run(engine, preempting=True) == _reference(pair)
    for runner in engine._runners:
        assert isinstance(runner, GraphRunner)
        # Nothing made the engine give up recording, and what was recorded last was replayed.
        assert runner._recorder is not None
        assert any(graph.uses > 2 for graph in runner._graphs.values())
        assert runner.cache.generation == 1
        assert runner.cache.capacity_tokens == runner.cache.limit_tokens
    assert _run(_engine(pair, cuda_graphs=False), preempting=True) == _reference(pair)


def test_one_models_graphs_survive_the_others() -> None:
    """Graphs of the target and of the draft are let go apart, and none leans on what went with others."""
    device = torch.device("cuda", torch.cuda.current_device())
    recorders = [CudaRecorder(device), CudaRecorder(device)]
    left, right = (torch.randn(512, 512, device=device, dtype=torch.bfloat16) for _ in range(2))
    expected = left @ right
    graphs: list[list[Any]] = [[], []]
    for turn in range(6):
        mine = graphs[turn % 2]
        mine.clear()
        recorders[turn % 2].begin_anew()
        for _ in range(4):
            product = torch.empty_like(expected)
            mine.append((recorders[turn % 2].record(lambda held=product: held.copy_(left @ right)), product))
        torch.cuda.empty_cache()
        for replay, held in (*graphs[0], *graphs[1]):
            held.zero_()
            replay()
            torch.testing.assert_close(held, expected)


def test_a_recording_that_fails_leaves_the_stream_as_it_was() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    recorder, number = CudaRecorder(device), torch.ones((), device=device)
    stream = torch.cuda.current_stream(device)
    with pytest.raises(RuntimeError):
        recorder.record(lambda: number.add_(number.item()))
    assert torch.cuda.current_stream(device) == stream
    assert (number + 1).item() > 1


def test_bfloat16_runs(save: Any) -> None:
    folder = save("llama")
    outputs = _run(_engine(load_pair(folder, folder, dtype="bfloat16", device="cuda")), preempting=True)
    assert [len(output) for output in outputs] == [MAX_TOKENS] * len(PROMPTS)


def test_one_wait_a_step(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA itself tells: any other synchronisation than the one copy at the end is an error."""
    folder = save("qwen3")
    pair = load_pair(folder, folder, dtype="bfloat16", device="cuda")
    # Passes that are being recorded are checked, which waits.
    engine = _engine(pair, slots=6, prompt_lookup=False, cuda_graphs=False)
    for index in range(len(PROMPTS)):
        engine.add(_request(str(index), []))
    for _ in range(3):
        engine.step()
    waits: list[int] = []
    fetch = decoding_module.fetch

    def counted(*tensors: torch.Tensor) -> list[Any]:
        waits.append(1)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return fetch(*tensors)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(decoding_module, "fetch", counted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        told = engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(told.request_ids) == len(PROMPTS)
    assert len(waits) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_gpu_than_the_current_one(save: Any) -> None:
    """What is timed, recorded and said is that of the GPU that is named."""
    folder = save("llama")
    torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.cuda.current_device() == 0
    pair = load_pair(folder, folder, dtype="float32", device="cuda:1")
    assert _run(_engine(pair), preempting=True) == _reference(pair)
    clock = PhaseClock(BusyClock(pair.device))
    work = torch.randn(4096, 4096, device=pair.device)
    began = clock.mark()
    for _ in range(50):
        work @ work
    ended = clock.mark()
    torch.cuda.synchronize(pair.device)
    assert clock.seconds(began, ended) > 1e-3


def test_host_memory_is_pinned_and_comes_back(save: Any) -> None:
    pair = load_pair(save("llama"), None, dtype="bfloat16", device="cuda")
    engine = _engine(pair, slots=1, spare_slots=0, prompt_lookup=False)
    engine.add(_request("4", []))
    engine.step()
    cache = engine._runners[0].cache
    before = [keys[0, :100].clone() for keys in cache.keys]
    engine.preempt("4")
    engine.add(_request("0", []))
    assert engine.resident()["4"][1] == "host"
    _, parked = engine._residency._host["4"]
    assert all(part.is_pinned() for part in parked.parts[0])
    assert parked.size_bytes == sum(pinned_bytes(part.nbytes) for parts in parked.parts for part in parts)
    engine.drop("0")
    engine.add(_request("4", []))
    for keys, held in zip(cache.keys, before, strict=True):
        torch.testing.assert_close(keys[0, :100], held)
