"""Answers as the two endpoints shape them: whole, and in pieces."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from google.protobuf.json_format import MessageToDict

from gateway.http import logprobs
from gateway.http.parameters import Endpoint
from laps.errors import Cancelled, Internal, Reason
from laps.v1 import generation_pb2

Json = dict[str, Any]

_FINISH_REASONS = {
    generation_pb2.FINISH_REASON_STOP: "stop",
    generation_pb2.FINISH_REASON_LENGTH: "length",
    # OpenAI has no word for it. What there is until then stands, and `laps` says why it ends.
    generation_pb2.FINISH_REASON_DEADLINE: "length",
}


@dataclass(frozen=True, slots=True)
class Ended:
    """One output, whole."""

    request_id: str
    text: str
    entries: Iterable[logprobs.Entry] | None
    """None: log-probabilities were not asked for."""
    complete: generation_pb2.Complete


class Shape(ABC):
    """One answer, whose outputs are told apart by their index."""

    id_prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    piece_kind: ClassVar[str]

    def __init__(self, model_name: str, request_id: str, outputs: int, outputs_per_prompt: int) -> None:
        self._outputs = outputs
        self._outputs_per_prompt = outputs_per_prompt
        self._envelope: Json = {
            "id": f"{self.id_prefix}-{request_id}",
            "object": self.piece_kind,
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, outputs: Sequence[Ended]) -> Json:
        """All outputs, in order."""
        choices = [
            self._choice(index, self._message(each.text), each.entries, finish_reason(each.complete))
            for index, each in enumerate(outputs)
        ]
        told = [self._own(each.request_id, each.complete) for each in outputs]
        answer = {
            "choices": choices,
            "usage": self._usage([each.complete for each in outputs]),
            "laps": told[0] if self._outputs == 1 else {"outputs": told},
        }
        return self._envelope | {"object": self.whole_kind} | answer

    @abstractmethod
    def opening(self) -> list[Json]:
        """Pieces that come before any text."""

    def piece(self, index: int, text: str, entries: Iterable[logprobs.Entry] | None) -> Json:
        return self._envelope | {"choices": [self._choice(index, self._delta(text), entries, None)]}

    def last_piece(self, index: int, request_id: str, complete: generation_pb2.Complete) -> Json:
        """Of that output."""
        choice = self._choice(index, self._delta(None), None, finish_reason(complete))
        return self._envelope | {"choices": [choice], "laps": self._own(request_id, complete)}

    def usage_piece(self, completes: Sequence[generation_pb2.Complete]) -> Json:
        return self._envelope | {"choices": [], "usage": self._usage(completes)}

    def _usage(self, completes: Sequence[generation_pb2.Complete]) -> Json:
        """Of all outputs; a prompt counts once, whatever is made of it."""
        prompts = [each.usage for each in completes[:: self._outputs_per_prompt]]
        prompt_tokens = sum(each.prompt_tokens for each in prompts)
        output_tokens = sum(each.usage.completion_tokens for each in completes)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in prompts)},
        }

    def _own(self, request_id: str, complete: generation_pb2.Complete) -> Json:
        # Of several outputs each is a request with an id of its own.
        return own(complete) if self._outputs == 1 else {"request_id": request_id} | own(complete)

    @abstractmethod
    def _message(self, text: str) -> Json: ...

    @abstractmethod
    def _delta(self, text: str | None) -> Json: ...

    @abstractmethod
    def _logprobs(self, entries: Iterable[logprobs.Entry]) -> Json: ...

    def _choice(
        self, index: int, content: Json, entries: Iterable[logprobs.Entry] | None, finish: str | None
    ) -> Json:
        told = None if entries is None else self._logprobs(entries)
        return {"index": index} | content | {"logprobs": told, "finish_reason": finish}


class ChatShape(Shape):
    id_prefix = "chatcmpl"
    whole_kind = "chat.completion"
    piece_kind = "chat.completion.chunk"

    def opening(self) -> list[Json]:
        delta = {"delta": {"role": "assistant", "content": ""}}
        return [
            self._envelope | {"choices": [self._choice(index, delta, None, None)]}
            for index in range(self._outputs)
        ]

    def _message(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str | None) -> Json:
        return {"delta": {} if text is None else {"content": text}}

    def _logprobs(self, entries: Iterable[logprobs.Entry]) -> Json:
        return logprobs.for_chat(entries)


class TextShape(Shape):
    id_prefix = "cmpl"
    whole_kind = "text_completion"
    piece_kind = "text_completion"

    def opening(self) -> list[Json]:
        return []

    def _message(self, text: str) -> Json:
        return {"text": text}

    def _delta(self, text: str | None) -> Json:
        return {"text": text or ""}

    def _logprobs(self, entries: Iterable[logprobs.Entry]) -> Json:
        return logprobs.for_completions(entries)


SHAPES: dict[Endpoint, type[Shape]] = {Endpoint.CHAT: ChatShape, Endpoint.COMPLETIONS: TextShape}


def finish_reason(complete: generation_pb2.Complete) -> str:
    return _FINISH_REASONS[complete.finish_reason]


def check_finished(complete: generation_pb2.Complete) -> None:
    """Raises the error that stands for an end which OpenAI has no finish reason for."""
    if complete.finish_reason == generation_pb2.FINISH_REASON_CANCELLED:
        raise Cancelled("the request was cancelled", reason=Reason.CANCELLED)
    if complete.finish_reason not in _FINISH_REASONS:
        raise Internal(f"the request could not be finished: {complete.error or 'no reason was given'}")


def own(complete: generation_pb2.Complete) -> Json:
    """What only LAPS has to tell, under a name of its own."""
    told: Json = {
        "finish_reason": generation_pb2.FinishReason.Name(complete.finish_reason)
        .removeprefix("FINISH_REASON_")
        .lower(),
        "timing": _plain(complete.timing),
        "speculation": _plain(complete.speculation),
    }
    if complete.matched_stop:
        told["matched_stop"] = complete.matched_stop
    if complete.HasField("matched_stop_token_id"):
        told["matched_stop_token_id"] = complete.matched_stop_token_id
    return told


def _plain(message: generation_pb2.Timing | generation_pb2.SpeculationStats) -> Json:
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
