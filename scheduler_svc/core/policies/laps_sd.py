"""LAPS-SD as we serve it: least perceived service, semi-clairvoyant from the first step on.

Rule.
1. Acceptance: tokens per step are estimated by shrinkage to the mean of the request's class,
   `(k0 * class mean + own tokens) / (k0 + own steps)`. The class mean is learnt from finished requests, and
   so is k0: how much steps of one request differ over how much requests of one class differ. Where
   lengths are predicted well, the class mean is that of predictions of their size, and of the very
   same one (`learning.Knowledge.of_request`): the longest outputs are often repetitions, which are
   accepted well, and a length that is right to the token is mostly that of the same request before.
2. Length: the prediction (the client's, or a fixed guess) is corrected by what predictions of its size,
   and the very same one, turned out to be in its class, with the log-error that they had
   (`learning.Knowledge.length`). Where
   well accepted requests are also longer than predicted, acceptance says less about service than it
   seems to: the correction `(rate / typical rate) ** slope`, slope learnt, takes that out again.
3. Rank: `max(L - emitted, 0.8 * log_sd * L, overrun * (emitted - L), 1) / tokens per step` steps, in
   seconds, L being the corrected length. The first is what the prediction leaves. The second is what a
   request that reaches a prediction with that error still needs in the mean. The third is for one that has
   outlived it: the longer past, the longer still, as with all long tails; but it starts small, since
   lengths often have bounds, so that no request is set aside just before its end. All ranks are made with
   the same step time until what the workers measure differs from it by more than a quarter: who waits would
   otherwise keep the rank of another moment's step and be compared with those of now.
4. Levels: the rank cut at `first_threshold_s * threshold_growth ** i`. They follow the rank, so they show
   where a request stands without coarsening the order. A request is perceptible while it is within its
   predicted length and the log-error of that length is at most `perceptible_log_sd`.
5. Preemption: when a request has come, ended or been ranked anew, the first of the waiting is weighed against
   the worst of the running, and takes its slot if what all gain exceeds the price. Gained is, for
   every waiting request that ranks before the victim, the service by which it is shorter; they share the
   slot with the others, so over the number of slots. The price is a switch, which everyone in the
   system waits for: `caution * switch seconds * live requests per worker`. So long queues make
   preemption pay, costly switches and many slots with few waiting do not.

Source: the paper's idea, arXiv 2505.17074; shrinkage after Buehlmann (1967) and James and Stein (1961); the
exchange in 5 after Smith (1956). The rest is ours, with what was measured in docs/policies.md. Steps cost
nothing; every other event O(slots), and O(log n) for the place in the queue; ranks of waiting
requests change only when they all do, after every n/8 finished requests.

Parameters: `caution` (factor), `overrun` (factor), `levels` (count), `first_threshold_s` (seconds),
`threshold_growth` (factor), `perceptible_log_sd` (natural logarithm), `least_finishes` (finished requests
between two re-rankings of all). Choose it: it is the default.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from scheduler_svc.core.class_records import ClassRecord
from scheduler_svc.core.hints import HintRecords
from scheduler_svc.core.learning import Knowledge, LengthBelief, mean_excess_tokens
from scheduler_svc.core.policies.base import Policy, acceptance, predicted_tokens
from scheduler_svc.core.records import TOKEN_BYTES, FinishReason, Request

_CLASS_PREFIX = "laps-sd/class/"
_EVERYTHING = "laps-sd/everything"
_HINTS_PREFIX = "laps-sd/hints/"
_STEP_TIME = "laps-sd/step_s"
_SHORT_QUEUE = 500
"""So many live requests are ranked anew in one tick."""
_RANKED_PER_S = 2000.0
_RANKED_WITHIN_S = 10.0
"""Of a longer queue so many a second are ranked anew, or as many as make it all of them within so many
seconds. Each that waits gets another place in the store: more at a time would be a train of long ticks."""
_RANKING_PAUSE_S = 0.005
_MEAN_EXCESS = math.sqrt(2.0 / math.pi)
"""By how many standard deviations a normal variable above its median exceeds it in the mean."""
_STEP_TIME_RATIO = 1.25
"""Where the measured step time differs by more from the one that ranks are made with, all are made anew."""
_BUCKETS_PER_DOUBLING = 4
_BUCKETS = 96


_NOTHING_KNOWN = LengthBelief(1.0, 0.0)


class _Belief:
    """What the policy keeps about a live request."""

    __slots__ = (
        "class_rate",
        "hinted",
        "length",
        "predicted",
        "ranked_steps",
        "rate_steps",
        "slope",
        "typical_log_rate",
    )

    def __init__(self, predicted: float, hinted: bool) -> None:
        self.predicted = predicted
        self.hinted = hinted
        self.length = _NOTHING_KNOWN
        self.class_rate = 1.0
        self.rate_steps = 1.0
        self.ranked_steps = -1
        """The steps after which it was ranked last."""
        self.slope = 0.0
        self.typical_log_rate = 0.0


class _Waiting:
    """How many wait and what they need together, by rank in buckets that grow by the fourth root of 2 from
    a millisecond on: the sums that preemption weighs, without looking at everyone."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, float]] = {}
        self._counts = [0] * _BUCKETS
        self._sums_s = [0.0] * _BUCKETS

    def add(self, request_id: str, rank_s: float) -> None:
        self.remove(request_id)
        bucket = _bucket(rank_s)
        self._places[request_id] = bucket, rank_s
        self._counts[bucket] += 1
        self._sums_s[bucket] += rank_s

    def remove(self, request_id: str) -> None:
        place = self._places.pop(request_id, None)
        if place is not None:
            bucket, rank_s = place
            self._counts[bucket] -= 1
            # An empty bucket starts from zero again: rounding errors do not add up.
            self._sums_s[bucket] = self._sums_s[bucket] - rank_s if self._counts[bucket] else 0.0

    def shorter_by_s(self, rank_s: float) -> float:
        """By how many seconds those before `rank_s` are shorter, all together; its own bucket as a whole."""
        last = _bucket(rank_s)
        below_s = sum(self._counts[:last]) * rank_s - sum(self._sums_s[:last])
        return below_s + max(0.0, self._counts[last] * rank_s - self._sums_s[last])


def _bucket(rank_s: float) -> int:
    return min(_BUCKETS - 1, max(0, int(_BUCKETS_PER_DOUBLING * math.log2(max(rank_s, 1e-3) / 1e-3))))


class LapsSd(Policy):
    name = "laps-sd"
    summary = "least perceived service, with acceptance and length learnt online (the default)"
    preemptive = True
    settled = True

    def __init__(
        self,
        caution: float = 8.0,
        overrun: float = 0.3,
        levels: int = 6,
        first_threshold_s: float = 0.5,
        threshold_growth: float = 2.0,
        perceptible_log_sd: float = 0.5,
        least_finishes: int = 16,
    ) -> None:
        super().__init__()
        if min(first_threshold_s, perceptible_log_sd) <= 0.0 or min(caution, overrun) < 0.0:
            raise ValueError(
                "first_threshold_s and perceptible_log_sd must be above 0, caution and overrun at least 0"
            )
        if levels < 1 or least_finishes < 1 or threshold_growth <= 1.0:
            raise ValueError("levels and least_finishes must be at least 1, threshold_growth above 1")
        self.level_thresholds_s = tuple(first_threshold_s * threshold_growth**i for i in range(levels - 1))
        self.order = f"laps-sd: seconds of service, levels from {list(self.level_thresholds_s)} s on"
        self.knowledge = Knowledge()
        self._caution = caution
        self._overrun = overrun
        self._perceptible_log_sd = perceptible_log_sd
        self._least_finishes = least_finishes
        self._finishes = 0
        self._step_s = 0.0
        """What one step is taken for in ranks; 0: nothing was ranked yet."""
        self._told_step_s = 0.0
        self._live: dict[str, Request] = {}
        self._to_rank: list[str] = []
        """Those whose turn has not come yet since enough was learnt, the next one last."""
        self._next_turn_s = -math.inf
        self._waiting = _Waiting()
        self._news = False
        """Something has come, ended or been ranked anew since preemption was last weighed."""

    # --- Estimates ----------------------------------------------------------------------

    def admit(self, request: Request) -> None:
        self._take_in(request)
        self.requeued(request)

    def readmit(self, request: Request) -> None:
        self._take_in(request)
        _belief(request).ranked_steps = request.steps
        self._waiting.add(request.request_id, request.rank)
        self._news = True

    def _take_in(self, request: Request) -> None:
        if not self._step_s:
            self._step_s = self.pool.step_s
        hinted = request.spec.predicted_output_tokens is not None
        request.policy_data = _Belief(predicted_tokens(request), hinted)
        self._live[request.request_id] = request
        self._recall(request)

    def leased(self, request: Request) -> None:
        self._waiting.remove(request.request_id)

    def requeued(self, request: Request) -> None:
        self._rank(request)
        self._waiting.add(request.request_id, request.rank)
        self._news = True

    def believe(self, request: Request) -> None:
        self._keep_ranked(request)
        length_tokens, rate = self._estimate(request)
        emitted = request.output_tokens
        left_tokens = mean_excess_tokens(length_tokens, _belief(request).length.log_sd, emitted)
        left_tokens = max(1.0, min(left_tokens, float(request.spec.max_tokens - emitted)))
        request.acceptance_estimate = acceptance(request, _belief(request).class_rate, self.pool)
        request.predicted_output_tokens = max(length_tokens, emitted + 1.0)
        request.perceived_s = left_tokens / rate * self.pool.step_s

    def _recall(self, request: Request) -> None:
        """Takes over what is known now about requests of its class."""
        belief = _belief(request)
        (
            belief.length,
            belief.class_rate,
            belief.rate_steps,
            belief.slope,
            belief.typical_log_rate,
        ) = self.knowledge.of_request(request.spec.request_class, belief.predicted, belief.hinted)

    def _estimate(self, request: Request) -> tuple[float, float]:
        """The median of the whole output in tokens, and tokens per step."""
        belief = _belief(request)
        rate_steps = belief.rate_steps
        rate = (rate_steps * belief.class_rate + request.output_tokens) / (rate_steps + request.steps)
        length_tokens = belief.length.median_tokens
        if belief.slope > 0.0:
            length_tokens *= math.exp(belief.slope * (math.log(rate) - belief.typical_log_rate))
        return length_tokens, rate

    def _keep_ranked(self, request: Request) -> None:
        """Steps are not ranked one by one: who looks at a running request's rank brings it up to date."""
        self._rank_all((request,), anew=False)

    def _rank(self, request: Request) -> None:
        self._rank_all((request,), anew=True)

    def _rank_all(self, requests: Sequence[Request], anew: bool) -> Request:
        """Ranks those that did a step since they were ranked last, or all `anew`. Returns the last of them by
        rank and arrival."""
        # `_estimate`, inlined: the search for whom to preempt ranks every running request after each of
        # its steps.
        thresholds_s, overrun, step_s = self.level_thresholds_s, self._overrun, self._step_s
        perceptible_log_sd = self._perceptible_log_sd
        last = requests[0]
        last_rank = -math.inf
        for request in requests:
            belief = request.policy_data
            assert type(belief) is _Belief
            steps = request.steps
            if anew or steps != belief.ranked_steps:
                emitted = len(request.output) // TOKEN_BYTES
                rate_steps, length = belief.rate_steps, belief.length
                rate = (rate_steps * belief.class_rate + emitted) / (rate_steps + steps)
                length_tokens = length.median_tokens
                if belief.slope > 0.0:
                    length_tokens *= math.exp(belief.slope * (math.log(rate) - belief.typical_log_rate))
                left_tokens = length_tokens - emitted
                unsure_tokens = _MEAN_EXCESS * length.log_sd * length_tokens
                if left_tokens < unsure_tokens:
                    overrun_tokens = -overrun * left_tokens
                    left_tokens = unsure_tokens if unsure_tokens > overrun_tokens else overrun_tokens
                most_tokens = float(request.spec.max_tokens - emitted)
                if left_tokens > most_tokens:
                    left_tokens = most_tokens
                request.rank = (left_tokens if left_tokens > 1.0 else 1.0) / rate * step_s
                belief.ranked_steps = steps
                request.level = bisect_right(thresholds_s, request.rank)
                request.perceptible = emitted < length_tokens and length.log_sd <= perceptible_log_sd
            rank = request.rank
            if rank > last_rank or (rank == last_rank and request.arrival_seq > last.arrival_seq):
                last, last_rank = request, rank
        return last

    # --- Learning -----------------------------------------------------------------------

    def finished(self, request: Request) -> None:
        belief = _belief(request)
        del self._live[request.request_id]
        self._waiting.remove(request.request_id)
        self._news = True
        # A request that was cancelled or failed does not tell how long it would have become.
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._finishes += 1
            self.knowledge.add(
                request.spec.request_class,
                belief.predicted,
                belief.hinted,
                request.output_tokens,
                request.steps,
                _step_variance(request),
            )

    def due(self, now_s: float) -> Iterable[Request]:
        """Ranks everything anew when enough was learnt since the last time, O(1) per finished request, or
        when steps have become longer or shorter. A long queue takes turns, and is not begun anew before it
        has come to its end."""
        if not self._to_rank:
            step_s = self.pool.step_s
            other_step = self.pool.measured and not (
                step_s / _STEP_TIME_RATIO <= self._step_s <= step_s * _STEP_TIME_RATIO
            )
            if not other_step and self._finishes < max(self._least_finishes, len(self._live) // 8):
                return ()
            if other_step:
                self._step_s = step_s
            self._finishes = 0
            self._to_rank = list(reversed(self._live))
        if len(self._live) <= _SHORT_QUEUE:
            at_once = len(self._to_rank)
        elif now_s < self._next_turn_s:
            return ()
        else:
            self._next_turn_s = now_s + _RANKING_PAUSE_S
            at_once = math.ceil(max(_RANKED_PER_S, len(self._live) / _RANKED_WITHIN_S) * _RANKING_PAUSE_S)
        names = self._to_rank[: -at_once - 1 : -1]
        del self._to_rank[-at_once:]
        requests = [self._live[name] for name in names if name in self._live]
        for request in requests:
            self._recall(request)
            self._rank(request)
            if not request.lease_id:
                self._waiting.add(request.request_id, request.rank)
        self._news = True
        return requests

    def next_due_s(self) -> float | None:
        return max(self.pool.now_s, self._next_turn_s) if self._to_rank else None

    def learnt(self) -> Mapping[str, str]:
        changes = {_CLASS_PREFIX + name: record.to_json() for name, record in self.knowledge.take_changes()}
        if changes:
            changes[_EVERYTHING] = self.knowledge.everything.to_json()
        changes |= {_HINTS_PREFIX + name: text for name, text in self.knowledge.hints.take_changes()}
        # Not before all have ranks of it: whoever takes over in between makes them all anew.
        if self._step_s != self._told_step_s and not self._to_rank:
            self._told_step_s = self._step_s
            changes[_STEP_TIME] = repr(self._step_s)
        return changes

    def restore_learnt(self, learnt: Mapping[str, str]) -> None:
        # Requests that keep their places have ranks of it.
        with suppress(ValueError):
            self._step_s = self._told_step_s = max(0.0, float(learnt.get(_STEP_TIME, "")))
        records: dict[str, ClassRecord] = {}
        hints = HintRecords()
        for key, text in sorted(learnt.items()):
            if key.startswith(_HINTS_PREFIX):
                with suppress(ValueError):
                    hints.restore(text)
            elif key.startswith(_CLASS_PREFIX) or key == _EVERYTHING:
                with suppress(ValueError):
                    records[key] = ClassRecord.from_json(text)
        everything = records.pop(_EVERYTHING, None)
        classes = {key.removeprefix(_CLASS_PREFIX): record for key, record in records.items()}
        self.knowledge.restore(classes, everything, hints)

    # --- Preemption ---------------------------------------------------------------------

    def victim_key(self, request: Request) -> tuple[float, ...]:
        self._keep_ranked(request)
        return (request.level, request.rank, request.arrival_seq)

    def worst(self, running: Sequence[Request]) -> Request:
        # Levels follow ranks, so the last by rank and arrival has the greatest key.
        return self._rank_all(running, anew=False)

    def preempts(self, newcomer: Request, victim: Request) -> str:
        if not self._news:
            return ""
        because = self._weigh(newcomer, victim)
        self._news = bool(because)
        return because

    def _weigh(self, newcomer: Request, victim: Request) -> str:
        if newcomer.rank >= victim.rank:
            return ""
        pool, waiting = self.pool, self._waiting
        gain_s = waiting.shorter_by_s(victim.rank) / pool.slots
        switch_s = pool.switch_s
        if newcomer.steps and not (newcomer.kv_resident and newcomer.worker_id == victim.worker_id):
            costs = pool.workers[victim.worker_id].costs
            switch_s += costs.prefill_token_s * (newcomer.spec.prompt_tokens + newcomer.output_tokens)
        price_s = self._caution * switch_s * pool.live / len(pool.workers)
        if gain_s <= price_s:
            return ""
        return (
            f"{newcomer.request_id} needs {victim.rank - newcomer.rank:.3g} s less; all who are shorter gain "
            f"{gain_s:.3g} s by it together, switching costs {price_s:.3g} s"
        )


def _step_variance(request: Request) -> float | None:
    """Variance of the tokens per step over the request's life; None where nothing was drafted."""
    histogram = request.acceptance_histogram
    steps = sum(histogram)
    if not steps:
        return None
    mean = sum(accepted * count for accepted, count in enumerate(histogram)) / steps
    squares = sum(accepted**2 * count for accepted, count in enumerate(histogram)) / steps
    return max(0.0, squares - mean * mean)


def _belief(request: Request) -> _Belief:
    belief = request.policy_data
    assert isinstance(belief, _Belief)
    return belief
