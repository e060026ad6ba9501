"""LAPS-SD as we serve it: least perceived service, semi-clairvoyant from the first step on.

Rule.
1. Acceptance: tokens per step are estimated by shrinkage to the mean of the request's class,
   `(k0 * class mean + own tokens) / (k0 + own steps)`, the class mean learnt from finished requests.
2. Length: the prediction (the client's, or a fixed guess) is corrected by what predictions of its size
   turned out to be in its class, with the log-error that they had. Where well accepted requests are also
   longer than predicted, acceptance says less about service than it seems to: the correction
   `(rate / typical rate) ** slope`, slope learnt, takes that out again.
3. Rank: `max(corrected length - emitted, 1) / tokens per step` steps, in seconds. A request that outlives
   its prediction keeps the front: two such requests would otherwise swap places at every step.
4. Levels: the rank cut at `first_threshold_s * threshold_growth ** i`. They follow the rank, so they show
   where a request stands without coarsening the order. A request is perceptible while it is within its
   predicted length and the log-error of that length is at most `perceptible_log_sd`.
5. Preemption: the newcomer ranks before the worst running request, and what is gained exceeds the price.
   Gained are at most the seconds by which the newcomer is shorter, and at most the wait for the next slot
   to fall free by itself: the newcomer starts, and later ones get their slot, so much earlier. That wait
   is the least remaining time of the running where lengths are known; the less they are known, the more
   it is one over the rate at which the running end. The price is a switch for everyone in the system,
   `caution * (1 + doubt * log_sd ** 2) * switch seconds * live requests per worker`: the more uncertain
   the victim's length, the more likely it was about to end.

Source: the paper's idea, arXiv 2505.17074; shrinkage after James and Stein (1961); the rest is ours, with
what was measured in docs/policies.md. O(1) per step and request, O(log n) per change of the queue; ranks
of waiting requests change only when they all do, after every n/8 finished requests.

Parameters: `prior_steps` (k0, steps), `caution` (factor), `doubt` (factor), `levels` (count),
`first_threshold_s` (seconds), `threshold_growth` (factor), `perceptible_log_sd` (natural logarithm),
`least_finishes` (finished requests between two re-rankings of all). Choose it: it is the default.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scheduler_svc.core.learning import ClassRecord, Knowledge, LengthBelief, mean_excess_tokens
from scheduler_svc.core.policies.base import Policy, predicted_tokens
from scheduler_svc.core.records import TOKEN_BYTES, FinishReason, Request

_CLASS_PREFIX = "laps-sd/class/"
_EVERYTHING = "laps-sd/everything"
_RANKED_AT_ONCE = 500
"""Requests that one tick ranks anew: a long queue must not make it a long tick."""


class _Belief:
    """What the policy keeps about a live request."""

    __slots__ = (
        "class_rate",
        "hinted",
        "length",
        "length_tokens",
        "predicted",
        "rate",
        "slope",
        "typical_log_rate",
    )

    def __init__(self, predicted: float, hinted: bool) -> None:
        self.predicted = predicted
        self.hinted = hinted
        self.length = LengthBelief(predicted, 0.0)
        self.class_rate = 1.0
        self.slope = 0.0
        self.typical_log_rate = 0.0
        self.length_tokens = predicted
        """The whole output as it was estimated last, and tokens per step."""
        self.rate = 1.0


class LapsSd(Policy):
    name = "laps-sd"
    summary = "least perceived service, with acceptance and length learnt online (the default)"
    preemptive = True

    def __init__(
        self,
        prior_steps: float = 40.0,
        caution: float = 3.0,
        doubt: float = 10.0,
        levels: int = 6,
        first_threshold_s: float = 0.5,
        threshold_growth: float = 2.0,
        perceptible_log_sd: float = 0.5,
        least_finishes: int = 16,
    ) -> None:
        super().__init__()
        if min(prior_steps, first_threshold_s, perceptible_log_sd) <= 0.0 or min(caution, doubt) < 0.0:
            raise ValueError(
                "prior_steps, first_threshold_s and perceptible_log_sd must be above 0, "
                "caution and doubt at least 0"
            )
        if levels < 1 or least_finishes < 1 or threshold_growth <= 1.0:
            raise ValueError("levels and least_finishes must be at least 1, threshold_growth above 1")
        self.level_thresholds_s = tuple(first_threshold_s * threshold_growth**i for i in range(levels - 1))
        self.knowledge = Knowledge()
        self._prior_steps = prior_steps
        self._caution = caution
        self._doubt = doubt
        self._perceptible_log_sd = perceptible_log_sd
        self._least_finishes = least_finishes
        self._finishes = 0
        self._live: dict[str, Request] = {}
        self._to_rank: list[str] = []
        """Those whose turn has not come yet since enough was learnt, the next one last."""

    # --- Estimates ----------------------------------------------------------------------

    def admit(self, request: Request) -> None:
        hinted = request.spec.predicted_output_tokens is not None
        request.policy_data = _Belief(predicted_tokens(request), hinted)
        self._live[request.request_id] = request
        self._recall(request)
        self.stepped((request,))

    def stepped(self, requests: Sequence[Request]) -> None:
        """One loop without calls: it runs for every row of every step."""
        prior_steps, step_s = self._prior_steps, self.pool.step_s
        thresholds_s, perceptible_log_sd = self.level_thresholds_s, self._perceptible_log_sd
        belief: Any
        for request in requests:
            belief = request.policy_data
            emitted = len(request.output) // TOKEN_BYTES
            rate = (prior_steps * belief.class_rate + emitted) / (prior_steps + request.steps)
            length: LengthBelief = belief.length
            length_tokens = length.median_tokens
            if belief.slope > 0.0:
                length_tokens *= math.exp(belief.slope * (math.log(rate) - belief.typical_log_rate))
            if length_tokens > request.spec.max_tokens:
                length_tokens = float(request.spec.max_tokens)
            belief.length_tokens, belief.rate = length_tokens, rate
            left_tokens = length_tokens - emitted
            if left_tokens < 1.0:
                rank = 1.0 / rate * step_s
                request.perceptible = False
            else:
                rank = left_tokens / rate * step_s
                request.perceptible = length.log_sd <= perceptible_log_sd
            request.rank = rank
            request.level = bisect_right(thresholds_s, rank)

    def believe(self, request: Request) -> None:
        belief = _belief(request)
        length_tokens, rate = belief.length_tokens, belief.rate
        emitted = request.output_tokens
        request.acceptance_estimate = min(1.0, max(0.0, (rate - 1.0) / self.pool.draft_tokens))
        request.predicted_output_tokens = max(length_tokens, emitted + 1.0)
        request.perceived_s = (
            mean_excess_tokens(length_tokens, belief.length.log_sd, emitted) / rate * self.pool.step_s
        )

    def _recall(self, request: Request) -> None:
        """Takes over what is known now about requests of its class."""
        belief, name, knowledge = _belief(request), request.spec.request_class, self.knowledge
        belief.length = knowledge.length(name, belief.predicted, belief.hinted)
        belief.class_rate = knowledge.tokens_per_step(name)
        belief.slope = knowledge.rate_slope()
        belief.typical_log_rate = knowledge.typical_log_rate(name)

    # --- Learning -----------------------------------------------------------------------

    def finished(self, request: Request) -> None:
        belief = _belief(request)
        del self._live[request.request_id]
        # A request that was cancelled or failed does not tell how long it would have become.
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._finishes += 1
            self.knowledge.add(
                request.spec.request_class,
                belief.predicted,
                belief.hinted,
                request.output_tokens,
                request.steps,
            )

    def due(self, now_s: float) -> Iterable[Request]:
        """Ranks everything anew when enough was learnt since the last time: O(1) per finished request."""
        if self._finishes >= max(self._least_finishes, len(self._live) // 8):
            self._finishes = 0
            self._to_rank = list(reversed(self._live))
        if not self._to_rank:
            return ()
        names = self._to_rank[: -_RANKED_AT_ONCE - 1 : -1]
        del self._to_rank[-_RANKED_AT_ONCE:]
        requests = [self._live[name] for name in names if name in self._live]
        for request in requests:
            self._recall(request)
        self.stepped(requests)
        return requests

    def next_due_s(self) -> float | None:
        return self.pool.now_s if self._to_rank else None

    def learnt(self) -> Mapping[str, str]:
        changes = {_CLASS_PREFIX + name: record.to_json() for name, record in self.knowledge.take_changes()}
        if changes:
            changes[_EVERYTHING] = self.knowledge.everything.to_json()
        return changes

    def restore_learnt(self, learnt: Mapping[str, str]) -> None:
        records: dict[str, ClassRecord] = {}
        for key, text in sorted(learnt.items()):
            if key.startswith(_CLASS_PREFIX) or key == _EVERYTHING:
                try:
                    records[key] = ClassRecord.from_json(text)
                except ValueError:
                    continue
        everything = records.pop(_EVERYTHING, None)
        classes = {key.removeprefix(_CLASS_PREFIX): record for key, record in records.items()}
        self.knowledge.restore(classes, everything)

    # --- Preemption ---------------------------------------------------------------------

    def preempts(self, newcomer: Request, victim: Request) -> str:
        shorter_s = victim.rank - newcomer.rank
        if shorter_s <= 0.0:
            return ""
        pool = self.pool
        switch_s = pool.switch_s
        if newcomer.steps and not (newcomer.kv_resident and newcomer.worker_id == victim.worker_id):
            costs = pool.workers[victim.worker_id].costs
            switch_s += costs.prefill_token_s * (newcomer.spec.prompt_tokens + newcomer.output_tokens)
        doubt = 1.0 + self._doubt * _belief(victim).length.log_sd ** 2
        price_s = self._caution * doubt * switch_s * pool.live / max(1, len(pool.workers))
        # What is gained is the smaller of the two; the wait is the dear one to find out.
        if shorter_s <= price_s:
            return ""
        wait_s = self._wait_for_a_slot_s(price_s)
        if wait_s <= price_s:
            return ""
        return (
            f"{newcomer.request_id} needs {shorter_s:.3g} s less and would have waited {wait_s:.3g} s "
            f"for a slot; switching costs all together {price_s:.3g} s"
        )

    def _wait_for_a_slot_s(self, least_of_interest_s: float) -> float:
        """Expected seconds until a running request ends by itself; a wait that is certainly not above the one
        given is told as 0 without looking at all running requests."""
        least_s, ends_per_s, log_sds, running = math.inf, 0.0, 0.0, 0
        for request in self.pool.running():
            self.believe(request)
            least_s = min(least_s, request.perceived_s)
            ends_per_s += 1.0 / max(request.perceived_s, 0.5 * self.pool.step_s)
            log_sds += _belief(request).length.log_sd
            running += 1
            # The wait lies between these two, and both only fall.
            if least_s <= least_of_interest_s and ends_per_s * least_of_interest_s >= 1.0:
                return 0.0
        known = 1.0 - min(1.0, log_sds / running)
        return float(least_s**known * (1.0 / ends_per_s) ** (1.0 - known))


def _belief(request: Request) -> _Belief:
    belief = request.policy_data
    assert isinstance(belief, _Belief)
    return belief
