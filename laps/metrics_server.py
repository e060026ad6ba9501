"""The port at which Prometheus reads a service's metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, start_http_server

from laps.setting import host_port


def listen(host: str, port: int, registry: CollectorRegistry) -> Callable[[], None]:
    """Serves them over HTTP; returns what ends that. Raises OSError with one clear line when the port is
    taken."""
    try:
        server, thread = start_http_server(port, addr=host.strip("[]"), registry=registry)
    except OSError:
        where = host_port(host, port)
        raise OSError(
            f"metrics_port: cannot listen on {where}: the port is in use or not permitted"
        ) from None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close
