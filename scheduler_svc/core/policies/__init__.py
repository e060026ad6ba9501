"""The policies. Each module of this package that defines a `Policy` with a name adds one:
dropping in a file is all that a new policy needs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any

from scheduler_svc.core.policies.base import Policy

DEFAULT_POLICY = "laps-sd"


@cache
def policies() -> dict[str, type[Policy]]:
    """All policies by name."""
    found: dict[str, type[Policy]] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if (
                issubclass(kind, Policy)
                and kind.__module__ == module.__name__
                and hasattr(kind, "name")  # a compiled class does not say that it is abstract
                and not inspect.isabstract(kind)
            ):
                if kind.name in found:
                    raise RuntimeError(f"two policies are called {kind.name!r}")
                found[kind.name] = kind
    return dict(sorted(found.items()))


def servable_policies() -> list[str]:
    """Names of those that can serve, that is, need no knowledge of the future."""
    return [name for name, kind in policies().items() if kind.servable]


def make_policy(name: str, **parameters: Any) -> Policy:
    """A new policy. Raises ValueError with the known names for an unknown one."""
    kind = policies().get(name)
    if kind is None:
        raise ValueError(f"unknown policy {name!r}; known are {', '.join(policies())}")
    return kind(**parameters)


__all__ = ["DEFAULT_POLICY", "Policy", "make_policy", "policies", "servable_policies"]
