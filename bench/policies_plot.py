"""Draws the pictures of docs/policies.md.

    python bench/policies_plot.py curve    latency against load: replays, into results/policies_curve.json
    python bench/policies_plot.py draw     docs/images/policies-*.png, the curve from that file

The workload is generated, so anybody gets the same: four tasks whose acceptance differs widely, lengths
predicted by a classifier that is blind to the task, 8 slots, 5 ms a switch.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from _cells import POLICIES, code_of

from simulator.mixes import WIDE_MIX, make_mix, with_coarse_predictions
from simulator.plots import draw_curves, draw_timeline
from simulator.replay import simulate

CURVE = Path(__file__).parent / "results" / "policies_curve.json"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
LOADS = (0.5, 0.7, 0.8, 0.9, 1.0, 1.1)
SLOTS, SWITCH_MS, JOBS, SEED = 8, 5.0, 1000, 401


@click.group()
def main() -> None:
    """Pictures of the policies."""


@main.command()
def curve() -> None:
    """Replay every policy at every load."""
    mix = with_coarse_predictions(make_mix(WIDE_MIX, JOBS, SEED), SEED)
    rows = {}
    for policy in POLICIES:
        means_s = [
            round(simulate(mix, policy, SLOTS, load, switch_ms=SWITCH_MS).mean_latency_s, 4) for load in LOADS
        ]
        rows[policy] = {"code": code_of(policy), "mean_latency_s": means_s}
        click.echo(f"{policy}: {means_s}")
    CURVE.write_text(json.dumps({"loads": LOADS, "policies": rows}, indent=1) + "\n", encoding="utf-8")


@main.command()
def draw() -> None:
    """Draw the curve from the results, and a timeline from a short replay."""
    found = json.loads(CURVE.read_text(encoding="utf-8"))
    old = [name for name, row in found["policies"].items() if row["code"] != code_of(name)]
    if old:
        raise click.ClickException(f"{CURVE.name} is of other code for {', '.join(old)}: run `curve` again")
    IMAGES.mkdir(exist_ok=True)
    draw_curves(
        IMAGES / "policies-load.png",
        {name: list(zip(found["loads"], row["mean_latency_s"], strict=True))
         for name, row in found["policies"].items()},
    )  # fmt: skip
    short = with_coarse_predictions(make_mix(WIDE_MIX, 40, SEED), SEED)
    result = simulate(short, "laps-sd", 3, 1.0, switch_ms=SWITCH_MS, record_stays=True)
    draw_timeline(IMAGES / "policies-timeline.png", "laps-sd", result, 3)


if __name__ == "__main__":
    main()
