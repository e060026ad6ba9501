"""Makes the dashboards in dashboards/ from the tables below.

    python deploy/grafana/make.py [--check]

Every expression is checked against the metrics that the code exports, and asked of a real Prometheus that
scrapes a real stack (tests/deploy/test_prometheus.py).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
POOL = '{pool=~"$pool"}'


@dataclass(frozen=True)
class Panel:
    """A graph. `curves`: (PromQL, legend). `text`: what to read from it."""

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    text: str = ""


def quantiles(metric: str, by: str, where: str = "") -> tuple[tuple[str, str], ...]:
    grouping = f"{by}, le" if by else "le"
    rate = f"sum by ({grouping}) (rate({metric}_bucket{where}[$__rate_interval]))"
    return tuple((f"histogram_quantile({q}, {rate})", f"p{round(q * 100)}") for q in (0.5, 0.9, 0.99))


def rate(metric: str, where: str = "", by: str = "") -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}{where}[$__rate_interval]))"


SERVING = (
    Panel("Calls", "reqps", ((rate("laps_gateway_calls_total", POOL, "code"), "{{code}}"),)),
    Panel("Time to first token", "s", quantiles("laps_gateway_time_to_first_token_seconds", "", POOL)),
    Panel("Time between tokens", "s", quantiles("laps_gateway_inter_token_latency_seconds", "", POOL)),
    Panel("Duration of calls", "s", quantiles("laps_gateway_call_seconds", "", POOL)),
    Panel(
        "Tokens",
        "short",
        (
            (rate("laps_gateway_tokens_total", POOL), "output/s"),
            (rate("laps_gateway_prompt_tokens_total", POOL), "prompt/s"),
        ),
    ),
    Panel(
        "Outputs by how they ended",
        "reqps",
        ((rate("laps_gateway_requests_total", POOL, "finish_reason"), "{{finish_reason}}"),),
    ),
    Panel(
        "Open streams",
        "short",
        ((f"sum by (pool, instance) (laps_gateway_streams{POOL})", "{{pool}} {{instance}}"),),
    ),
    Panel(
        "Streams lost to slow clients",
        "reqps",
        ((rate("laps_gateway_streams_lost_total", POOL), "lost/s"),),
        "Their requests go on; the clients can resume.",
    ),
    Panel(
        "Gateways that reach their scheduler",
        "short",
        ((f"laps_gateway_scheduler_connected{POOL}", "{{pool}} {{instance}}"),),
    ),
)

SCHEDULING = (
    Panel(
        "Requests",
        "short",
        (
            (f"max by (pool) (laps_queued_requests{POOL})", "queued {{pool}}"),
            (f"max by (pool) (laps_running_requests{POOL})", "running {{pool}}"),
            (f"max by (pool) (laps_slots{POOL})", "slots {{pool}}"),
        ),
    ),
    Panel(
        "Backlog",
        "s",
        ((f"max by (pool) (laps_backlog_seconds{POOL})", "{{pool}}"),),
        "Seconds of service that the live requests still need, as perceived; the workers scale on it.",
    ),
    Panel("Longest wait", "s", ((f"max by (pool) (laps_longest_wait_seconds{POOL})", "{{pool}}"),)),
    Panel(
        "By queue level", "short", ((f"sum by (level) (laps_queue_level_requests{POOL})", "level {{level}}"),)
    ),
    Panel(
        "Preemptions",
        "reqps",
        ((rate("laps_preemptions_total", POOL, "pool"), "{{pool}}"),),
        "Each costs a return to a slot, and a prefill where the KV cache was given up.",
    ),
    Panel(
        "Acceptance of drafted tokens",
        "percentunit",
        (
            (
                f"{rate('laps_spec_decode_accepted_tokens_total', POOL, 'pool')}"
                f" / {rate('laps_spec_decode_draft_tokens_total', POOL, 'pool')}",
                "{{pool}}",
            ),
        ),
    ),
    Panel(
        "Arrivals and ends",
        "reqps",
        (
            (rate("laps_requests_accepted_total", POOL), "accepted"),
            (rate("laps_requests_finished_total", POOL), "ended"),
            (rate("laps_requests_refused_total", POOL), "refused"),
        ),
    ),
    Panel("Output", "short", ((rate("laps_output_tokens_total", POOL, "pool"), "tokens/s {{pool}}"),)),
    Panel(
        "KV cache in use", "percentunit", ((f"max by (pool) (laps_kv_cache_utilization{POOL})", "{{pool}}"),)
    ),
    Panel("Workers in session", "short", ((f"max by (pool) (laps_workers{POOL})", "{{pool}}"),)),
)

STORE = (
    Panel("Time of a commit", "s", quantiles("laps_commit_seconds", "pool", POOL)),
    Panel(
        "Commits",
        "ops",
        ((rate("laps_commits_total", POOL, "pool"), "{{pool}}"),),
        "One a tick, however many requests it is about.",
    ),
    Panel("Store away", "short", ((f"laps_store_down{POOL}", "{{pool}} {{instance}}"),)),
    Panel("Who leads", "short", ((f"laps_scheduler_leads{POOL}", "{{pool}} {{instance}}"),)),
    Panel(
        "Epoch",
        "short",
        ((f"max by (pool) (laps_scheduler_epoch{POOL})", "{{pool}}"),),
        "Grows with each change of leader.",
    ),
    Panel(
        "Reports of workers",
        "ops",
        (
            (rate("laps_step_reports_total", POOL), "reports/s"),
            (rate("laps_step_rows_refused_total", POOL), "rows refused/s"),
        ),
    ),
)

DASHBOARDS = {"serving": SERVING, "scheduling": SCHEDULING, "store": STORE}


def dashboard(name: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "pool",
            "label": "Pool",
            "type": "query",
            "datasource": SOURCE,
            "query": "label_values(laps_scheduler_leads, pool)",
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
        },
    ]
    return {
        "uid": f"laps-{name}",
        "title": f"LAPS: {name}",
        "tags": ["laps"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "links": [
            {"title": "LAPS", "type": "dashboards", "tags": ["laps"], "keepTime": True, "includeVars": True}
        ],
        "panels": [graph(number, panel) for number, panel in enumerate(panels)],
    }


def graph(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend, "datasource": SOURCE}
            for index, (expression, legend) in enumerate(panel.curves)
        ],
    }


def files() -> dict[Path, str]:
    return {
        FOLDER / f"{name}.json": json.dumps(dashboard(name, panels), indent=1) + "\n"
        for name, panels in DASHBOARDS.items()
    }


if __name__ == "__main__":
    for path, text in files().items():
        if "--check" in sys.argv:
            if not path.is_file() or path.read_text() != text:
                sys.exit(f"{path.name} is not current; run python deploy/grafana/make.py")
        else:
            path.write_text(text)
