"""Reading a model's weights: onto one device, over several by a device map, or in shards of a process group.

transformers does the work, quantised checkpoints included; here stands what it is asked for, and which of
its answers are not good enough to serve.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from .errors import ModelError

DEVICE_MAPS = ("none", "auto")
_SHOWN_MODULES = 3


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go.

    device: of the inputs and the logits, and of all weights unless they are spread. spread: over all GPUs of
    this process, layer by layer, as accelerate's 'auto' device map has it. ranks: processes of which each
    holds its shard of every layer (tensor parallelism); more than 1 needs an initialised process group.
    """

    device: torch.device
    spread: bool = False
    ranks: int = 1


def read_model(role: str, folder: Path, config: Any, dtype: torch.dtype, placement: Placement) -> Any:
    """The model in evaluation mode. Raises ModelError with one line: what cannot be read, or what is missing
    for it.
    """
    method = _quantization_method(role, folder, config)
    options = _options(role, folder, config, method, placement)
    try:
        with _no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        kind = f" is quantised by {method!r} and" if method else ""
        raise ModelError(f"{role} model in {str(folder)!r}{kind} cannot be loaded: {_line(error)}") from error
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        # transformers would fill these with random numbers and only warn.
        raise ModelError(
            f"{role} model in {str(folder)!r} lacks {len(missing)} weights, {missing[0]!r} among them"
        )
    if placement.spread:
        _check_spread(role, folder, model)
    if not options:
        model = model.to(placement.device)
    return model.eval().requires_grad_(False)


def _quantization_method(role: str, folder: Path, config: Any) -> str | None:
    """Name of the method by which a checkpoint is quantised, None for plain weights."""
    described = getattr(config, "quantization_config", None)
    if described is None:
        return None
    given = described if isinstance(described, dict) else described.to_dict()
    method = given.get("quant_method")
    name = str(getattr(method, "value", method))
    if not AutoHfQuantizer.supports_quant_method(given):  # type: ignore[no-untyped-call]
        # transformers would only warn, and take the numbers for weights.
        raise ModelError(
            f"{role} model in {str(folder)!r} is quantised by {name!r}, which this transformers does not know"
        )
    return name


def _options(
    role: str, folder: Path, config: Any, method: str | None, placement: Placement
) -> dict[str, Any]:
    """What from_pretrained must be told so that the weights come to lie in their place."""
    if placement.ranks > 1:
        _check_shards(role, folder, config, method, placement.ranks)
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_size=placement.ranks)}
    if placement.spread:
        _need_accelerate("device map 'auto'")
        return {"device_map": "auto"}
    if method is not None and placement.device.type != "cpu":
        # Quantised weights cannot be moved afterwards.
        _need_accelerate(f"a checkpoint quantised by {method!r} on {placement.device}")
        return {"device_map": {"": placement.device}}
    return {}


def _need_accelerate(what: str) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError(f"{what} needs the package accelerate; install it with: pip install accelerate")


def _check_spread(role: str, folder: Path, model: Any) -> None:
    """Weights that did not fit would be fetched anew in every step; that is no way to serve."""
    places = {name: str(place) for name, place in getattr(model, "hf_device_map", {}).items()}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    outside = [name for name, place in places.items() if place == "disk" or (place == "cpu" and gpus)]
    if outside:
        size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        shown = ", ".join(outside[:_SHOWN_MODULES]) + (", ..." if len(outside) > _SHOWN_MODULES else "")
        raise ModelError(
            f"{role} model in {str(folder)!r} ({size} bytes of weights) does not fit the memory of "
            f"{f'{gpus} GPUs' if gpus else 'this machine'}: {len(outside)} of {len(places)} parts would lie "
            f"outside ({shown}); use more GPUs, a smaller dtype or a quantised checkpoint"
        )


def _check_shards(role: str, folder: Path, config: Any, method: str | None, ranks: int) -> None:
    text = config.get_text_config(decoder=True)
    if method is not None:
        raise ModelError(
            f"{role} model in {str(folder)!r} is quantised by {method!r}; tensor parallelism takes plain "
            "weights only"
        )
    if not getattr(text, "base_model_tp_plan", None):
        raise ModelError(
            f"{text.model_type} has no tensor-parallel plan in this transformers; run it on one device, or "
            "spread it by device map 'auto'"
        )
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if heads % ranks or key_heads % ranks:
        raise ModelError(
            f"{role} model in {str(folder)!r} has {heads} attention heads and {key_heads} key-value heads, "
            f"which cannot be split over {ranks} processes; both must be multiples of it"
        )


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
