"""API keys and tenants, in a file that holds no key: only what it takes to recognise one.

    tenants.acme = { max_queued_requests = 100, requests_per_s = 20 }
    keys.9f2c41d07a3b = { tenant = "acme", role = "client", sha256 = "..." }

A key is `laps_ID_SECRET`. The secret has 256 random bits, so a plain SHA-256 of it cannot be searched; a slow
hash would only slow the gateway. The file may change at any time and is read again then.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from laps.errors import Unauthenticated
from laps.logs import get_logger
from laps.security.access import Role
from laps.security.principal import NOBODY, TENANT_NAME, Principal, Quota
from laps.setting import SettingsError

_KEY = re.compile(r"laps_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NO_HASH = "0" * 64
"""What an unknown id is compared with, so that it takes as long as a known one."""
_MAX_FILE_BYTES = 16 << 20

log = get_logger()

TenantName = Annotated[str, StringConstraints(pattern=f"^{TENANT_NAME.pattern}$")]
KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]


class _Tenant(BaseModel):
    model_config = ConfigDict(extra="forbid")
    max_queued_requests: int | None = Field(None, ge=0)
    max_queued_tokens: int | None = Field(None, ge=0)
    requests_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_priority: int | None = Field(None, ge=-100, le=100)
    max_streams: int | None = Field(None, ge=0)


class _Key(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tenant: TenantName | Literal[""] = ""
    role: Literal[Role.CLIENT, Role.OPERATOR] = Role.CLIENT
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tenants: dict[TenantName, _Tenant] = {}
    keys: dict[KeyId, _Key] = {}


@dataclass(frozen=True, slots=True)
class NewKey:
    key: str
    """To be handed to whom it is for; it cannot be found out again."""
    line: str
    """For the file of keys."""


def new_key(tenant: str = "", role: str = "client") -> NewKey:
    """Raises SettingsError for a tenant or a role that cannot be."""
    if tenant and not TENANT_NAME.fullmatch(tenant):
        raise SettingsError(f"tenant: {tenant!r} may have at most 63 of [a-z0-9-]")
    if role not in (Role.CLIENT, Role.OPERATOR):
        raise SettingsError(f"role: {role!r} is neither client nor operator")
    if role == Role.CLIENT and not tenant:
        raise SettingsError("tenant: a client belongs to one; name it")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    belongs = f'tenant = "{tenant}", ' if tenant else ""
    line = f'keys.{key_id} = {{ {belongs}role = "{role}", sha256 = "{_hash(secret)}" }}'
    return NewKey(f"laps_{key_id}_{secret}", line)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def check_text(text: str, path: str) -> None:
    """Raises SettingsError when this could not be a file of keys."""
    try:
        _parse(text)
    except ValueError as error:
        raise SettingsError(f"api_keys_file: {path}: {_one_line(error)}") from None


def _parse(text: str) -> tuple[Mapping[str, str], Mapping[str, Principal]]:
    content = _File.model_validate(tomllib.loads(text))
    quotas = {name: Quota(**tenant.model_dump()) for name, tenant in content.tenants.items()}
    principals = {}
    for key_id, key in content.keys.items():
        if key.role == Role.CLIENT and not key.tenant:
            raise ValueError(f"keys.{key_id}: a client belongs to a tenant")
        principals[key_id] = Principal(
            f"key {key_id}", frozenset({key.role}), key.tenant, quotas.get(key.tenant, Quota())
        )
    return {key_id: key.sha256 for key_id, key in content.keys.items()}, principals


class KeyFile:
    """Recognises keys. Follows the file; a version that cannot be read is logged, and the last one holds."""

    def __init__(self, path: str) -> None:
        """Raises SettingsError when the file cannot be read."""
        self._path = Path(path)
        try:
            self._seen = self._fingerprint()
            self._hashes, self._principals = self._read()
        except (OSError, ValueError) as error:
            raise SettingsError(f"api_keys_file: {path}: {_one_line(error)}") from None

    def recognise(self, authorization: str) -> Principal:
        """Who shows this `authorization` header; nobody for none.

        Raises:
            Unauthenticated: it is not a key of ours.
        """
        if not authorization:
            return NOBODY
        self._follow()
        scheme, _, given = authorization.partition(" ")
        parts = _KEY.fullmatch(given.strip()) if scheme.lower() == "bearer" else None
        key_id, secret = parts.groups() if parts else ("", "")
        known = self._hashes.get(key_id, _NO_HASH)
        # Every way through takes one hash and one comparison whose time tells nothing.
        if not hmac.compare_digest(_hash(secret), known):
            raise Unauthenticated("the API key is not valid")
        return self._principals[key_id]

    def _follow(self) -> None:
        try:
            seen = self._fingerprint()
            if seen == self._seen:
                return
            self._seen = seen
            self._hashes, self._principals = self._read()
            log.info("api keys read", path=str(self._path), keys=len(self._hashes))
        except (OSError, ValueError) as error:
            log.error(
                "api keys not readable, the last ones hold", path=str(self._path), error=_one_line(error)
            )

    def _fingerprint(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _read(self) -> tuple[Mapping[str, str], Mapping[str, Principal]]:
        if self._path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"has more than {_MAX_FILE_BYTES} bytes")
        return _parse(self._path.read_text())


def _one_line(error: Exception) -> str:
    """Without the values: a key that was put in by mistake must not reach a log."""
    if isinstance(error, ValidationError):
        first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)
