"""The interface of a policy: it orders the waiting requests and says who must make room.

A policy writes what it believes onto the request (level, rank, perceptible,
acceptance_estimate, predicted_output_tokens, perceived_s), so that everything it decides by
can be read from outside. The scheduler calls it at the moments named below and does the rest:
queues, priorities, slots, leases, deadlines, the starvation bound.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from mypy_extensions import mypyc_attr

from scheduler_svc.core.pool import PoolView
from scheduler_svc.core.records import Request

PRIOR_TOKENS_PER_STEP = 2.0
PRIOR_STEPS = 10.0
ACCEPTANCE_PRIOR_TOKENS = 16.0
"""Drafted tokens that what is likely weighs in the acceptance that is told of a request."""
UNKNOWN_OUTPUT_TOKENS = 256.0
"""Guess for a request without any prediction, cut to its max_tokens."""
LEAST_RANK = -1e12
"""Ranks of policies lie above it."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Policy(ABC):
    """Order: level, then rank, then arrival; lower runs earlier. Ranks lie above `LEAST_RANK`."""

    name: ClassVar[str]
    """What people write after --policy."""
    summary: ClassVar[str]
    """One line for help texts."""
    preemptive: ClassVar[bool] = False
    servable: ClassVar[bool] = True
    """False: needs to know the future, for replays only."""
    settled: ClassVar[bool] = False
    """True: whom a waiting request may not preempt now, it may not later either, until something arrives
    or ends. Replays then skip the steps in between."""
    order: str = ""
    """What levels and ranks mean, of a policy that implements `readmit`: requests that were placed under the
    same words keep their places after a crash. Empty: they are placed anew."""
    level_thresholds_s: tuple[float, ...] = ()
    """Service in seconds at which a request leaves level i downwards: attained service in the policies of
    that name, perceived (remaining) service in laps-sd."""

    def __init__(self) -> None:
        self.pool = PoolView()

    def bind(self, pool: PoolView) -> None:
        """Called once, before anything else."""
        self.pool = pool

    @abstractmethod
    def admit(self, request: Request) -> None:
        """A request is new, or came back after a crash (then `steps` may be above 0)."""

    def readmit(self, request: Request) -> None:  # noqa: B027
        """Instead of `admit`, for a request that came back after a crash, has never run and was placed under
        the same `order`: what is believed about it, level and rank included, stays as it was."""

    def stepped(self, requests: Sequence[Request]) -> None:  # noqa: B027
        """These requests have done a step, their counters are current. The hot path: a policy without
        this method spares the scheduler to look at each request once more."""

    def leased(self, request: Request) -> None:  # noqa: B027
        """It has got a slot."""

    def requeued(self, request: Request) -> None:  # noqa: B027
        """It is about to wait again."""

    def finished(self, request: Request) -> None:  # noqa: B027
        """It has ended, in whatever way: learn from it, forget it."""

    def preempts(self, newcomer: Request, victim: Request) -> str:
        """Why the first of the waiting should take the slot of `victim`, in words; empty: it should not.
        Asked only of preemptive policies, and for two requests of one priority."""
        if (newcomer.level, newcomer.rank) < (victim.level, victim.rank):
            if newcomer.level < victim.level:
                return f"level {newcomer.level} goes before level {victim.level}"
            return f"rank {newcomer.rank:.4g} goes before {victim.rank:.4g}"
        return ""

    def victim_key(self, request: Request) -> tuple[float, ...]:
        """Of the running requests, the one with the greatest key is asked to make room first."""
        return (request.level, request.rank, request.arrival_seq)

    def worst(self, running: Sequence[Request]) -> Request:
        """The one with the greatest key of some running requests, at least one. Asked for every worker that
        has done a step; where very many run, ten times a second (`board.SOUGHT_AFTER_S`)."""
        return max(running, key=self.victim_key)

    def due(self, now_s: float) -> Iterable[Request]:
        """Requests whose level or rank the policy has changed because time has passed."""
        return ()

    def next_due_s(self) -> float | None:
        """When `due` should be asked at the latest."""
        return None

    def believe(self, request: Request) -> None:
        """Brings the request's estimates up to date for a reader. Called when it is admitted and
        before its record is written, not at every step. The plain version suits policies that
        do not order by estimates."""
        estimate(request, self.pool)

    def learnt(self) -> Mapping[str, str]:
        """What was learnt since the last call and should survive a restart: name to readable JSON."""
        return {}

    def restore_learnt(self, learnt: Mapping[str, str]) -> None:  # noqa: B027
        """What an earlier process has learnt. Entries that are not understood are ignored."""


def predicted_tokens(request: Request) -> float:
    """The client's prediction of the output length, or a fixed guess; at most max_tokens, at least 1."""
    predicted = request.spec.predicted_output_tokens
    if predicted is None:
        predicted = UNKNOWN_OUTPUT_TOKENS
    return max(1.0, min(predicted, float(request.spec.max_tokens)))


def estimate(request: Request, pool: PoolView) -> None:
    """Plain estimates: the predicted length, and tokens per step shrunk to a fixed prior,
    `(k0 * prior + own tokens) / (k0 + own steps)` with k0 = 10 steps."""
    emitted = request.output_tokens
    per_step = (PRIOR_STEPS * PRIOR_TOKENS_PER_STEP + emitted) / (PRIOR_STEPS + request.steps)
    length = max(predicted_tokens(request), emitted + 1.0)
    request.acceptance_estimate = acceptance(request, PRIOR_TOKENS_PER_STEP, pool)
    request.predicted_output_tokens = length
    request.perceived_s = (length - emitted) / per_step * pool.step_s


def acceptance(request: Request, likely_tokens_per_step: float, pool: PoolView) -> float:
    """Share of its drafted tokens that the target keeps, shrunk to what such a rate makes likely. Engines
    choose how much they draft, so a request's own tokens per step do not tell it."""
    likely = min(1.0, max(0.0, (likely_tokens_per_step - 1.0) / pool.draft_tokens))
    return (ACCEPTANCE_PRIOR_TOKENS * likely + request.accepted_tokens) / (
        ACCEPTANCE_PRIOR_TOKENS + request.drafted_tokens
    )
