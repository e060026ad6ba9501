"""How often a step makes the host wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from worker_svc.engine import EngineRequest, SamplingConfig, StoppingConfig
from worker_svc.engine import decoding as decoding_module


class _Reads(TorchDispatchMode):
    """Counts reads of single values, which on a GPU would each wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fast_path", [True, False])
def test_one_wait_a_step_for_any_batch(
    tools: Any, pair: Any, monkeypatch: pytest.MonkeyPatch, fast_path: bool
) -> None:
    """All kinds of rows together: greedy, seeded, free, filtered, with log-probabilities."""
    waits: list[int] = []
    fetch = decoding_module.fetch
    monkeypatch.setattr(decoding_module, "fetch", lambda *given: waits.append(1) or fetch(*given))
    kinds = [
        SamplingConfig(logprobs=3),
        SamplingConfig(temperature=0.8, seed=4, top_k=20),
        SamplingConfig(temperature=0.8, top_p=0.9, min_p=0.01),
        SamplingConfig(temperature=1.0, logprobs=0),
    ]
    engine = tools.engine(pair, draft_tokens=3, fast_path=fast_path)
    for index, sampling in enumerate(kinds):
        stopping = StoppingConfig(max_tokens=30, min_tokens=20)
        engine.add(
            EngineRequest(str(index), [5, 6, 7, 5, 6, 7 + index], sampling=sampling, stopping=stopping)
        )
    engine.step()
    waits.clear()
    with _Reads() as reads:
        told = engine.step()
    assert len(told.request_ids) == len(kinds)
    assert sum(told.drafted_counts) > 0
    assert len(waits) == 1
    assert reads.count == 0
