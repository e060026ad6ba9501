"""What one setting is: where its value may come from, who reads it, and how it is shown."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import Field
from pydantic.fields import FieldInfo

from laps.errors import LocalError

ENV_PREFIX = "LAPS_"

Service = Literal["gateway", "scheduler", "worker", "client"]
Source = Literal["flag", "environment", "file", "default"]

SERVICES: tuple[Service, ...] = ("gateway", "scheduler", "worker")


class SettingsError(LocalError):
    """A setting has no usable value. The message is one line that names setting and source."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from; `detail` is the flag, the variable or the file."""

    source: Source
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.source} {self.detail}".rstrip()


def setting(default: Any, help_text: str, used_by: tuple[Service, ...], **bounds: Any) -> Any:
    return Field(default, description=help_text, json_schema_extra={"used_by": list(used_by)}, **bounds)


def port_setting(default: int, help_text: str, used_by: tuple[Service, ...]) -> Any:
    return setting(default, help_text, used_by, ge=0, le=65535)


def host_port(host: str, port: int) -> str:
    """The address as calls and pages name it: an IPv6 one stands in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on it."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def reachable(host: str, port: int) -> str:
    """HOST:PORT at which a client on this machine reaches who listens on `host`."""
    return host_port("127.0.0.1" if host in ("0.0.0.0", "::", "[::]") else host, port)


def mask_url(url: str) -> str:
    """The URL without its password."""
    return re.sub(r"(?i)(password=)[^&]*", r"\1***", re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", url))


def used_by(field: FieldInfo) -> tuple[Service, ...]:
    extra = field.json_schema_extra
    return tuple(extra["used_by"]) if isinstance(extra, dict) else ()  # type: ignore[arg-type]


def flag_name(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def env_name(setting: str) -> str:
    return ENV_PREFIX + setting.upper()


def type_name(field: FieldInfo) -> str:
    """The type in a person's words, for help and reference pages."""
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    names = {int: "integer", float: "number", str: "text", Path: "path", bool: "true|false"}
    return names.get(field.annotation, "text") if isinstance(field.annotation, type) else "text"
