"""Costs and chances that tests of the draft length choose from."""

from __future__ import annotations

from worker_svc.engine.costs import StepCosts


def made_up_costs(draft_s: float, verify_s: float, row_s: float) -> StepCosts:
    """Drafting costs draft_s a token, verifying verify_s and row_s for each token of each row."""
    costs = StepCosts()
    for rows in (1, 2, 4, 8):
        for length in range(9):
            costs.verify.set(rows, length + 1, verify_s + row_s * rows * (length + 1))
            if length:
                costs.draft.set(rows, length, draft_s * length)
    costs.calibrated = True
    return costs


def same_chance(chance: float) -> list[float]:
    """Survival where each position has the same chance."""
    return [chance**length for length in range(1, 17)]
