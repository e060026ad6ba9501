"""Reading a model's weights: onto one device, over several by a device map, or in shards of a process group.

transformers does the work, quantised checkpoints included; here stands what it is asked for, and which of
its answers are not good enough to serve.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from .errors import ModelError, first_line
from .memory import available_bytes

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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder that is to be read. role: 'target' or 'draft'."""

    role: str
    folder: Path
    config: Any


def check_room(checkpoints: Sequence[Checkpoint], dtype: torch.dtype, placement: Placement) -> None:
    """Raises ModelError with the numbers where the weights of these together are more than the device has
    free. Not for weights that are spread: accelerate places them, and `read_model` judges where they lie.
    """
    sizes = [weight_bytes(checkpoint, dtype) for checkpoint in checkpoints]
    described = " and ".join(
        f"{checkpoint.role} model in {str(checkpoint.folder)!r} has {size} bytes of weights"
        for checkpoint, size in zip(checkpoints, sizes, strict=True)
    )
    on_gpu = placement.device.type == "cuda"
    # Shards on GPUs lie on a GPU each; on CPUs they share the machine.
    needed = sizes[0] // (placement.ranks if on_gpu else 1) + sum(sizes[1:])
    free = available_bytes(placement.device)
    if needed > free:
        split = f" ({needed} for each of {placement.ranks} processes)" if placement.ranks > 1 else ""
        raise ModelError(
            f"{described}{split} in {str(dtype).removeprefix('torch.')}, but {placement.device} has {free} "
            "bytes free; use a smaller dtype, a quantised checkpoint, or more devices"
        )
    if on_gpu and placement.ranks == 1 and max(sizes) > (host_free := available_bytes(torch.device("cpu"))):
        raise ModelError(
            f"{described}, which pass through the host's memory, but that has {host_free} bytes free"
        )


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights when loaded: counted over the model without its numbers, or by the
    files where weights are quantised or the model cannot be made without them.
    """
    if getattr(checkpoint.config, "quantization_config", None) is None:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype)  # type: ignore[no-untyped-call]
            return _parameter_bytes(model)
        except Exception:
            # Some models compute with numbers while they are made; their files tell nearly as well.
            pass
    return sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))


def _parameter_bytes(model: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def read_model(checkpoint: Checkpoint, dtype: torch.dtype, placement: Placement) -> Any:
    """The model in evaluation mode. Raises ModelError with one line: what cannot be read, or what is missing
    for it.
    """
    role, folder, config = checkpoint.role, checkpoint.folder, checkpoint.config
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
        raise ModelError(
            f"{role} model in {str(folder)!r}{kind} cannot be loaded: {first_line(error)}"
        ) from error
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
        try:
            model = model.to(placement.device)
        except torch.OutOfMemoryError as error:
            raise ModelError(f"{role} model in {str(folder)!r} does not fit: {first_line(error)}") from error
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
        size = _parameter_bytes(model)
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
