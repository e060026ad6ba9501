"""A model whose right output is known, and an engine for the worker's driver that runs it.

The next token depends on every token before it, prompt included, so one wrong token of context makes
everything after it wrong. As in the real engine KV caches live in slots, spare slots and host
memory and are dropped oldest first; a request that is resumed brings its whole context.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from worker_svc.engine import EngineRequest
from worker_svc.engine.results import FinishReason, KvUsage, StepResult, TokenLogprob

END_TOKEN = 0
VOCABULARY = 8192
CONTEXT_TOKENS = 4096
MIN_LENGTH_TOKENS = 3
DRAFT_TOKEN_S, VERIFY_S = 0.002, 0.020


def _absorb(state: int, tokens: Sequence[int]) -> int:
    return zlib.crc32(array("I", tokens).tobytes(), state)


def _next(state: int, position: int, mean_length: int) -> int:
    if position >= MIN_LENGTH_TOKENS and state % mean_length == 0:
        return END_TOKEN
    return 1 + (state >> 8) % (VOCABULARY - 1)


def output_of(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The model's output. The prompt's first token is the mean length of the outputs of its kind."""
    output: list[int] = []
    state = _absorb(0, prompt)
    while len(output) < max_tokens:
        token = _next(state, len(output), prompt[0])
        output.append(token)
        if token == END_TOKEN:
            break
        state = _absorb(state, [token])
    return output


def logprob_of(token_id: int) -> float:
    """What the model says of every token that it emits; exact in every number type on the way."""
    return -(token_id % 64) / 8.0


@dataclass(eq=False)
class _Row:
    request: EngineRequest
    output: list[int]
    state: int
    kv_tokens: int = 0
    prefilled: bool = False


class FakeEngine:
    """What `EngineDriver` asks of `worker_svc.engine.Engine`."""

    def __init__(self, slots: int, spare_slots: int, host_rows: int, seed: str) -> None:
        self.config = SimpleNamespace(slots=slots, spare_slots=spare_slots, draft_tokens=4)
        self.costs = SimpleNamespace(
            draft_s=lambda draft_tokens: DRAFT_TOKEN_S,
            verify_s=VERIFY_S,
            prefill_s_per_token=0.0001,
        )
        self.context_tokens = CONTEXT_TOKENS
        self.kv_capacity_tokens = (slots + spare_slots) * CONTEXT_TOKENS
        self._keeps = slots + spare_slots + host_rows
        self._rows: OrderedDict[str, _Row] = OrderedDict()
        self._running: dict[str, _Row] = {}
        self._rng = random.Random(seed)

    def add(self, request: EngineRequest) -> None:
        request_id = request.request_id
        if request_id in self._running:
            raise RuntimeError(f"{request_id} is already running")
        if len(self._running) >= self.config.slots:
            raise RuntimeError(f"all {self.config.slots} slots are running")
        output = list(request.output_token_ids)
        if len(output) >= (request.stopping.max_tokens or CONTEXT_TOKENS):
            raise RuntimeError(f"{request_id} has all its tokens already")
        state = _absorb(_absorb(0, request.prompt_token_ids), output)
        held = self._rows.pop(request_id, None)
        row = _Row(request, output, state)
        if held is not None:
            row.kv_tokens, row.prefilled = held.kv_tokens, held.prefilled
        self._rows[request_id] = self._running[request_id] = row
        while len(self._rows) > self._keeps:
            del self._rows[next(name for name in self._rows if name not in self._running)]

    def preempt(self, request_id: str, run_order: tuple[float, ...] | None = None) -> None:
        del self._running[request_id]

    def drop(self, request_id: str) -> None:
        self._rows.pop(request_id, None)
        self._running.pop(request_id, None)

    def holds(self, request_id: str) -> int:
        row = self._rows.get(request_id)
        return 0 if row is None else row.kv_tokens

    @property
    def held(self) -> list[str]:
        return list(self._rows)

    def next_step_s(self) -> float:
        return (VERIFY_S + 4 * DRAFT_TOKEN_S) * self._rng.uniform(0.8, 1.3)

    def step(self, meanwhile: Callable[[], object]) -> StepResult:
        # Its driver has done that, before it let the step's time pass.
        meanwhile()
        rows: list[tuple[str, int, int, int, int, FinishReason | None, int | None]] = []
        emitted: list[int] = []
        logprobs: list[tuple[TokenLogprob, ...] | None] = []
        for request_id, row in list(self._running.items()):
            if not row.prefilled:
                row.prefilled = True
                row.kv_tokens = len(row.request.prompt_token_ids)
                continue
            limit = row.request.stopping.max_tokens or CONTEXT_TOKENS
            drafted = max(0, min(row.request.draft_tokens or 0, limit - len(row.output) - 1))
            accepted = min(drafted, self._rng.choice((0, 0, 1, 1, 2, 3, 4)))
            offset, tokens, reason = len(row.output), [], None
            for _ in range(accepted + 1):
                token = _next(row.state, len(row.output), row.request.prompt_token_ids[0])
                tokens.append(token)
                row.output.append(token)
                row.state = _absorb(row.state, [token])
                if token == END_TOKEN:
                    reason = FinishReason.STOP
                elif len(row.output) >= limit:
                    reason = FinishReason.LENGTH
                if reason is not None:
                    break
            row.kv_tokens = len(row.request.prompt_token_ids) + len(row.output)
            matched = END_TOKEN if reason is FinishReason.STOP else None
            accepted = min(accepted, len(tokens))
            rows.append((request_id, offset, len(tokens), drafted, accepted, reason, matched))
            emitted += tokens
            wanted = row.request.sampling.logprobs is not None
            logprobs.append(tuple(TokenLogprob(t, logprob_of(t)) for t in tokens) if wanted else None)
            if reason is not None:
                # Its KV stays, as with `hold_finished`.
                self.preempt(request_id)
        kv = KvUsage(tokens=sum(row.kv_tokens for row in self._rows.values()))
        if not rows:
            return StepResult(step_s=VERIFY_S, kv=kv)
        ids, offsets, counts, drafts, accepts, reasons, stops = zip(*rows, strict=True)
        return StepResult(
            request_ids=ids,
            offsets=offsets,
            emitted_counts=counts,
            token_ids=np.array(emitted, np.int32),
            drafted_counts=drafts,
            accepted_counts=accepts,
            finish=reasons,
            matched_stop=stops,
            logprobs=tuple(logprobs),
            step_s=VERIFY_S + 4 * DRAFT_TOKEN_S,
            kv=kv,
        )
