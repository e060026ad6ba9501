"""What the worker makes of its settings."""

from __future__ import annotations

import pytest

from laps.settings import BUILT_IN_TARGET, Settings
from worker_svc.engine import EngineRequest, ModelPair, StoppingConfig, load_pair
from worker_svc.main import make_engine


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return load_pair(BUILT_IN_TARGET, None)


@pytest.mark.parametrize("lookup_tokens", [0, 3])
def test_lookup_tokens_bound_what_is_looked_up(pair: ModelPair, lookup_tokens: int) -> None:
    engine = make_engine(Settings(lookup_tokens=lookup_tokens), pair)
    stopping = StoppingConfig(max_tokens=12, ignore_eos=True)
    engine.add(EngineRequest("a", pair.tokenizer("x = 1\n" * 20).input_ids, stopping=stopping))
    drafted = [0]
    while engine.running:
        drafted += engine.step().drafted_counts
    assert max(drafted) == lookup_tokens
