"""What the clients saw of a run with faults, and whether the store agrees with all of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laps.settings import BUILT_IN_TARGET
from scheduler_svc.core.records import TOKEN_BYTES, FinishReason, RequestState
from scheduler_svc.store import keys
from scheduler_svc.store.store import Store


@dataclass
class Seen:
    """One request, as its client saw it."""

    request_id: str
    prompt: int
    max_tokens: int
    seed: int | None
    """Of a sampled request; None: greedy."""
    tokens: list[int] = field(default_factory=list)
    """What was shown, with resumes."""
    heard_s: list[float] = field(default_factory=list)
    """Instants at which something came."""
    acknowledged: bool = False
    finish_reason: str = ""
    gave_up: str = ""
    resumptions: int = 0
    may_be_cut: bool = False
    """Cancelled or with a deadline: it may end early."""


@dataclass
class Verdict:
    requests: int = 0
    acknowledged: int = 0
    tokens: int = 0
    resumptions: int = 0
    given_up: int = 0
    """By clients whose patience was over; the requests come to their end all the same."""
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    finish_reasons: dict[str, int] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return not (self.lost or self.doubled or self.different)


class Reference:
    """The target's own greedy output, from transformers."""

    def __init__(self, prompts: list[list[int]], max_tokens: int) -> None:
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(BUILT_IN_TARGET, dtype=torch.float32).eval()
        end = AutoTokenizer.from_pretrained(BUILT_IN_TARGET).eos_token_id
        self.outputs: list[list[int]] = []
        with torch.inference_mode():
            for prompt in prompts:
                made = model.generate(
                    torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=end
                )
                self.outputs.append(made[0, len(prompt) :].tolist())


async def judge(store: Store, seen: list[Seen], reference: Reference) -> Verdict:
    """Reads every request from the store itself and compares."""
    verdict = Verdict(requests=len(seen))
    sampled: dict[tuple[int, int], list[int]] = {}
    for one in seen:
        stored = await store.read_request(one.request_id)
        verdict.acknowledged += one.acknowledged
        verdict.resumptions += one.resumptions
        verdict.given_up += bool(one.gave_up)
        if stored is None:
            if one.acknowledged:
                verdict.lost.append(f"{one.request_id} was acknowledged and is not stored")
            continue
        if stored.state is not RequestState.FINISHED or stored.finish_reason is None:
            verdict.lost.append(f"{one.request_id} has not come to an end: {stored.state}")
            continue
        reason = stored.finish_reason.value
        verdict.finish_reasons[reason] = verdict.finish_reasons.get(reason, 0) + 1
        log = await _checked_log(store, one, verdict)
        verdict.tokens += len(log)
        _compare(one, reason, log, verdict)
        if one.seed is None:
            right = reference.outputs[one.prompt][: one.max_tokens]
        else:
            longest = sampled.setdefault((one.prompt, one.seed), log)
            sampled[one.prompt, one.seed] = right = max(longest, log, key=len)
        if log != right[: len(log)]:
            verdict.different.append(f"{one.request_id}: the stored output is not the target's")
        whole = stored.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        if one.seed is None and whole and len(log) != len(right):
            verdict.lost.append(f"{one.request_id} ended as {reason} after {len(log)} of {len(right)} tokens")
        if not whole and not one.may_be_cut and not one.gave_up:
            verdict.lost.append(f"{one.request_id} ended as {reason}: {stored.error}")
    return verdict


async def _checked_log(store: Store, one: Seen, verdict: Verdict) -> list[int]:
    log: list[int] = []
    for number, entry in enumerate(await store.read_entries(one.request_id), start=1):
        if (entry.entry, entry.offset) != (number, len(log)):
            where = f"entry {entry.entry} at {entry.offset}, {number} at {len(log)} was to come"
            verdict.lost.append(f"{one.request_id}: a gap in the log: {where}")
        packed = entry.token_ids
        ids = (packed[at : at + TOKEN_BYTES] for at in range(0, len(packed), TOKEN_BYTES))
        log += [int.from_bytes(token, "little") for token in ids]
    return log


def _compare(one: Seen, reason: str, log: list[int], verdict: Verdict) -> None:
    if one.tokens != log[: len(one.tokens)]:
        verdict.different.append(f"{one.request_id}: the client was shown other tokens than are stored")
    if one.finish_reason and one.finish_reason != reason:
        verdict.doubled.append(
            f"{one.request_id} ended as {one.finish_reason} for its client, as {reason} here"
        )
    if one.finish_reason and len(one.tokens) != len(log):
        verdict.lost.append(f"{one.request_id}: {len(one.tokens)} of {len(log)} tokens reached the client")


async def until_all_have_ended(store: Store, timeout_s: float) -> int:
    """Waits until no request is live; returns how many are all the same."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        live: int = await store.reader.read(store.reader.redis.zcard(keys.live(store.pool)))
        if live == 0 or time.monotonic() > give_up_s:
            return live
        await asyncio.sleep(0.2)
