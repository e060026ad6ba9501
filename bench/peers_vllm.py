"""vLLM in one mode, driven line by line; bench/peers.py runs this with the Python of vLLM's own environment.

    .bench/vllm/bin/python bench/peers_vllm.py --target DIR [--draft DIR | --ngram] --tokens 128 --batch 16

Says {"ready": VERSION} when it is up. Then each line in, {"prompts": [[ids]]}, gives one line out:
{"seconds", "cpu_seconds", "outputs", "drafted", "accepted"}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft")
    parser.add_argument("--ngram", action="store_true")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--eager", action="store_true", help="without vLLM's compilation")
    options = parser.parse_args()
    # Whatever else the libraries print goes to stderr: stdout is the protocol.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import vllm
    from vllm import LLM, SamplingParams

    speculation: dict[str, Any] | None = None
    if options.draft:
        speculation = {"method": "draft_model", "model": options.draft}
    elif options.ngram:
        speculation = {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    if speculation is not None:
        speculation["num_speculative_tokens"] = options.draft_tokens
    llm = LLM(
        options.target,
        dtype="float32",
        max_model_len=options.context,
        max_num_seqs=options.batch,
        enforce_eager=options.eager,
        speculative_config=speculation,
        # The same prompts come again in every round; nobody is to remember them.
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True, detokenize=False)

    def counted() -> dict[str, float]:
        found = {metric.name: getattr(metric, "value", 0.0) for metric in llm.get_metrics()}
        return {
            "drafted": found.get("vllm:spec_decode_num_draft_tokens", 0.0),
            "accepted": found.get("vllm:spec_decode_num_accepted_tokens", 0.0),
        }

    print(json.dumps({"ready": vllm.__version__}), file=replies, flush=True)
    for line in sys.stdin:
        prompts = [{"prompt_token_ids": ids} for ids in json.loads(line)["prompts"]]
        before = counted()
        began, began_cpu = time.perf_counter(), time.process_time()
        results = llm.generate(prompts, sampling, use_tqdm=False)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
        after = counted()
        reply = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "outputs": [list(result.outputs[0].token_ids) for result in results],
            **{name: after[name] - before[name] for name in after},
        }
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
