"""Choosing tokens for a batch: processed scores, drafted tokens, and lossless verification.

Two kinds of rows, decided by the request alone:

- coupled rows (greedy, and sampled with a seed): draft and target each take argmax(scores + noise), with the
  same noise for both (none for greedy). A drafted token is accepted if it is the target's own choice, so what
  is emitted is always the target's choice, whatever the draft.
- free rows (sampled without a seed): speculative rejection sampling (Leviathan et al., 2023; Chen et al.,
  2023). A drafted token d is accepted with probability min(1, p(d) / q(d)); at the first rejection the token
  is drawn from max(p - q, 0), normalised; after a full acceptance from p.

Shapes: R rows, Q = 1 + drafted positions, V vocabulary. Scores are float32 with -inf for tokens that may not
be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import SamplingConfig
from .noise import gumbel, seed_to_int64
from .penalties import Biases, TokenHistory
from .transfers import upload

_NEVER = float("-inf")
# Below it scores may overflow, and those that are infinite are all alike. This one is greedy to the last bit.
_LEAST_TEMPERATURE = 1e-30


@dataclass(slots=True)
class SamplingRow:
    """What sampling must know of one request.

    blocked_token_ids: not to be chosen before output position `min_tokens`. history: held where a penalty
    needs it; the owner adds emitted tokens.
    """

    config: SamplingConfig
    min_tokens: int
    blocked_token_ids: tuple[int, ...]
    history: TokenHistory | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """tokens: int64 [R, Q], the first `accepted` + 1 of each row being emitted. accepted: int64 [R]."""

    tokens: Tensor
    accepted: Tensor


class BatchSampler:
    """The sampling rules of the rows of one batch, as tensors; built anew only when the batch changes."""

    def __init__(self, rows: Sequence[SamplingRow], vocabulary_size: int, device: torch.device) -> None:
        self.rows = rows
        self._vocabulary_size = vocabulary_size
        self._device = device
        configs = [row.config for row in rows]
        sampled = [i for i, config in enumerate(configs) if not config.greedy]
        self._sampled = self._index(sampled)
        self._temperature = self._column([max(configs[i].temperature, _LEAST_TEMPERATURE) for i in sampled])
        self._seeded = self._index([i for i in sampled if configs[i].seed is not None])
        self._seeds = upload(
            [
                seed_to_int64(config.seed)
                for config in configs
                if config.seed is not None and not config.greedy
            ],
            device,
            torch.int64,
        )
        free = [i for i in sampled if configs[i].seed is None]
        self._free = self._index(free)
        self._place_of_free = {row: place for place, row in enumerate(free)}
        self._biases = {i: Biases(config, device) for i, config in enumerate(configs) if config.logit_bias}
        self._histories = {i: row.history for i, row in enumerate(rows) if row.history is not None}
        filtered = {
            "top_k": [i for i in sampled if configs[i].top_k > 0],
            "top_p": [i for i in sampled if configs[i].top_p < 1.0],
            "min_p": [i for i in sampled if configs[i].min_p > 0.0],
        }
        self._filters = {
            name: (self._index(chosen), [getattr(configs[i], name) for i in chosen])
            for name, chosen in filtered.items()
            if chosen
        }
        self._blocked = [i for i, row in enumerate(rows) if row.min_tokens > 0 and row.blocked_token_ids]
        self._blocked_ids = {i: upload(list(rows[i].blocked_token_ids), device) for i in self._blocked}
        self._noise: Tensor | None = None
        self._offsets: list[int] = []
        self._plain = not (sampled or self._biases or self._histories or self._blocked)

    def _index(self, chosen: list[int]) -> Tensor | None:
        return upload(chosen, self._device) if chosen else None

    def _column(self, values: Sequence[float]) -> Tensor:
        return upload(values, self._device, torch.float32)[:, None, None]

    def begin(self, offsets: Sequence[int], queries: int) -> None:
        """Starts a step: offsets are the output tokens of each row so far; `queries` positions will be
        chosen.
        """
        self._offsets = list(offsets)
        self._noise = None
        if self._seeded is not None:
            begin = upload(self._offsets, self._device)[self._seeded]
            positions = begin[:, None] + torch.arange(queries, device=self._device)
            self._noise = gumbel(self._seeds, positions, self._vocabulary_size)

    def draft(
        self, logits: Tensor, drafts: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Chooses the next drafted token of each row.

        logits: [R, 1, V] of the draft, after `drafts` [R, j] of this step. Returns int64 [R], and the
        probabilities [F, V] from which the free rows were drawn (None without free rows).
        """
        if self._plain:
            return logits[:, 0].argmax(-1), None
        first = drafts.shape[1]
        scores = self._scores(logits, first, drafts)
        tokens = self._coupled_choice(scores, first)[:, 0]
        if self._free is None:
            return tokens, None
        probabilities = scores[self._free, 0].softmax(-1)
        tokens[self._free] = _draw(probabilities, generator)
        return tokens, probabilities

    def certain(self, drafts: Tensor, probabilities: Tensor | None, rows: Sequence[int]) -> Tensor | None:
        """Distributions [F, n, V] from which the free rows' `drafts` [R, n] were drawn, where those of `rows`
        were not drawn but looked up: q is 1 at the token itself.

        probabilities: [F, up to n, V] of the draft model's, if it ran. Rejection sampling then accepts with p
        of the token, and otherwise draws from p without it. Returns None without free rows.
        """
        if self._free is None:
            return None
        shape = (len(self._place_of_free), drafts.shape[1], self._vocabulary_size)
        result = torch.zeros(shape, device=self._device)
        if probabilities is not None:
            result[:, : probabilities.shape[1]] = probabilities
        places = [self._place_of_free[row] for row in rows if row in self._place_of_free]
        if places:
            index = upload(places, self._device)
            chosen = drafts[self._free][index]
            result[index] = torch.zeros_like(result[index]).scatter_(-1, chosen[:, :, None], 1.0)
        return result

    def verify(
        self,
        logits: Tensor,
        drafts: Tensor,
        draft_lengths: Tensor,
        draft_probabilities: Tensor | None,
        generator: torch.Generator,
    ) -> Verdict:
        """Judges the drafted tokens and chooses the token that follows the accepted ones.

        logits: [R, Q, V] of the target. drafts: int64 [R, Q - 1], of which row i has draft_lengths[i].
        draft_probabilities: [F, Q - 1, V] for the free rows.
        """
        drafted = drafts.shape[1]
        valid = torch.arange(drafted, device=self._device) < draft_lengths[:, None]
        scores = logits if self._plain else self._scores(logits, 0, drafts)
        choice = self._coupled_choice(scores, 0)
        agrees = (choice[:, :drafted] == drafts) & valid
        accepted = agrees.long().cumprod(1).sum(1)
        if self._free is not None:
            free = self._free
            tokens, count = _reject(
                scores[free].softmax(-1),
                drafts[free],
                draft_lengths[free],
                valid[free],
                draft_probabilities,
                generator,
            )
            choice[free] = tokens
            accepted[free] = count
        return Verdict(choice, accepted)

    def logprobs(
        self, logits: Tensor, tokens: Tensor, rows: Sequence[int], top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Raw log-softmax of the target for the given rows.

        Returns the chosen tokens' [r, Q], and the `top` best values and token ids [r, Q, top].
        """
        index = upload(list(rows), self._device)
        values = logits[index].float().log_softmax(-1)
        chosen = values.gather(-1, tokens[index][:, :, None])[:, :, 0]
        best = values.topk(max(top, 1), dim=-1)
        return chosen, best.values, best.indices

    def _coupled_choice(self, scores: Tensor, first: int) -> Tensor:
        """argmax(scores + noise) [R, q] for positions first .. first + q - 1; greedy rows have no noise."""
        choice = scores.argmax(-1)
        if self._noise is not None and self._seeded is not None:
            noise = self._noise[:, first : first + scores.shape[1]]
            choice[self._seeded] = (scores[self._seeded] + noise).argmax(-1)
        return choice

    def _scores(self, logits: Tensor, first: int, drafts: Tensor) -> Tensor:
        """Processed scores [R, q, V] for output positions first .. first + q - 1 of this step, given the
        drafts.
        """
        scores = logits.float()
        if scores is logits:
            scores = logits.clone()
        for row, biases in self._biases.items():
            biases.add(scores[row])
        for row, history in self._histories.items():
            history.penalise(scores[row], first, drafts[row])
        for row in self._blocked:
            masked = min(self.rows[row].min_tokens - self._offsets[row] - first, scores.shape[1])
            if masked > 0:
                scores[row, :masked].index_fill_(-1, self._blocked_ids[row], _NEVER)
        if self._sampled is not None:
            scores[self._sampled] = scores[self._sampled] / self._temperature
        for name, (index, values) in self._filters.items():
            scores[index] = _FILTERS[name](scores[index], values)
        return scores


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draws one index from each row of unnormalised weights [R, V]: the largest of weight / Exp(1)."""
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(-1)


def _reject(
    target: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    valid: Tensor,
    draft: Tensor | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Speculative rejection sampling. target: p [F, Q, V]. draft: q [F, Q - 1, V]. Returns tokens [F, Q],
    accepted [F].
    """
    rows, queries, _ = target.shape
    drafted = queries - 1
    if drafted == 0 or draft is None:
        return _draw(target[:, 0], generator)[:, None].expand(rows, queries).clone(), torch.zeros_like(
            lengths
        )
    p = target[:, :drafted].gather(-1, drafts[:, :, None])[:, :, 0]
    q = draft.gather(-1, drafts[:, :, None])[:, :, 0]
    uniform = torch.rand(p.shape, generator=generator, device=p.device, dtype=torch.float64)
    accepted = ((uniform * q < p) & valid).long().cumprod(1).sum(1)
    every = torch.arange(rows, device=p.device)
    after = target[every, accepted]
    rejected = (accepted < lengths)[:, None]
    residual = (after - draft[every, accepted.clamp(max=drafted - 1)]).clamp_min(0.0)
    # Where p and q agree to rounding, the residual may vanish; then p itself is the right distribution.
    usable = rejected & (residual.sum(-1, keepdim=True) > 0)
    last = _draw(torch.where(usable, residual, after), generator)
    tokens = torch.cat([drafts, torch.zeros_like(drafts[:, :1])], 1)
    tokens[every, accepted] = last
    return tokens, accepted


def _keep_top_k(scores: Tensor, values: Sequence[int]) -> Tensor:
    largest = min(max(values), scores.shape[-1])
    best = scores.topk(largest, dim=-1).values
    index = upload([min(k, largest) - 1 for k in values], scores.device)
    threshold = best.gather(-1, index[:, None, None].expand(-1, scores.shape[1], 1))
    return scores.masked_fill(scores < threshold, _NEVER)


def _keep_top_p(scores: Tensor, values: Sequence[float]) -> Tensor:
    """Keeps the best tokens of each position up to a mass of p, and all that score exactly as the last of
    them.
    """
    ordered = _ascending(scores)
    mass = ordered.softmax(-1).cumsum(-1)
    limit = upload([1.0 - p for p in values], scores.device, torch.float32)[:, None, None]
    drop = mass <= limit
    drop[..., -1] = False
    threshold = ordered.gather(-1, drop.sum(-1, keepdim=True))
    return scores.masked_fill(scores < threshold, _NEVER)


def _ascending(scores: Tensor) -> Tensor:
    if scores.is_cuda:
        return scores.sort(dim=-1).values
    # torch sorts indices too, which nobody needs here, and without vector instructions: many times slower.
    ordered = scores.clone()
    ordered.numpy().sort(axis=-1)
    return ordered


def _keep_min_p(scores: Tensor, values: Sequence[float]) -> Tensor:
    probabilities = scores.softmax(-1)
    limit = upload(values, scores.device, torch.float32)[:, None, None]
    keep = probabilities >= limit * probabilities.amax(-1, keepdim=True)
    return scores.masked_fill(~keep, _NEVER)


# In the order of transformers' generate.
_FILTERS = {"top_k": _keep_top_k, "top_p": _keep_top_p, "min_p": _keep_min_p}
