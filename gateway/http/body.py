"""A JSON body, read strictly, and its values with their types.

JSON as Python reads it takes NaN, keeps the last of two equal names and half of a surrogate
pair. Each of these would say something else here than where it was written, so they are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from gateway.http.errors import Refusal, invalid
from laps.limits import INT32_MAX

UINT32_MAX = (1 << 32) - 1
_MAX_TOLD_CHARS = 64
"""Of a name that is not ours, so much is repeated in an error."""
_MAX_PATH_CHARS = 256


class _NoNumber:
    """Stands where a body says NaN or Infinity."""

    def __init__(self, name: str) -> None:
        self.name = name


def parse(body: bytes) -> dict[str, Any]:
    """The body's object. Raises Refusal, which names the parameter where there is one."""
    no_numbers: list[_NoNumber] = []

    def no_number(name: str) -> _NoNumber:
        no_numbers.append(_NoNumber(name))
        return no_numbers[-1]

    try:
        value = json.loads(body.decode(), parse_constant=no_number, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise _malformed(f"is not valid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg}, line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise _malformed("is nested too deeply") from None
    except ValueError:
        # Python refuses to read integers of thousands of digits.
        raise _malformed("has a number that is too long") from None
    if not isinstance(value, dict):
        raise _malformed("must be an object")
    if no_numbers:
        raise invalid(_path_to(value, no_numbers[0]), f"{no_numbers[0].name} is not JSON; must be a number")
    return value


def shown(name: str, most_chars: int = _MAX_TOLD_CHARS) -> str:
    """A name from outside, fit for an error's message."""
    return name if len(name) <= most_chars else name[:most_chars] + "..."


class Fields:
    """An object's values, checked for their types. What is null counts as not given."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def raw(self, name: str) -> Any:
        """Of any type; None: not given."""
        return self._values.get(name)

    def path(self, name: str) -> str:
        return self._prefix + name

    def text(self, name: str) -> str | None:
        value = self.raw(name)
        return None if value is None else as_text(self.path(name), value)

    def flag(self, name: str) -> bool | None:
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong_type(self.path(name), "true or false", value)
        return value

    def whole(self, name: str, low: int = -INT32_MAX - 1, high: int = INT32_MAX) -> int | None:
        value = self.raw(name)
        return None if value is None else as_whole(self.path(name), value, low, high)

    def number(self, name: str) -> float | None:
        """Never infinite."""
        value = self.raw(name)
        return None if value is None else as_number(self.path(name), value)

    def object(self, name: str) -> Fields:
        """Empty when it is not given."""
        value = self.raw(name)
        return Fields({} if value is None else as_object(self.path(name), value), f"{self.path(name)}.")

    def items(self, name: str) -> list[Any]:
        """A list; empty when it is not given."""
        value = self.raw(name)
        return [] if value is None else as_list(self.path(name), value)


def as_text(param: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(param, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(param, f"has half of a surrogate pair at character {error.start}") from None
    return value


def as_whole(param: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(param, "an integer", value)
    if not low <= value <= high:
        raise invalid(param, f"must be between {low} and {high}")
    return value


def as_number(param: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(param, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise invalid(param, "is too large a number")
    return number


def as_token_ids(param: str, values: list[Any]) -> list[int]:
    # Prompts of a million ids are looked through without a step of Python for each.
    if values and (set(map(type, values)) != {int} or min(values) < 0 or max(values) > UINT32_MAX):
        for index, value in enumerate(values):
            as_whole(f"{param}[{index}]", value, 0, UINT32_MAX)
    return values


def as_object(param: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong_type(param, "an object", value)
    return value


def as_list(param: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong_type(param, "an array", value)
    return value


def _wrong_type(param: str, expected: str, value: Any) -> Refusal:
    names = {str: "a string", bool: "true or false", dict: "an object", list: "an array", type(None): "null"}
    return Refusal(param, f"must be {expected}, not {names.get(type(value), 'a number')}", "invalid_type")


def _malformed(problem: str) -> Refusal:
    return Refusal("", f"the body cannot be read as JSON: {problem}", "invalid_json")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise invalid(shown(name), "stands there twice")
            seen.add(name)
    return values


def _path_to(value: dict[str, Any], wanted: _NoNumber) -> str:
    """Where a value stands, as in `messages[0].content`. Empty where it does not."""
    # Holds no more than one path at a time, however many values a body has.
    names: list[str | int] = []
    levels = [_children(value)]
    while levels:
        for name, here in levels[-1]:
            if here is wanted:
                return shown("".join(map(_step_of_path, [*names, name])).lstrip("."), _MAX_PATH_CHARS)
            if isinstance(here, dict | list):
                names.append(name)
                levels.append(_children(here))
                break
        else:
            levels.pop()
            del names[-1:]
    return ""


def _children(value: dict[str, Any] | list[Any]) -> Iterator[tuple[str | int, Any]]:
    return iter(value.items()) if isinstance(value, dict) else enumerate(value)


def _step_of_path(name: str | int) -> str:
    return f"[{name}]" if isinstance(name, int) else f".{shown(name)}"
