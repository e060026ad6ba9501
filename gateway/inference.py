"""InferenceService: what clients call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from gateway.admission import admit, unpack
from gateway.calls import Call, Handler, shutting_down
from gateway.detokenizer import Detokenizer, Release
from gateway.edge import TenantLimits
from gateway.metrics import Metrics
from gateway.scheduler_link import SchedulerLink
from gateway.streams import Limit, Reader
from gateway.tokenizer import Tokenizer
from gateway.validation import Bounds, check_request_id
from laps.errors import FieldViolation, LapsError, OutOfRange, Reason, ResourceExhausted
from laps.logs import bind_context
from laps.security.access import Role
from laps.settings import Settings
from laps.v1 import generation_pb2, inference_pb2

RETRY_AFTER_S = 1.0
"""What a client is told that comes when all streams are taken."""

Response = type[inference_pb2.GenerateResponse] | type[inference_pb2.ResumeResponse]


class Stops(NamedTuple):
    """What may end an output, as far as text is concerned."""

    strings: tuple[str, ...]
    token_ids: frozenset[int]


class _Output(NamedTuple):
    """What a stream is about."""

    request_id: str
    stops: Stops
    before: Sequence[int]
    """The prompt's last tokens."""


class InferenceService:
    def __init__(
        self, settings: Settings, tokenizer: Tokenizer, link: SchedulerLink, metrics: Metrics
    ) -> None:
        self.draining = False
        self.streams = Limit(settings.max_streams, _streams_full, metrics.streams.set)
        self._settings = settings
        self._tokenizer = tokenizer
        self._link = link
        self._metrics = metrics
        self._readers: dict[Reader, None] = {}
        self._tenants = TenantLimits()

    def methods(self) -> dict[str, Handler]:
        return {
            "Generate": self.generate,
            "Resume": self.resume,
            "Cancel": self.cancel,
            "GetRequest": self.get_request,
            "ListModels": self.list_models,
        }

    @property
    def bounds(self) -> Bounds:
        """The strictest of what settings, model and workers allow."""
        pool, model = self._link.pool, self._tokenizer.limits
        contexts = (self._settings.context_tokens, model.context_tokens, pool.context_tokens if pool else 0)
        vocabularies = (self._tokenizer.vocabulary_size, pool.vocabulary_size if pool else 0)
        return Bounds(
            model_name=self._settings.model_name,
            vocabulary_size=min(size for size in vocabularies if size),
            context_tokens=min(tokens for tokens in contexts if tokens),
            default_max_tokens=self._settings.default_max_tokens,
        )

    async def generate(self, request: inference_pb2.GenerateRequest, call: Call) -> None:
        self._refuse_while_draining()
        with self._tenants.stream(call.caller), self.streams:
            await self._generate(request, call)

    async def resume(self, request: inference_pb2.ResumeRequest, call: Call) -> None:
        stored_id = self._stored_id(request.request_id, call)
        self._refuse_while_draining()
        with self._tenants.stream(call.caller), self.streams, bind_context(request_id=stored_id):
            await self._resume(request, stored_id, call)

    async def cancel(self, request: inference_pb2.CancelRequest, call: Call) -> inference_pb2.CancelResponse:
        stored_id = self._stored_id(request.request_id, call)
        answer = await self._link.cancel(stored_id, call.deadline_s())
        return inference_pb2.CancelResponse(state=answer.state)

    async def get_request(
        self, request: inference_pb2.GetRequestRequest, call: Call
    ) -> inference_pb2.GetRequestResponse:
        stored_id = self._stored_id(request.request_id, call)
        stored = await self._link.read(
            stored_id,
            include_output=request.include_output,
            include_prompt=request.include_output and self._tokenizer.context_tokens > 0,
            until_s=call.deadline_s(),
        )
        response = inference_pb2.GetRequestResponse(request=stored.request)
        response.request.request_id = call.caller.shown_id(stored_id)
        response.request.preempted_because = call.caller.shown_reason(stored.request.preempted_because)
        if stored.HasField("complete"):
            response.complete.CopyFrom(stored.complete)
        if request.include_output:
            tokens = unpack(stored.output_token_ids)
            response.output.ids.extend(tokens)
            before = self._end_of(stored.prompt_token_ids)
            detokenizer = self._detokenizer(self._stops_from(stored.stopping), before)
            response.text = detokenizer.push(tokens).text
            if stored.HasField("complete"):
                response.text += _finish(detokenizer, stored.complete).text
        return response

    async def list_models(
        self, request: inference_pb2.ListModelsRequest, call: Call
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[self.describe_model()])

    def describe_model(self) -> inference_pb2.Model:
        bounds = self.bounds
        model = inference_pb2.Model(
            name=self._settings.model_name,
            pool=self._settings.pool,
            target=self._settings.target,
            vocabulary_size=bounds.vocabulary_size,
            context_tokens=bounds.context_tokens,
        )
        pool = self._link.pool
        if pool is not None and self._link.connected:
            model.target = pool.target or model.target
            model.draft, model.workers, model.slots = pool.draft, pool.workers, pool.slots
        return model

    def drop_streams(self) -> None:
        """Ends every client stream; their clients resume elsewhere."""
        for reader in tuple(self._readers):
            reader.lose(shutting_down())

    def _stored_id(self, request_id: str, call: Call) -> str:
        """The id in the pool of the caller's request. Another tenant's request cannot be named."""
        check_request_id(request_id, in_pool=Role.OPERATOR in call.caller.roles)
        stored_id = call.caller.stored_id(request_id)
        call.fields["request_id"] = stored_id
        return stored_id

    async def _generate(self, request: inference_pb2.GenerateRequest, call: Call) -> None:
        self._tenants.check(call.caller, request.priority)
        spec = await admit(
            request,
            self.bounds,
            self._tokenizer,
            pool=self._settings.pool,
            disconnect_grace_s=self._settings.disconnect_grace_s,
            call_time_left_s=call.time_left_s(),
        )
        spec.request_id = call.caller.stored_id(spec.request_id)
        spec.traceparent = call.traceparent
        call.fields["request_id"] = spec.request_id
        call.fields["prompt_tokens"] = len(spec.prompt_token_ids) // 4
        with bind_context(request_id=spec.request_id):
            # A client that leaves meanwhile takes its request with it.
            answer = await self._link.submit(spec, call.caller.quota if call.caller.tenant else None)
            if not answer.joined:
                self._metrics.prompt_tokens.inc(call.fields["prompt_tokens"])
            stops = self._stops_from(spec.stopping)
            # Who only reads slowly did not leave: it has learnt the id, and its request waits for it.
            implicit = not request.request_id and not request.HasField("cancel_on_disconnect")
            linger_s = self._settings.disconnect_grace_s if implicit else 0.0
            output = _Output(spec.request_id, stops, self._end_of(spec.prompt_token_ids))
            await self._stream(call, output, 0, inference_pb2.GenerateResponse, linger_s)

    async def _resume(self, request: inference_pb2.ResumeRequest, stored_id: str, call: Call) -> None:
        call.fields["offset"] = request.offset
        stored = await self._link.read(
            stored_id,
            include_output=False,
            include_prompt=self._tokenizer.context_tokens > 0,
            until_s=call.deadline_s(),
        )
        if request.offset > stored.request.output_tokens:
            raise _offset_beyond(request.offset, stored.request.output_tokens)
        output = _Output(stored_id, self._stops_from(stored.stopping), self._end_of(stored.prompt_token_ids))
        await self._stream(call, output, request.offset, inference_pb2.ResumeResponse, 0.0)

    async def _stream(
        self, call: Call, output: _Output, offset: int, response: Response, linger_s: float
    ) -> None:
        # First of all: the scheduler must hear of a client that leaves, also of one that was never reached.
        reader = self._link.attach(output.request_id)
        self._readers[reader] = None
        done = False
        try:
            await call.accepted(call.caller.shown_id(output.request_id), output.before)
            detokenizer = self._detokenizer(output.stops, output.before)
            await self._pump(call, reader, detokenizer, offset, response)
            done = True
        except asyncio.CancelledError:
            if reader.lost is None:
                raise
            # Not the client's doing: the task was waiting for a client that does not read.
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            raise reader.lost from None
        finally:
            self._readers.pop(reader, None)
            if reader.lost is not None and reader.lost.reason is Reason.CLIENT_TOO_SLOW:
                self._metrics.streams_lost.inc()
            self._link.detach(reader, done=done, linger_s=linger_s if reader.lost is not None else 0.0)

    async def _pump(
        self, call: Call, reader: Reader, detokenizer: Detokenizer, offset: int, response: Response
    ) -> None:
        """Sends the output from `offset` on until it ends."""
        feed, sent, to_skip = reader.feed, offset, offset
        request_id = call.caller.shown_id(feed.request_id)
        # One message for the whole stream: to make a new one costs several times what filling it does.
        message = response(request_id=request_id)
        chunk = message.chunk
        chunk.SetInParent()
        last_s = 0.0
        while True:
            tokens, completion = await reader.take()
            if to_skip:
                detokenizer.skip(tokens[:to_skip])
                tokens, to_skip = tokens[to_skip:], max(to_skip - len(tokens), 0)
                if completion is not None and to_skip:
                    raise _offset_beyond(offset, len(feed.tokens))
            count, text = detokenizer.push(tokens)
            if completion is not None:
                rest = _finish(detokenizer, completion)
                count, text = count + rest.tokens, text + rest.text
            if count or text:
                message.offset = sent
                del chunk.token_ids[:]
                chunk.token_ids.extend(feed.tokens[sent : sent + count])
                chunk.text = text
                if feed.logprobs:
                    del chunk.logprobs[:]
                    chunk.logprobs.extend(feed.logprobs[sent : sent + count])
                await call.write(message)
                sent += count
                last_s = self._sent(call, count, last_s)
            if completion is not None:
                await call.write(response(request_id=request_id, offset=sent, complete=completion))
                reason = generation_pb2.FinishReason.Name(completion.finish_reason)
                self._metrics.requests.labels(reason.removeprefix("FINISH_REASON_")).inc()
                call.fields["finish_reason"] = reason.removeprefix("FINISH_REASON_")
                call.fields["queue_ms"] = round(completion.timing.queue_time_ms, 1)
                call.fields["preemptions"] = completion.timing.preemptions
                return

    def _sent(self, call: Call, tokens: int, last_s: float) -> float:
        """Counts a chunk that was written; returns when that was."""
        now_s = time.monotonic()
        if tokens:
            call.output_tokens += tokens
            if last_s == 0.0:
                self._metrics.flow.first(tokens)
                call.fields["ttft_ms"] = round((now_s - call.began_s) * 1e3, 1)
                if "offset" not in call.fields:
                    self._metrics.time_to_first_token.observe(now_s - call.began_s)
            else:
                self._metrics.flow.further(tokens, now_s - last_s)
        return now_s

    def _detokenizer(self, stops: Stops, before: Sequence[int]) -> Detokenizer:
        return Detokenizer(self._tokenizer.decoder(before), stops.strings, stops.token_ids)

    def _end_of(self, packed_prompt: bytes) -> Sequence[int]:
        """The prompt's last tokens, as many as decoding what follows takes."""
        tokens = self._tokenizer.context_tokens
        return unpack(packed_prompt[-4 * tokens :]) if tokens else ()

    def _stops_from(self, stopping: generation_pb2.StoppingParams) -> Stops:
        eos = frozenset[int]() if stopping.ignore_eos else self._tokenizer.limits.eos_token_ids
        return Stops(tuple(stopping.stop), frozenset(stopping.stop_token_ids) | eos)

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise shutting_down()


def _finish(detokenizer: Detokenizer, completion: generation_pb2.Complete) -> Release:
    token_id = completion.matched_stop_token_id if completion.HasField("matched_stop_token_id") else None
    return detokenizer.finish(completion.matched_stop, token_id)


def _offset_beyond(offset: int, output_tokens: int) -> OutOfRange:
    return OutOfRange(
        f"offset: {offset} lies beyond the {output_tokens} tokens of the output",
        metadata={"output_tokens": output_tokens},
        violations=(FieldViolation("offset", f"must be at most {output_tokens}"),),
    )


def _streams_full(most: int) -> LapsError:
    return ResourceExhausted(
        f"the gateway serves {most} streams, as many as it may; come back later",
        reason=Reason.STREAMS_FULL,
        retry_after_s=RETRY_AFTER_S,
        quota_subject="max_streams",
        metadata={"limit": most},
    )
