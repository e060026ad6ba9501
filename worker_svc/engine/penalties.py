"""Scores that are changed by what came before them, and by the client's own biases.

Repetition penalty: Keskar et al., 2019 (CTRL), over prompt and output. Frequency and presence penalty, over
the output alone, and biases: as in OpenAI's API, score - frequency * count - presence * (count > 0) + bias.

Shapes: q positions of one request, V vocabulary. Scores are float32 and changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import SamplingConfig
from .transfers import upload


class TokenHistory:
    """The tokens of one request as its penalties count them; the owner adds what is emitted."""

    def __init__(self, config: SamplingConfig, vocabulary_size: int, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        if config.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary_size, dtype=torch.bool, device=device)
        if config.frequency_penalty or config.presence_penalty:
            self._counts = torch.zeros(vocabulary_size, device=device)

    @classmethod
    def of(
        cls,
        config: SamplingConfig,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        vocabulary_size: int,
        device: torch.device,
    ) -> TokenHistory | None:
        """None where no penalty asks for it."""
        if not config.penalised:
            return None
        history = cls(config, vocabulary_size, device)
        if history._seen is not None:
            history._seen[upload(list(prompt_token_ids), device, torch.int64)] = True
        history.emit(output_token_ids)
        return history

    def emit(self, token_ids: Sequence[int]) -> None:
        """Adds tokens of the output."""
        if not len(token_ids):
            return
        index = upload(list(token_ids), self._device, torch.int64)
        if self._seen is not None:
            self._seen[index] = True
        if self._counts is not None:
            self._counts.index_add_(0, index, torch.ones_like(index, dtype=self._counts.dtype))

    def penalise(self, scores: Tensor, first: int, drafts: Tensor) -> None:
        """Scores [q, V] of the positions first .. first + q - 1 of a step that has drafted `drafts` so far.

        A drafted token counts for the positions behind it.
        """
        queries = scores.shape[0]
        # (An index of one value without a dimension would be read back from the device.)
        drafted = [(max(0, p + 1 - first), drafts[p : p + 1]) for p in range(first + queries - 1)]
        if self._seen is not None:
            seen = self._seen.repeat(queries, 1)
            for behind, token in drafted:
                seen[behind:].index_fill_(-1, token, True)
            penalty = self._config.repetition_penalty
            penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores.copy_(torch.where(seen, penalised, scores))
        if self._counts is not None:
            counts = self._counts.repeat(queries, 1)
            one = counts.new_ones((queries, 1))
            for behind, token in drafted:
                counts[behind:].index_add_(-1, token, one[behind:])
            present = (counts > 0) * self._config.presence_penalty
            scores.sub_(counts.mul_(self._config.frequency_penalty).add_(present))


class Biases:
    """The biases of one request, on the device."""

    def __init__(self, config: SamplingConfig, device: torch.device) -> None:
        self._token_ids = upload([token_id for token_id, _ in config.logit_bias], device, torch.int64)
        self._values = upload([bias for _, bias in config.logit_bias], device, torch.float32)

    def add(self, scores: Tensor) -> None:
        """To scores [q, V]."""
        scores.index_add_(-1, self._token_ids, self._values.expand(scores.shape[0], -1))
