"""Errors that cross the wire: gRPC statuses with google.rpc details, and back.

A server raises one of these (or calls `abort`); a client gets the same class, reason and numbers from
`from_rpc_error`. The reasons stand in `laps.reasons`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from laps.reasons import Reason as Reason

if TYPE_CHECKING:
    import grpc
    from google.rpc import status_pb2

DOMAIN = "laps"
_DETAILS_KEY = "grpc-status-details-bin"
# gRPC refuses more than 8 KiB of headers; the message travels in them twice, once percent-encoded.
_MAX_MESSAGE_CHARS = 512
_MAX_VIOLATIONS = 8
_MAX_VALUE_CHARS = 256


class LocalError(Exception):
    """Its message is one clear line for a person; the command line shows it without a traceback."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """`field` is a path such as "sampling.temperature"."""

    field: str
    description: str


class LapsError(LocalError):
    """An error with a reason. Subclasses are one per gRPC status; `status` is the status' name."""

    default_reason: ClassVar[Reason] = Reason.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        metadata: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
        violations: Sequence[FieldViolation] = (),
        resource_type: str = "",
        resource_name: str = "",
        quota_subject: str = "",
        status: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.status = status or self.reason.status
        self.metadata = {key: str(value) for key, value in (metadata or {}).items()}
        self.retry_after_s = retry_after_s
        self.violations = tuple(violations)
        self.resource_type = resource_type
        self.resource_name = resource_name
        self.quota_subject = quota_subject
        self.from_transport = False
        """Made by gRPC on the way and not by one of our services."""

    @property
    def code(self) -> grpc.StatusCode:
        import grpc

        return grpc.StatusCode[self.status]


class InvalidArgument(LapsError):
    """A field's value cannot be."""

    default_reason = Reason.FIELD_INVALID

    def __init__(self, field: str, message: str, *, reason: Reason | None = None, **metadata: Any) -> None:
        super().__init__(
            f"{field}: {message}" if field else message,
            reason=reason,
            metadata=metadata,
            violations=(FieldViolation(field, message),) if field else (),
        )
        self.field = field


class NotFound(LapsError):
    default_reason = Reason.REQUEST_UNKNOWN


class AlreadyExists(LapsError):
    default_reason = Reason.REQUEST_ID_REUSED


class ResourceExhausted(LapsError):
    """At a bound; `retry_after_s` says when to come back, `quota_subject` what is full."""

    default_reason = Reason.QUEUE_FULL


class Unavailable(LapsError):
    """Comes and goes by itself; the same call may succeed after `retry_after_s`."""

    default_reason = Reason.UNREACHABLE


class DeadlineExceeded(LapsError):
    default_reason = Reason.DEADLINE_PASSED


class OutOfRange(LapsError):
    default_reason = Reason.OFFSET_BEYOND_OUTPUT


class FailedPrecondition(LapsError):
    default_reason = Reason.MODEL_MISMATCH


class Aborted(LapsError):
    default_reason = Reason.EPOCH_STALE


class Cancelled(LapsError):
    default_reason = Reason.CANCELLED


class DataLoss(LapsError):
    default_reason = Reason.OUTPUT_INCOMPLETE


class Unauthenticated(LapsError):
    default_reason = Reason.UNAUTHENTICATED


class PermissionDenied(LapsError):
    default_reason = Reason.PERMISSION_DENIED


class Unimplemented(LapsError):
    default_reason = Reason.UNIMPLEMENTED


class Internal(LapsError):
    default_reason = Reason.INTERNAL


_CLASS_BY_STATUS: dict[str, type[LapsError]] = {
    cls.default_reason.status: cls
    for cls in (
        NotFound,
        AlreadyExists,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        OutOfRange,
        FailedPrecondition,
        Aborted,
        Cancelled,
        DataLoss,
        Unauthenticated,
        PermissionDenied,
        Unimplemented,
        Internal,
    )
}


def request_unknown(request_id: str) -> NotFound:
    """The NotFound of a request, the same from every service."""
    return NotFound(f"there is no request {request_id!r}", resource_type="request", resource_name=request_id)


def store_unreachable(message: str = "the store does not answer") -> Unavailable:
    """The Unavailable of a store that is away, the same from every service."""
    return Unavailable(message, reason=Reason.STORE_UNREACHABLE, retry_after_s=1.0)


def to_status(error: LapsError) -> status_pb2.Status:
    """The error as a google.rpc.Status with its details."""
    from google.rpc import error_details_pb2 as details
    from google.rpc import status_pb2

    status = status_pb2.Status(code=error.code.value[0], message=error.message[:_MAX_MESSAGE_CHARS])

    def add(detail: Any) -> None:
        status.details.add().Pack(detail)

    metadata = {key: value[:_MAX_VALUE_CHARS] for key, value in error.metadata.items()}
    add(details.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=metadata))
    if error.violations:
        add(
            details.BadRequest(
                field_violations=[
                    details.BadRequest.FieldViolation(
                        field=v.field, description=v.description[:_MAX_VALUE_CHARS]
                    )
                    for v in error.violations[:_MAX_VIOLATIONS]
                ]
            )
        )
    if error.retry_after_s is not None:
        retry = details.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(max(error.retry_after_s, 0.0) * 1e9))
        add(retry)
    if error.quota_subject:
        violation = details.QuotaFailure.Violation(
            subject=error.quota_subject, description=error.message[:_MAX_VALUE_CHARS]
        )
        add(details.QuotaFailure(violations=[violation]))
    if error.resource_type:
        add(details.ResourceInfo(resource_type=error.resource_type, resource_name=error.resource_name))
    return status


def trailing_metadata(error: LapsError) -> tuple[tuple[str, bytes], ...]:
    """What makes the details travel with a gRPC status."""
    return ((_DETAILS_KEY, to_status(error).SerializeToString()),)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: LapsError) -> NoReturn:
    """Ends the call with the error."""
    await context.abort(error.code, error.message[:_MAX_MESSAGE_CHARS], trailing_metadata(error))
    raise AssertionError("abort returned")


def rpc_error_of(status: bytes) -> grpc.aio.AioRpcError:
    """What a call would have ended with: for a serialized google.rpc.Status that came in a message."""
    import grpc.aio
    from google.rpc import status_pb2

    told = status_pb2.Status.FromString(status)
    code = next((code for code in grpc.StatusCode if code.value[0] == told.code), grpc.StatusCode.UNKNOWN)
    details = grpc.aio.Metadata((_DETAILS_KEY, status))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), details, told.message, None)


def from_rpc_error(error: grpc.RpcError) -> LapsError:
    """The LapsError that the server raised, or one made from the bare status."""
    call: Any = error
    status_name: str = call.code().name
    message: str = call.details() or ""
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            parsed = _parse_details(status_name, message, value)
            if parsed is not None:
                return parsed
    made = _make(status_name, None, message or status_name)
    made.from_transport = True
    return made


def _make(status: str, reason: Reason | None, message: str, **rest: Any) -> LapsError:
    if status == "INVALID_ARGUMENT":
        violations: tuple[FieldViolation, ...] = rest.pop("violations", ())
        made: LapsError = InvalidArgument("", message, reason=reason, **rest.pop("metadata", {}))
        made.violations = violations
        if violations and isinstance(made, InvalidArgument):
            made.field = violations[0].field
        return made
    return _CLASS_BY_STATUS.get(status, LapsError)(message, reason=reason, status=status, **rest)


def _parse_details(status_name: str, message: str, raw: bytes) -> LapsError | None:
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2 as details
    from google.rpc import status_pb2

    try:
        status = status_pb2.Status.FromString(raw)
    except DecodeError:
        return None
    reason: Reason | None = None
    rest: dict[str, Any] = {}
    info, bad, retry = details.ErrorInfo(), details.BadRequest(), details.RetryInfo()
    quota, resource = details.QuotaFailure(), details.ResourceInfo()
    for detail in status.details:
        if detail.Unpack(info):
            # A newer server may know reasons that we do not.
            reason = Reason.__members__.get(info.reason)
            rest["metadata"] = dict(info.metadata)
        elif detail.Unpack(bad):
            rest["violations"] = tuple(FieldViolation(v.field, v.description) for v in bad.field_violations)
        elif detail.Unpack(retry):
            rest["retry_after_s"] = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(quota) and quota.violations:
            rest["quota_subject"] = quota.violations[0].subject
        elif detail.Unpack(resource):
            rest["resource_type"], rest["resource_name"] = resource.resource_type, resource.resource_name
    return _make(status_name, reason, message or status.message, **rest)
