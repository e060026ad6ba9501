"""Log-probabilities are those of the target's plain forward pass, before temperature and filters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worker_svc.engine import EngineRequest, ModelPair, SamplingConfig, StoppingConfig


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3, "top_k": 5}, {"temperature": 1.0}])
@torch.inference_mode()
def test_equal_to_a_plain_forward(tools: Any, pair: ModelPair, sampling: dict[str, Any]) -> None:
    prompt = [9, 8, 7, 6]
    stopping = StoppingConfig(max_tokens=20, ignore_eos=True)
    requests = [
        EngineRequest(str(top), prompt, sampling=SamplingConfig(**sampling, logprobs=top), stopping=stopping)
        for top in (None, 0, 3)
    ]
    outputs = tools.drain(tools.engine(pair), requests)
    assert outputs["None"].logprobs is None
    for top in (0, 3):
        output = outputs[str(top)]
        full = torch.tensor([prompt + output.tokens])
        rows = pair.target(input_ids=full).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert [entry.token_id for entry in output.logprobs] == output.tokens
        for row, entry in zip(rows, output.logprobs, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            assert len(entry.alternatives) == top
            for (token_id, value), best in zip(
                entry.alternatives, row.topk(max(top, 1)).indices.tolist(), strict=False
            ):
                assert token_id == best
                assert value == pytest.approx(float(row[token_id]), abs=1e-3)
