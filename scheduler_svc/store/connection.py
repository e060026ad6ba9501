"""Calls to the store's functions, with one meaning for everything that can go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, TypeGuard
from urllib.parse import urlsplit
from weakref import WeakSet

import msgpack
import structlog
from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from scheduler_svc.store import keys, library
from scheduler_svc.store.errors import StoreBehind, StoreError, StoreUnavailable, from_reply
from scheduler_svc.store.pipeline import Pipeline

CONNECT_TIMEOUT_S = 2.0
LEAST_VERSION = (7, 0)
CANNOT_SERVE_NOW = (exceptions.ClusterDownError, exceptions.MasterDownError, exceptions.TryAgainError)
"""redis-py cuts off the codes by which `from_reply` would know them."""
NOT_ALL_HERE = "non local key"
"""In what a node says of a function that wants a key which has moved already."""
MAX_DETOURS = 3
"""Of one call: to another node of a cluster, to load the functions there."""

log = structlog.get_logger()


def place(url: str) -> str:
    """Where a URL points, fit for messages: without user and password."""
    parts = urlsplit(url)
    if parts.hostname is None:
        return parts.path
    return f"{parts.hostname}:{parts.port or 6379}"


class _ToldOfItsEnd(AbstractConnection):
    """uvloop refuses to write where the peer has just broken off, as when a proxy finds no server behind it,
    by an error that redis-py does not take for that."""

    async def send_packed_command(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().send_packed_command(*args, **kwargs)
        except RuntimeError as error:
            raise exceptions.ConnectionError(str(error)) from error


class _Tcp(_ToldOfItsEnd, Connection):
    pass


class _Socket(_ToldOfItsEnd, UnixDomainSocketConnection):
    pass


class _Tls(_ToldOfItsEnd, SSLConnection):
    """Reads the certificate's files for each connection: redis-py would keep the first ones for ever."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        self.ssl_context.context = None
        return super()._connection_arguments()


OURS = {Connection: _Tcp, SSLConnection: _Tls, UnixDomainSocketConnection: _Socket}


class NodePool(ConnectionPool):
    """Connections to the node that holds the pool, whose keys all lie on one. The first goes where the URL
    says; a node of a cluster may send us on to another one."""

    def __init__(self, connection_class: type[AbstractConnection] = Connection, **options: Any) -> None:
        # Not earlier: what the URL says goes before what `from_url` is given.
        super().__init__(connection_class=OURS[connection_class], **options)
        self._given = self._place()
        self._outdated: WeakSet[AbstractConnection] = WeakSet()

    def follow(self, moved: exceptions.MovedError) -> None:
        """From here on at the node that was named."""
        log.info("the pool lies on another node of the cluster", node=moved.node_addr)
        where = {"host": moved.host, "port": moved.port}
        # A node that does not know its own address leaves the host out: it is the one that was asked.
        self.connection_kwargs |= {name: value for name, value in where.items() if value}
        self.leave()

    def leave(self) -> None:
        """Every connection is opened anew before it is used again: it may lead to the wrong server."""
        self._outdated |= {*self._available_connections, *self._in_use_connections}

    async def connected(self) -> AbstractConnection:
        """A connection that the pool does not keep."""
        connection: AbstractConnection = self.make_connection()  # type: ignore[no-untyped-call]
        await self.ensure_connection(connection)
        return connection

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        if connection in self._outdated:
            self._outdated.discard(connection)
            await connection.disconnect()
        if not connection.is_connected:
            for name, value in self._place().items():
                setattr(connection, name, value)
        try:
            await super().ensure_connection(connection)
        except (exceptions.ConnectionError, exceptions.TimeoutError, OSError):
            # The node that was followed may be gone. Those that the URL names know who has taken its place.
            self.connection_kwargs |= self._given
            raise

    def _place(self) -> dict[str, Any]:
        """Nothing for a socket of this host."""
        known = self.connection_kwargs
        return {name: known[name] for name in ("host", "port") if name in known}


def make_pool(url: str, timeout_s: float, **options: Any) -> NodePool:
    """Connections for reading. A lost connection is replaced once, which for reading is harmless. What
    writes goes through `Caller`: redis-py by itself would repeat a write ten times, on timeouts too."""
    return NodePool.from_url(
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
    if isinstance(error, CANNOT_SERVE_NOW):
        return StoreUnavailable(f"Redis at {where} cannot serve now: {error}")
    if NOT_ALL_HERE in str(error):
        return StoreUnavailable(f"the cluster of {where} is moving the pool's keys one by one")
    if isinstance(error, exceptions.ResponseError):
        return from_reply(str(error))
    if isinstance(error, TimeoutError | exceptions.TimeoutError):
        return StoreUnavailable(f"Redis at {where} does not answer in time")
    return StoreUnavailable(f"Redis at {where} cannot be reached: {_reason(error)}")


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def command_reply(redis: Redis, *command: str | int) -> Awaitable[Any]:
    """A command that redis-py has no typed method for."""
    reply: Awaitable[Any] = redis.execute_command(*command)  # type: ignore[no-untyped-call]
    return reply


async def _in_the_right_place(
    attempt: Callable[[], Awaitable[Any]],
    go_there: Callable[[exceptions.ResponseError], Awaitable[None]],
    refused: exceptions.ResponseError | None = None,
) -> Any:
    """Makes a call. Where it is refused as a whole because the pool or the functions are not there, it is
    made again where they are, which is no repetition. `refused`: so ended a first attempt."""
    for _ in range(MAX_DETOURS):
        if refused is None:
            try:
                return await attempt()
            except exceptions.ResponseError as error:
                if not _was_in_the_wrong_place(error):
                    raise
                refused = error
        await go_there(refused)
        refused = None
    return await attempt()


def _was_in_the_wrong_place(error: Exception) -> TypeGuard[exceptions.ResponseError]:
    return isinstance(error, exceptions.MovedError) or (
        isinstance(error, exceptions.ResponseError) and "Function not found" in str(error)
    )


async def _go_where_it_belongs(pool: NodePool, refused: exceptions.ResponseError) -> None:
    if isinstance(refused, exceptions.MovedError):
        pool.follow(refused)
    else:
        # The server was replaced or emptied, or is a node that this pool has just come to.
        await library.load(Redis(connection_pool=pool))


OnReply = Callable[[Any, StoreError | None], None]
"""Takes what a call returned, or what it raised."""


class Unawaited:
    """Calls under way that tell somebody of their end, instead of being awaited."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, call: Callable[[], Awaitable[Any]], on_reply: OnReply) -> None:
        task = asyncio.create_task(self._finish(call, on_reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self, call: Callable[[], Awaitable[Any]], on_reply: OnReply) -> None:
        try:
            reply = await call()
        except StoreError as error:
            on_reply(None, error)
        else:
            on_reply(reply, None)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


class Caller:
    """Calls that change something, each made once, by one connection, in the order in which they are made."""

    def __init__(self, pool: NodePool, url: str, pool_name: str, timeout_s: float) -> None:
        self._url = url
        self._key = keys.meta(pool_name)
        self._timeout_s = timeout_s
        self._pool = pool
        self._pipeline: Pipeline | None = None
        self._connecting = asyncio.Lock()
        self._unawaited = Unawaited()

    async def call(self, function: str, *args: str | bytes | int | float) -> Any:
        """Calls a function of the library.

        Raises:
            StoreUnavailable: no answer; whether the call was carried out is unknown.
            StoreError: refused; the function's code decides the class.
        """
        return await self._call(None, function, *args)

    async def _call(
        self, refused: exceptions.ResponseError | None, function: str, *args: str | bytes | int | float
    ) -> Any:
        try:
            return await _in_the_right_place(partial(self._once, function, *args), self._go_there, refused)
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise translated(error, self._url) from error

    def send(self, function: str, *args: str | bytes | int | float, on_reply: OnReply) -> None:
        """`call` for whoever does not wait: `on_reply` is called in the turn of the event loop in which the
        answer comes. Whoever calls sees to it that only a few are under way."""
        if self._pipeline is None or self._pipeline.lost:
            self._unawaited.begin(partial(self.call, function, *args), on_reply)
            return

        def answered(reply: Any, error: Exception | None) -> None:
            if error is None:
                on_reply(reply, None)
            elif _was_in_the_wrong_place(error):
                self._unawaited.begin(partial(self._call, error, function, *args), on_reply)
            else:
                self._check(error)
                on_reply(None, translated(error, self._url))

        self._pipeline.ask("FCALL", function, 1, self._key, *args, on_answer=answered)

    async def _go_there(self, refused: exceptions.ResponseError) -> None:
        await _go_where_it_belongs(self._pool, refused)
        if isinstance(refused, exceptions.MovedError):
            self._lose_connection("the pool lies on another node")

    async def _once(self, function: str, *args: str | bytes | int | float) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                pipeline = await self._connected()
                return await pipeline.answer("FCALL", function, 1, self._key, *args)
        except exceptions.RedisError as error:
            self._check(error)
            raise

    async def _connected(self) -> Pipeline:
        async with self._connecting:
            if self._pipeline is None or self._pipeline.lost:
                self._pipeline = Pipeline(await self._pool.connected(), self._timeout_s)
            return self._pipeline

    def _check(self, error: Exception) -> None:
        """Refused credentials are those of this connection: the next one may have others. And a name may lead
        to another server since this one is a replica, which does not end the connections that it has."""
        if isinstance(error, exceptions.AuthenticationError):
            self._lose_connection("the credentials were refused")
        elif isinstance(error, exceptions.ReadOnlyError | exceptions.MasterDownError):
            self._pool.leave()
            self._lose_connection("the server is a replica now")

    def _lose_connection(self, because: str) -> None:
        """The next call opens another one."""
        if self._pipeline is not None:
            self._pipeline.lose(exceptions.ConnectionError(because))

    def drop(self) -> None:
        """Nobody waits for anything any more: what was sent may have been carried out or not."""
        self._unawaited.cancel()
        self._lose_connection("the call was given up")


class Reader:
    """Calls that change nothing, from a pool of connections."""

    def __init__(self, pool: NodePool, url: str, pool_name: str) -> None:
        self.redis: Redis = Redis(connection_pool=pool)
        self._pool = pool
        self._url = url
        self._key = keys.meta(pool_name)

    async def ask(self, function: str, *args: str | int, raw: bool = False) -> Any:
        """Calls a read-only function and unpacks its answer; `raw`: strings come as bytes.

        Raises:
            StoreUnavailable: no answer.
        """
        attempt = partial(command_reply, self.redis, "FCALL_RO", function, 1, self._key, *args)
        try:
            packed = await self.read(_in_the_right_place(attempt, partial(_go_where_it_belongs, self._pool)))
        except StoreBehind:
            self._pool.leave()
            raise
        return msgpack.unpackb(packed, raw=raw, strict_map_key=False)

    async def read(self, reply: Awaitable[Any]) -> Any:
        """Awaits a reply of redis-py; its errors become ours."""
        try:
            return await reply
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise translated(error, self._url) from error
