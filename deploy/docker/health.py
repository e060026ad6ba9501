"""Asks a LAPS service of this container for its grpc.health.v1 status, where nobody else can: in compose.

python health.py 50053 laps.ready    exit 0 if the health name is served; without one: if calls are
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 4.0


def main(port: str, name: str = "") -> int:
    host = os.environ.get("LAPS_HOST", "127.0.0.1")
    # A server on every address is reached by loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with open_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{address}: {status}")
    return 0 if status == "SERVING" else 1


def open_channel(address: str) -> grpc.Channel:
    # Whatever proxies the environment names: it is this host that is asked.
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    certificate, key, authorities = (os.environ.get(f"LAPS_TLS_{name}") for name in ("CERT", "KEY", "CA"))
    if not (certificate and key and authorities):
        return grpc.insecure_channel(address, options)
    read = [Path(path).read_bytes() for path in (authorities, key, certificate)]
    # Nobody else answers on this host's own address, and certificates do not name that.
    options.append(("grpc.ssl_target_name_override", "localhost"))
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*read), options)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
