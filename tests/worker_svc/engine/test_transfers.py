"""How often a step makes the host wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from worker_svc.engine import (
    EngineRequest,
    SamplingConfig,
    StoppingConfig,
    cache,
    decoding,
    penalties,
    prefill,
    sampling,
)
from worker_svc.engine.clock import PhaseClock
from worker_svc.engine.transfers import upload


class _Transfers(TorchDispatchMode):
    """Counts reads of single values, which on a GPU would each wait for it, and tensors made from lists."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode the first is seen, and the second is not.
        self.reads += func in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
        # Single numbers (`x[...] = True`) travel as arguments of the kernel.
        self.made += func is torch.ops.aten.lift_fresh.default and args[0].dim() > 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fast_path", [True, False])
def test_one_wait_a_step_for_any_batch(
    tools: Any, pair: Any, monkeypatch: pytest.MonkeyPatch, fast_path: bool
) -> None:
    """All kinds of rows together: greedy, seeded, free, filtered, penalised, with log-probabilities. Then one
    more comes, so that the step prefills too and the batch's rules are sent up anew.
    """
    waits: list[int] = []
    fetch = decoding.fetch
    monkeypatch.setattr(decoding, "fetch", lambda *given: waits.append(1) or fetch(*given))
    uploads: list[int] = []
    for module in (cache, decoding, penalties, prefill, sampling):
        monkeypatch.setattr(module, "upload", lambda *given: uploads.append(1) or upload(*given))
    kinds = [
        SamplingConfig(logprobs=3),
        SamplingConfig(temperature=0.8, seed=4, top_k=20),
        SamplingConfig(temperature=0.8, top_p=0.9, min_p=0.01),
        SamplingConfig(temperature=1.0, logprobs=0),
        SamplingConfig(repetition_penalty=1.3),
    ]
    engine = tools.engine(pair, slots=6, draft_tokens=3, fast_path=fast_path)

    def add(index: int, sampling: SamplingConfig) -> None:
        stopping = StoppingConfig(max_tokens=30, min_tokens=20)
        engine.add(
            EngineRequest(str(index), [5, 6, 7, 5, 6, 7 + index], sampling=sampling, stopping=stopping)
        )

    for index, sampling_config in enumerate(kinds):
        add(index, sampling_config)
    engine.step()
    for count in (5, 6):
        if count == 6:
            add(5, SamplingConfig(temperature=0.5, seed=5, min_p=0.02))
        waits.clear()
        uploads.clear()
        with _Transfers() as transfers:
            told = engine.step()
        assert len(told.request_ids) == count
        assert sum(told.drafted_counts) > 0
        assert (told.prefill_tokens > 0) == (count == 6)
        assert len(waits) == 1
        assert transfers.reads == 0
        # What goes up goes from pinned memory.
        assert transfers.made == len(uploads) > 0


@pytest.mark.parametrize("device_is_asynchronous", [False, True])
def test_others_are_woken_once_a_step_before_the_longest_wait(
    tools: Any, pair: Any, monkeypatch: pytest.MonkeyPatch, device_is_asynchronous: bool
) -> None:
    monkeypatch.setattr(PhaseClock, "waits", device_is_asynchronous)
    engine = tools.engine(pair, slots=2, draft_tokens=3, prefill_tokens=8)
    seen: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def noted(*given: Any) -> Any:
            seen.append(name)
            return function(*given)

        return noted

    for name, runner in zip(("target", "draft"), engine._runners, strict=True):
        monkeypatch.setattr(runner, "forward", noting(name, runner.forward))
    monkeypatch.setattr(decoding, "fetch", noting("wait", decoding.fetch))

    def step() -> Any:
        seen.clear()
        return engine.step(lambda: seen.append("others"))

    engine.add(EngineRequest("long", list(range(1, 20)), stopping=StoppingConfig(max_tokens=20)))
    for _ in range(2):
        assert not step().request_ids
        assert seen == ["target"], "prefill alone: nobody gains a token"
    while not sum(step().drafted_counts):
        assert seen.count("others") == 1
    last = ["target", "others", "wait"] if device_is_asynchronous else ["others", "target", "wait"]
    assert seen[-3:] == last
    assert seen.count("others") == 1
