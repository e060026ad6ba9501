"""One process of a tensor-parallel engine; test_parallel.py runs two of them under torchrun.

    torchrun --nproc-per-node 2 shared_target.py TARGET DRAFT RESULT.json REQUESTS.json

The lead serves the requests with preemptions through slot and host, and writes each output's tokens.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from worker_svc.engine import Engine, EngineConfig, EngineRequest, Group, StoppingConfig, load_pair


def main() -> None:
    target, draft, result, requests = sys.argv[1:]
    torch.set_num_threads(1)
    group = Group(torch.device("cpu"))
    leads = group.rank == 0
    pair = replace(load_pair(target, draft if leads else None, group=group), eos_token_ids=(1 << 30,))
    settings = EngineConfig(
        slots=2, spare_slots=1, draft_tokens=3, prefill_tokens=32, kv_block_tokens=16,
        host_cache_bytes=1 << 20, adaptive=False, seed=0,
    )  # fmt: skip
    engine = Engine(pair, settings)
    if not leads:
        engine.follow()
        return
    prompts = json.loads(Path(requests).read_text())
    outputs: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    queue, places, key_heads = list(outputs), set(), engine._runners[0].cache.shapes[0].heads
    while queue or engine.running:
        while queue and engine.free_slots:
            name = queue.pop(0)
            stopping = StoppingConfig(max_tokens=12)
            engine.add(EngineRequest(name, prompts[int(name)], outputs[name], stopping=stopping))
        told = engine.step()
        for row, name in enumerate(told.request_ids):
            outputs[name] += told.tokens_of(row)
        if engine.running and queue:
            queue.append(engine.running[0])
            engine.preempt(engine.running[0])
        places |= {place for _, place in engine.resident().values()}
    engine.calibrate(0.0)
    group.stop()
    Path(result).write_text(
        json.dumps({"outputs": list(outputs.values()), "places": sorted(places), "key_heads": key_heads})
    )


if __name__ == "__main__":
    main()
