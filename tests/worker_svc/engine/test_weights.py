"""Weights that are quantised, spread by a device map, or cannot be served where they are wanted."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig

from worker_svc.engine import EngineRequest, ModelError, StoppingConfig, load_pair
from worker_svc.engine.cache import LayerShape, SlotCache, SlotWindow
from worker_svc.engine.weights import Checkpoint, Placement, check_room, weight_bytes

PROMPTS = [[5, 6, 7], list(range(2, 40)), [9]]
MAX_TOKENS = 16


def _agrees(tools: Any, pair: Any) -> None:
    requests = [
        EngineRequest(str(index), prompt, stopping=StoppingConfig(max_tokens=MAX_TOKENS))
        for index, prompt in enumerate(PROMPTS)
    ]
    outputs = tools.drain(tools.engine(pair, draft_tokens=3), requests)
    for index, prompt in enumerate(PROMPTS):
        assert outputs[str(index)].tokens == tools.greedy_reference(pair, prompt, MAX_TOKENS)


def _save_quantised(folder: Path, model: Any, form: str, bits: int) -> None:
    """Quantises all linear layers but the head, as a tool for quantising would, and saves them compressed."""
    group = None if bits == 8 else 32
    weights = QuantizationArgs(
        num_bits=bits, symmetric=True, strategy="group" if group else "channel", group_size=group
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=form)
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            values = module.weight.detach().unflatten(-1, (-1, group or module.weight.shape[-1]))
            scale, _ = calculate_qparams(values.amin(-1), values.amax(-1), weights)
            module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
    compressor.compress_model(model)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    compressor.update_config(folder)


@pytest.mark.parametrize(("form", "bits"), [("int-quantized", 8), ("pack-quantized", 4)])
def test_compressed_tensors(tools: Any, tmp_path: Path, form: str, bits: int) -> None:
    config = tools.families["llama"](64)
    config.hidden_size, config.intermediate_size = 64, 96
    config.head_dim = 16
    model = tools.make_model(config, 0)
    plain = model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    _save_quantised(tmp_path / "model", model, form, bits)
    pair = load_pair(tmp_path / "model", None)
    _agrees(tools, pair)
    held = pair.target.model.layers[0].mlp.up_proj.weight
    assert 0 < float((held - plain).abs().max()) < float(plain.abs().max())


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq' and cannot be loaded"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' and cannot be loaded"),
        ({"quant_method": "of-tomorrow"}, "'of-tomorrow', which this transformers does not know"),
    ],
)
def test_other_methods_are_refused_by_name(
    folders: Any, tmp_path: Path, described: dict[str, Any], reason: str
) -> None:
    shutil.copytree(folders.target, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] = described
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=reason) as caught:
        load_pair(tmp_path / "model", None)
    assert "\n" not in str(caught.value)


def test_device_map(tools: Any, folders: Any) -> None:
    pair = load_pair(folders.target, folders.draft, device_map="auto")
    assert pair.device == pair.target.device == pair.draft.device
    _agrees(tools, pair)


def test_device_map_without_accelerate(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "accelerate" else found(name, *rest)
    )
    with pytest.raises(ModelError, match=r"needs the package accelerate; .*pip install accelerate"):
        load_pair(folders.target, None, device_map="auto")


def test_weights_that_do_not_fit(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would leave the rest on the disk and read it in every step."""
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda *given: {"cpu": 60_000})
    with pytest.raises(
        ModelError, match=r"\(\d+ bytes of weights\) does not fit the memory .* parts would lie"
    ):
        load_pair(folders.target, None, device_map="auto")


def _held_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_are_counted_before_loading(make_folders: Any, family: str) -> None:
    """Tied weights (gpt2's head is its embedding table) once, in the type in which they will be held."""
    folder = make_folders(family).target
    checkpoint = Checkpoint("target", folder, AutoConfig.from_pretrained(folder))
    held = _held_bytes(load_pair(folder, None).target)
    assert weight_bytes(checkpoint, torch.float32) == held
    assert weight_bytes(checkpoint, torch.bfloat16) == held // 2
    checkpoint.config.quantization_config = {"quant_method": "compressed-tensors"}
    assert weight_bytes(checkpoint, torch.float32) == (folder / "model.safetensors").stat().st_size


def test_a_model_too_large_is_refused_before_it_is_read(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There are machines on which it would fit.
    monkeypatch.setattr("worker_svc.engine.weights.available_bytes", lambda device: 1 << 37)
    shutil.copytree(folders.target, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"hidden_size": 1 << 16, "intermediate_size": 1 << 18, "head_dim": 1 << 14}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    needed = 2 * (4 * (1 << 32) * 3 // 4 + 3 * (1 << 34) + (1 << 17)) + 2 * 64 * (1 << 16) + (1 << 16)
    with pytest.raises(
        ModelError,
        match=rf"target .* has {4 * needed} bytes of weights in float32, but cpu has \d+ bytes free; use",
    ):
        load_pair(tmp_path / "model", None)
    with pytest.raises(ModelError, match=rf"has {2 * needed} bytes of weights in bfloat16"):
        load_pair(tmp_path / "model", None, dtype="bfloat16")


def test_target_and_draft_need_room_together(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair(folders.target, folders.draft)
    sizes = _held_bytes(pair.target), _held_bytes(pair.draft)
    monkeypatch.setattr("worker_svc.engine.weights.available_bytes", lambda device: sum(sizes) - 1)
    with pytest.raises(
        ModelError,
        match=rf"target .* has {sizes[0]} bytes of weights and draft .* has {sizes[1]} bytes of weights in "
        rf"float32, but cpu has {sum(sizes) - 1} bytes free",
    ):
        load_pair(folders.target, folders.draft)
    assert load_pair(folders.target, None).draft is None


def test_each_gpu_of_a_group_holds_its_share(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = [Checkpoint("target", folders.target, AutoConfig.from_pretrained(folders.target))]
    needed = weight_bytes(checkpoints[0], torch.float32)
    free = {"cuda": needed // 2, "cpu": needed}
    monkeypatch.setattr("worker_svc.engine.weights.available_bytes", lambda device: free[device.type])
    check_room(checkpoints, torch.float32, Placement(torch.device("cuda", 0), ranks=2))
    with pytest.raises(ModelError, match=rf"but cuda:0 has {needed // 2} bytes free"):
        check_room(checkpoints, torch.float32, Placement(torch.device("cuda", 0)))
    free["cuda"] = needed // 2 - 1
    with pytest.raises(ModelError, match=rf"\({needed // 2} for each of 2 processes\) in float32"):
        check_room(checkpoints, torch.float32, Placement(torch.device("cuda", 0), ranks=2))
    free |= {"cuda": needed, "cpu": needed - 1}
    with pytest.raises(ModelError, match=rf"host's memory, but that has {needed - 1} bytes free"):
        check_room(checkpoints, torch.float32, Placement(torch.device("cuda", 0)))


def test_what_excludes_what(folders: Any) -> None:
    with pytest.raises(ModelError, match="device map 'all' is not one of none, auto"):
        load_pair(folders.target, None, device_map="all")
    with pytest.raises(ModelError, match="exclude each other"):
        load_pair(folders.target, None, device_map="auto", group=SimpleNamespace(size=2))


def test_models_that_cannot_be_sharded(make_folders: Any) -> None:
    with pytest.raises(ModelError, match=r"4 attention heads and 2 key-value heads, .* over 4 processes"):
        load_pair(make_folders("llama").target, None, group=SimpleNamespace(size=4))
    with pytest.raises(ModelError, match="gpt2 has no tensor-parallel plan"):
        load_pair(make_folders("gpt2").target, None, group=SimpleNamespace(size=2))


def test_layers_on_several_devices() -> None:
    """Each layer's KV lies where the layer runs; 'meta' stands for a second device."""
    elsewhere = torch.device("meta")
    shapes = [LayerShape(2, 4, 4), LayerShape(2, 4, 4, elsewhere), LayerShape(2, 4, 4)]
    cache = SlotCache(shapes, 3, 64, 16, torch.float32, torch.device("cpu"))
    assert [keys.device.type for keys in cache.keys] == ["cpu", "meta", "cpu"]
    for second, slots in ((1, [0, 1]), (0, [2, 0])):
        window = SlotWindow(cache, slots, [0, 20], 2)
        for layer, keys in enumerate(cache.keys):
            states = torch.full((2, 2, 2, 4), float(layer + 1), device=keys.device)
            held = window.write(keys, states)
            assert held.device == keys.device
            assert held.shape == (2, 22, 2, 4)
        assert cache.keys[0][second, 20:22].eq(1).all()
        assert cache.keys[2][second, 20:22].eq(3).all()


def test_quantised_on_a_shared_target_is_refused(folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders.target, tmp_path / "model")
    config = LlamaConfig.from_pretrained(tmp_path / "model")
    config.quantization_config = {"quant_method": "compressed-tensors"}
    (tmp_path / "model/config.json").write_text(config.to_json_string())
    with pytest.raises(ModelError, match="tensor parallelism takes plain weights only"):
        load_pair(tmp_path / "model", None, group=SimpleNamespace(size=2))
