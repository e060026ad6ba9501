"""gRPC channels and servers as all parts of LAPS open them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from laps.security.tls import TlsFiles, channel_credentials, server_credentials
from laps.setting import host_port, is_loopback

DEFAULT_MAX_MESSAGE_BYTES = 4 << 20
KEEPALIVE_INTERVAL_MS = 5_000
"""Ping an idle connection this often."""
PING_TIMEOUT_MS = 5_000
"""A peer that leaves a ping unanswered for this long is gone."""
RECONNECT_FIRST_MS = 100
RECONNECT_MAX_MS = 2_000
CONNECT_TIMEOUT_MS = 2_000

Options = list[tuple[str, int | str]]


def _shared_options(max_message_bytes: int) -> Options:
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_INTERVAL_MS),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        # Without this one a frozen peer goes unnoticed for a minute whatever keepalive says.
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel_options(max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES) -> Options:
    return [
        *_shared_options(max_message_bytes),
        # Our clients retry where that is safe; a retry inside gRPC would hide it from them.
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_FIRST_MS),
        # This one is also the time that an attempt may take: slow links need more than the first pause.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
        # Two channels of one process to one address must not share a connection and its fate.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def server_options(
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    max_concurrent_streams: int | None = None,
    share_port: bool = False,
) -> Options:
    """`max_concurrent_streams` bounds the calls of one connection; more wait at the client. `share_port`:
    several processes may listen on one port, and the kernel spreads new connections over them."""
    options = [
        *_shared_options(max_message_bytes),
        # Unless it is wanted a second process must fail to start, not take every second connection.
        ("grpc.so_reuseport", int(share_port)),
        # Allow the pings that channel_options sends.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_INTERVAL_MS // 2),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_INTERVAL_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
    ]
    if max_concurrent_streams is not None:
        options.append(("grpc.max_concurrent_streams", max_concurrent_streams))
    return options


def to_the_one_that_serves(service: str) -> Options:
    """For an address that several processes share: calls go to the one whose health says that it serves
    `service` (gRPC's client-side health checking). A name is resolved to all of its addresses; without one
    that serves, calls fail with UNAVAILABLE."""
    config = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": service}}
    return [
        ("grpc.service_config", json.dumps(config)),
        # The name's addresses are looked up again this soon after a connection was lost, not after 30 s.
        ("grpc.dns_min_time_between_resolutions_ms", RECONNECT_MAX_MS),
    ]


def past_proxies(address: str, of_clients: bool) -> Options:
    """gRPC takes `http_proxy` and its like from the environment for every channel it opens. That is right
    on a client's way to its gateway; the parts of LAPS call each other, and this machine itself, without.
    """
    if of_clients and not is_loopback(address.rpartition(":")[0]):
        return []
    return [("grpc.enable_http_proxy", 0)]


def open_channel(
    address: str,
    *,
    of_clients: bool = False,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    serving: str = "",
    credentials: grpc.ChannelCredentials | None = None,
    tls: TlsFiles | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] | None = None,
) -> grpc.aio.Channel:
    """An asyncio channel to HOST:PORT; in the clear unless `credentials` or `tls` are given. `of_clients`:
    see `past_proxies`; `serving`: see `to_the_one_that_serves`.

    Raises OSError when a file of `tls` cannot be read.
    """
    options = channel_options(max_message_bytes) + past_proxies(address, of_clients)
    if serving:
        options += to_the_one_that_serves(serving)
    credentials = credentials or channel_credentials(tls)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)


def open_sync_channel(
    address: str,
    *,
    of_clients: bool = False,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    credentials: grpc.ChannelCredentials | None = None,
    tls: TlsFiles | None = None,
) -> grpc.Channel:
    """The same for threads."""
    options = channel_options(max_message_bytes) + past_proxies(address, of_clients)
    credentials = credentials or channel_credentials(tls)
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials, options=options)


def new_server(
    *,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    max_concurrent_streams: int | None = None,
    share_port: bool = False,
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]] = (),
) -> grpc.aio.Server:
    """An asyncio server without services and ports."""
    return grpc.aio.server(
        interceptors=list(interceptors),
        options=server_options(max_message_bytes, max_concurrent_streams, share_port),
    )


def bind(
    server: grpc.aio.Server,
    host: str,
    port: int,
    tls: TlsFiles | None = None,
    *,
    ask_clients: bool = True,
) -> int:
    """Listens on host:port and returns the port (`port` 0: any free one). With `tls` and `ask_clients` only
    clients with a certificate get through.

    Raises OSError with one clear line when the port is taken.
    """
    where = host_port(host, port)
    try:
        if tls is None:
            bound = server.add_insecure_port(where)
        else:
            bound = server.add_secure_port(where, server_credentials(tls, ask_clients=ask_clients))
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise OSError(f"cannot listen on {where}: the port is in use or not permitted")
    return bound
