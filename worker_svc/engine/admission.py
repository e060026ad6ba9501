"""Judging a request before the engine takes it, and making its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .acceptance import AcceptanceEstimate
from .config import EngineConfig, EngineRequest
from .errors import InvalidRequestError
from .loading import ModelPair
from .lookup import PromptLookup
from .penalties import TokenHistory
from .rows import Row
from .sampling import SamplingRow
from .stopping import StopChecker


def checked_tokens(request: EngineRequest, pair: ModelPair, context_tokens: int) -> list[int]:
    """Prompt and output as plain integers; raises InvalidRequestError naming the field that is wrong."""
    prompt = _token_ids("prompt_token_ids", request.prompt_token_ids, pair.vocabulary_size)
    output = _token_ids("output_token_ids", request.output_token_ids, pair.vocabulary_size)
    stopping = request.stopping
    if len(prompt) >= context_tokens:
        raise InvalidRequestError(
            "prompt_token_ids",
            f"{len(prompt)} tokens leave no room for output in a context of {context_tokens} tokens",
        )
    if stopping.max_tokens is not None and len(prompt) + stopping.max_tokens > context_tokens:
        raise InvalidRequestError(
            "max_tokens",
            f"{len(prompt)} prompt tokens and {stopping.max_tokens} output tokens exceed the context of "
            f"{context_tokens} tokens",
        )
    limit = output_limit_tokens(request, context_tokens)
    if stopping.min_tokens > limit:
        raise InvalidRequestError(
            "min_tokens", f"{stopping.min_tokens} is more than the {limit} tokens that fit the context"
        )
    if len(output) >= limit:
        raise InvalidRequestError(
            "output_token_ids", f"{len(output)} tokens given, but the request ends at {limit}"
        )
    _token_ids("stop_token_ids", stopping.stop_token_ids, pair.vocabulary_size)
    _token_ids("logit_bias", [token_id for token_id, _ in request.sampling.logit_bias], pair.vocabulary_size)
    if stopping.stop and pair.tokenizer is None:
        raise InvalidRequestError("stop", "stop strings need a tokenizer, and the model folder has none")
    return prompt + output


def output_limit_tokens(request: EngineRequest, context_tokens: int) -> int:
    """Output tokens at which the request ends with LENGTH."""
    if request.stopping.max_tokens is not None:
        return request.stopping.max_tokens
    return context_tokens - len(request.prompt_token_ids)


def draft_limit_tokens(request: EngineRequest, config: EngineConfig) -> int:
    """The draft model's tokens in a step at most."""
    return config.draft_tokens if request.draft_tokens is None else request.draft_tokens


def new_row(
    request: EngineRequest,
    tokens: list[int],
    pair: ModelPair,
    config: EngineConfig,
    context_tokens: int,
    acceptance: AcceptanceEstimate,
    lookup_priors: Mapping[int, AcceptanceEstimate],
) -> Row:
    """A row for a checked request, without slot or KV. The estimates are those of all requests together."""
    stopper = StopChecker(
        request.stopping,
        pair.eos_token_ids,
        output_limit_tokens(request, context_tokens),
        pair.tokenizer,
        request.prompt_token_ids,
        request.output_token_ids,
    )
    history = TokenHistory.of(
        request.sampling,
        request.prompt_token_ids,
        request.output_token_ids,
        pair.vocabulary_size,
        pair.device,
    )
    # While min_tokens holds, an end-of-sequence id is blocked even where it would not end the request.
    blocked = stopper.end_token_ids | set(pair.eos_token_ids)
    return Row(
        request=request,
        tokens=tokens,
        stopper=stopper,
        sampling=SamplingRow(request.sampling, request.stopping.min_tokens, tuple(sorted(blocked)), history),
        draft_limit_tokens=draft_limit_tokens(request, config),
        acceptance=AcceptanceEstimate(acceptance),
        lookup=PromptLookup(lookup_priors) if config.prompt_lookup else None,
    )


def _token_ids(field: str, values: Sequence[int], vocabulary_size: int) -> list[int]:
    ids = [int(value) for value in values]
    for position, token_id in enumerate(ids):
        if not 0 <= token_id < vocabulary_size:
            raise InvalidRequestError(
                field,
                f"token id {token_id} at position {position} is outside the vocabulary of {vocabulary_size}",
            )
    return ids
