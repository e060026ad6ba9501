"""The ways of decoding that bench/engine.py compares: transformers' own, and the engine's."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from worker_svc.engine import Engine, EngineConfig, EngineRequest, ModelPair, StoppingConfig

PADDING = 0


def read_prompts(path: Path, pair: ModelPair, longest: int) -> dict[str, list[list[int]]]:
    """By kind of prompt, token ids, of each at most the first `longest`."""
    found: dict[str, list[list[int]]] = defaultdict(list)
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if "messages" in entry:
            ids = pair.tokenizer.apply_chat_template(
                entry["messages"], add_generation_prompt=True, return_dict=True
            )["input_ids"]
        else:
            ids = pair.tokenizer(entry["text"]).input_ids
        if ids:
            found[entry["kind"]].append(list(ids)[:longest])
    return dict(found)


@dataclass
class Run:
    """One contender over one batch of prompts: seconds, and each prompt's output."""

    seconds: float
    outputs: list[list[int]]


@dataclass
class Steps:
    """What the engine told of its steps, summed over runs."""

    steps: int = 0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0
    # By drafter: rows, and the tokens drafted for them and accepted of them.
    rows_of: Counter[str] = field(default_factory=Counter)
    drafted_of: Counter[str] = field(default_factory=Counter)
    accepted_of: Counter[str] = field(default_factory=Counter)
    # Of the expected step time, signed, as a share of the measured one.
    errors: list[float] = field(default_factory=list)


class Generate:
    """transformers' generate; `extra` selects assisted generation or prompt lookup, which take one prompt at
    a time.
    """

    def __init__(self, pair: ModelPair, tokens: int, single: bool = False, **extra: Any) -> None:
        self._pair, self._single, self._extra = pair, single, extra
        self._config = copy.deepcopy(pair.target.generation_config)
        # An id that no token has, so that nothing ends early; None would be filled in again from the model.
        self._config.eos_token_id = pair.vocabulary_size
        self._config.pad_token_id = PADDING
        self._config.do_sample = False
        self._config.max_new_tokens = tokens
        if "prompt_lookup_num_tokens" in self._extra:
            self._config.prompt_lookup_num_tokens = self._extra.pop("prompt_lookup_num_tokens")
        # Static lengths: every contender decodes exactly as many tokens.
        self._config.max_length = None

    def takes(self, batch: int) -> bool:
        return batch == 1 or not self._single

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], kind: str) -> Run:
        width = max(map(len, prompts))
        ids = torch.tensor([[PADDING] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        began = time.perf_counter()
        output = self._pair.target.generate(
            ids, attention_mask=mask, generation_config=self._config, **self._extra
        )
        return Run(time.perf_counter() - began, output[:, width:].tolist())


class Ours:
    """The engine in one configuration; keeps what its steps told by kind of prompt and batch."""

    def __init__(self, pair: ModelPair, tokens: int, slots: int, **config: Any) -> None:
        self._stopping = StoppingConfig(max_tokens=tokens, ignore_eos=True)
        self.engine = Engine(pair, EngineConfig(slots=slots, spare_slots=0, prefix_sharing=False, **config))
        self.engine.calibrate()
        self.steps: dict[tuple[str, int], Steps] = defaultdict(Steps)

    def takes(self, batch: int) -> bool:
        return True

    def run(self, prompts: list[list[int]], kind: str) -> Run:
        outputs: list[list[int]] = [[] for _ in prompts]
        told = self.steps[kind, len(prompts)]
        began = time.perf_counter()
        for index, prompt in enumerate(prompts):
            self.engine.add(EngineRequest(str(index), prompt, stopping=self._stopping))
        while self.engine.running:
            result = self.engine.step()
            for row, request_id in enumerate(result.request_ids):
                outputs[int(request_id)] += result.tokens_of(row)
            told.steps += 1
            told.rows += len(result.request_ids)
            told.drafted += sum(result.drafted_counts)
            told.accepted += sum(result.accepted_counts)
            for drafter, drafted, accepted in zip(
                result.drafters, result.drafted_counts, result.accepted_counts, strict=True
            ):
                told.rows_of[drafter.value] += 1
                told.drafted_of[drafter.value] += drafted
                told.accepted_of[drafter.value] += accepted
            if result.expected_s is not None and result.prefill_s == 0:
                told.errors.append(result.expected_s / result.step_s - 1)
        return Run(time.perf_counter() - began, outputs)


def contenders(pair: ModelPair, tokens: int, slots: int, draft_tokens: int) -> dict[str, Any]:
    """All of them by name, transformers first."""
    found: dict[str, Any] = {"transformers generate": Generate(pair, tokens)}
    if pair.draft is not None:
        found["transformers assisted"] = Generate(pair, tokens, single=True, assistant_model=pair.draft)
    found["transformers prompt lookup"] = Generate(pair, tokens, single=True, prompt_lookup_num_tokens=4)
    found["engine, general path"] = Ours(pair, tokens, slots, draft_tokens=0, fast_path=False)
    found["engine, target only"] = Ours(pair, tokens, slots, draft_tokens=0)
    found["engine, fixed draft of 3"] = Ours(
        pair, tokens, slots, draft_tokens=3, adaptive=False, prompt_lookup=False
    )
    found["engine, no lookup"] = Ours(pair, tokens, slots, draft_tokens=draft_tokens, prompt_lookup=False)
    found["engine, lookup alone"] = Ours(replace(pair, draft=None), tokens, slots, draft_tokens=draft_tokens)
    found["engine, adaptive"] = Ours(pair, tokens, slots, draft_tokens=draft_tokens)
    return found
