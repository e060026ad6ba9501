"""Figures of many measured values."""

from __future__ import annotations

import statistics


def spread(values: list[float]) -> dict[str, float]:
    """Number, median and 99th percentile of durations in seconds."""
    if not values:
        return {"n": 0}
    ordered = sorted(values)
    p99_s = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"n": len(ordered), "p50_s": round(statistics.median(ordered), 4), "p99_s": round(p99_s, 4)}
