"""A request inside the engine: its tokens, and how many of them have their KV where."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from .acceptance import AcceptanceEstimate
from .config import EngineRequest
from .lookup import PromptLookup
from .sampling import SamplingRow
from .stopping import StopChecker

TARGET = 0
DRAFT = 1


class Place(enum.StrEnum):
    """Where a request's KV lies: in the running batch, in a slot while preempted, or in host memory."""

    RUNNING = "running"
    SLOT = "slot"
    HOST = "host"


@dataclass(slots=True, eq=False)
class Row:
    """tokens: prompt and output. kv_tokens: leading tokens whose KV is held, by model (TARGET, DRAFT).
    acceptance: of the draft model's tokens. lookup: None where prompt lookup is off. run_order: requests with
    lower ones run earlier. shared_tokens: of the prompt, whose KV another request had already. finished:
    its end is reported, and its KV held until it is dropped. entered: it came into the batch after the last
    step; returned: not for the first time.

    Invariant between steps: kv_tokens[TARGET] <= len(tokens) - 1, for the last token is fed by the next
    verification.
    """

    request: EngineRequest
    tokens: list[int]
    stopper: StopChecker
    sampling: SamplingRow
    draft_limit_tokens: int
    acceptance: AcceptanceEstimate
    lookup: PromptLookup | None = None
    place: Place = Place.RUNNING
    slot: int = -1
    kv_tokens: list[int] = field(default_factory=lambda: [0, 0])
    entered: bool = True
    returned: bool = False
    run_order: tuple[float, ...] = ()
    shared_tokens: int = 0
    finished: bool = False

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def prefill_tokens(self) -> int:
        """Tokens that the target must still see before the request can decode."""
        return len(self.tokens) - 1 - self.kv_tokens[TARGET]

    def goes_on(self, request: EngineRequest, tokens: list[int]) -> bool:
        """Whether a request with these tokens goes on just where this row is, by the same rules."""
        return (
            self.tokens == tokens
            and len(self.request.prompt_token_ids) == len(request.prompt_token_ids)
            and self.request.stopping == request.stopping
            and self.request.sampling == request.sampling
        )
