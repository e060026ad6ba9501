"""The engine: requests come and go between steps; each step drafts and verifies for all that run.

    engine = Engine(load_pair("models/tiny/target", "models/tiny/draft"), EngineConfig(slots=8))
    engine.add(EngineRequest("a", prompt_token_ids))
    while engine.running:
        result = engine.step()

One thread drives an engine; nothing here locks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .acceptance import AcceptanceEstimate
from .adaptive import Drafter, RowPlan
from .admission import checked_tokens, draft_limit_tokens, new_row
from .budget import KvBudget, fitting_context
from .cache import MARGIN_TOKENS, LayerShape, SlotCache, lazy_memory
from .calibration import calibrate
from .clock import BusyClock
from .config import EngineConfig, EngineRequest
from .costs import StepCosts
from .decoding import Decoded, Decoder
from .errors import EngineError, NoFreeSlotError, UnknownRequestError
from .forward import Runner, layer_shapes
from .graphs import GraphRunner, recorder_for
from .loading import ModelPair
from .lookup import shared_priors
from .parallel import LeadRunner, follow
from .planning import Planner
from .prefill import Prefiller
from .results import FinishReason, KvUsage, StepColumns, StepResult
from .rows import TARGET, Row
from .runners import make_runner
from .slots import Residency, common_prefix

# Prefill may take so much of the time that a step without it takes, while others decode that are no fewer:
# less than once, so that with what the estimates miss the gap between two tokens does not double.
_PREFILL_SHARE = 0.7


class Engine:
    """Draft-and-verify decoding of up to `config.slots` requests at a time, with the KV of preempted ones
    kept.
    """

    @torch.inference_mode()
    def __init__(self, pair: ModelPair, config: EngineConfig | None = None) -> None:
        """Raises ModelError for an architecture that the engine cannot run, or a context that no KV budget
        allows.
        """
        self.pair = pair
        self.config = config or EngineConfig()
        torch.set_num_threads(self.config.threads)
        models = [pair.target] if pair.draft is None else [pair.target, pair.draft]
        shapes = [layer_shapes(model) for model in models]
        elements = sum(shape.elements for layers in shapes for shape in layers)
        lazy = all(lazy_memory(layers, pair.device) for layers in shapes)
        self.context_tokens, limit_bytes = fitting_context(
            self.config,
            pair.context_tokens,
            elements * pair.dtype.itemsize,
            lazy,
            pair.device,
            pair.context_reason,
        )
        if pair.group is not None:
            # The others know nothing of the draft, which may bear less.
            self.context_tokens = pair.group.agree(self.context_tokens)
        runners = [self._runner(model, layers) for model, layers in zip(models, shapes, strict=True)]
        if pair.group is not None and pair.group.rank == 0:
            runners[0] = LeadRunner(runners[0], pair.group)
        self._runners = runners
        caches = [runner.cache for runner in runners]
        slots = self.config.slots + self.config.spare_slots
        self._residency = Residency(caches, slots, self.config.host_cache_bytes)
        # What the check of the runners has left.
        self._residency.shrink()
        self.kv_budget = KvBudget(caches, self.config, limit_bytes)
        self._clock = BusyClock(pair.device, alone=pair.group is None)
        self._decoder = Decoder(
            runners[0],
            runners[1] if len(runners) > 1 else None,
            pair.vocabulary_size,
            self._clock,
            self.config.seed,
        )
        self.costs = StepCosts()
        share = self._share if self.config.prefix_sharing else None
        self._prefiller = Prefiller(runners, self.costs, self._clock, share)
        self._planner = Planner(self._prefiller, self.costs, self.config, pair.draft is not None)
        self._acceptance = AcceptanceEstimate()
        self._lookup_priors = shared_priors()
        self._rows: dict[str, Row] = {}
        self._running: dict[str, Row] = {}
        self._switch_s = 0.0

    @property
    def running(self) -> tuple[str, ...]:
        """Ids of the requests that the next step works on, in the order of their entry."""
        return tuple(self._running)

    @property
    def free_slots(self) -> int:
        """Requests that may be added now."""
        return self.config.slots - len(self._running)

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens of prompt and output whose KV the slots can hold: what the budget allows, and the slots."""
        slots = self.config.slots + self.config.spare_slots
        return min(slots * self.context_tokens, self.kv_budget.limit_bytes // self.kv_budget.bytes_per_token)

    @torch.inference_mode()
    def add(self, request: EngineRequest) -> None:
        """Starts a request, or resumes it after the output that it already has.

        KV that is still held for this id is reused for the longest common prefix; the rest is prefilled. Who
        goes on just where it was costs no more than its KV does to move.
        Raises InvalidRequestError (a ValueError) naming the field, NoFreeSlotError, or EngineError if it
        already runs.
        """
        began = time.perf_counter()
        if request.request_id in self._running:
            raise EngineError(f"request {request.request_id!r} is already running")
        tokens = checked_tokens(request, self.pair, self.context_tokens)
        if self.free_slots == 0:
            raise NoFreeSlotError(
                f"all {self.config.slots} slots are running; preempt or drop a request first"
            )
        row = self._rows.get(request.request_id)
        returned = len(request.output_token_ids) > 0 or self.holds(request.request_id) > 0
        if row is None or not row.goes_on(request, tokens):
            row = self._renewed(row, request, tokens)
        row.request, row.finished, row.run_order = request, False, request.run_order
        row.draft_limit_tokens = draft_limit_tokens(request, self.config)
        row.kv_tokens = [min(count, len(tokens) - 1) for count in row.kv_tokens]
        self._residency.seat(row)
        self._forget_dropped()
        if returned:
            self._switch_s += time.perf_counter() - began
        row.entered, row.returned = True, returned
        self._rows[request.request_id] = row
        self._running[request.request_id] = row

    def preempt(self, request_id: str, run_order: tuple[float, ...] | None = None) -> None:
        """Takes a running request out of the batch. Its KV stays in its slot, later in host memory, while
        there is room. run_order: its place among those that wait, where that has changed.
        """
        row = self._running.pop(request_id, None)
        if row is None:
            raise UnknownRequestError(f"request {request_id!r} is not running")
        self._decoder.forget_batch()
        if run_order is not None:
            row.run_order = run_order
        self._residency.set_idle(row)

    @torch.inference_mode()
    def drop(self, request_id: str) -> None:
        """Forgets a request in any state and frees its KV; of one that has finished it may stay for others to
        share. Unknown ids are ignored.
        """
        row = self._rows.get(request_id)
        self._forget(request_id, keep=self.config.prefix_sharing and row is not None and row.finished)

    @torch.inference_mode()
    def forget_kept(self) -> None:
        """Frees the KV that finished requests have left for others to share."""
        self._residency.forget_kept()

    def holds(self, request_id: str) -> int:
        """Tokens of prompt and output whose target KV is held for this request; 0 for none."""
        row = self._rows.get(request_id)
        return row.kv_tokens[TARGET] if row is not None else 0

    def resident(self) -> dict[str, tuple[int, str]]:
        """All requests whose KV is held: output tokens, and where ('running', 'slot' or 'host')."""
        return {request_id: (row.output_tokens, row.place.value) for request_id, row in self._rows.items()}

    @torch.inference_mode()
    def step(self, meanwhile: Callable[[], object] | None = None) -> StepResult:
        """One iteration: prefill what is new, up to `prefill_tokens`, then draft and verify for all that are
        ready.

        meanwhile: called once where this thread is about to leave the interpreter to others for longest, to
        wake those that need it; not in a step in which no request is ready.
        """
        began, busy_began = time.perf_counter(), self._clock.now_s()
        entered = [row for row in self._running.values() if row.entered]
        switched = sum(row.returned for row in entered)
        for row in entered:
            row.entered = False
        admitted = self.kv_budget.admit(list(self._running.values()), self._residency)
        self._forget_dropped()
        limit_s = self._prefill_limit_s(admitted)
        prefill = self._prefiller.target(admitted, self.config.prefill_tokens, limit_s)
        ready = [row for row in admitted if row.prefill_tokens == 0]
        switch_s, self._switch_s = self._switch_s, 0.0
        if not ready:
            prefill.settle()
            return StepResult(
                prefill_tokens=prefill.tokens,
                prefill_s=prefill.seconds,
                step_s=time.perf_counter() - began,
                switched=switched,
                switch_s=switch_s,
                kv=self._kv_usage(),
            )
        arranging, busy_arranging = time.perf_counter(), self._clock.now_s()
        batch, moved = self._residency.arrange(ready)
        arranged_s = time.perf_counter() - arranging if moved or entered else 0.0
        busy_arranged_s = self._clock.now_s() - busy_arranging if moved or entered else 0.0
        if switched:
            switch_s += arranged_s
        plans, caught_up = self._planner.plan(batch, limit_s - prefill.busy_s)
        expected_s = prefill.seconds + caught_up.seconds + arranged_s
        drafted = max(plan.length for plan in plans)
        modelled = max(plan.length if plan.drafter is Drafter.DRAFT else 0 for plan in plans)
        reach_tokens = max(len(row.tokens) for row in batch)
        expected_s += self.costs.stretch * self.costs.step_s(len(batch), drafted, modelled, reach_tokens)
        decoded = self._decoder.decode(batch, plans, meanwhile)
        prefill.settle()
        caught_up.settle()
        prefill_s = prefill.seconds + caught_up.seconds
        columns = self._take(batch, plans, decoded)
        step_s = time.perf_counter() - began
        beside_s = prefill.busy_s + caught_up.busy_s + busy_arranged_s
        busy_s = self._clock.now_s() - busy_began - beside_s
        self.costs.observe_step(
            len(batch),
            drafted,
            decoded.busy_draft_s,
            decoded.busy_verify_s,
            busy_s - decoded.busy_draft_s - decoded.busy_verify_s,
            modelled,
            reach_tokens,
            passed_s=step_s - prefill_s - arranged_s,
        )
        return columns.result(
            prefill_tokens=prefill.tokens,
            prefill_s=prefill_s,
            draft_s=decoded.draft_s,
            verify_s=decoded.verify_s,
            step_s=step_s,
            switched=switched,
            switch_s=switch_s,
            expected_s=expected_s,
            kv=self._kv_usage(),
        )

    @torch.inference_mode()
    def calibrate(self, budget_s: float = 2.0) -> StepCosts:
        """Measures drafting and verifying at growing batch sizes, for at most about `budget_s` seconds.

        For start-up: refuses with EngineError while requests are held. Returns the costs, refined by every
        step.
        """
        if self._rows:
            raise EngineError("calibration needs an engine that holds no requests")
        calibrate(self._runners, self._clock, self.config, self.context_tokens, self.costs, budget_s)
        self._residency.shrink()
        return self.costs

    def follow(self) -> None:
        """For the processes that share the lead's target: repeats what the lead does until it stops.

        Raises RuntimeError when the lead is gone.
        """
        if self.pair.group is None or self.pair.group.rank == 0:
            raise EngineError("only a process of a group that does not lead it can follow")
        follow(self.pair.group, self._runners[0])

    def _prefill_limit_s(self, rows: Sequence[Row]) -> float:
        """Seconds that prefill may take in this step: without limit where nobody waits for it, and in
        proportion where more rows wait for their prefill than for their next token.
        """
        decoding = sum(row.prefill_tokens == 0 for row in rows)
        if not (decoding and self.config.adaptive and self.costs.calibrated):
            return math.inf
        costs = self.costs
        step_s = costs.step_s(decoding, costs.drafted, costs.modelled, costs.reach_tokens)
        # Else requests that come one after the other would enter one by one: many steps of few rows each.
        return _PREFILL_SHARE * max(1.0, (len(rows) - decoding) / decoding) * step_s

    def _take(self, batch: Sequence[Row], plans: Sequence[RowPlan], decoded: Decoded) -> StepColumns:
        """Gives the rows their tokens, ends those that are finished, and returns the columns."""
        columns = StepColumns()
        for row, plan, tokens, accepted, logprobs in zip(
            batch, plans, decoded.tokens, decoded.accepted, decoded.logprobs, strict=True
        ):
            offset = row.output_tokens
            reason: FinishReason | None = None
            matched: str | int | None = None
            for count, token_id in enumerate(tokens, start=1):
                reason, matched = row.stopper.push(token_id)
                if reason is not None:
                    tokens = tokens[:count]
                    break
            row.tokens.extend(tokens)
            if row.sampling.history is not None:
                row.sampling.history.emit(tokens)
            if plan.drafter is Drafter.DRAFT:
                row.acceptance.observe(plan.length, accepted)
            if row.lookup is not None:
                row.lookup.observe(tokens)
            columns.add(
                row.request_id,
                offset,
                tokens,
                plan.length,
                min(accepted, len(tokens)),
                plan.drafter,
                reason,
                matched,
                logprobs,
                row.shared_tokens,
            )
            if reason is not None:
                # Tokens that were verified after the one that ended the request are not part of it.
                row.kv_tokens = [min(count, len(row.tokens)) for count in row.kv_tokens]
                row.finished = True
                if self.config.hold_finished:
                    # Of all that wait it is the last that will run again.
                    self.preempt(row.request_id, (math.inf,))
                else:
                    self.drop(row.request_id)
        return columns

    def _renewed(self, held: Row | None, request: EngineRequest, tokens: list[int]) -> Row:
        """A new row, or the one that is held with what it still knows of these tokens."""
        row = new_row(
            request,
            tokens,
            self.pair,
            self.config,
            self.context_tokens,
            self._acceptance,
            self._lookup_priors,
        )
        if held is None:
            return row
        common = common_prefix(held.tokens, tokens)
        if common < len(held.tokens):
            # The index knows tokens that are no longer the request's.
            held.lookup = row.lookup
        held.tokens, held.stopper, held.sampling = tokens, row.stopper, row.sampling
        held.kv_tokens = [min(count, common) for count in held.kv_tokens]
        return held

    def _share(self, row: Row) -> int:
        """Prefix sharing for a row in prefill; what a new prompt gains counts as cached."""
        gained = self._residency.share(row)
        if row.output_tokens == 0:
            row.shared_tokens += gained
        return gained

    def _forget(self, request_id: str, keep: bool) -> None:
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        self._running.pop(request_id, None)
        self._decoder.forget_batch()
        self._residency.forget(row, keep)

    def _runner(self, model: Any, layers: Sequence[LayerShape]) -> Runner:
        cache = SlotCache(
            layers,
            self.config.slots + self.config.spare_slots,
            self.context_tokens + MARGIN_TOKENS,
            self.config.kv_block_tokens,
            self.pair.dtype,
            self.pair.device,
        )
        runner = make_runner(model, cache, self.pair.vocabulary_size, self.config.fast_path)
        alone = self.pair.group is None and all(shape.device is None for shape in layers)
        recorder = recorder_for(self.pair.device) if self.config.cuda_graphs and alone else None
        return GraphRunner(runner, self.pair.vocabulary_size, recorder) if recorder is not None else runner

    def _forget_dropped(self) -> None:
        for row in self._residency.dropped:
            if row.request_id in self._running:
                # It still runs, and will be prefilled again when there is room.
                row.kv_tokens = [0, 0]
                row.shared_tokens = 0
            else:
                self._rows.pop(row.request_id, None)
        self._residency.dropped.clear()

    def _kv_usage(self) -> KvUsage:
        return KvUsage(
            tokens=self._residency.tokens_held(),
            bytes=self._residency.bytes_held(),
            host_bytes=self._residency.host_bytes,
            allocated_bytes=sum(runner.cache.allocated_bytes for runner in self._runners),
            kept_tokens=self._residency.tokens_kept(),
        )
