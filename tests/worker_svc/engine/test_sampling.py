"""Sampled output has the target's distribution; seeded output depends on model, prompt, parameters and seed
alone.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from worker_svc.engine import EngineRequest, ModelPair, SamplingConfig, StoppingConfig, load_pair
from worker_svc.engine.config import MAX_REPETITION_PENALTY, MIN_REPETITION_PENALTY
from worker_svc.engine.noise import gumbel
from worker_svc.engine.penalties import TokenHistory
from worker_svc.engine.sampling import BatchSampler, SamplingRow

VOCABULARY = 12
TOKENS = 3
SAMPLES = 2000
# One token: it is fed by the first verification itself, so that thousands of requests need no prefill.
PROMPT = [3]

CASES = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "top_k": {"temperature": 1.3, "top_k": 4},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.2, "min_p": 0.1},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.7},
    "frequency": {"temperature": 1.0, "frequency_penalty": 0.9},
    "presence": {"temperature": 1.0, "presence_penalty": -1.1},
    "bias": {"temperature": 0.9, "logit_bias": ((3, 0.8), (7, -100.0), (9, -0.7))},
    "all": {
        "temperature": 1.1,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.4,
        "presence_penalty": 0.6,
        "logit_bias": ((5, 0.5),),
    },
}


@pytest.fixture(scope="module")
def small_pair(make_folders: Any) -> ModelPair:
    folders = make_folders(vocabulary_size=VOCABULARY, noise=0.3, initializer_range=0.12)
    return load_pair(folders.target, folders.draft)


class AddedPenalties(LogitsProcessor):
    """By the formula of OpenAI's API, token by token; transformers has none."""

    def __init__(self, config: SamplingConfig, prompt_tokens: int) -> None:
        self.config, self.prompt_tokens = config, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, tokens in enumerate(input_ids.tolist()):
            for token, count in Counter(tokens[self.prompt_tokens :]).items():
                scores[row, token] -= (
                    count * self.config.frequency_penalty + float(count > 0) * self.config.presence_penalty
                )
        return scores


def _processors(config: SamplingConfig, prompt_tokens: int = 1) -> LogitsProcessorList:
    """transformers' own processors, in the order of its generate."""
    chain: list[Any] = []
    if config.logit_bias:
        chain.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in config.logit_bias]))
    if config.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.frequency_penalty or config.presence_penalty:
        chain.append(AddedPenalties(config, prompt_tokens))
    if not config.greedy:
        chain.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        chain.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        chain.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        chain.append(MinPLogitsWarper(config.min_p))
    return LogitsProcessorList(chain)


@torch.inference_mode()
def _exact(
    pair: ModelPair, config: SamplingConfig, prompt: Sequence[int] = PROMPT
) -> dict[tuple[int, ...], float]:
    """Probability of every output of TOKENS tokens, from plain forward passes."""
    chain = _processors(config, len(prompt))
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(TOKENS):
        prefixes = [prefix for prefix, chance in known.items() if chance > 0]
        inputs = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        rows = chain(inputs, pair.target(input_ids=inputs).logits[:, -1]).softmax(-1).tolist()
        known = {
            (*prefix, token): known[prefix] * chance
            for prefix, row in zip(prefixes, rows, strict=True)
            for token, chance in enumerate(row)
        }
    return known


def _chi_square_excess(samples: Iterable[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """Standard deviations by which Pearson's statistic exceeds its mean; cells expected under 5 times are
    merged.
    """
    counts = Counter(samples)
    total = sum(counts.values())
    assert all(exact.get(sample, 0.0) > 0 for sample in counts), "a sample that the target can never give"
    statistic, cells, rest_expected, rest_count = 0.0, 0, 0.0, 0
    for outcome, chance in exact.items():
        if chance * total >= 5:
            statistic += (counts[outcome] - chance * total) ** 2 / (chance * total)
            cells += 1
        else:
            rest_expected += chance * total
            rest_count += counts[outcome]
    if rest_expected >= 5:
        statistic += (rest_count - rest_expected) ** 2 / rest_expected
        cells += 1
    freedom = cells - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seeded", [False, True], ids=["free", "seeded"])
@pytest.mark.parametrize("case", list(CASES))
def test_distribution(tools: Any, small_pair: ModelPair, case: str, seeded: bool) -> None:
    base = SamplingConfig(**CASES[case])
    exact = _exact(small_pair, base)
    engine = tools.engine(small_pair, slots=100, spare_slots=0, draft_tokens=2, seed=11)
    stopping = StoppingConfig(max_tokens=TOKENS, ignore_eos=True)
    outputs = tools.drain(
        engine,
        [
            EngineRequest(
                str(i),
                PROMPT,
                sampling=SamplingConfig(**CASES[case], seed=i if seeded else None),
                stopping=stopping,
                draft_tokens=i % 3,
            )
            for i in range(SAMPLES)
        ],
    )
    assert 0 < sum(o.accepted for o in outputs.values()) < sum(o.drafted for o in outputs.values())
    assert _chi_square_excess((tuple(o.tokens) for o in outputs.values()), exact) < 5.0


@pytest.mark.parametrize("drafter", ["lookup", "both"])
@pytest.mark.parametrize("case", ["plain", "top_p", "all"])
def test_distribution_with_lookup(tools: Any, small_pair: ModelPair, case: str, drafter: str) -> None:
    """The prompt's last tokens have occurred before, so the first step looks up, later ones now and then."""
    prompt = [3, 4, 3, 4]
    sampling = SamplingConfig(**CASES[case])
    exact = _exact(small_pair, sampling, prompt)
    pair = replace(small_pair, draft=None) if drafter == "lookup" else small_pair
    engine = tools.engine(pair, slots=100, spare_slots=0, seed=12)
    stopping = StoppingConfig(max_tokens=TOKENS, ignore_eos=True)
    outputs = tools.drain(
        engine,
        [
            EngineRequest(str(i), prompt, sampling=sampling, stopping=stopping, draft_tokens=i % 3)
            for i in range(SAMPLES)
        ],
    )
    assert 0 < sum(o.accepted for o in outputs.values()) < sum(o.drafted for o in outputs.values())
    assert _chi_square_excess((tuple(o.tokens) for o in outputs.values()), exact) < 5.0


def test_the_chi_square_sees_a_wrong_distribution(small_pair: ModelPair) -> None:
    right, wrong = (_exact(small_pair, SamplingConfig(temperature=t)) for t in (1.0, 1.6))
    generator = random.Random(0)
    samples = generator.choices(list(wrong), list(wrong.values()), k=SAMPLES)
    assert _chi_square_excess(samples, right) > 5.0


def _scores(configs: Sequence[SamplingConfig], logits: torch.Tensor) -> torch.Tensor:
    """What a batch's rows may choose of: processed scores of one step without drafts."""
    sampler = BatchSampler(
        [SamplingRow(config, 0, (), None) for config in configs], logits.shape[-1], torch.device("cpu")
    )
    sampler.begin([0] * len(configs), logits.shape[1])
    return sampler._scores(logits, 0, torch.zeros((len(configs), logits.shape[1] - 1), dtype=torch.long))


@torch.inference_mode()
def test_filters_equal_those_of_transformers_in_any_batch() -> None:
    """Rows with and without top-p together, and beside other filters; each as if it were alone."""
    configs = [
        SamplingConfig(temperature=0.7, seed=1, top_p=0.3),
        SamplingConfig(temperature=1.0),
        SamplingConfig(temperature=1.5, top_p=0.95, top_k=7),
        SamplingConfig(),
        SamplingConfig(temperature=1.0, top_p=1e-6),
        SamplingConfig(temperature=1.0, seed=2, top_p=0.999, min_p=0.05),
        SamplingConfig(temperature=1.2, top_k=5),
    ]
    logits = 3 * torch.randn((len(configs), 4, 300), generator=torch.Generator().manual_seed(0))
    together = _scores(configs, logits)
    for row, config in enumerate(configs):
        assert torch.equal(_scores([config], logits[row : row + 1])[0], together[row])
        if not config.greedy:
            expected = _processors(config)(torch.zeros((4, 1), dtype=torch.long), logits[row])
            assert torch.equal(together[row], expected)


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1.25},
        {"repetition_penalty": 0.5, "frequency_penalty": -2.0, "presence_penalty": 1.0},
    ],
    ids="-".join,
)
@torch.inference_mode()
def test_drafted_tokens_are_penalised_at_the_positions_behind_them(penalties: dict[str, float]) -> None:
    """All positions of a verification at once, and those of drafting one by one, as if each came alone; and
    what was drafted counts no more in the next step.
    """
    config = SamplingConfig(**penalties)
    logits = torch.randn((1, 4, 30), generator=torch.Generator().manual_seed(0))
    drafts = torch.tensor([[7, 9, 7]])
    prompt, output = [3, 9, 20], [5, 20, 5]
    history = TokenHistory.of(config, prompt, output, 30, torch.device("cpu"))
    sampler = BatchSampler([SamplingRow(config, 0, (), history)], 30, torch.device("cpu"))
    for _ in range(2):
        sampler.begin([len(output)], 4)
        together = sampler._scores(logits, 0, drafts)
        for position in range(4):
            known = torch.tensor([prompt + output + drafts[0, :position].tolist()])
            expected = _processors(config, len(prompt))(known, logits[:, position].clone())
            torch.testing.assert_close(together[:, position], expected)
            alone = sampler._scores(logits[:, position : position + 1], position, drafts[:, :position])
            assert torch.equal(alone[:, 0], together[:, position])
        assert history is not None
        history.emit([9, 7])
        output += [9, 7]


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_greedy_output_with_penalties_and_biases_is_that_of_plain_decoding(
    tools: Any, pair: ModelPair, draft_tokens: int
) -> None:
    prompts = [[40, 41, 42], [9, 8, 9, 8], [3]]
    config = SamplingConfig(
        repetition_penalty=1.1,
        frequency_penalty=0.7,
        presence_penalty=-0.3,
        logit_bias=((5, 1.5), (11, -100.0)),
    )
    requests = [
        EngineRequest(
            str(i), prompt, sampling=config, stopping=StoppingConfig(max_tokens=24, ignore_eos=True)
        )
        for i, prompt in enumerate(prompts)
    ]
    outputs = tools.drain(tools.engine(pair, draft_tokens=draft_tokens), requests)
    for i, prompt in enumerate(prompts):
        chain, tokens = _processors(config, len(prompt)), torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(24):
                scores = chain(tokens, pair.target(input_ids=tokens).logits[:, -1].float())
                tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
        assert outputs[str(i)].tokens == tokens[0, len(prompt) :].tolist()
        assert len(set(outputs[str(i)].tokens)) > 8, "penalised repetitions"
    assert (sum(output.accepted for output in outputs.values()) > 0) == (draft_tokens > 0)


@torch.inference_mode()
def test_top_p_keeps_all_that_score_as_the_last_one_kept() -> None:
    """Which of equal tokens stay does not depend on how they were sorted."""
    logits = torch.full((1, 1, 64), -20.0)
    logits[0, 0, 5::7] = 2.0
    logits[0, 0, 3] = 3.0
    kept = _scores([SamplingConfig(temperature=1.0, top_p=0.5)], logits)[0, 0].isfinite().nonzero()[:, 0]
    assert kept.tolist() == [3, *range(5, 64, 7)]


def _seeded_requests() -> list[EngineRequest]:
    requests = []
    for i, case in enumerate(itertools.islice(itertools.cycle(CASES.values()), 10)):
        generator = random.Random(i)
        prompt = [generator.randrange(2, 64) for _ in range(generator.randrange(1, 40))]
        sampling = SamplingConfig(**case, seed=1000 + i)
        requests.append(
            EngineRequest(str(i), prompt, sampling=sampling, stopping=StoppingConfig(max_tokens=20))
        )
    return requests


@pytest.fixture(scope="module")
def seeded_reference(tools: Any, folders: Any) -> dict[str, list[int]]:
    engine = tools.engine(load_pair(folders.target, None), slots=1, prompt_lookup=False)
    return {name: output.tokens for name, output in tools.drain(engine, _seeded_requests()).items()}


@pytest.mark.parametrize("slots", [1, 3, 10])
@pytest.mark.parametrize("draft_tokens", [1, 4])
@pytest.mark.parametrize("prompt_lookup", [False, True])
def test_seeded_output_ignores_batch_and_draft(
    tools: Any,
    pair: ModelPair,
    seeded_reference: dict[str, list[int]],
    slots: int,
    draft_tokens: int,
    prompt_lookup: bool,
) -> None:
    engine = tools.engine(
        pair, slots=slots, draft_tokens=draft_tokens, prompt_lookup=prompt_lookup, seed=slots
    )
    outputs = tools.drain(engine, _seeded_requests())
    assert {name: output.tokens for name, output in outputs.items()} == seeded_reference
    assert sum(output.accepted for output in outputs.values()) > 0


def test_seeded_output_ignores_neighbours_and_preemption(
    tools: Any, pair: ModelPair, seeded_reference: dict[str, list[int]]
) -> None:
    engine = tools.engine(pair, slots=4, spare_slots=1, host_cache_bytes=20_000)
    free = SamplingConfig(temperature=1.0)
    waiting = [
        other
        for request in _seeded_requests()
        for other in (request, EngineRequest(f"x{request.request_id}", [9, 8, 7], sampling=free))
    ]
    requests = {request.request_id: request for request in waiting}
    outputs: dict[str, Any] = {}
    generator = random.Random(5)
    while waiting or engine.running:
        while waiting and engine.free_slots:
            request = waiting.pop(generator.randrange(len(waiting)))
            held = outputs.get(request.request_id)
            output = tuple(held.tokens) if held else ()
            engine.add(
                EngineRequest(
                    request.request_id, request.prompt_token_ids, output, request.sampling, request.stopping
                )
            )
        tools.collect(outputs, engine.step())
        if engine.running and generator.random() < 0.5:
            name = generator.choice(engine.running)
            if name.startswith("x"):
                engine.drop(name)
            else:
                engine.preempt(name)
                waiting.append(requests[name])
    assert {name: outputs[name].tokens for name in seeded_reference} == seeded_reference


def test_noise_is_gumbel_and_reproducible() -> None:
    seeds = torch.tensor([1, 2, -3])
    positions = torch.arange(200).expand(3, 200)
    noise = gumbel(seeds, positions, 500)
    assert torch.equal(noise[1:2, 7:8], gumbel(seeds[1:2], positions[1:2, 7:8], 500))
    # The mean of Gumbel noise is Euler's constant, its variance pi^2 / 6.
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    uniform = (-(-noise).exp()).exp().view(-1)
    expected = uniform.numel() / 64
    histogram = torch.histc(uniform.float(), 64, 0, 1)
    assert float(((histogram - expected) ** 2 / expected).sum()) < 63 + 5 * math.sqrt(126)
    # Known values pin the hash: a change would change every seeded output.
    assert noise[0, 0, :3].tolist() == pytest.approx(
        [0.1772064934697004, 0.1576136418319589, 0.48321051846760354], abs=1e-12
    )


def test_free_requests_differ_and_an_engine_seed_repeats_them(tools: Any, pair: ModelPair) -> None:
    def run(seed: int | None) -> list[list[int]]:
        sampling = SamplingConfig(temperature=1.5)
        requests = [
            EngineRequest(str(i), [4, 5, 6], sampling=sampling, stopping=StoppingConfig(max_tokens=12))
            for i in range(4)
        ]
        return [output.tokens for output in tools.drain(tools.engine(pair, seed=seed), requests).values()]

    assert run(1) == run(1)
    assert len({tuple(tokens) for tokens in run(None) + run(None)}) > 4


@pytest.mark.parametrize("temperature", [1e-20, 1e-39, 5e-324])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("penalty", [MIN_REPETITION_PENALTY, 1.0, MAX_REPETITION_PENALTY])
def test_the_least_temperatures_are_greedy(
    tools: Any, pair: ModelPair, temperature: float, seed: int | None, penalty: float
) -> None:
    """Scores divided by so little are beyond what float32 holds."""
    warm = SamplingConfig(repetition_penalty=penalty)
    greedy, cold = (
        EngineRequest("a", [40, 41, 42], sampling=sampling, stopping=StoppingConfig(max_tokens=20))
        for sampling in (warm, replace(warm, temperature=temperature, seed=seed))
    )
    expected = tools.drain(tools.engine(pair), [greedy])["a"].tokens
    assert tools.drain(tools.engine(pair), [cold])["a"].tokens == expected
