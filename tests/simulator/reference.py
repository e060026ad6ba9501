"""The replay model once more, written from its description and sharing no code with the simulator."""

from __future__ import annotations

import bisect
from typing import Any


def replay(
    jobs: list[dict[str, Any]],
    policy: str,
    slots: int,
    load: float,
    step_ms: float = 32.0,
    switch_ms: float = 1.0,
) -> tuple[float, int]:
    """Mean latency in seconds and the number of returns to a slot."""
    step_s = step_ms / 1000
    span = jobs[-1]["arrival_s"] - jobs[0]["arrival_s"]
    work = sum(len(job["emitted_per_step"]) for job in jobs) * step_s
    arrivals = [job["arrival_s"] * work / (slots * load * span) for job in jobs]
    done = [0] * len(jobs)
    emitted = [0] * len(jobs)

    def rank(index: int) -> float:
        if policy == "fcfs":
            return index
        if policy == "sjf":
            return float(jobs[index]["predicted_output_tokens"])
        if policy == "srpt":
            return max(float(jobs[index]["predicted_output_tokens"]) - emitted[index], 1.0)
        return len(jobs[index]["emitted_per_step"]) - done[index]

    now, arrived, switches, total = arrivals[0], 0, 0, 0.0
    waiting: list[tuple[float, int]] = []
    running: list[int] = []
    seen: set[int] = set()
    while arrived < len(jobs) or waiting or running:
        if not waiting and not running:
            now = max(now, arrivals[arrived])
        while arrived < len(jobs) and arrivals[arrived] <= now:
            bisect.insort(waiting, (rank(arrived), arrived))
            arrived += 1
        entering = []
        while waiting and len(running) < slots:
            entering.append(waiting.pop(0)[1])
            running.append(entering[-1])
        while policy in ("srpt", "oracle") and waiting:
            worst = max(running, key=lambda index: (rank(index), index))
            if waiting[0][0] >= rank(worst):
                break
            entering.append(waiting.pop(0)[1])
            running[running.index(worst)] = entering[-1]
            bisect.insort(waiting, (rank(worst), worst))
        returns = sum(index in seen for index in entering)
        switches += returns
        seen.update(entering)
        now += step_s + returns * switch_ms / 1000
        for index in list(running):
            emitted[index] += jobs[index]["emitted_per_step"][done[index]]
            done[index] += 1
            if done[index] == len(jobs[index]["emitted_per_step"]):
                running.remove(index)
                total += now - arrivals[index]
    return total / len(jobs), switches
