"""A folder that cannot be served is refused with one line that says why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, GPTNeoConfig, MambaConfig, Qwen3NextConfig

from worker_svc.engine import Engine, EngineConfig, ModelError, load_pair


def _refused(message: str, target: Path | str, draft: Path | str | None = None, **options: Any) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_pair(target, draft, **options)
    assert "\n" not in str(caught.value)


def test_what_a_pair_knows(folders: Any, text_pair: Any) -> None:
    pair = load_pair(str(folders.target), folders.draft)
    assert pair.vocabulary_size == 64
    assert pair.context_tokens == 160
    assert pair.eos_token_ids == (1,)
    assert pair.tokenizer is None
    assert text_pair.tokenizer.decode(text_pair.tokenizer("fox").input_ids) == "fox"


def test_fingerprint_follows_the_content(folders: Any, tmp_path: Path) -> None:
    pair = load_pair(folders.target, folders.draft)
    shutil.copytree(folders.target, tmp_path / "copy")
    assert load_pair(tmp_path / "copy", folders.draft).fingerprint == pair.fingerprint
    assert load_pair(folders.target, None).fingerprint != pair.fingerprint
    assert load_pair(folders.draft, folders.draft).fingerprint != pair.fingerprint
    assert len(pair.fingerprint) == 64


def test_folders_without_a_model(folders: Any, tmp_path: Path) -> None:
    _refused("target model folder .* does not exist", tmp_path / "nowhere")
    _refused("draft model folder .* does not exist", folders.target, tmp_path / "nowhere")
    _refused("has no config.json", tmp_path)
    small = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(small))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    _refused("no .*safetensors weights; other formats are not loaded", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    _refused("target model in .* cannot be loaded", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    _refused("config.json not understood", tmp_path)
    (tmp_path / "config.json").write_text("{")
    _refused("config.json not understood", tmp_path)


def test_missing_weights(folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders.target, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["num_hidden_layers"] = 3
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    _refused("lacks 9 weights", tmp_path / "model")


def test_code_in_a_folder_is_not_run(folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders.target, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    _refused("config.json not understood", tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_draft_of_another_vocabulary(make_folders: Any, tools: Any) -> None:
    target = make_folders(vocabulary_size=400).target
    _refused("another vocabulary .* sizes 64 and 400", target, make_folders(vocabulary_size=64).draft)
    draft = make_folders(vocabulary_size=400).draft
    tools.save_tokenizer(target, 400)
    tools.save_tokenizer(draft, 350)
    _refused("another vocabulary .* tokens, .* of them different", target, draft)


def test_dtype_and_device(folders: Any) -> None:
    _refused("dtype 'int8' is not one of", folders.target, dtype="int8")
    _refused("not a torch device", folders.target, device="toaster")


def test_recurrent_models_are_refused(tools: Any, tmp_path: Path) -> None:
    """A state without a length cannot forget rejected tokens."""
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    mamba = MambaConfig(state_size=4, **small)
    tools.make_model(mamba, 0).save_pretrained(tmp_path / "mamba")
    with pytest.raises(ModelError):
        Engine(load_pair(tmp_path / "mamba", None), EngineConfig(slots=2))
    hybrid = Qwen3NextConfig(
        layer_types=["linear_attention", "full_attention"], intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, num_experts=4,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, **small,
    )  # fmt: skip
    tools.make_model(hybrid, 0).save_pretrained(tmp_path / "hybrid")
    _refused("linear_attention layers", tmp_path / "hybrid")


def test_models_that_mask_by_the_longest_row_are_refused(tools: Any, tmp_path: Path) -> None:
    """GPT-Neo's local layers; without them it is served."""
    small = {
        "vocab_size": 64, "hidden_size": 32, "num_heads": 4, "num_layers": 2, "intermediate_size": 32,
        "max_position_embeddings": 160, "eos_token_id": 1, "bos_token_id": 0,
    }  # fmt: skip
    local = GPTNeoConfig(attention_types=[[["global", "local"], 1]], window_size=16, **small)
    tools.make_model(local, 0).save_pretrained(tmp_path / "local")
    _refused("gpt_neo masks its local layers itself", tmp_path / "local")
    whole = GPTNeoConfig(attention_types=[[["global"], 2]], **small)
    tools.make_model(whole, 0).save_pretrained(tmp_path / "global")
    tools.engine(load_pair(tmp_path / "global", None))


def test_what_the_model_itself_raises_becomes_one_line(tools: Any, tmp_path: Path) -> None:
    """A cache for Bart has the encoder's layers: the first pass fails where the decoder has more."""
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=32, max_position_embeddings=160, eos_token_id=1, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    tools.make_model(config, 0).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="bart cannot be run with a cache by slots: list index") as caught:
        Engine(load_pair(tmp_path, None), EngineConfig(slots=2))
    assert "\n" not in str(caught.value)
