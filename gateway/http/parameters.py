"""Every parameter that OpenAI's clients may send, and what becomes of it, as docs/openai.md shows it.

Three kinds. One that is used. One that is ignored, as nothing in the output depends on it. One
that is refused by name, as without it the output would silently be another one than asked for.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from typing import Any

from gateway.http.body import Fields, shown
from gateway.http.errors import Refusal


class Endpoint(enum.Enum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class Fate(enum.Enum):
    USED = "used"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    fate: Fate
    note: str
    endpoints: tuple[Endpoint, ...] = (Endpoint.CHAT, Endpoint.COMPLETIONS)
    harmless: tuple[Any, ...] = ()
    """Values of a refused one that ask for nothing."""


_CHAT = (Endpoint.CHAT,)
_COMPLETIONS = (Endpoint.COMPLETIONS,)

PARAMETERS = (
    Parameter("model", Fate.USED, "The model's name; without it, the only model."),
    Parameter("messages", Fate.USED, "Text only: strings or parts of type `text`.", _CHAT),
    Parameter(
        "prompt", Fate.USED, "A string or a list of token ids, or a list of such prompts.", _COMPLETIONS
    ),
    Parameter("n", Fate.USED, "So many outputs of each prompt; 128 in all."),
    Parameter("stream", Fate.USED, "Server-sent events."),
    Parameter("stream_options", Fate.USED, "`include_usage`."),
    Parameter("max_tokens", Fate.USED, "Without it `default_max_tokens`, or what the context leaves."),
    Parameter("max_completion_tokens", Fate.USED, "The newer name of `max_tokens`; give one of them."),
    Parameter("temperature", Fate.USED, "1 without it, as at OpenAI; 0 is greedy."),
    Parameter("top_p", Fate.USED, "Above 0 and at most 1."),
    Parameter("seed", Fate.USED, "The same output whenever model, prompt and parameters are the same."),
    Parameter("stop", Fate.USED, "A string or up to 16; the text ends before it."),
    Parameter(
        "logprobs", Fate.USED, "Chat: true or false. Completions: how many of the likeliest, up to 20."
    ),
    Parameter("top_logprobs", Fate.USED, "Up to 20.", _CHAT),
    Parameter("top_k", Fate.USED, "Not OpenAI's. Keep the k likeliest tokens; 0 keeps all."),
    Parameter("min_p", Fate.USED, "Not OpenAI's. Keep tokens this share as likely as the likeliest."),
    Parameter(
        "repetition_penalty",
        Fate.USED,
        "Not OpenAI's. Divides the score of tokens already seen; 0.01 to 100.",
    ),
    Parameter(
        "frequency_penalty",
        Fate.USED,
        "Lowers a token's score for each time that the output has it; -2 to 2.",
    ),
    Parameter("presence_penalty", Fate.USED, "Lowers the score of tokens that the output has; -2 to 2."),
    Parameter("logit_bias", Fate.USED, "By token id: added to its score, -100 to 100. Up to 300 tokens."),
    Parameter("min_tokens", Fate.USED, "Not OpenAI's. The output does not end before it."),
    Parameter("stop_token_ids", Fate.USED, "Not OpenAI's. Tokens that end the output."),
    Parameter("ignore_eos", Fate.USED, "Not OpenAI's. Go on past the model's own end."),
    Parameter(
        "laps",
        Fate.USED,
        "Not OpenAI's. An object of `priority`, `request_class`, `predicted_output_tokens`, `timeout_s`, "
        "`cancel_on_disconnect`.",
    ),
    Parameter("user", Fate.IGNORED, "Who asks."),
    Parameter("safety_identifier", Fate.IGNORED, "Who asks."),
    Parameter("metadata", Fate.IGNORED, "Labels."),
    Parameter("store", Fate.IGNORED, "Whether OpenAI keeps the answer."),
    Parameter("service_tier", Fate.IGNORED, "Billing."),
    Parameter("prompt_cache_key", Fate.IGNORED, "A hint for caching."),
    Parameter("prompt_cache_retention", Fate.IGNORED, "A hint for caching."),
    Parameter("prediction", Fate.IGNORED, "A hint for speed; the draft model does its work.", _CHAT),
    Parameter("parallel_tool_calls", Fate.IGNORED, "Says nothing without tools.", _CHAT),
    Parameter("best_of", Fate.REFUSED, "Every output is told; see `n`.", _COMPLETIONS, (1,)),
    Parameter("echo", Fate.REFUSED, "The prompt is not repeated.", _COMPLETIONS, (False,)),
    Parameter("suffix", Fate.REFUSED, "No insertion.", _COMPLETIONS, ("",)),
    Parameter("tools", Fate.REFUSED, "No tools.", _CHAT, ([],)),
    Parameter("tool_choice", Fate.REFUSED, "No tools.", _CHAT, ("none", "auto")),
    Parameter("functions", Fate.REFUSED, "No tools.", _CHAT, ([],)),
    Parameter("function_call", Fate.REFUSED, "No tools.", _CHAT, ("none", "auto")),
    Parameter(
        "response_format", Fate.REFUSED, "Text is not forced into a form.", harmless=({"type": "text"},)
    ),
    Parameter("modalities", Fate.REFUSED, "Text only.", _CHAT, (["text"],)),
    Parameter("audio", Fate.REFUSED, "Text only.", _CHAT),
    Parameter("reasoning_effort", Fate.REFUSED, "The models have no such setting.", _CHAT, ("none",)),
    Parameter("verbosity", Fate.REFUSED, "The models have no such setting.", _CHAT, ("medium",)),
    Parameter("web_search_options", Fate.REFUSED, "No search.", _CHAT),
)
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def check_parameters(fields: Fields, endpoint: Endpoint) -> None:
    """Raises Refusal for what would change the output and cannot be had, and for names that nobody knows."""
    for name in fields:
        parameter = _BY_NAME.get(name)
        if parameter is None or endpoint not in parameter.endpoints:
            raise Refusal(shown(name), f"is not a parameter of {endpoint.value}", "unknown_parameter")
        if parameter.fate is Fate.REFUSED and not _is_harmless(fields.raw(name), parameter):
            allowed = " or ".join(json.dumps(value) for value in parameter.harmless)
            hint = f" (only {allowed} is taken)" if allowed else ""
            raise Refusal(name, f"is not supported{hint}: {parameter.note}", "unsupported_parameter")


def _is_harmless(value: Any, parameter: Parameter) -> bool:
    # In Python 1 is True and 0 is False; in JSON they are not.
    return any(
        value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
        for harmless in parameter.harmless
    )
