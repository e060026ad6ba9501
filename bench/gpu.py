"""Step time of the engine against the roofline: the bytes that a step must read over measured bandwidth.

    python bench/gpu.py --shape 1b 8b --json bench/results/gpu.json
    python bench/gpu.py --device cpu --shape tiny

Weights are random, so nothing that a draft says would be accepted; `--acceptance` accepts each drafted token
with that probability instead of judging it, which changes no pass over either model. A decode step reads all
weights of the target and the KV of every row once, and for each drafted token the draft's: what that takes at
the bandwidth of a device-to-device copy is the least time of a step. Compute is not in the bound.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from worker_svc.engine import Engine, EngineConfig, EngineRequest, ModelPair, StoppingConfig
from worker_svc.engine.sampling import BatchSampler, Verdict

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# hidden, intermediate, layers, heads, key heads, vocabulary, of target and draft.
SHAPES = {
    "tiny": ((192, 512, 8, 6, 2, 2048), (128, 256, 1, 4, 2, 2048)),
    "1b": ((2048, 8192, 16, 32, 8, 128_256), (512, 2048, 4, 8, 4, 128_256)),
    "8b": ((4096, 14_336, 32, 32, 8, 128_256), (2048, 8192, 16, 32, 8, 128_256)),
}
# Passes are recorded when they come for the second time, and checked twice.
WARM_UP_STEPS = 10
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


@dataclass(frozen=True)
class Measured:
    """Milliseconds of a step in the median and the bound, at one shape and batch. eager_ms: without CUDA
    graphs.
    """

    shape: str
    batch: int
    drafted: int
    step_ms: float
    eager_ms: float
    bound_ms: float
    tokens_per_step: float


class InjectedSampler(BatchSampler):
    """Judges as always, then accepts each drafted token by chance: the work of a step without its verdict."""

    acceptance = 0.0

    def verify(self, logits: Tensor, drafts: Tensor, draft_lengths: Tensor, *given: Any) -> Verdict:
        verdict = super().verify(logits, drafts, draft_lengths, *given)
        if drafts.shape[1] == 0:
            return verdict
        lucky = torch.rand(drafts.shape, device=drafts.device) < self.acceptance
        valid = torch.arange(drafts.shape[1], device=drafts.device) < draft_lengths[:, None]
        accepted = (lucky & valid).long().cumprod(1).sum(1)
        return Verdict(verdict.tokens, accepted)


def random_pair(shape: str, dtype: torch.dtype, device: torch.device, context_tokens: int) -> ModelPair:
    models = []
    for hidden, intermediate, layers, heads, key_heads, vocabulary in SHAPES[shape]:
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=vocabulary,
            max_position_embeddings=context_tokens,
            tie_word_embeddings=False,
        )
        with torch.device(device):
            models.append(AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False))
    return ModelPair(
        target=models[0],
        draft=models[1],
        tokenizer=None,
        vocabulary_size=SHAPES[shape][0][-1],
        context_tokens=context_tokens,
        eos_token_ids=(),
        fingerprint="random",
        dtype=dtype,
        device=device,
    )


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written per second by a copy within the device, the best of ten."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * source.numel() / best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: Any) -> int:
    """What a pass must read: all but the embedding table, of which it reads a few rows."""
    table = model.get_input_embeddings().weight
    return (
        sum(w.numel() * w.element_size() for w in model.parameters()) - table.numel() * table.element_size()
    )


def bound_s(engine: Engine, held_tokens: int, batch: int, drafted: int, bytes_per_s: float) -> float:
    """Least seconds of a step: weights and KV, read once by the target and `drafted` times by the draft."""
    models = [engine.pair.target, engine.pair.draft]
    total = 0
    for model, runner, passes in zip(models, engine._runners, (1, drafted), strict=False):
        total += passes * (weight_bytes(model) + batch * held_tokens * runner.cache.bytes_per_token)
    return total / bytes_per_s


def measure(
    pair: ModelPair, shape: str, batch: int, options: argparse.Namespace, bytes_per_s: float
) -> Measured:
    step_ms, tokens_per_step, least = run(pair, batch, options, bytes_per_s, cuda_graphs=True)
    eager_ms, _, _ = run(pair, batch, options, bytes_per_s, cuda_graphs=False)
    return Measured(shape, batch, options.draft_tokens, step_ms, eager_ms, least * 1e3, tokens_per_step)


def run(
    pair: ModelPair, batch: int, options: argparse.Namespace, bytes_per_s: float, cuda_graphs: bool
) -> tuple[float, float, float]:
    """Milliseconds of a step in the median, tokens of a row and step, and the least seconds of a step."""
    room = (options.steps + WARM_UP_STEPS + 1) * (options.draft_tokens + 1)
    engine = Engine(
        pair,
        EngineConfig(
            slots=batch, spare_slots=0, draft_tokens=options.draft_tokens, prompt_lookup=False,
            adaptive=False, context_tokens=options.held_tokens + room + 16,
            # All prompts at once, so that all rows decode in every step that is measured.
            prefill_tokens=batch * options.held_tokens, cuda_graphs=cuda_graphs,
        ),
    )  # fmt: skip
    stopping = StoppingConfig(max_tokens=room, ignore_eos=True)
    for index in range(batch):
        prompt = [(index + place) % pair.vocabulary_size for place in range(options.held_tokens)]
        engine.add(EngineRequest(str(index), prompt, stopping=stopping))
    for _ in range(WARM_UP_STEPS):
        engine.step()
    seconds, emitted, held = [], 0, 0
    for _ in range(options.steps):
        synchronize(pair.device)
        began = time.perf_counter()
        told = engine.step()
        seconds.append(time.perf_counter() - began)
        emitted += len(told.token_ids)
        held += told.kv.tokens // batch
    steps = len(seconds)
    least = bound_s(engine, held // steps, batch, options.draft_tokens, bytes_per_s)
    return statistics.median(seconds) * 1e3, emitted / steps / batch, least


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=["1b", "8b"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--acceptance", type=float, default=0.7)
    parser.add_argument("--held-tokens", type=int, default=512, help="KV of each row at the start")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --shape tiny tries the benchmark itself")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    dtype = DTYPES[options.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    InjectedSampler.acceptance = options.acceptance
    from worker_svc.engine import decoding

    decoding.BatchSampler = InjectedSampler  # type: ignore[misc]
    bytes_per_s = copy_bytes_per_s(device)
    print(f"{device_name(device)}, {dtype}, copy bandwidth {bytes_per_s / 1e9:.0f} GB/s")
    print("shape   batch  drafted   step ms  eager ms  bound ms  step/bound  tokens/step  tokens/s")
    rows = []
    for shape in options.shape:
        pair = random_pair(shape, dtype, device, options.held_tokens + 1024)
        for batch in options.batches:
            told = measure(pair, shape, batch, options, bytes_per_s)
            rate = told.tokens_per_step * batch / told.step_ms * 1e3
            print(
                f"{shape:6}{batch:7}{told.drafted:9}{told.step_ms:10.2f}{told.eager_ms:10.2f}{told.bound_ms:10.2f}"
                f"{told.step_ms / told.bound_ms:12.2f}{told.tokens_per_step:13.2f}{rate:10.0f}"
            )
            sys.stdout.flush()
            rows.append(asdict(told) | {"tokens_per_s": rate})
        del pair
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "device": device_name(device), "dtype": str(dtype), "copy_bytes_per_s": bytes_per_s,
            "held_tokens": options.held_tokens, "acceptance": options.acceptance, "steps": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
