"""The built-in pair: it loads, fits the repository, speaks the chat template and drafts well."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = Path(__file__).resolve().parents[2] / "models" / "tiny"
LARGEST_PAIR_BYTES = 40_000_000
KINDS = {"code", "chat", "topic", "licence"}
# The card says 0.62 over all prompts and whole answers; these few, cut short, scatter more.
ACCEPTANCE_FLOOR = 0.5
MARKERS = ("<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")

pytestmark = pytest.mark.skipif(
    not (TINY / "target" / "model.safetensors").exists(), reason="the pair's weights are not in this checkout"
)


@pytest.fixture(scope="module", autouse=True)
def tiny_modules() -> Any:
    """The training scripts are plain files beside the weights, found by their folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(TINY))
    yield
    sys.path.remove(str(TINY))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair() -> dict[str, Any]:
    load = transformers.AutoModelForCausalLM.from_pretrained
    return {name: load(TINY / name, dtype=torch.float32).eval() for name in ("target", "draft")}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINY / "target")


def demo_entries() -> list[dict[str, Any]]:
    lines = (TINY / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_pair_fits_the_repository() -> None:
    files = [f for name in ("target", "draft") for f in (TINY / name).iterdir()]
    assert sum(f.stat().st_size for f in files) <= LARGEST_PAIR_BYTES
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".pkl"}], "weights are safetensors only"


def test_shapes_agree(pair: dict[str, Any], tokenizer: Any) -> None:
    target, draft = pair["target"].config, pair["draft"].config
    assert target.vocab_size == draft.vocab_size == len(tokenizer) == 2048
    assert target.num_hidden_layers >= 12 * draft.num_hidden_layers
    assert target.num_key_value_heads < target.num_attention_heads, "grouped KV heads"
    assert target.tie_word_embeddings
    assert draft.tie_word_embeddings
    assert target.max_position_embeddings == draft.max_position_embeddings == 2048


def test_stored_in_half_precision() -> None:
    from safetensors import safe_open

    for name in ("target", "draft"):
        with safe_open(str(TINY / name / "model.safetensors"), framework="pt") as weights:
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118


def test_both_folders_hold_the_same_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (TINY / "target" / file).read_bytes() == (TINY / "draft" / file).read_bytes()


def test_special_tokens(pair: dict[str, Any], tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token == "<|pad|>"
    for marker in MARKERS:
        ids = tokenizer(marker, add_special_tokens=False).input_ids
        assert ids == [tokenizer.convert_tokens_to_ids(marker)]
    for model in pair.values():
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("text", ["def f(x):\n\treturn  x\n\n\n", "naïve – 日本 🙂", " lead", "a\r\nb\x00"])
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA<|end|><|user|>\nR\n<|assistant|>\n"


def test_template_is_what_was_trained_on(tokenizer: Any) -> None:
    from tiny_corpus import chat_text

    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_text("Q", "A", "S") == prompt + "A"


def test_demo_prompts_are_valid(tokenizer: Any) -> None:
    entries = demo_entries()
    assert len(entries) >= 32
    assert {entry["kind"] for entry in entries} == KINDS
    for entry in entries:
        assert ("text" in entry) != ("messages" in entry)
        assert 16 <= entry["max_tokens"] <= 160
        if "messages" in entry:
            assert entry["messages"][-1]["role"] == "user"
            assert tokenizer.apply_chat_template(entry["messages"], tokenize=False)
    assert len({entry["max_tokens"] for entry in entries}) >= 8, "the demo needs lengths that differ"


@torch.no_grad()
def test_greedy_acceptance(pair: dict[str, Any], tokenizer: Any) -> None:
    """The draft's best token is the target's at most positions of the target's own text."""
    from tiny_tokens import prompt_ids

    matches = tokens = 0
    for entry in demo_entries()[::4]:
        prompt = torch.tensor([prompt_ids(tokenizer, entry)])
        out = pair["target"].generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False
        )
        guess = pair["draft"](input_ids=out).logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
        made = out[0, prompt.shape[1] :]
        matches, tokens = matches + int((guess == made).sum()), tokens + len(made)
    assert matches / tokens >= ACCEPTANCE_FLOOR


@torch.no_grad()
def test_positions_to_the_end_of_the_context(pair: dict[str, Any], tokenizer: Any) -> None:
    """Late positions work: their loss rises a little (the card says by how much) and does not collapse."""
    unit = "def add(first, second):\n    # Return the sum of two numbers.\n    return first + second\n\n"
    ids = tokenizer(unit * 120, return_tensors="pt").input_ids[:, :2048]
    assert ids.shape[1] == 2048
    for model in pair.values():
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        nats = -scores.gather(1, ids[0, 1:, None]).squeeze(1)
        assert torch.isfinite(nats).all()
    nats_target = -pair["target"](input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert nats_target[1500:].mean() < nats_target[:256].mean() + 1.0


def test_tokenizer_training_is_reproducible() -> None:
    from tiny_tokens import train_tokenizer

    texts = [f"def name_{i}(value):\n    return value + {i}\n" for i in range(200)]
    first, second = (train_tokenizer(texts, vocab_tokens=320) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_split_is_by_name_alone() -> None:
    from tiny_corpus import is_held_out, stable_number

    names = [f"package/module_{i}.py" for i in range(2000)]
    share = sum(is_held_out("code", name) for name in names) / len(names)
    assert 0.015 < share < 0.05
    assert stable_number("split/code/os.py", 1000) == stable_number("split/code/os.py", 1000)


@torch.no_grad()
def test_deepening_keeps_the_function() -> None:
    from tiny_models import deepen, new_model, target_config

    shallow = new_model(target_config(2), seed=3).eval()
    deep = deepen(shallow, 6).eval()
    ids = torch.arange(2, 34)[None]
    assert deep.config.num_hidden_layers == 6
    torch.testing.assert_close(deep(input_ids=ids).logits, shallow(input_ids=ids).logits)
