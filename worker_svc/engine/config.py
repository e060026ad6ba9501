"""What a caller may set: the engine's configuration, and a request with its sampling and stopping rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import InvalidRequestError

MAX_DRAFT_TOKENS = 16
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MIN_REPETITION_PENALTY = float.fromhex("0x1.47ae14p-7")
"""0.01 in float32, in which callers may hold it. Near zero scores become infinite, and all alike."""
MAX_REPETITION_PENALTY = 100.0
MAX_ADDED_PENALTY = 2.0
"""Of frequency and presence, either way."""
MAX_LOGIT_BIAS = 100.0


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one engine uses its machine.

    - slots: requests that decode together.
    - spare_slots: further slots in which preempted requests keep their KV.
    - context_tokens: longest prompt and output; None takes the models' own limit.
    - draft_tokens: upper bound of the draft model's tokens a step, for requests that name none.
    - prompt_lookup: draft also by looking up what followed the last tokens earlier in the request's own text;
      works without a draft model too.
    - lookup_tokens: upper bound of looked up tokens a step. They cost no model, so more of them may pay than
      of the draft model's; a request whose own bound is 0 looks nothing up.
    - host_cache_bytes: host memory for the KV of preempted requests that fit no slot; beyond it those that
      would run last are dropped.
    - kv_limit_bytes: bound of the KV in slots; None takes four fifths of what the device has free when the
      engine is built. On a GPU it bounds what is taken at the start, for all slots at their longest. On a
      CPU, where requests that run grow beyond it, those that come last wait in host memory; a context that
      cannot fit alone is refused.
    - kv_block_tokens: one that comes back from host memory waits until there is room for so many more of each
      that runs. Where a CPU has no lazy pages (not on Linux), the cache grows in such blocks, doubling.
    - prefix_sharing: take the KV of a prompt's beginning from another request that has it, finished ones
      included as long as their slots are not needed.
    - hold_finished: a request that has finished keeps its KV as a preempted one does until it is dropped: for
      a caller who may have to take its end back.
    - prefill_tokens: prompt tokens computed in one step at most, so that long prompts do not stall running
      requests.
    - threads: torch threads of this process. With more than one set OMP_WAIT_POLICY=PASSIVE, or waiting
      threads spin on cores that others need.
    - adaptive: after `Engine.calibrate`, draft fewer tokens, down to none, where measured costs say that more
      would not pay, each request by the drafter that promises more; and prefill no more in a step than about
      doubles it while others decode, unless more requests wait for their prefill than decode.
    - fast_path: run small Llama-shaped models through the lean forward and compiled passes; False forces
      the general path.
    - cuda_graphs: on a single GPU, replay recorded passes of decoding steps instead of starting their kernels
      one by one.
    - seed: seeds the engine's free choices (for tests); None draws from the operating system.
    """

    slots: int = 8
    spare_slots: int = 8
    context_tokens: int | None = None
    draft_tokens: int = 4
    prompt_lookup: bool = True
    lookup_tokens: int = MAX_DRAFT_TOKENS
    host_cache_bytes: int = 1 << 30
    kv_limit_bytes: int | None = None
    kv_block_tokens: int = 256
    prefix_sharing: bool = True
    hold_finished: bool = False
    prefill_tokens: int = 512
    threads: int = 1
    adaptive: bool = True
    fast_path: bool = True
    cuda_graphs: bool = True
    seed: int | None = None

    def __post_init__(self) -> None:
        _require_int("slots", self.slots, 1, 4096)
        _require_int("spare_slots", self.spare_slots, 0, 4096)
        _require_int("draft_tokens", self.draft_tokens, 0, MAX_DRAFT_TOKENS)
        _require_int("lookup_tokens", self.lookup_tokens, 0, MAX_DRAFT_TOKENS)
        _require_int("host_cache_bytes", self.host_cache_bytes, 0, 1 << 62)
        _require_int("kv_block_tokens", self.kv_block_tokens, 1, 1 << 20)
        _require_int("prefill_tokens", self.prefill_tokens, 1, 1 << 20)
        _require_int("threads", self.threads, 1, 1024)
        if self.context_tokens is not None:
            _require_int("context_tokens", self.context_tokens, 2, 1 << 30)
        if self.kv_limit_bytes is not None:
            _require_int("kv_limit_bytes", self.kv_limit_bytes, 1, 1 << 62)


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How the next token is chosen, in the order in which Hugging Face applies it.

    temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off. repetition_penalty: over
    prompt and output, 0.01 to 100; 1 is off. frequency_penalty, presence_penalty: over the output, -2 to 2;
    0 is off. logit_bias: (token id, what is added to its score, -100 to 100), each token once. Penalties and
    biases are applied to greedy requests too. seed: makes the output a function of model, prompt, parameters
    and seed alone; None samples freely. logprobs: None for none, else the number of alternatives reported
    beside the chosen token (natural log, raw target).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number(
            "repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        )
        for name in ("frequency_penalty", "presence_penalty"):
            _require_number(name, getattr(self, name), -MAX_ADDED_PENALTY, MAX_ADDED_PENALTY)
        for token_id, bias in self.logit_bias:
            _require_int("logit_bias", token_id, 0, 1 << 31)
            _require_number("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidRequestError("logit_bias", "a token may have one bias")
        _require_int("top_k", self.top_k, 0, 1 << 31)
        if self.seed is not None:
            _require_int("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or bool(self.frequency_penalty or self.presence_penalty)


@dataclass(frozen=True, slots=True)
class StoppingConfig:
    """When a request ends.

    max_tokens: output tokens at most; None runs until the context is full. min_tokens: end-of-sequence and
    stop ids cannot be chosen, and stop strings do not count, before so many output tokens. stop: strings; the
    token that completes one is the last that is emitted. stop_token_ids: ids that end the output and are
    emitted. ignore_eos: the model's own end-of-sequence ids do not end it.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, 1 << 31)
        _require_int("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                "min_tokens", f"{self.min_tokens} is more than max_tokens {self.max_tokens}"
            )
        if isinstance(self.stop, str):
            raise InvalidRequestError("stop", "must be a list of strings, not one string")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                "stop", f"{len(self.stop)} strings given, at most {MAX_STOP_STRINGS} allowed"
            )
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequestError(
                    "stop", f"each string needs 1 to {MAX_STOP_CHARS} characters, not {len(text)}"
                )
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, 0, 1 << 31)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request to start, or to resume with the output tokens that it already has.

    draft_tokens: upper bound of tokens that the draft model drafts a step for this request; None takes the
    engine's; 0 is no speculation at all, not by lookup either. run_order: requests with lower ones would be
    run earlier; where memory is short, the KV of the highest goes first.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    draft_tokens: int | None = None
    run_order: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.request_id:
            raise InvalidRequestError("request_id", "must not be empty")
        if len(self.prompt_token_ids) == 0:
            raise InvalidRequestError("prompt_token_ids", "the prompt is empty; at least one token is needed")
        if self.draft_tokens is not None:
            _require_int("draft_tokens", self.draft_tokens, 0, MAX_DRAFT_TOKENS)


def _require_int(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(name, f"must be an integer, not {value!r}")
    if not low <= value <= high:
        raise InvalidRequestError(name, f"must be between {low} and {high}, not {value}")


def _require_number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequestError(name, f"must be a finite number, not {value!r}")
    if not low <= value <= high or (open_low and value == low):
        bound = "above" if open_low else "at least"
        raise InvalidRequestError(name, f"must be {bound} {low:g} and at most {high:g}, not {value:g}")
