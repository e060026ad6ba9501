"""The client for threads; its methods are those of `AsyncClient`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from laps import channels
from laps.client import queries
from laps.client.requests import GenerateOptions, Prompt, build_request
from laps.client.results import (
    Chunk,
    Completion,
    Model,
    PoolQueues,
    Request,
    RequestDetail,
    Snapshot,
    Worker,
    from_proto,
)
from laps.client.retry import NO_RETRY, Backoff, RetryPolicy
from laps.client.transcript import Transcript
from laps.errors import LapsError, from_rpc_error
from laps.security.tls import TlsFiles
from laps.v1 import inference_pb2, inference_pb2_grpc, queue_pb2, queue_pb2_grpc

T = TypeVar("T")
Metadata = Sequence[tuple[str, str]]


class Client:
    """Calls a gateway. Methods raise LapsError. One client may serve many threads."""

    def __init__(
        self,
        server: str = "127.0.0.1:50051",
        *,
        retry: RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        tls: TlsFiles | None = None,
        api_key: str = "",
        metadata: Metadata = (),
        max_message_bytes: int = channels.DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        """`tls` rather than `credentials` where the files may be replaced while the client lives."""
        self.server = server
        self.retry = retry or RetryPolicy()
        self._metadata = (*metadata, *queries.authorization(api_key))
        self._credentials = credentials
        self._tls = tls
        self._max_message_bytes = max_message_bytes
        self._retired: list[grpc.Channel] = []
        self._connect()

    def _connect(self) -> None:
        # Before the files are read: what is replaced meanwhile counts as new.
        self._tls_seen = self._tls.fingerprint() if self._tls else ()
        self._channel = channels.open_sync_channel(
            self.server,
            of_clients=True,
            max_message_bytes=self._max_message_bytes,
            credentials=self._credentials,
            tls=self._tls,
        )
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._queue = queue_pb2_grpc.QueueServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for channel in (*self._retired, self._channel):
            channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Generates to the end. An interrupted caller (Ctrl-C) cancels the request."""
        with self.stream(prompt, **options) as stream:
            return stream.finish()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """The output as it comes; iterate over it, then read its `result`."""
        transcript = Transcript(build_request(prompt, options), retry=self.retry)
        return Stream(self, transcript, cancel_when_left=not options.get("request_id"))

    def resume(self, request_id: str, offset: int = 0) -> Stream:
        """The output of a request that was begun elsewhere, from output token `offset` on."""
        transcript = Transcript(None, request_id=request_id, offset=offset, retry=self.retry)
        return Stream(self, transcript, cancel_when_left=False)

    def cancel(self, request_id: str) -> str:
        """Cancels the request and returns its state."""
        answer = self._call(
            lambda: self._inference.Cancel, inference_pb2.CancelRequest(request_id=request_id)
        )
        return queries.state_word(answer.state)

    def get(self, request_id: str, *, include_output: bool = False) -> RequestDetail:
        """What is known of a request, while it is live and for the server's `retention_s` after its end.
        Raises NotFound."""
        request = inference_pb2.GetRequestRequest(request_id=request_id, include_output=include_output)
        return queries.request_detail(self._call(lambda: self._inference.GetRequest, request))

    def models(self) -> list[Model]:
        """The models that can be asked for."""
        return queries.models(
            self._call(lambda: self._inference.ListModels, inference_pb2.ListModelsRequest())
        )

    def queues(self, pool: str = "", *, head_limit: int = 0) -> list[PoolQueues]:
        """The queue of `pool`, or of all pools, with `head_limit` requests of each level (at most 1,000)."""
        request = queue_pb2.ListQueuesRequest(pool=pool, head_limit=head_limit)
        return queries.queues(self._call(lambda: self._queue.ListQueues, request))

    def requests(self, *states: str, pool: str = "", limit: int = 1000) -> list[Request]:
        """Requests in these states ("queued", "running", ...), all live ones where none is given."""
        found: list[Request] = []
        token = ""
        while len(found) < limit:
            page = queries.list_request(states, pool, token, limit - len(found))
            answer = self._call(lambda: self._queue.ListRequests, page)
            found += [from_proto(Request, info) for info in answer.requests]
            token = answer.next_page_token
            if not token:
                break
        return found

    def workers(self, pool: str = "") -> list[Worker]:
        """The workers in session, of `pool` or of all pools, with who holds each slot."""
        return queries.workers(
            self._call(lambda: self._queue.ListWorkers, queue_pb2.ListWorkersRequest(pool=pool))
        )

    def watch(self, pool: str = "", *, interval_s: float = 0.5, head_limit: int = 10) -> Iterator[Snapshot]:
        """Snapshots as the queue changes, without end. Connects again when the connection breaks."""
        request = queries.watch_request(pool, interval_s, head_limit)
        backoff, begun = Backoff(self.retry), False
        while True:
            call: Any = self._queue.Watch(request, metadata=self._metadata)
            try:
                for answer in call:
                    backoff.progress()
                    begun = True
                    yield queries.snapshot(answer)
                delay_s = 0.1
            except grpc.RpcError as error:
                delay_s = backoff.after(self._translate(error), begun=begun)
            finally:
                call.cancel()
            time.sleep(delay_s)

    def _translate(self, error: grpc.RpcError) -> LapsError:
        translated = from_rpc_error(error)
        if translated.from_transport:
            self._take_new_certificates()
        return queries.name_server(translated, self.server)

    def _take_new_certificates(self) -> None:
        """A channel keeps the certificates with which it was opened; new ones need a new channel."""
        with contextlib.suppress(OSError):
            if self._tls is not None and self._tls.fingerprint() != self._tls_seen:
                # Other calls may still be using it.
                self._retired.append(self._channel)
                self._connect()

    def _call(
        self,
        method: Callable[[], Callable[..., T]],
        request: object,
        retry: RetryPolicy | None = None,
        timeout_s: float = queries.UNARY_TIMEOUT_S,
    ) -> T:
        backoff = Backoff(retry or self.retry)
        while True:
            try:
                return method()(request, timeout=timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                delay_s = backoff.after(self._translate(error), begun=False)
            time.sleep(delay_s)


class Stream:
    """An iterator over a request's chunks; see `AsyncStream`."""

    def __init__(self, client: Client, transcript: Transcript, *, cancel_when_left: bool) -> None:
        self._client = client
        self._transcript = transcript
        self._cancel_when_left = cancel_when_left
        self._chunks = self._run()
        self._begun = False
        self._failed = False

    @property
    def request_id(self) -> str:
        """By which it can be resumed and asked for; empty until the gateway has given it one."""
        return self._transcript.request_id

    @property
    def offset(self) -> int:
        """Output tokens so far: where `resume` would go on."""
        return self._transcript.offset

    @property
    def result(self) -> Completion:
        """The whole, once the stream has ended. Raises RuntimeError before."""
        if self._transcript.result is None:
            raise RuntimeError(f"request {self.request_id} has not ended")
        return self._transcript.result

    def finish(self) -> Completion:
        """Reads to the end."""
        for _ in self:
            pass
        return self.result

    def cancel(self) -> str:
        """Cancels the request; the stream then ends with finish reason "cancelled"."""
        return self._client.cancel(self.request_id)

    def close(self) -> None:
        """Ends the stream."""
        self._chunks.close()
        left = self._begun and not self._failed and self._transcript.result is None
        if left and self._cancel_when_left:
            self._cancel_when_left = False
            # Whoever leaves has no use for an error; a request that was not reached ends after its grace.
            with contextlib.suppress(LapsError):
                cancel = inference_pb2.CancelRequest(request_id=self.request_id)
                self._client._call(
                    lambda: self._client._inference.Cancel, cancel, NO_RETRY, queries.LEAVE_TIMEOUT_S
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        self._begun = True
        return next(self._chunks)

    def _run(self) -> Generator[Chunk, None, None]:
        transcript, client = self._transcript, self._client
        while True:
            problem: LapsError | None = None
            call = self._open()
            try:
                for response in call:
                    if (chunk := transcript.accept(response)) is not None:
                        yield chunk
                    if transcript.result is not None:
                        return
            except grpc.RpcError as error:
                problem = client._translate(error)
            finally:
                call.cancel()
            try:
                delay_s = transcript.failed(problem)
            except LapsError:
                self._failed = True
                raise
            time.sleep(delay_s)

    def _open(self) -> Any:
        call = self._transcript.next_call()
        stub, metadata = self._client._inference, self._client._metadata
        if isinstance(call.request, inference_pb2.GenerateRequest):
            return stub.Generate(call.request, timeout=call.timeout_s, metadata=metadata)
        return stub.Resume(call.request, timeout=call.timeout_s, metadata=metadata)
