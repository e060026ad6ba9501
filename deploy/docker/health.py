"""Asks a LAPS service of this container for its grpc.health.v1 status.

    python health.py answers 50051    exit 0 if it answers at all
    python health.py serves 50051     exit 0 if it says that it serves

Kubernetes' own gRPC probe takes NOT_SERVING for a failure, so it can tell whether a service is ready,
not whether it lives: a scheduler that stands by answers NOT_SERVING, and must not be restarted for that.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 4.0


def main(question: str, port: str) -> int:
    host = os.environ.get("LAPS_HOST", "127.0.0.1")
    # A server on every address is reached by loopback.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            print(f"{address}: {error.code().name}", file=sys.stderr)
            return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{address}: {status}")
    return 0 if question == "answers" or status == "SERVING" else 1


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("answers", "serves"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2]))
