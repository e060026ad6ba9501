"""Makes the reference pages from the code; `--check` only tells whether they are current.

python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import cast

from prometheus_client.metrics_core import Metric

from gateway.metrics import Metrics as GatewayMetrics
from laps.reasons import Reason
from laps.setting import env_name, flag_name, used_by
from laps.settings import BUILT_IN_DRAFT, BUILT_IN_TARGET, Settings
from scheduler_svc.core.policies import make_policy, policies
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.core.settings import SchedulerSettings
from scheduler_svc.leader import Leader
from scheduler_svc.metrics import Refusals, SchedulerCollector
from scheduler_svc.store.store import Store

DOCS = Path(__file__).parent
MADE = "<!-- Made from the code by docs/generate.py. -->"


def settings_page() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = str(field.default).replace(BUILT_IN_TARGET, "models/tiny/target")
        default = default.replace(BUILT_IN_DRAFT, "models/tiny/draft")
        services = ", ".join(used_by(field)) or "laps up"
        shown = f"`{default}`" if default else ""
        names = f"`{flag_name(name)}` | `{env_name(name)}`"
        rows.append(f"| {names} | {shown} | {services} | {field.description} |")
    return page(
        "Settings",
        "A value comes from the first source that has it: a flag, the environment, a TOML file\n"
        "(`--config FILE`, else `LAPS_CONFIG`, else `./laps.toml`; the name is the variable's without\n"
        "`LAPS_`, in lower case), the default. `laps config` prints what is in force and from where.\n"
        "`laps up` takes all of them and hands them on. `LAPS_COMPILED` is no setting: see\n"
        "[capacity.md](capacity.md#compiled).",
        "| flag | variable | default | used by | what it is |\n| --- | --- | --- | --- | --- |",
        rows,
    )


def errors_page() -> str:
    rows = [f"| `{reason.name}` | {reason.status} | {reason.sentence} |" for reason in Reason]
    return page(
        "Errors",
        "Every error of every service is a gRPC status whose details hold a `google.rpc.ErrorInfo` with\n"
        "domain `laps` and one of these reasons; `BadRequest` names the field, `RetryInfo` says when to\n"
        "come back. What gRPC itself refuses comes without details: a message of more than\n"
        "`max_message_bytes`, a health check of a service that is not served, a connection that breaks.",
        "| reason | status | what it means |\n| --- | --- | --- |",
        rows,
    )


def metric_families() -> list[Metric]:
    """What a leading scheduler and a gateway export."""
    core = Scheduler("default", make_policy("fcfs"), SchedulerSettings())
    # It is only looked at: the store is never asked.
    leader = Leader(
        core,
        cast(Store, None),
        epoch=1,
        tick_interval_s=0.0,
        gateway_grace_s=1.0,
        leader_ttl_s=1.0,
    )
    collector = SchedulerCollector(
        "default", lambda: leader, lambda: leader.store_answers, Refusals("default")
    )
    return [*collector.collect(), *GatewayMetrics().registry.collect()]


def metrics_page() -> str:
    rows = []
    for family in metric_families():
        suffix = "_total" if family.type == "counter" else ""
        rows.append(f"| `{family.name}{suffix}` | {family.type} | {family.documentation} |")
    return page(
        "Metrics",
        "`--metrics-port` serves them to Prometheus. Every `laps_*` carries the label `pool`.",
        "| name | type | what it is |\n| --- | --- | --- |",
        rows,
    )


def policies_table() -> str:
    rows = []
    for name, kind in policies().items():
        serves = "yes" if kind.servable else "replays only"
        rows.append(f"| `{name}` | {'yes' if kind.preemptive else 'no'} | {serves} | {kind.summary} |")
    return page(
        "The policies at a glance",
        "`laps up --policy NAME`; each is one file in `scheduler_svc/core/policies/`, which documents its\n"
        "rule, its source and its parameters.",
        "| policy | preempts | serves | in a line |\n| --- | --- | --- | --- |",
        rows,
    )


def page(title: str, text: str, head: str, rows: list[str]) -> str:
    return "\n".join([f"# {title}", "", MADE, "", text, "", head, *rows, ""])


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "errors.md": errors_page,
    "metrics.md": metrics_page,
    "policy-list.md": policies_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a committed page is not current")
    check = parser.parse_args().check
    for name, make in PAGES.items():
        path = DOCS / name
        if not check:
            path.write_text(make())
        elif not path.is_file() or path.read_text() != make():
            raise SystemExit(f"docs/{name} is not current; run `make docs`")


if __name__ == "__main__":
    main()
