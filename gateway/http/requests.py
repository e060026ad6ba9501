"""From a body in OpenAI's terms to GenerateRequests, and back from their fields to its parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.duration_pb2 import Duration

from gateway.http.body import (
    UINT32_MAX,
    Fields,
    as_list,
    as_number,
    as_object,
    as_text,
    as_token_ids,
    as_whole,
    shown,
)
from gateway.http.errors import Refusal, invalid
from gateway.http.parameters import Endpoint, check_parameters
from gateway.validation import MAX_BIASED_TOKENS
from laps.limits import MAX_REQUEST_ID_CHARS
from laps.v1 import generation_pb2, inference_pb2

DEFAULT_TEMPERATURE = 1.0
"""OpenAI's. Over gRPC an absent temperature means greedy."""
_MAX_TIMEOUT_S = 1e9
MAX_OUTPUTS = 128
"""Of one call, of all its prompts together: as many as OpenAI's `n` may be."""
_LAPS_FIELDS = frozenset(
    ("priority", "request_class", "predicted_output_tokens", "timeout_s", "cancel_on_disconnect")
)
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_MESSAGE_FIELDS = frozenset(("role", "content", "name"))
"""`name` is taken and not used: hardly a chat template has a place for it."""
_ROLES = {"developer": "system"}
"""What OpenAI calls a system message since its reasoning models; chat templates know the old name."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client wants, and in which form."""

    endpoint: Endpoint
    requests: list[inference_pb2.GenerateRequest]
    """One for each prompt."""
    outputs_per_prompt: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    names: dict[str, str] = field(default_factory=dict)
    """The client's parameter for a field of the request, where the last part of its path does not say it."""

    @property
    def outputs(self) -> int:
        return len(self.requests) * self.outputs_per_prompt

    @property
    def request_id(self) -> str:
        """The client's own, of all outputs together; empty: there is none."""
        return self.requests[0].request_id

    def output(self, index: int) -> inference_pb2.GenerateRequest:
        """The request of one output, in the order of the answer's choices: all of the first prompt, then
        those of the second. Of several, each has an id of its own where the client has given one, and each of
        one prompt another seed where it has given one."""
        place, number = divmod(index, self.outputs_per_prompt)
        if self.outputs == 1:
            return self.requests[0]
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self.requests[place])
        if request.request_id:
            request.request_id += f"-{index}"
        if request.sampling.HasField("seed"):
            request.sampling.seed = (request.sampling.seed + number) % (1 << 64)
        return request

    def param_of(self, path: str) -> str:
        """`stopping.stop[1]` is `stop[1]` here, `messages.messages[0].role` is `messages[0].role`."""
        index = re.search(r"\[.*", path)
        tail = index.group() if index else ""
        name = path.removesuffix(tail)
        return self.names.get(name, name.rpartition(".")[2]) + tail


def read_request(body: dict[str, Any], endpoint: Endpoint, request_id: str) -> Asked:
    """Raises Refusal with the parameter's name. What the model allows is judged later, as for gRPC."""
    fields = Fields(body)
    check_parameters(fields, endpoint)
    chat = endpoint is Endpoint.CHAT
    names = {
        "messages.messages": "messages",
        "text": "prompt",
        "token_ids.ids": "prompt",
        "prompt": "messages" if chat else "prompt",
        "sampling.logprobs": "top_logprobs" if chat else "logprobs",
        "timeout": "laps.timeout_s",
    }
    names |= {name: f"laps.{name}" for name in _LAPS_FIELDS}
    request = inference_pb2.GenerateRequest(request_id=request_id, model=fields.text("model") or "")
    per_prompt = fields.whole("n", 1, MAX_OUTPUTS) or 1
    prompts = [None] if chat else _prompts(fields)
    outputs = len(prompts) * per_prompt
    if outputs > MAX_OUTPUTS:
        name = "prompt" if len(prompts) > MAX_OUTPUTS else "n"
        raise invalid(name, f"must come to at most {MAX_OUTPUTS} outputs in all, not {outputs}")
    if outputs > 1 and len(f"{request_id}-{outputs - 1}") > MAX_REQUEST_ID_CHARS:
        # No name to come back to, as with every other one that cannot be ours.
        request.request_id = ""
    if chat:
        _read_messages(fields, request.messages)
    _read_sampling(fields, request.sampling, chat=chat)
    names["stopping.max_tokens"] = _read_stopping(fields, request.stopping)
    _read_own(fields.object("laps"), request)
    stream = fields.flag("stream") or False
    return Asked(
        endpoint=endpoint,
        requests=[request] if chat else _with_prompts(request, prompts),
        outputs_per_prompt=per_prompt,
        stream=stream,
        include_usage=_read_stream_options(fields, stream),
        logprobs=request.sampling.HasField("logprobs"),
        names=names,
    )


def _read_messages(fields: Fields, messages: generation_pb2.ChatMessages) -> None:
    for index, message in enumerate(fields.items("messages")):
        path = f"messages[{index}]"
        turn = Fields(as_object(path, message), f"{path}.")
        for name in turn:
            if name not in _MESSAGE_FIELDS and turn.raw(name) != []:
                raise Refusal(turn.path(shown(name)), "is not supported: text only", "unsupported_parameter")
        role = turn.text("role") or ""
        content = _content(turn.path("content"), turn.raw("content"))
        messages.messages.add(role=_ROLES.get(role, role), content=content)
    # Also when there are none: the prompt is then an empty chat, and refused as such.
    messages.SetInParent()


def _content(param: str, content: Any) -> str:
    if not isinstance(content, list):
        return as_text(param, content)
    texts = []
    for index, part in enumerate(content):
        fields = Fields(as_object(f"{param}[{index}]", part), f"{param}[{index}].")
        if fields.text("type") != "text":
            raise Refusal(fields.path("type"), "is not supported: text only", "unsupported_parameter")
        texts.append(fields.text("text") or "")
    return "".join(texts)


def _prompts(fields: Fields) -> list[Any]:
    """A string or a list of token ids is one prompt, a list of those are several."""
    given = fields.raw("prompt")
    if isinstance(given, list) and given and not isinstance(given[0], int):
        return given
    return [given]


def _with_prompts(
    template: inference_pb2.GenerateRequest, prompts: list[Any]
) -> list[inference_pb2.GenerateRequest]:
    requests = []
    for place, prompt in enumerate(prompts):
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(template)
        _read_prompt("prompt" if len(prompts) == 1 else f"prompt[{place}]", prompt, request)
        requests.append(request)
    return requests


def _read_prompt(param: str, prompt: Any, request: inference_pb2.GenerateRequest) -> None:
    if isinstance(prompt, list):
        request.token_ids.ids.extend(as_token_ids(param, prompt))
        request.token_ids.SetInParent()
    elif prompt is not None:
        request.text = as_text(param, prompt)
    else:
        raise Refusal(param, "must be given: a string or a list of token ids", "prompt_empty")


def _read_sampling(fields: Fields, sampling: generation_pb2.SamplingParams, *, chat: bool) -> None:
    temperature = fields.number("temperature")
    sampling.temperature = DEFAULT_TEMPERATURE if temperature is None else temperature
    for name in ("top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
        if (number := fields.number(name)) is not None:
            setattr(sampling, name, number)
    _read_biases(fields.object("logit_bias"), sampling)
    if (top_k := fields.whole("top_k")) is not None:
        sampling.top_k = top_k
    if (seed := fields.whole("seed", -(1 << 63), (1 << 64) - 1)) is not None:
        # OpenAI's seeds have a sign; every one of them is another seed here as well.
        sampling.seed = seed % (1 << 64)
    logprobs = _logprobs_of_chat(fields) if chat else fields.whole("logprobs")
    if logprobs is not None:
        sampling.logprobs = logprobs


def _read_biases(biases: Fields, sampling: generation_pb2.SamplingParams) -> None:
    if len(biases) > MAX_BIASED_TOKENS:
        raise invalid("logit_bias", f"must be at most {MAX_BIASED_TOKENS} tokens, not {len(biases)}")
    for name in biases:
        # As Python reads numbers, several names would be one token's.
        if not _TOKEN_ID.fullmatch(name):
            raise invalid("logit_bias", f"{shown(name)!r} is not a token id")
        param = f"logit_bias[{name}]"
        token_id = as_whole(param, int(name), 0, UINT32_MAX)
        sampling.logit_bias[token_id] = as_number(param, biases.raw(name))


def _logprobs_of_chat(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs")
    if top and not wanted:
        raise invalid("top_logprobs", "needs logprobs to be true")
    return (top or 0) if wanted else None


def _read_stopping(fields: Fields, stopping: generation_pb2.StoppingParams) -> str:
    """Returns the parameter that bounds the output."""
    names = ("max_tokens", "max_completion_tokens")
    if all(name in fields for name in names):
        raise invalid("max_tokens", "is the same as max_completion_tokens; give one of them")
    bound = next((name for name in names if name in fields), "max_tokens")
    if (max_tokens := fields.whole(bound)) is not None:
        stopping.max_tokens = max_tokens
    if (min_tokens := fields.whole("min_tokens")) is not None:
        stopping.min_tokens = min_tokens
    stop = fields.raw("stop")
    if isinstance(stop, str):
        stopping.stop.append(as_text("stop", stop))
    elif stop is not None:
        texts = as_list("stop", stop)
        stopping.stop.extend(as_text(f"stop[{index}]", text) for index, text in enumerate(texts))
    stopping.stop_token_ids.extend(as_token_ids("stop_token_ids", fields.items("stop_token_ids")))
    stopping.ignore_eos = fields.flag("ignore_eos") or False
    return bound


def _read_own(own: Fields, request: inference_pb2.GenerateRequest) -> None:
    for name in own:
        if name not in _LAPS_FIELDS:
            raise Refusal(own.path(shown(name)), "is not a parameter", "unknown_parameter")
    request.priority = own.whole("priority") or 0
    request.request_class = own.text("request_class") or ""
    if (predicted := own.whole("predicted_output_tokens")) is not None:
        request.predicted_output_tokens = predicted
    if (cancels := own.flag("cancel_on_disconnect")) is not None:
        request.cancel_on_disconnect = cancels
    if (timeout_s := own.number("timeout_s")) is not None:
        if not 0 < timeout_s <= _MAX_TIMEOUT_S:
            raise invalid("laps.timeout_s", f"must be more than 0 and at most {_MAX_TIMEOUT_S:g} s")
        timeout = Duration()
        timeout.FromNanoseconds(max(int(timeout_s * 1e9), 1))
        request.timeout.CopyFrom(timeout)


def _read_stream_options(fields: Fields, stream: bool) -> bool:
    """Whether the usage is wanted at the stream's end."""
    options = fields.object("stream_options")
    if "stream_options" in fields and not stream:
        raise invalid("stream_options", "says something only when stream is true")
    for name in options:
        # Obfuscation hides the lengths of tokens from those who watch an encrypted stream.
        if name not in ("include_usage", "include_obfuscation"):
            raise Refusal(options.path(shown(name)), "is not a parameter", "unknown_parameter")
    return options.flag("include_usage") or False
