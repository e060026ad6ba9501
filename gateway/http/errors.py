"""Errors as OpenAI's clients know them: a status, and a body that names the parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from laps.errors import FieldViolation, InvalidArgument, LapsError, Reason

CLIENT_CLOSED_REQUEST = 499
"""No standard has a status for what was cancelled; this is the usual one."""

HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": CLIENT_CLOSED_REQUEST,
    "INTERNAL": 500,
    "DATA_LOSS": 500,
    "UNKNOWN": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

_CODES = {
    Reason.FIELD_INVALID: "invalid_value",
    Reason.PROMPT_TOO_LONG: "context_length_exceeded",
    Reason.MODEL_UNKNOWN: "model_not_found",
    Reason.UNAUTHENTICATED: "invalid_api_key",
    Reason.RATE_EXCEEDED: "rate_limit_exceeded",
}
"""Where OpenAI has a name that programs look for. The others are our reasons in small letters."""


class Refusal(InvalidArgument):
    """A request that only HTTP can make, refused with a status and a code of its own."""

    def __init__(
        self,
        param: str,
        message: str,
        code: str,
        http_status: int = 400,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(param, message)
        self.openai_code = code
        self.http_status = http_status
        self.headers = dict(headers or {})


def invalid(param: str, message: str) -> Refusal:
    return Refusal(param, message, "invalid_value")


def http_status(error: LapsError) -> int:
    if isinstance(error, Refusal):
        return error.http_status
    if error.reason is Reason.MESSAGE_TOO_LARGE:
        return 413
    return HTTP_STATUS.get(error.status, 500)


def error_body(error: LapsError, param_of: Callable[[str], str] = str) -> dict[str, Any]:
    """The body, `{"error": {...}}`. `param_of` turns a field of our contract into the client's parameter."""
    status = http_status(error)
    code = error.openai_code if isinstance(error, Refusal) else _CODES.get(error.reason)
    message, param = error.message, None
    if error.violations:
        # All of them can only be told in the message: OpenAI's shape has room for one parameter.
        told = [FieldViolation(param_of(each.field), each.description) for each in error.violations]
        param = told[0].field
        message = "; ".join(f"{each.field}: {each.description}" for each in told)
    elif error.reason is Reason.MODEL_UNKNOWN:
        param = "model"
    kind = _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": param,
            "code": code or error.reason.name.lower(),
        }
    }


def error_headers(error: LapsError) -> dict[str, str]:
    """When to come back, and whether that can help at all."""
    headers = dict(error.headers) if isinstance(error, Refusal) else {}
    if error.reason is Reason.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(math.ceil(error.retry_after_s), 0))
        # OpenAI's clients prefer this one, which can be less than a second.
        headers["Retry-After-Ms"] = str(max(round(error.retry_after_s * 1e3), 0))
    if error.status == "ALREADY_EXISTS":
        # Their clients try again after every 409.
        headers["X-Should-Retry"] = "false"
    return headers


def to_json(body: Any) -> bytes:
    """ASCII alone: many clients split a stream at every character that Unicode calls a line's end."""
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
