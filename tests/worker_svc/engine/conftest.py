"""Tiny random models of several families, and helpers to run an engine over requests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from worker_svc.engine import Engine, EngineConfig, EngineRequest, FinishReason, ModelPair, load_pair

torch.set_num_threads(1)

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
    # Wide weights keep the logits of random models apart, so that rounding never decides an argmax.
    "initializer_range": 0.35,
}

FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": lambda v: LlamaConfig(vocab_size=v, **SHAPE),
    "qwen3": lambda v: Qwen3Config(vocab_size=v, head_dim=8, **SHAPE),
    "mistral": lambda v: MistralConfig(vocab_size=v, sliding_window=9, **SHAPE),
    "gemma3": lambda v: Gemma3TextConfig(
        vocab_size=v,
        head_dim=8,
        sliding_window=9,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        # Its large tied embeddings would make a random model repeat the last token, whatever else it sees.
        tie_word_embeddings=False,
        **SHAPE,
    ),
    "gpt2": lambda v: GPT2Config(
        vocab_size=v, n_embd=32, n_layer=2, n_head=4, n_positions=160, eos_token_id=1, bos_token_id=0,
        initializer_range=0.35,
    ),
    "mixtral": lambda v: MixtralConfig(
        vocab_size=v, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, **SHAPE
    ),
}  # fmt: skip


def make_model(config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def perturbed(model: Any, amount: float, seed: int = 1) -> Any:
    """A draft that agrees with the model now and then."""
    other = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * amount * parameter.std())
    return other


def save_tokenizer(folder: Path, vocabulary_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f"w{i} the quick brown fox {i * 7919} jumps over und überquert" for i in range(300)]
    tokenizer.train_from_iterator(words, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


@dataclass(frozen=True)
class Folders:
    target: Path
    draft: Path


@pytest.fixture(scope="session")
def save_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Folders]:
    """Saves a random model of a configuration and a perturbed copy of it as its draft."""

    def save(config: Any, noise: float = 0.15) -> Folders:
        root = tmp_path_factory.mktemp(config.model_type)
        target = make_model(config, 0)
        target.save_pretrained(root / "target")
        perturbed(target, noise).save_pretrained(root / "draft")
        return Folders(root / "target", root / "draft")

    return save


@pytest.fixture(scope="session")
def make_folders(save_pair: Callable[..., Folders]) -> Callable[..., Folders]:
    """Saves a random model of a family and a perturbed copy of it as its draft."""

    def make(
        family: str = "llama", vocabulary_size: int = 64, noise: float = 0.15, **changes: Any
    ) -> Folders:
        config = FAMILIES[family](vocabulary_size)
        for name, value in changes.items():
            setattr(config, name, value)
        return save_pair(config, noise)

    return make


@pytest.fixture(scope="session")
def folders(make_folders: Callable[..., Folders]) -> Folders:
    return make_folders()


@pytest.fixture(scope="session")
def pair(folders: Folders) -> ModelPair:
    return load_pair(folders.target, folders.draft)


@pytest.fixture(scope="session")
def text_pair(make_folders: Callable[..., Folders]) -> ModelPair:
    """A pair with a byte-level tokenizer."""
    folders = make_folders(vocabulary_size=400)
    save_tokenizer(folders.target, 400)
    save_tokenizer(folders.draft, 400)
    return load_pair(folders.target, folders.draft)


@dataclass
class Output:
    tokens: list[int]
    finish: FinishReason | None = None
    matched_stop: str | int | None = None
    logprobs: list[Any] | None = None
    drafted: int = 0
    accepted: int = 0


def collect(outputs: dict[str, Output], result: Any) -> None:
    """Adds a step's rows to the outputs, checking that offsets join without a gap."""
    for row, request_id in enumerate(result.request_ids):
        output = outputs.setdefault(request_id, Output([]))
        assert result.offsets[row] == len(output.tokens)
        assert result.emitted_counts[row] >= 1
        assert result.accepted_counts[row] <= result.drafted_counts[row]
        output.tokens += result.tokens_of(row)
        output.finish, output.matched_stop = result.finish[row], result.matched_stop[row]
        output.drafted += result.drafted_counts[row]
        output.accepted += result.accepted_counts[row]
        if result.logprobs[row] is not None:
            output.logprobs = (output.logprobs or []) + list(result.logprobs[row])
    assert len(result.token_ids) == sum(result.emitted_counts)


def drain(engine: Engine, requests: Iterable[EngineRequest]) -> dict[str, Output]:
    """Runs all requests to their end, as many at a time as there are slots."""
    waiting = list(requests)[::-1]
    outputs = {request.request_id: Output(list(request.output_token_ids)) for request in waiting}
    while waiting or engine.running:
        while waiting and engine.free_slots:
            engine.add(waiting.pop())
        collect(outputs, engine.step())
    return outputs


def make_engine(pair: ModelPair, **changes: Any) -> Engine:
    """An engine with small blocks that always drafts, so that tests exercise growth and speculation."""
    settings: dict[str, Any] = {
        "slots": 4,
        "spare_slots": 2,
        "adaptive": False,
        "kv_block_tokens": 16,
        "seed": 0,
    }
    return Engine(pair, EngineConfig(**(settings | changes)))


def greedy_reference(pair: ModelPair, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers' generate gives."""
    output = pair.target.generate(
        torch.tensor([prompt]), attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=list(pair.eos_token_ids), pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in output[0, len(prompt) :]]


@torch.inference_mode()
def next_logits(pair: ModelPair, tokens: list[int]) -> torch.Tensor:
    """The target's own logits [vocabulary] after the tokens."""
    logits: torch.Tensor = pair.target(input_ids=torch.tensor([tokens])).logits[0, -1]
    return logits


class Toolbox:
    """The helpers above, for tests."""

    Output = Output
    collect = staticmethod(collect)
    drain = staticmethod(drain)
    engine = staticmethod(make_engine)
    greedy_reference = staticmethod(greedy_reference)
    next_logits = staticmethod(next_logits)
    families = FAMILIES
    make_model = staticmethod(make_model)
    save_tokenizer = staticmethod(save_tokenizer)


@pytest.fixture(scope="session")
def tools() -> type[Toolbox]:
    return Toolbox
