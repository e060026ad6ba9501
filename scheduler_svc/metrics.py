"""What a scheduler tells Prometheus, read from the leading core at each scrape."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from laps import metrics_server
from scheduler_svc import compiled
from scheduler_svc.core.records import Request
from scheduler_svc.core.scheduler import Scheduler
from scheduler_svc.leader import Leader

COUNTERS = {
    "submitted": ("requests_accepted", "Requests accepted"),
    "refused": ("requests_refused", "Submissions refused"),
    "finished": ("requests_finished", "Requests that have ended, in whatever way"),
    "preemptions": ("preemptions", "Requests taken out of a slot for another one"),
    "emitted_tokens": ("output_tokens", "Output tokens stored"),
    "drafted_tokens": ("spec_decode_draft_tokens", "Tokens proposed by draft models"),
    "accepted_tokens": ("spec_decode_accepted_tokens", "Drafted tokens that the target kept"),
    "reports": ("step_reports", "Step reports of workers"),
    "reports_refused": (
        "step_reports_refused",
        "Reports that cannot be: of unknown workers, with columns that do not fit, with impossible numbers",
    ),
    "rows_refused": ("step_rows_refused", "Rows of reports that contradicted what is stored"),
}
"""The core's counters by name: metric (without laps_ and _total) and help. They begin with the term."""


class Refusals:
    """Calls and sessions that this process has refused for what they say or for who says it. Submissions that
    find the pool full are not among them: `laps_requests_refused_total` counts those.
    """

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self.counter = Counter(
            "laps_scheduler_refused_calls",
            "Calls and workers' sessions that were not allowed, or said what cannot be",
            ["pool", "method", "status"],
            registry=None,
        )

    def __call__(self, method: str, status: str) -> None:
        """`method` is the call's path, `status` the name of a gRPC status."""
        name = method.removeprefix("/laps.v1.").replace("/", ".")
        self.counter.labels(self._pool, name, status).inc()


def kv_cache_utilization(core: Scheduler) -> float:
    """Share of the workers' KV cache in use, 0 to 1."""
    workers = list(core.workers.values())
    used_tokens = sum(worker.kv_used_tokens for worker in workers)
    capacity_tokens = sum(worker.kv_capacity_tokens for worker in workers)
    return used_tokens / capacity_tokens if capacity_tokens else 0.0


_UNHURRIED_AT_ONCE = 1000


def _unhurried(requests: list[Request]) -> Iterator[Request]:
    """A long queue is gone through in small parts; in between the scheduler has the interpreter to itself."""
    for number, request in enumerate(requests, 1):
        yield request
        if number % _UNHURRIED_AT_ONCE == 0:
            time.sleep(0.0005)


@dataclass
class _Live:
    """Sums over the live requests."""

    backlog_s: float = 0.0
    oldest_s: float = math.inf
    """When the first of those without a slot arrived; infinite: none waits."""
    by_level: dict[int, int] = field(default_factory=dict)

    def add(self, request: Request) -> None:
        self.backlog_s += request.perceived_s
        self.by_level[request.level] = self.by_level.get(request.level, 0) + 1
        if not request.lease_id and request.arrival_s < self.oldest_s:
            self.oldest_s = request.arrival_s


class SchedulerCollector(Collector):
    """Scrapes come in another thread: it copies what it iterates over and changes nothing."""

    def __init__(
        self,
        pool: str,
        leader: Callable[[], Leader | None],
        store_answers: Callable[[], bool],
        refusals: Refusals,
    ) -> None:
        self._pool = pool
        self._leader = leader
        self._store_answers = store_answers
        self._refusals = refusals

    def collect(self) -> Iterator[Metric]:
        yield from self._refusals.counter.collect()
        leader = self._leader()
        yield self._gauge(
            "scheduler_leads", "1 while this scheduler leads the pool", float(leader is not None)
        )
        # Also without a leader: a scheduler that starts while the store is away never leads.
        yield self._gauge(
            "store_down",
            "1 while the store does not answer this scheduler",
            float(not self._store_answers()),
        )
        yield self._gauge(
            "scheduler_compiled",
            "1 where the scheduler's hot path runs compiled",
            float(compiled.running().usable),
        )
        if leader is None:
            return
        core = leader.core
        requests, waiting = list(core.requests.values()), core.waiting_requests
        live = _Live()
        for request in _unhurried(requests):
            live.add(request)
        workers = list(core.workers.values())
        now_s = leader.now_s()
        for name, text, value in (
            ("queued_requests", "Requests that wait for a slot", waiting),
            ("running_requests", "Requests that hold a slot", len(requests) - waiting),
            ("kv_cache_utilization", "Share of the workers' KV cache in use, 0 to 1",
             kv_cache_utilization(core)),
            ("backlog_seconds", "Estimated service that all live requests still need",
             live.backlog_s),
            ("longest_wait_seconds", "Age of the oldest request without a slot",
             max(0.0, now_s - live.oldest_s)),
            ("workers", "Workers in session", len(workers)),
            ("slots", "Slots of the workers in session", sum(worker.slots for worker in workers)),
            ("scheduler_epoch", "The leader's epoch", leader.epoch),
        ):  # fmt: skip
            yield self._gauge(name, text, value)
        levels = GaugeMetricFamily(
            "laps_queue_level_requests", "Live requests by queue level", labels=["pool", "level"]
        )
        for level, count in sorted(live.by_level.items()):
            levels.add_metric([self._pool, str(level)], count)
        yield levels
        for name, (metric, text) in COUNTERS.items():
            yield self._counter(metric, text, getattr(core.counters, name))
        yield self._counter("commits", "Ticks stored", leader.ticks)
        yield from leader.commit_times.collect()

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"laps_{name}", text, labels=["pool"])
        family.add_metric([self._pool], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"laps_{name}", text, labels=["pool"])
        family.add_metric([self._pool], value)
        return family


def listen(
    host: str,
    port: int,
    pool: str,
    leader: Callable[[], Leader | None],
    store_answers: Callable[[], bool],
    refusals: Refusals,
) -> Callable[[], None]:
    """Serves the metrics over HTTP; returns what ends that. Raises OSError when the port is taken."""
    registry = CollectorRegistry()
    registry.register(SchedulerCollector(pool, leader, store_answers, refusals))
    return metrics_server.listen(host, port, registry)
