"""When to try again, and when to give up."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from laps.errors import LapsError, Reason, Unavailable

# What gRPC and proxies say when a connection breaks under a call, besides UNAVAILABLE.
_BROKEN_STREAM_WORDS = ("RST_STREAM", "Stream removed", "GOAWAY", "Connection reset", "Socket closed")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits count failures in a row; progress of a stream begins them anew."""

    connect_attempts: int = 4
    """Calls at most while nothing of the request has come back."""
    resume_attempts: int = 12
    """Calls at most once output has begun."""
    first_backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    max_retry_after_s: float = 30.0
    """A server that asks for more patience than this is given up."""
    on_wait: Callable[[LapsError, float], None] | None = None
    """Called before each wait with what went wrong and the seconds until the next call."""


NO_RETRY = RetryPolicy(connect_attempts=1, resume_attempts=1)


class Backoff:
    """Counts the failures of one request and says how long to wait after each."""

    def __init__(self, policy: RetryPolicy, rng: random.Random | None = None) -> None:
        self._policy = policy
        self._rng = rng or random.Random()
        self._failures = 0

    def progress(self) -> None:
        self._failures = 0

    def after(self, error: LapsError, *, begun: bool) -> float:
        """Seconds to wait before the next call. Raises the error when there is to be none."""
        policy = self._policy
        self._failures += 1
        limit = policy.resume_attempts if begun else policy.connect_attempts
        asked_s = error.retry_after_s or 0.0
        if not is_transient(error) or self._failures >= limit or asked_s > policy.max_retry_after_s:
            raise error
        ceiling_s = min(policy.first_backoff_s * 2 ** (self._failures - 1), policy.max_backoff_s)
        # Full jitter: the clients of a gateway that went away must not all return in the same moment.
        wait_s = max(asked_s, self._rng.uniform(ceiling_s / 2, ceiling_s))
        if policy.on_wait is not None:
            policy.on_wait(error, wait_s)
        return wait_s


def is_transient(error: LapsError) -> bool:
    """Whether the same call may succeed later, given that calling twice does no harm."""
    if isinstance(error, Unavailable) or error.reason is Reason.CLIENT_TOO_SLOW:
        return True
    return error.from_transport and any(word in error.message for word in _BROKEN_STREAM_WORDS)
