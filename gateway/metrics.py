"""What a gateway tells Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from laps import metrics_server
from laps.v1 import scheduler_pb2

M = TypeVar("M", bound=Counter | Histogram)
_BUCKETS_S = Histogram.DEFAULT_BUCKETS
_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
POOL_LOAD = {
    "vllm:num_requests_waiting": "As laps_queued_requests, of the whole pool",
    "vllm:num_requests_running": "As laps_running_requests, of the whole pool",
    "vllm:kv_cache_usage_perc": "As laps_kv_cache_utilization, of the whole pool, 0 to 1",
}
"""For inference gateways (Kubernetes' Gateway API Inference Extension), which ask the pods that they send to,
and know these names."""


class _OfPool(Generic[M]):
    """A metric whose first label is known."""

    def __init__(self, pool: str, metric: M) -> None:
        self._pool = pool
        self._metric: M = metric

    def labels(self, *values: str) -> M:
        return cast(M, self._metric.labels(self._pool, *values))


class TokenFlow(Collector):
    """What is counted with every message: plain numbers, which cost a tenth of what the library's locks do.
    The event loop alone writes them."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._tokens = 0
        self._intervals = [0] * (len(_ITL_BUCKETS_S) + 1)
        """Per bucket, not cumulative; the last one has no bound."""
        self._intervals_s = 0.0

    def first(self, tokens: int) -> None:
        """The first message of a stream has gone out."""
        self._tokens += tokens

    def further(self, tokens: int, since_last_s: float) -> None:
        """A later one, so many seconds after the one before it."""
        self._tokens += tokens
        interval_s = since_last_s / tokens
        self._intervals_s += interval_s
        self._intervals[bisect_left(_ITL_BUCKETS_S, interval_s)] += 1

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        tokens = CounterMetricFamily("laps_gateway_tokens", "Output tokens sent to clients", labels=["pool"])
        tokens.add_metric([self._pool], self._tokens)
        yield tokens
        intervals = HistogramMetricFamily(
            "laps_gateway_inter_token_latency_seconds",
            "Time between messages of a stream, per token of the later one",
            labels=["pool"],
        )
        bounds = (*(str(float(bound)) for bound in _ITL_BUCKETS_S), "+Inf")
        counts = accumulate(tuple(self._intervals))
        intervals.add_metric([self._pool], list(zip(bounds, counts, strict=True)), self._intervals_s)
        yield intervals


class Metrics:
    """One gateway's own registry, so that several can live in one process. Its own metrics carry the label
    `pool`, as a scheduler's do."""

    def __init__(self, pool: str = "default") -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"laps_gateway_{name}", text, ["pool", *labels], registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"laps_gateway_{name}", text, ["pool"], registry=registry)

        def seconds(name: str, text: str, *labels: str, buckets: Sequence[float] = _BUCKETS_S) -> Histogram:
            name = f"laps_gateway_{name}_seconds"
            return Histogram(name, text, ["pool", *labels], buckets=buckets, registry=registry)

        self.calls = _OfPool(pool, counter("calls_total", "Finished calls", "method", "code"))
        self.call_seconds = _OfPool(pool, seconds("call", "Time from a call's arrival to its end", "method"))
        self.streams = gauge("streams", "Client streams that are open").labels(pool)
        self.streams_lost = counter("streams_lost_total", "Streams taken from slow clients").labels(pool)
        self.requests = _OfPool(
            pool, counter("requests_total", "Outputs delivered to their end", "finish_reason")
        )
        self.prompt_tokens = counter("prompt_tokens_total", "Accepted prompt tokens").labels(pool)
        self.time_to_first_token = seconds(
            "time_to_first_token",
            "Time from a call's arrival to its first output token",
            buckets=_TTFT_BUCKETS_S,
        ).labels(pool)
        self.flow = TokenFlow(pool)
        registry.register(self.flow)
        self.scheduler_connected = gauge(
            "scheduler_connected", "1 while the scheduler can be reached"
        ).labels(pool)
        self.pool_load = tuple(
            Gauge(name, text, ["model_name"], registry=registry) for name, text in POOL_LOAD.items()
        )

    def pool_told(self, model_name: str, pool: scheduler_pb2.DescribePoolResponse) -> None:
        """What the scheduler says about its pool, each second."""
        values = (pool.queued_requests, pool.running_requests, pool.kv_cache_utilization)
        for gauge, value in zip(self.pool_load, values, strict=True):
            gauge.labels(model_name).set(value)

    def listen(self, host: str, port: int) -> Callable[[], None]:
        """Serves them over HTTP; returns what ends that. Raises OSError when the port is taken."""
        return metrics_server.listen(host, port, self.registry)
