"""Pictures of replays. Needs matplotlib (`pip install 'laps[plot]'`)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from simulator.result import Result, Stay

_SHOWN_STAYS = 160
"""Stays in the timeline: enough to see a busy stretch, few enough to tell them apart."""


def draw(
    path: Path, results: dict[str, Result], curves: dict[str, list[tuple[float, float]]], slots: int
) -> None:
    """Latency against load for all policies, the distribution of latencies, and for the last policy who held
    which slot (a cross marks a preemption)."""
    # Imported here and untyped: an optional extra.
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(14, 11), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.3))
    _draw_curves(figure.add_subplot(grid[0, 0]), curves, results)
    _draw_distribution(figure.add_subplot(grid[0, 1]), results)
    name, result = list(results.items())[-1]
    _draw_timeline(figure.add_subplot(grid[1, :]), name, result, slots)
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def draw_curves(path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    """Mean latency (s) against load, a line for each policy."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(9, 5.5), layout="constrained")
    _draw_curves(figure.add_subplot(), curves, {})
    figure.savefig(path, format="png", dpi=90, metadata={"Software": None})


def draw_timeline(path: Path, name: str, result: Result, slots: int) -> None:
    """Who held which slot, and why one was preempted. `result` must have recorded its stays."""
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(13, 5.5), layout="constrained")
    _draw_timeline(figure.add_subplot(), name, result, slots)
    figure.savefig(path, format="png", dpi=90, metadata={"Software": None})


def _draw_curves(axes: Any, curves: dict[str, list[tuple[float, float]]], results: dict[str, Result]) -> None:
    if curves:
        for name, points in curves.items():
            axes.plot(
                [load for load, _ in points], [latency_s for _, latency_s in points], marker="o", label=name
            )
        axes.set_xlabel("load")
        axes.set_yscale("log")
        axes.legend()
    else:
        axes.bar(list(results), [result.mean_latency_s for result in results.values()])
    axes.set_ylabel("mean latency (s)")


def _draw_distribution(axes: Any, results: dict[str, Result]) -> None:
    for name, result in results.items():
        ordered = sorted(result.latencies_s)
        axes.plot(ordered, [(index + 1) / len(ordered) for index in range(len(ordered))], label=name)
    axes.set_xscale("log")
    axes.set_xlabel("latency (s)")
    axes.set_ylabel("share of requests")
    axes.legend()


def _draw_timeline(axes: Any, name: str, result: Result, slots: int) -> None:
    stays = _busiest(result.stays)
    for stay in stays:
        axes.barh(
            stay.slot,
            stay.end_s - stay.begin_s,
            left=stay.begin_s,
            height=0.8,
            color=f"C{stay.job % 10}",
            alpha=0.8,
        )
        if stay.preempted_because:
            axes.plot(stay.end_s, stay.slot, marker="x", color="black")
    preempted = sorted(
        (stay for stay in stays if stay.preempted_because), key=lambda stay: (stay.end_s, stay.slot)
    )
    for stay in stays:
        axes.text(
            (stay.begin_s + stay.end_s) / 2,
            stay.slot,
            f"r{stay.job}",
            ha="center",
            va="center",
            fontsize=7,
            clip_on=True,
        )
    # Under the picture: beside the crosses the reasons would cover each other.
    reasons = [f"{stay.end_s:.2f} s, r{stay.job}: {stay.preempted_because}" for stay in preempted[:6]]
    axes.text(0.0, -0.16, "\n".join(reasons), transform=axes.transAxes, va="top", fontsize=8)
    axes.set_title(f"{name}: who held which slot (x: preempted, the first reasons below)")
    axes.set_xlabel("time (s)")
    axes.set_ylabel("slot")
    axes.set_yticks(range(slots))


def _busiest(stays: list[Stay]) -> list[Stay]:
    """The stretch of stays with the most preemptions, so that there is something to see."""
    stays = sorted(stays, key=lambda stay: stay.begin_s)
    if len(stays) <= _SHOWN_STAYS:
        return stays
    preempted = [0]
    for stay in stays:
        preempted.append(preempted[-1] + bool(stay.preempted_because))
    begin = max(
        range(len(stays) - _SHOWN_STAYS + 1),
        key=lambda first: preempted[first + _SHOWN_STAYS] - preempted[first],
    )
    return stays[begin : begin + _SHOWN_STAYS]
