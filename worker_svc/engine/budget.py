"""The memory that KV may take: which context fits it, and which of the running requests fit it now."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .cache import MARGIN_TOKENS, SlotCache
from .config import EngineConfig
from .errors import ModelError
from .memory import available_bytes
from .rows import Row
from .slots import Residency

_SHARE_OF_FREE = 0.8
_LEAST_CONTEXT_TOKENS = 16


class KvBudget:
    """Bytes for the KV of all slots and models. Requests take of it what they hold, not what they might."""

    def __init__(self, caches: Sequence[SlotCache], config: EngineConfig, limit_bytes: int) -> None:
        self._caches = caches
        self._spared_tokens = config.kv_block_tokens
        self.limit_bytes = limit_bytes
        self.bytes_per_token = sum(cache.bytes_per_token for cache in caches)
        self._lazy = all(cache.lazy for cache in caches)

    def admit(self, running: Sequence[Row], residency: Residency) -> list[Row]:
        """Those of the running rows that may take part in the next step, with room made for them; the others
        wait in host memory. Rows are taken in their order of running and, where that is equal, of entry, up
        to the first that does not fit, so none is passed by smaller ones for ever.
        """
        if not self._lazy:
            # Checked once and for all: every slot may grow to the whole context.
            return list(running)
        admitted: list[Row] = []
        needed_bytes = 0
        for row in sorted(running, key=lambda row: row.run_order):
            tokens = len(row.tokens) + MARGIN_TOKENS
            # One that comes back must not have to leave again at once.
            spared_tokens = 0 if row.slot >= 0 else self._spared_tokens * len(admitted)
            if needed_bytes + (tokens + spared_tokens) * self.bytes_per_token > self.limit_bytes:
                break
            needed_bytes += tokens * self.bytes_per_token
            admitted.append(row)
        chosen = set(admitted)
        for row in running:
            if row not in chosen and row.slot >= 0:
                residency.park(row)
        residency.make_room(needed_bytes, self.limit_bytes, admitted)
        for row in admitted:
            if row.slot < 0:
                residency.seat(row)
        return [row for row in running if row in chosen]


def fitting_context(
    config: EngineConfig,
    model_tokens: int,
    bytes_per_token: int,
    lazy: bool,
    device: torch.device,
    model_reason: str = "",
) -> tuple[int, int]:
    """The context to be served, and the budget in bytes.

    A context that is asked for must fit; the models' own is cut to what does. One request of it must fit
    where memory follows what is written, all slots at once where it follows the longest. Raises ModelError
    with the numbers, and with `model_reason`, why the models take no more.
    """
    wanted = config.context_tokens or model_tokens
    if wanted > model_tokens:
        reason = f": {model_reason}" if model_reason else ""
        raise ModelError(
            f"a context of {wanted} tokens is asked for, but the models take {model_tokens}{reason}"
        )
    if wanted < _LEAST_CONTEXT_TOKENS:
        raise ModelError(
            f"a context of {wanted} tokens is too short; at least {_LEAST_CONTEXT_TOKENS} are needed"
        )
    slots = 1 if lazy else config.slots + config.spare_slots
    limit_bytes = config.kv_limit_bytes
    if limit_bytes is None:
        limit_bytes = int(_SHARE_OF_FREE * available_bytes(device))
    fitting = limit_bytes // (bytes_per_token * slots) - MARGIN_TOKENS
    least = wanted if config.context_tokens is not None else min(wanted, _LEAST_CONTEXT_TOKENS)
    if fitting < least:
        needed = slots * (least + MARGIN_TOKENS) * bytes_per_token
        what = "one request" if lazy else f"{slots} slots"
        raise ModelError(
            f"{what} of {least} tokens and {MARGIN_TOKENS} of margin need {needed} bytes of KV, "
            f"{bytes_per_token} a token, but the budget is {limit_bytes}; "
            f"lower context_tokens{'' if lazy else ', slots or spare_slots'}, or raise the budget"
        )
    return min(wanted, fitting), limit_bytes
