"""Rolling figures of a pool, from what the store tells: throughput, acceptance, latency."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from typing import Any

from laps.client.results import enum_word
from laps.v1 import generation_pb2, queue_pb2

WINDOW_S = 300.0
"""Figures are about this much of the past."""
BUCKET_S = 2.0
"""Width of a point of the curves."""
MAX_FINISHED = 5000
"""Finished requests remembered at most; the newest of them stand for the window."""
MAX_FOLLOWED = 20_000
"""Live requests whose counters are remembered at most."""
QUANTILES = (0.5, 0.9, 0.99)

_Ended = tuple[float, dict[str, float], str]


class Figures:
    """Counters of requests become rates: what each grew by since it was seen last. One that was preempted
    meanwhile is counted when it is seen again, or has finished: late, but never lost."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, tuple[int, int, int]] = OrderedDict()
        """By request: output, drafted and accepted tokens that are counted already."""
        self._finished: deque[_Ended] = deque(maxlen=MAX_FINISHED)
        self._buckets: OrderedDict[int, list[float]] = OrderedDict()
        """By number: tokens, drafted, accepted, waiting, running."""
        self._began_s = math.inf

    def observe(self, now_s: float, waiting: int, running: Iterable[queue_pb2.RequestInfo]) -> None:
        """A picture of the pool at `now_s`, on the store's clock."""
        first = self._began_s == math.inf
        self._began_s = min(self._began_s, now_s)
        bucket = self._bucket(now_s)
        bucket[3] = waiting
        bucket[4] = 0
        for info in running:
            bucket[4] += 1
            self._count(bucket, info, counts=not first)
        while len(self._seen) > MAX_FOLLOWED:
            self._seen.popitem(last=False)

    def ended(self, now_s: float, finished: Iterable[queue_pb2.RequestInfo]) -> None:
        """Requests that have finished, each told once."""
        for info in finished:
            if info.arrival_s >= self._began_s or info.request_id in self._seen:
                self._count(self._bucket(now_s), info, counts=True)
            self._seen.pop(info.request_id, None)
            reason = enum_word(generation_pb2.FinishReason.DESCRIPTOR, info.finish_reason)
            self._finished.append((info.finished_s, latencies_s(info), reason))

    def summary(self, now_s: float) -> dict[str, Any]:
        """`latency_s`: by name p50, p90, p99 over the requests that finished in the window, null without any.
        Curves: one value per `bucket_s`, oldest first, null where there was nothing to measure."""
        recent = [ended for ended in self._finished if ended[0] >= now_s - WINDOW_S]
        names = ("queue", "first_token", "per_token", "total")
        samples = {name: sorted(e[1][name] for e in recent if name in e[1]) for name in names}
        reasons: dict[str, int] = {}
        for _, _, reason in recent:
            reasons[reason] = reasons.get(reason, 0) + 1
        last = int(now_s // BUCKET_S)
        numbers = range(last - int(WINDOW_S / BUCKET_S), last)
        curves = [self._buckets.get(number) for number in numbers]
        return {
            "window_s": WINDOW_S,
            "bucket_s": BUCKET_S,
            "finished": len(recent),
            "finish_reasons": reasons,
            "latency_s": {name: [quantile(values, q) for q in QUANTILES] for name, values in samples.items()},
            "tokens_per_s": [None if b is None else round(b[0] / BUCKET_S, 1) for b in curves],
            "acceptance": [round(b[2] / b[1], 4) if b is not None and b[1] else None for b in curves],
            "waiting": [None if b is None else int(b[3]) for b in curves],
            "running": [None if b is None else int(b[4]) for b in curves],
        }

    def _count(self, bucket: list[float], info: queue_pb2.RequestInfo, *, counts: bool) -> None:
        now = (info.output_tokens, info.num_draft_tokens, info.num_accepted_tokens)
        # One that is new since we look has begun since we look; another may have run before.
        counts = counts and (info.request_id in self._seen or info.arrival_s >= self._began_s)
        before = self._seen.get(info.request_id, (0, 0, 0))
        self._seen[info.request_id] = now
        self._seen.move_to_end(info.request_id)
        if counts:
            for place, (new, old) in enumerate(zip(now, before, strict=True)):
                bucket[place] += max(new - old, 0)

    def _bucket(self, now_s: float) -> list[float]:
        number, most = int(now_s // BUCKET_S), int(WINDOW_S / BUCKET_S) + 2
        if number not in self._buckets:
            last = next(reversed(self._buckets), number)
            # No picture comes while nothing changes.
            for quiet in range(max(last + 1, number - most), number):
                self._buckets[quiet] = [0.0, 0.0, 0.0, *self._buckets[last][3:]]
            self._buckets[number] = [0.0] * 5
            while len(self._buckets) > most:
                self._buckets.popitem(last=False)
        return self._buckets[number]


def latencies_s(info: queue_pb2.RequestInfo) -> dict[str, float]:
    """Of a finished request, from its acceptance on. What never happened is missing."""
    found = {"total": info.finished_s - info.arrival_s}
    if info.first_scheduled_s:
        found["queue"] = info.first_scheduled_s - info.arrival_s
    if info.first_token_s:
        found["first_token"] = info.first_token_s - info.arrival_s
        if info.output_tokens > 1:
            found["per_token"] = (info.finished_s - info.first_token_s) / (info.output_tokens - 1)
    return found


def quantile(values: Sequence[float], q: float) -> float | None:
    """The least of the sorted `values` that at least a share `q` of them does not exceed (nearest rank)."""
    return values[max(math.ceil(q * len(values)) - 1, 0)] if values else None
