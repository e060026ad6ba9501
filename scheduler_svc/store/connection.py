"""Calls to the store's functions, with one meaning for everything that can go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgpack
import structlog
from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from scheduler_svc.store import keys, library
from scheduler_svc.store.errors import StoreError, StoreUnavailable, from_reply

CONNECT_TIMEOUT_S = 2.0
LEAST_VERSION = (7, 0)
MAX_DETOURS = 3
"""Of one call: to another node of a cluster, to load the functions there."""

log = structlog.get_logger()


def place(url: str) -> str:
    """Where a URL points, fit for messages: without user and password."""
    parts = urlsplit(url)
    if parts.hostname is None:
        return parts.path
    return f"{parts.hostname}:{parts.port or 6379}"


class _FreshlyRead(SSLConnection):
    """Reads the certificate's files for each connection: redis-py would keep the first ones for ever."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        return super()._connection_arguments()


def make_pool(url: str, timeout_s: float, **options: Any) -> ConnectionPool:
    """Connections for reading. A lost connection is replaced once, which for reading is harmless. What
    writes goes through `Caller`: redis-py by itself would repeat a write ten times, on timeouts too."""
    if urlsplit(url).scheme == "rediss":
        options["connection_class"] = _FreshlyRead
    return ConnectionPool.from_url(
        url,
        retry=Retry(NoBackoff(), 1, (exceptions.ConnectionError,)),
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=timeout_s,
        health_check_interval=0,
        protocol=2,
        **options,
    )


def translated(error: Exception, url: str) -> StoreError:
    """What an error of redis-py means to us."""
    where = place(url)
    if isinstance(error, exceptions.AuthenticationError | exceptions.NoPermissionError):
        return StoreError(f"Redis at {where} refuses the credentials: {error}")
    if isinstance(error, exceptions.AskError):
        return StoreUnavailable(f"the cluster of {where} is moving the pool to another node")
    if isinstance(error, exceptions.BusyLoadingError):
        return StoreUnavailable(f"Redis at {where} is still loading its data")
    if isinstance(error, exceptions.OutOfMemoryError):
        return from_reply(f"OOM {error}")
    if isinstance(error, exceptions.ReadOnlyError):
        return StoreUnavailable(f"Redis at {where} is a read-only replica")
    if isinstance(error, exceptions.ResponseError):
        return from_reply(str(error))
    if isinstance(error, TimeoutError | exceptions.TimeoutError):
        return StoreUnavailable(f"Redis at {where} does not answer in time")
    return StoreUnavailable(f"Redis at {where} cannot be reached: {_reason(error)}")


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


async def follow(pool: ConnectionPool, moved: exceptions.MovedError) -> None:
    """From here on at the node of a cluster that holds the pool: its keys all lie on one."""
    log.info("the pool lies on another node of the cluster", node=moved.node_addr)
    where = {"host": moved.host, "port": moved.port}
    # A node that does not know its own address leaves the host out: it is the one that was asked.
    pool.connection_kwargs |= {name: value for name, value in where.items() if value}
    await pool.disconnect(inuse_connections=False)
    # They would connect to the old node again.
    pool._available_connections.clear()


def command_reply(redis: Redis, *command: str | int) -> Awaitable[Any]:
    """A command that redis-py has no typed method for."""
    reply: Awaitable[Any] = redis.execute_command(*command)  # type: ignore[no-untyped-call]
    return reply


class Caller:
    """One connection for calls that change something, each made once, in the order in which they are made.

    A call is sent without waiting for the answers of those before it; the answers come in the same order.
    When the connection is lost, with it are all that have no answer yet: whether they were carried out is
    unknown.
    """

    def __init__(self, pool: ConnectionPool, url: str, pool_name: str, timeout_s: float) -> None:
        self._url = url
        self._key = keys.meta(pool_name)
        self._timeout_s = timeout_s
        self._pool = pool
        self._redis: Redis = Redis(connection_pool=pool)
        self._connection = self._make_connection()
        self._sending = asyncio.Lock()
        self._sent_last: asyncio.Future[bool] | None = None
        """Of the call that was sent last by this connection: whether its answer has been read."""

    def _make_connection(self) -> AbstractConnection:
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        # The timeout here covers a whole call; two more inside it would only cost time.
        connection.socket_timeout = None
        return connection

    async def call(self, function: str, *args: str | bytes | int | float) -> Any:
        """Calls a function of the library.

        Raises:
            StoreUnavailable: no answer; whether the call was carried out is unknown.
            StoreError: refused; the function's code decides the class.
        """
        try:
            for _ in range(MAX_DETOURS):
                # What follows was refused as a whole, so asking again is no repetition.
                try:
                    return await self._once(function, *args)
                except exceptions.MovedError as moved:
                    await follow(self._pool, moved)
                    await self._lose(self._connection)
                except exceptions.ResponseError as error:
                    if "Function not found" not in str(error):
                        raise
                    # The server was replaced or emptied, or is a node that this pool has just come to.
                    await library.load(self._redis)
            return await self._once(function, *args)
        except exceptions.RedisError as error:
            raise translated(error, self._url) from error

    async def _once(self, function: str, *args: str | bytes | int | float) -> Any:
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        connection = self._connection
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._sending:
                    connection = self._connection
                    if not connection.is_connected:
                        await connection.connect()  # type: ignore[no-untyped-call]
                    packed = connection.pack_command("FCALL", function, 1, self._key, *args)
                    before, self._sent_last = self._sent_last, answered
                    await connection.send_packed_command(packed, check_health=False)
                if before is not None and not await before:
                    raise exceptions.ConnectionError("the connection was lost by a call before this one")
                reply = await connection.read_response()
        except exceptions.ResponseError as error:
            _settle(answered, True)
            if isinstance(error, exceptions.AuthenticationError):
                await self._lose(connection)
            raise
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            _settle(answered, False)
            await self._lose(connection)
            raise translated(error, self._url) from error
        except BaseException:
            # Cancelled: the answer may still come, and must not be taken for the next call's.
            _settle(answered, False)
            await self._lose(connection)
            raise
        _settle(answered, True)
        return reply

    async def _lose(self, connection: AbstractConnection) -> None:
        """The next call takes a new connection: on this one there may be answers that nobody waits for."""
        if self._connection is connection:
            self._connection, self._sent_last = self._make_connection(), None
        await connection.disconnect(nowait=True)

    async def close(self) -> None:
        await self._connection.disconnect()


def _settle(answered: asyncio.Future[bool], read: bool) -> None:
    # The call behind it may have been cancelled as it waited for this.
    if not answered.done():
        answered.set_result(read)


class Reader:
    """Calls that change nothing, from a pool of connections."""

    def __init__(self, redis: Redis, url: str, pool_name: str) -> None:
        self.redis = redis
        self._url = url
        self._key = keys.meta(pool_name)

    async def ask(self, function: str, *args: str | int, raw: bool = False) -> Any:
        """Calls a read-only function and unpacks its answer; `raw`: strings come as bytes.

        Raises:
            StoreUnavailable: no answer.
        """
        packed = await self.read(self._packed(("FCALL_RO", function, 1, self._key, *args)))
        return msgpack.unpackb(packed, raw=raw, strict_map_key=False)

    async def _packed(self, command: tuple[str | int, ...]) -> Any:
        for _ in range(MAX_DETOURS):
            try:
                return await command_reply(self.redis, *command)
            except exceptions.MovedError as moved:
                await follow(self.redis.connection_pool, moved)
            except exceptions.ResponseError as error:
                if "Function not found" not in str(error):
                    raise
                await library.load(self.redis)
        return await command_reply(self.redis, *command)

    async def read(self, reply: Awaitable[Any]) -> Any:
        """Awaits a reply of redis-py; its errors become ours."""
        try:
            return await reply
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise translated(error, self._url) from error
