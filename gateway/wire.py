"""Says what is wrong with bytes that are no message of a given type: which field, and why.

Protobuf's own parser says only that it failed. This one runs after that, so it may be slow; but it gives up
on what has very many fields, which no client of ours sends and which would hold up everybody else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from google.protobuf.descriptor import Descriptor, FieldDescriptor

_VARINT, _FIXED64, _BYTES, _START_GROUP, _END_GROUP, _FIXED32 = range(6)
_MAX_DEPTH = 64
_MAX_VARINT_BYTES = 10
_MAX_FIELDS = 10_000
"""Some ten milliseconds."""


class _Fault(Exception):
    def __init__(self, reason: str) -> None:
        self.path: list[str] = []
        self.reason = reason


class _GivenUp(Exception):
    pass


def find_fault(data: bytes, message: Descriptor) -> tuple[str, str]:
    """(field path, reason). The path is empty where the fault lies outside any known field."""
    try:
        _scan(data, message, 0, itertools.count())
    except _Fault as fault:
        return ".".join(reversed(fault.path)), fault.reason
    except _GivenUp:
        pass
    return "", f"is not a {message.full_name}"


def _scan(data: bytes, message: Descriptor, depth: int, fields: Iterator[int]) -> None:
    if depth > _MAX_DEPTH:
        raise _Fault("is nested too deeply")
    position = 0
    while position < len(data):
        if next(fields) > _MAX_FIELDS:
            raise _GivenUp
        tag, position = _varint(data, position)
        field = message.fields_by_number.get(tag >> 3)
        try:
            position = _scan_value(data, position, tag & 7, field, depth, fields)
        except _Fault as fault:
            if field is not None:
                fault.path.append(field.name)
            raise


def _scan_value(
    data: bytes,
    position: int,
    kind: int,
    field: FieldDescriptor | None,
    depth: int,
    fields: Iterator[int],
) -> int:
    if kind == _VARINT:
        return _varint(data, position)[1]
    if kind in (_FIXED64, _FIXED32):
        return _advance(data, position, 8 if kind == _FIXED64 else 4)
    if kind != _BYTES:
        raise _Fault("has a wire type that does not exist")
    length, start = _varint(data, position)
    end = _advance(data, start, length)
    if field is not None and field.type == FieldDescriptor.TYPE_STRING:
        try:
            data[start:end].decode()
        except UnicodeDecodeError as error:
            raise _Fault(f"is not valid UTF-8 at byte {error.start}") from None
    elif field is not None and field.message_type is not None:
        _scan(data[start:end], field.message_type, depth + 1, fields)
    return end


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= len(data):
            raise _Fault("is cut short")
        byte = data[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise _Fault("has a number of more than ten bytes")


def _advance(data: bytes, position: int, length: int) -> int:
    if position + length > len(data):
        raise _Fault("is cut short")
    return position + length
