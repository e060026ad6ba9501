"""What a gateway tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from laps.v1 import scheduler_pb2

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
POOL_LOAD = {
    "vllm:num_requests_waiting": "As laps_queued_requests, of the whole pool",
    "vllm:num_requests_running": "As laps_running_requests, of the whole pool",
    "vllm:kv_cache_usage_perc": "As laps_kv_cache_utilization, of the whole pool, 0 to 1",
}
"""For inference gateways (Kubernetes' Gateway API Inference Extension), which ask the pods that they send to,
and know these names."""


class Metrics:
    """One gateway's own registry, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.calls = Counter(
            "laps_gateway_calls_total", "Finished calls", ["method", "code"], registry=registry
        )
        self.call_seconds = Histogram(
            "laps_gateway_call_seconds",
            "Time from a call's arrival to its end",
            ["method"],
            registry=registry,
        )
        self.streams = Gauge("laps_gateway_streams", "Client streams that are open", registry=registry)
        self.streams_lost = Counter(
            "laps_gateway_streams_lost_total", "Streams taken from slow clients", registry=registry
        )
        self.requests = Counter(
            "laps_gateway_requests_total",
            "Outputs delivered to their end",
            ["finish_reason"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "laps_gateway_prompt_tokens_total", "Accepted prompt tokens", registry=registry
        )
        self.tokens = Counter("laps_gateway_tokens_total", "Output tokens sent to clients", registry=registry)
        self.time_to_first_token = Histogram(
            "laps_gateway_time_to_first_token_seconds",
            "Time from a call's arrival to its first output token",
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "laps_gateway_inter_token_latency_seconds",
            "Time between messages of a stream, per token of the later one",
            buckets=_ITL_BUCKETS_S,
            registry=registry,
        )
        self.scheduler_connected = Gauge(
            "laps_gateway_scheduler_connected", "1 while the scheduler can be reached", registry=registry
        )

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
        server, thread = start_http_server(port, addr=host, registry=self.registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return close
