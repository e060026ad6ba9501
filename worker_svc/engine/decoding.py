"""Draft and verify: the two phases in which the rows of a batch gain tokens.

Row i has tokens t[0 .. L-1]; the target holds the KV of all but the last. Drafting proposes d[1 .. n], for
each row by the draft model or by lookup; verification feeds t[L-1], d[1 .. n] of all rows to the target in
one pass, accepts the longest agreeing prefix of length a, and adds one token of the target's own. Afterwards
the KV of t[L-1], d[1 .. a] is held by right, and the rest is rubbish behind the length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .adaptive import Drafter, RowPlan
from .clock import BusyClock, PhaseClock
from .forward import Runner
from .results import TokenLogprob
from .rows import DRAFT, TARGET, Row
from .sampling import BatchSampler
from .transfers import fetch, upload


@dataclass(frozen=True, slots=True)
class Decoded:
    """tokens[i]: what row i emits, accepted[i] drafted tokens and one more. Times in seconds; those that are
    busy are without what the thread waited for a core or for the interpreter's lock.
    """

    tokens: list[list[int]]
    accepted: list[int]
    logprobs: list[list[TokenLogprob] | None]
    draft_s: float
    verify_s: float
    busy_draft_s: float
    busy_verify_s: float


class Decoder:
    """Runs both phases over rows that lie in the first slots."""

    def __init__(
        self,
        target: Runner,
        draft: Runner | None,
        vocabulary_size: int,
        clock: BusyClock,
        seed: int | None,
    ) -> None:
        self._target = target
        self._draft = draft
        self._vocabulary_size = vocabulary_size
        self._device = device = clock.device
        self._clock = PhaseClock(clock)
        self._generator = torch.Generator(device=device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._sampler: BatchSampler | None = None
        self._sampler_rows: list[Row] = []

    def decode(
        self,
        rows: Sequence[Row],
        plans: Sequence[RowPlan],
        meanwhile: Callable[[], object] | None = None,
    ) -> Decoded:
        """rows: in slot order from slot 0. plans: how to draft for each. meanwhile: see `Engine.step`.
        Updates kv_tokens; not the tokens.
        """
        lengths = [plan.length for plan in plans]
        drafted = max(lengths)
        sampler = self._sampler_for(rows)
        sampler.begin([row.output_tokens for row in rows], drafted + 1)
        began = self._clock.mark()
        drafts, probabilities = self._propose(rows, plans, sampler)
        proposed = self._clock.mark()
        last = upload([[row.tokens[-1]] for row in rows], self._device)
        starts = [len(row.tokens) - 1 for row in rows]
        if meanwhile is not None and not self._clock.waits:
            # A CPU computes during the call.
            meanwhile()
        logits = self._target.forward(
            torch.cat([last, drafts], 1) if drafted else last, range(len(rows)), starts, drafted + 1
        )
        limit = upload(lengths, self._device)
        verdict = sampler.verify(logits, drafts, limit, probabilities, self._generator)
        asked = self._asked_logprobs(rows, sampler, logits, verdict.tokens)
        if meanwhile is not None and self._clock.waits:
            meanwhile()
        # The one place where the host waits for the device.
        packed, *values = fetch(torch.cat([verdict.tokens, verdict.accepted[:, None]], 1), *asked)
        logprobs: list[list[TokenLogprob] | None] = [None] * len(rows)
        if values:
            logprobs = _logprobs(rows, packed, *values)
        verified = self._clock.mark()
        tokens, accepted = [], []
        modelled = max(_modelled(plans))
        for row, plan, columns, row_logprobs in zip(rows, plans, packed, logprobs, strict=True):
            count = columns[-1]
            tokens.append(columns[: count + 1])
            accepted.append(count)
            if row_logprobs is not None:
                del row_logprobs[count + 1 :]
            length = len(row.tokens)
            row.kv_tokens[TARGET] = length + count
            # Of a row that looked up, the draft has seen tokens that were not judged.
            if plan.drafter is Drafter.DRAFT:
                row.kv_tokens[DRAFT] = length + min(modelled - 1, count)
        return Decoded(
            tokens,
            accepted,
            logprobs,
            self._clock.seconds(began, proposed),
            self._clock.seconds(proposed, verified),
            self._clock.busy_s(began, proposed),
            self._clock.busy_s(proposed, verified),
        )

    def _propose(
        self, rows: Sequence[Row], plans: Sequence[RowPlan], sampler: BatchSampler
    ) -> tuple[Tensor, Tensor | None]:
        """Drafted tokens [R, max length], and the free rows' distributions [F, max length, V]."""
        drafts, probabilities = self._model_drafts(rows, _modelled(plans), sampler)
        looked_up = [index for index, plan in enumerate(plans) if plan.drafter is Drafter.LOOKUP]
        if not looked_up:
            return drafts, probabilities
        drafted = max(plan.length for plan in plans)
        padding = [0] * drafted
        found = [(_found(rows[index], plans[index].length) + padding)[:drafted] for index in looked_up]
        drafts = functional.pad(drafts, (0, drafted - drafts.shape[1]))
        drafts[upload(looked_up, self._device)] = upload(found, self._device)
        return drafts, sampler.certain(drafts, probabilities, looked_up)

    def _model_drafts(
        self, rows: Sequence[Row], lengths: Sequence[int], sampler: BatchSampler
    ) -> tuple[Tensor, Tensor | None]:
        """What the draft model proposes: tokens [R, max(lengths)], distributions [F, max(lengths), V]."""
        drafted = max(lengths)
        drafts = torch.zeros((len(rows), 0), dtype=torch.long, device=self._device)
        if drafted == 0 or self._draft is None:
            return drafts, None
        probabilities: list[Tensor] = []
        logits = self._first_draft_logits(rows, lengths, self._draft)
        starts = [len(row.tokens) for row in rows]
        for step in range(drafted):
            if step:
                fed = [start + step - 1 for start in starts]
                logits = self._draft.forward(drafts[:, -1:], range(len(rows)), fed, 1)
            tokens, chances = sampler.draft(logits, drafts, self._generator)
            drafts = torch.cat([drafts, tokens[:, None]], 1)
            if chances is not None:
                probabilities.append(chances)
        return drafts, torch.stack(probabilities, 1) if probabilities else None

    def _first_draft_logits(self, rows: Sequence[Row], lengths: Sequence[int], draft: Runner) -> Tensor:
        """Feeds each row's tokens that the draft has not seen: one, or two after a draft that was accepted
        whole.

        Rows that do not draft are fed along, for the batch is a slice; what they gain is kept.
        """
        starts = [row.kv_tokens[DRAFT] for row in rows]
        pending = [len(row.tokens) - start for row, start in zip(rows, starts, strict=True)]
        width = max(count for count, length in zip(pending, lengths, strict=True) if length)
        fed = []
        for row, start in zip(rows, starts, strict=True):
            unseen = row.tokens[start : start + width]
            row.kv_tokens[DRAFT] = start + len(unseen)
            fed.append(unseen + [0] * (width - len(unseen)))
        tokens = upload(fed, self._device)
        if min(pending) >= width:
            return draft.forward(tokens, range(len(rows)), starts, 1)
        last = upload([min(count, width) - 1 for count in pending], self._device)
        return draft.forward(tokens, range(len(rows)), starts, 1, last)

    def _sampler_for(self, rows: Sequence[Row]) -> BatchSampler:
        same = len(rows) == len(self._sampler_rows) and all(
            a is b for a, b in zip(rows, self._sampler_rows, strict=True)
        )
        if self._sampler is None or not same:
            self._sampler_rows = list(rows)
            self._sampler = BatchSampler([row.sampling for row in rows], self._vocabulary_size, self._device)
        return self._sampler

    def forget_batch(self) -> None:
        """Lets go of the last batch's rows, so that nothing of them is kept alive."""
        self._sampler, self._sampler_rows = None, []

    def _asked_logprobs(
        self, rows: Sequence[Row], sampler: BatchSampler, logits: Tensor, tokens: Tensor
    ) -> tuple[Tensor, ...]:
        """What `BatchSampler.logprobs` gives for the rows that ask for it; nothing if none does."""
        asking = _asking(rows)
        if not asking:
            return ()
        top = min(max(count for _, count in asking), self._vocabulary_size)
        return sampler.logprobs(logits, tokens, [index for index, _ in asking], top)


def _asking(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Index and number of alternatives of each row that asks for log-probabilities."""
    counts = [row.request.sampling.logprobs for row in rows]
    return [(index, count) for index, count in enumerate(counts) if count is not None]


def _logprobs(
    rows: Sequence[Row],
    tokens: Sequence[Sequence[int]],
    chosen: Sequence[Sequence[float]],
    values: Sequence[Sequence[Sequence[float]]],
    ids: Sequence[Sequence[Sequence[int]]],
) -> list[list[TokenLogprob] | None]:
    """For each row that asks, one entry for each position of the step."""
    result: list[list[TokenLogprob] | None] = [None] * len(rows)
    for place, (index, count) in enumerate(_asking(rows)):
        result[index] = [
            TokenLogprob(
                tokens[index][position],
                chosen[place][position],
                tuple(zip(ids[place][position][:count], values[place][position][:count], strict=True)),
            )
            for position in range(len(chosen[place]))
        ]
    return result


def _modelled(plans: Sequence[RowPlan]) -> list[int]:
    """Tokens that the draft model is to propose for each row."""
    return [plan.length if plan.drafter is Drafter.DRAFT else 0 for plan in plans]


def _found(row: Row, length: int) -> list[int]:
    if row.lookup is None or row.lookup.proposal is None:
        raise AssertionError("a row planned for lookup has found something")
    return row.lookup.proposal.tokens[:length]
