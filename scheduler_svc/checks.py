"""What comes from workers and gateways is looked at before the core sees it.

They are services of ours, but one of them may be broken, or not be what it says. What cannot be is refused
as a whole, so that no number of it reaches an estimate, a queue's order or the store. Rows that contradict
what is stored are the core's to refuse (`core/steps.py`): they end a lease and not a session.
"""

from __future__ import annotations

import math
import re

from laps.errors import InvalidArgument
from laps.limits import INT32_MAX, MAX_LOGPROBS, MAX_PRIORITY, MAX_REQUEST_ID_CHARS
from laps.security.principal import TENANT_NAME, TENANT_SEPARATOR
from laps.v1 import scheduler_pb2, worker_pb2

MAX_SLOTS = 4096
MAX_TEXT_CHARS = 1024
MAX_SECONDS = 1e6
MAX_ERROR_CHARS = 512
MAX_TRACEPARENT_CHARS = 128

_SAMPLING_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
_ID = re.compile(r"[A-Za-z0-9._/-]{1,128}")
_REQUEST_ID = re.compile(
    rf"(?:{TENANT_NAME.pattern}{TENANT_SEPARATOR})?[A-Za-z0-9._-]{{1,{MAX_REQUEST_ID_CHARS}}}"
)


def check_hello(hello: worker_pb2.WorkerHello) -> None:
    """Raises InvalidArgument for what no worker of ours would say of itself."""
    if not _ID.fullmatch(hello.worker_id):
        raise InvalidArgument("hello.worker_id", "must have 1 to 128 of [A-Za-z0-9._/-]")
    if not 1 <= hello.slots <= MAX_SLOTS:
        raise InvalidArgument("hello.slots", f"must be between 1 and {MAX_SLOTS}, not {hello.slots}")
    for name in ("device", "target", "draft", "model_fingerprint"):
        if len(getattr(hello, name)) > MAX_TEXT_CHARS:
            raise InvalidArgument(f"hello.{name}", f"must have at most {MAX_TEXT_CHARS} characters")
    for name in ("vocabulary_size", "context_tokens"):
        if getattr(hello, name) > INT32_MAX:
            raise InvalidArgument(f"hello.{name}", f"must be at most {INT32_MAX}")
    _check_costs("hello.costs", hello.costs)


def check_report(report: worker_pb2.StepReport) -> None:
    """Raises InvalidArgument for a report that no engine makes, whatever its requests are."""
    timings = report.timings
    _check_seconds("report.timings", "step_s", timings.step_s)
    if timings.HasField("costs"):
        _check_costs("report.timings.costs", timings.costs)
    # Mostly there are none, and to go through an empty map runs Python code of the library.
    for row, logprobs in report.logprobs.items() if report.logprobs else ():
        emitted = report.emitted_counts[row] if row < len(report.emitted_counts) else 0
        if len(logprobs.logprobs) != emitted:
            raise InvalidArgument(
                "report.logprobs", f"row {row} has {len(logprobs.logprobs)} for {emitted} tokens"
            )
        if any(len(each.top) > MAX_LOGPROBS for each in logprobs.logprobs):
            raise InvalidArgument("report.logprobs", f"at most {MAX_LOGPROBS} alternatives can be asked for")
    for finish in report.finishes:
        if len(finish.matched_stop) > MAX_TEXT_CHARS:
            raise InvalidArgument("report.finishes", f"a stop string has at most {MAX_TEXT_CHARS} characters")
    for error in report.errors:
        # Shown to the client and kept in the store.
        if len(error.message) > MAX_ERROR_CHARS:
            error.message = error.message[:MAX_ERROR_CHARS]


def check_spec(spec: scheduler_pb2.RequestSpec) -> None:
    """Raises InvalidArgument for what no gateway of ours lets through."""
    if not _REQUEST_ID.fullmatch(spec.request_id):
        raise InvalidArgument(
            "spec.request_id", "must have 1 to 128 of [A-Za-z0-9._-], after TENANT: if it has one"
        )
    if not spec.prompt_token_ids or len(spec.prompt_token_ids) % 4:
        raise InvalidArgument("spec.prompt_token_ids", "must be whole tokens, at least one")
    if spec.stopping.max_tokens < 1:
        raise InvalidArgument("spec.stopping.max_tokens", "must be at least 1")
    if not -MAX_PRIORITY <= spec.priority <= MAX_PRIORITY:
        raise InvalidArgument("spec.priority", f"must be between {-MAX_PRIORITY} and {MAX_PRIORITY}")
    if spec.request_class and not _ID.fullmatch(spec.request_class):
        raise InvalidArgument("spec.request_class", "must have at most 128 of [A-Za-z0-9._/-]")
    if len(spec.traceparent) > MAX_TRACEPARENT_CHARS:
        raise InvalidArgument("spec.traceparent", f"must have at most {MAX_TRACEPARENT_CHARS} characters")
    for name in ("disconnect_grace_s", "deadline_s"):
        value = getattr(spec, name)
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgument(f"spec.{name}", f"must be a finite number of at least 0, not {value}")
    for number in _SAMPLING_NUMBERS:
        if not math.isfinite(getattr(spec.sampling, number)):
            raise InvalidArgument(f"spec.sampling.{number}", "must be a finite number")
    if not all(map(math.isfinite, spec.sampling.logit_bias.values())):
        raise InvalidArgument("spec.sampling.logit_bias", "must be finite numbers")


def _check_costs(field: str, costs: worker_pb2.StepCosts) -> None:
    _check_seconds(field, "draft_token_s", costs.draft_token_s)
    _check_seconds(field, "verify_s", costs.verify_s)
    _check_seconds(field, "prefill_token_s", costs.prefill_token_s)
    _check_seconds(field, "switch_s", costs.switch_s)


def _check_seconds(field: str, name: str, value: float) -> None:
    # Also refuses NaN, which is neither.
    if not 0 <= value <= MAX_SECONDS:
        raise InvalidArgument(f"{field}.{name}", f"must be between 0 and {MAX_SECONDS:g} s, not {value}")
