"""Stand-ins for objects of ours."""

from __future__ import annotations

from typing import Any


class Instead:
    """An object but for some of its attributes. Those of compiled classes cannot be set from outside."""

    def __init__(self, original: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
