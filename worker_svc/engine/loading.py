"""Loading a target and its draft, and refusing a pair that cannot work together."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from .errors import ModelError, first_line
from .forward import attention_kinds, longrope_limit, position_limit
from .parallel import Group
from .weights import DEVICE_MAPS, Checkpoint, Placement, check_room, read_model

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLE_BYTES = 1 << 16
_SAMPLES_PER_FILE = 256
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class ModelPair:
    """A target, its draft if there is one, and what they share.

    context_tokens: positions that both can take. fingerprint: sha256 in hex over configurations and weights;
    equal folders have equal fingerprints on every machine (large files are sampled, not read whole). group:
    the processes that share the target, if there are several. context_reason: why context_tokens is less than
    a configuration names; empty if it is not.
    """

    target: Any = field(repr=False)
    draft: Any | None = field(repr=False)
    tokenizer: Any | None = field(repr=False)
    vocabulary_size: int
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    group: Group | None = field(default=None, repr=False)
    context_reason: str = ""


def load_pair(
    target: str | Path,
    draft: str | Path | None,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str = "none",
    group: Group | None = None,
) -> ModelPair:
    """Loads a target and an optional draft from local folders with safetensors weights.

    dtype: float32, bfloat16 or float16. device_map: 'auto' spreads the target's layers over all GPUs of this
    process (needs accelerate); the draft stays on the target's first device. group: the processes that share
    the target by tensor parallelism; each of them calls this, the lead alone with a draft. Code from a model
    folder is never run. Raises ModelError with one line.
    """
    if dtype not in _DTYPES:
        raise ModelError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    if device_map not in DEVICE_MAPS:
        raise ModelError(f"device map {device_map!r} is not one of {', '.join(DEVICE_MAPS)}")
    ranks = group.size if group is not None else 1
    if device_map != "none" and ranks > 1:
        raise ModelError(
            f"device map {device_map!r} and tensor parallelism over {ranks} processes exclude each other"
        )
    placement = Placement(_device(device), spread=device_map == "auto", ranks=ranks)
    target_folder = _folder("target", target)
    draft_folder = _folder("draft", draft) if draft is not None else None
    tokenizer = _tokenizer(target_folder)
    target_config = _config("target", target_folder)
    vocabulary_size = _vocabulary_size("target", target_folder, target_config)
    draft_config = None
    if draft_folder is not None:
        draft_config = _config("draft", draft_folder)
        _check_vocabulary(target_folder, draft_folder, vocabulary_size, draft_config, tokenizer)
    context_tokens, context_reason = _context([target_config, *([draft_config] if draft_config else [])])
    if context_reason:
        log.warning("the context is limited to %d tokens: %s", context_tokens, context_reason)
    number_type = _DTYPES[dtype]
    checkpoints = [Checkpoint("target", target_folder, target_config)]
    if draft_folder is not None:
        checkpoints.append(Checkpoint("draft", draft_folder, draft_config))
    if not placement.spread:
        check_room(checkpoints, number_type, placement)
    target_model = read_model(checkpoints[0], number_type, placement)
    where = target_model.device if placement.spread else placement.device
    draft_model = None
    if draft_folder is not None:
        if placement.spread:
            check_room(checkpoints[1:], number_type, Placement(where))
        draft_model = read_model(checkpoints[1], number_type, Placement(where))
    return ModelPair(
        target=target_model,
        draft=draft_model,
        tokenizer=tokenizer,
        vocabulary_size=vocabulary_size,
        context_tokens=context_tokens,
        eos_token_ids=_eos_token_ids(target_folder, target_config),
        fingerprint=_fingerprint([target_folder] + ([draft_folder] if draft_folder else [])),
        dtype=number_type,
        device=where,
        group=group,
        context_reason=context_reason,
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r} is not a torch device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name!r} asked for, but this torch sees no CUDA device")
    if device.type == "cuda" and device.index is None:
        # Tensors name their device in full, and are compared with this one.
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _folder(role: str, path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{role} model folder {str(path)!r} does not exist")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{role} model folder {str(path)!r} has no config.json")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(
            f"{role} model folder {str(path)!r} has no *.safetensors weights; other formats are not loaded"
        )
    return folder


def _config(role: str, folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        attention_kinds(config)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{role} model folder {str(folder)!r}: config.json not understood: {first_line(error)}"
        ) from error
    return config


def _tokenizer(folder: Path) -> Any | None:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"tokenizer in {str(folder)!r} cannot be loaded: {first_line(error)}") from error


def _vocabulary_size(role: str, folder: Path, config: Any) -> int:
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if not size:
        raise ModelError(f"{role} model folder {str(folder)!r}: config.json has no vocab_size")
    return int(size)


def _check_vocabulary(
    target: Path, draft: Path, target_size: int, draft_config: Any, tokenizer: Any | None
) -> None:
    draft_size = _vocabulary_size("draft", draft, draft_config)
    draft_tokenizer = _tokenizer(draft)
    if tokenizer is not None and draft_tokenizer is not None:
        ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
        if ours != theirs:
            differing = sum(
                1 for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
            )
            raise ModelError(
                f"draft {str(draft)!r} has another vocabulary than target {str(target)!r}: "
                f"{len(theirs)} and {len(ours)} tokens, {differing} of them different"
            )
    if draft_size != target_size:
        raise ModelError(
            f"draft {str(draft)!r} has another vocabulary than target {str(target)!r}: "
            f"sizes {draft_size} and {target_size}"
        )


def _context(configs: Sequence[Any]) -> tuple[int, str]:
    """Positions that all the models take, and why that is less than one names, or nothing."""
    tokens, config = min(
        ((position_limit(config) or 2048, config) for config in configs), key=lambda limited: limited[0]
    )
    named = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longrope_limit(config) != tokens or named == tokens:
        return tokens, ""
    return tokens, (
        f"{config.model_type} has longrope positions, of which a pass beyond {tokens} tokens takes others "
        "for all its tokens"
    )


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """End-of-sequence ids as generate sees them: generation_config.json first, then config.json."""
    value = None
    generation = folder / "generation_config.json"
    if generation.is_file():
        value = json.loads(generation.read_text()).get("eos_token_id")
    if value is None:
        value = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)


def _fingerprint(folders: list[Path]) -> str:
    digest = hashlib.sha256()
    for folder in folders:
        digest.update(json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True).encode())
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}\n".encode())
            step = max(_SAMPLE_BYTES, size // _SAMPLES_PER_FILE)
            with path.open("rb") as file:
                for start in range(0, size, step):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
