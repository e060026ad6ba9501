"""Every setting of every service: name, type, default, unit and help, each in this one place.

A value comes from the first source that has it: a flag, the environment (`LAPS_PORT`), a TOML file
(`port = 50051`; `--config FILE`, else `LAPS_CONFIG`, else `./laps.toml`), the default. `load_settings`
remembers which one it was, so that `laps config` and every error can name it.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import PrivateAttr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from laps.setting import (
    ENV_PREFIX,
    SERVICES,
    Origin,
    Service,
    SettingsError,
    Source,
    env_name,
    flag_name,
    mask_url,
    port_setting,
    reachable,
    setting,
)

CONFIG_ENV = "LAPS_CONFIG"
ORIGINS_ENV = "LAPS_ORIGINS"
"""Set for a child process: where its parent had the settings from that it hands on by the environment."""
COMPILED_ENV = "LAPS_COMPILED"
"""Read by `scheduler_svc.compiled`, before any setting."""
DEFAULT_CONFIG_FILE = Path("laps.toml")
SECRETS = frozenset({"api_key"})
"""Never shown."""
MASKED = "***"
NO_DRAFT = "none"

_BUILT_IN_MODELS = Path(__file__).resolve().parent.parent / "models" / "tiny"
BUILT_IN_TARGET = str(_BUILT_IN_MODELS / "target")
BUILT_IN_DRAFT = str(_BUILT_IN_MODELS / "draft")

_G: tuple[Service, ...] = ("gateway",)
_S: tuple[Service, ...] = ("scheduler",)
_W: tuple[Service, ...] = ("worker",)
_GS: tuple[Service, ...] = ("gateway", "scheduler")
_SW: tuple[Service, ...] = ("scheduler", "worker")
_GW: tuple[Service, ...] = ("gateway", "worker")
_ALL: tuple[Service, ...] = (*SERVICES, "client")
_UP: tuple[Service, ...] = ()


class Settings(BaseSettings):
    """What is in force. Use `load_settings`; `Settings(port=0)` serves tests and embedders."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    # State.
    redis_url: str = setting("", "Redis >= 7.0 or Valkey; empty: the built-in store in data_dir", _S)
    data_dir: Path = setting(Path(".laps"), "Folder of the built-in store's data and of child logs", _S)

    # The pool and its models.
    pool: str = setting(
        "default", "Name of the pool: one model pair with its workers and queue", SERVICES, min_length=1
    )
    model_name: str = setting("tiny", "Name by which clients ask for the pool's model", _G, min_length=1)
    target: str = setting(
        BUILT_IN_TARGET, "Target model: a local folder with safetensors weights", _GW, min_length=1
    )
    draft: str = setting(
        "",
        "Draft model of the same vocabulary, or 'none'; empty: the built-in one for the "
        "built-in target, else none",
        _W,
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Number type of the models", _W
    )
    device: str = setting("auto", "Device of the models: auto, cpu, cuda, cuda:1", _W, min_length=1)
    device_map: Literal["none", "auto"] = setting(
        "none", "auto: spread the target's layers over all GPUs of the worker (needs accelerate)", _W
    )
    tensor_parallel: int = setting(
        1, "GPUs of one node that share the target, a process each (1: none)", _W, ge=1, le=16
    )
    context_tokens: int = setting(
        0, "Prompt and output together at most; 0: the model's own limit", _GW, ge=0
    )
    threads: int = setting(1, "Compute threads of one worker", _W, ge=1)

    # Network.
    host: str = setting("127.0.0.1", "Address to listen on", SERVICES, min_length=1)
    port: int = port_setting(50051, "The gateway's gRPC port; 0: any free one", _G)
    http_port: int = port_setting(
        0, "The gateway's HTTP port, for OpenAI's clients; 0: none. 'laps up' takes 8000, or any free one", _G
    )
    share_port: bool = setting(
        False, "Several gateways listen on one port (SO_REUSEPORT); new connections are spread over them", _G
    )
    health_port: int = port_setting(
        0,
        "A further gRPC port of one gateway alone, for its health where several share a port; 0: none",
        _G,
    )
    scheduler_address: str = setting(
        "127.0.0.1:50052",
        "Where the pool's scheduler listens; of several, with commas between, the one that leads is found",
        _GW,
    )
    scheduler_port: int = port_setting(50052, "The scheduler's gRPC port; 0: any free one", _S)
    worker_port: int = port_setting(
        0, "The worker's gRPC port, which has its health and nothing else; 0: any free one", _W
    )
    metrics_port: int = port_setting(
        0,
        "Prometheus port, 0: none; under 'laps up' the scheduler's is 1 above it, further gateways' from 501",
        _GS,
    )
    max_message_bytes: int = setting(4 << 20, "Size of one gRPC message at most", _ALL, ge=1 << 16)

    # Security.
    tls_cert: str = setting(
        "",
        "Certificate chain (PEM) that this process shows; empty: no TLS. May be replaced at any time",
        _ALL,
    )
    tls_key: str = setting("", "Private key (PEM) of tls_cert", _ALL)
    tls_ca: str = setting(
        "",
        "Certificates (PEM) by which the other side is known; clients: 'system' for the system's own",
        _ALL,
    )
    edge_tls_cert: str = setting(
        "", "Certificate chain (PEM) that the gateway shows its clients; empty: tls_cert", _G
    )
    edge_tls_key: str = setting("", "Private key (PEM) of edge_tls_cert", _G)
    edge_tls_ca: str = setting(
        "",
        "Let in only clients with a certificate by these (PEM), beside their keys; empty: none is asked for",
        _G,
    )
    tls_trust_domain: str = setting(
        "laps",
        "Services' certificates have the URI spiffe://TRUST_DOMAIN/ROLE",
        _S,
        pattern=r"^[a-z0-9._-]+$",
    )
    redis_ca: str = setting(
        "", "Certificates (PEM) by which a rediss:// store is known; empty: tls_ca, or the system's", _S
    )
    api_keys_file: str = setting(
        "", "TOML file of hashed API keys and tenants ('laps keys new'); empty: no keys are asked for", _G
    )
    api_key: str = setting(
        "", "API key that client commands send; better as variable than as flag", ("client",)
    )
    allow_unauthenticated: bool = setting(
        False, "Serve callers without keys or certificates on an address that other hosts reach", _GS
    )

    # Decoding.
    gateways: int = setting(1, "Gateways that 'laps up' starts, all on one port", _UP, ge=1, le=64)
    workers: int = setting(2, "Workers that 'laps up' starts", _UP, ge=0, le=256)
    slots: int = setting(4, "Requests that one worker decodes together", _W, ge=1, le=4096)
    spare_slots: int = setting(
        4, "Further slots that keep the KV cache of preempted requests", _W, ge=0, le=4096
    )
    host_cache_bytes: int = setting(1 << 28, "Host memory for the KV cache of preempted requests", _W, ge=0)
    kv_limit_bytes: int = setting(
        0, "Memory for the KV cache in slots; 0: four fifths of what is free at the start", _W, ge=0
    )
    prefix_sharing: bool = setting(
        True,
        "Prompts that begin alike share the KV cache of their beginning (tenants can tell by its speed)",
        _W,
    )
    cuda_graphs: bool = setting(True, "On a single GPU, replay recorded passes of small batches", _W)
    prefill_tokens: int = setting(512, "Prompt tokens computed in one step at most", _W, ge=1)
    draft_tokens: int = setting(4, "Tokens drafted in one step at most", _SW, ge=1, le=16)
    lookup_tokens: int = setting(
        16, "Tokens looked up in the request's own text in one step at most; 0: none", _W, ge=0, le=16
    )

    # Scheduling.
    policy: str = setting("laps-sd", "Scheduling policy", _S, min_length=1)
    starvation_bound_s: float = setting(
        60.0, "A request that waited this long runs before the others; 0: never", _S, ge=0
    )
    tick_interval_s: float = setting(
        0.002, "The scheduler gathers events this long between two decisions", _S, ge=0, le=1
    )
    report_interval_s: float = setting(
        0.03, "A worker tells of shorter steps together, about so often; 0: of each at once", _W, ge=0, le=1
    )
    step_credit: int = setting(32, "Steps that a worker may be ahead of the store", _S, ge=1, le=1024)
    lease_duration_s: float = setting(10.0, "A lease that is not renewed ends after this time", _S, gt=0)
    session_timeout_s: float = setting(
        5.0, "A worker that is silent for this long is taken for lost", _S, gt=0
    )
    heartbeat_interval_s: float = setting(1.0, "A worker says at least this often that it lives", _S, gt=0)
    leader_ttl_s: float = setting(
        2.0, "A leader that does not renew its claim loses it after this time", _S, gt=0
    )

    # Bounds.
    max_queued_requests: int = setting(10_000, "Waiting requests in a pool at most", _S, ge=1)
    max_queued_tokens: int = setting(10_000_000, "Prompt tokens of all waiting requests at most", _S, ge=1)
    max_streams: int = setting(1000, "Client streams of one gateway at most", _G, ge=1)
    stream_buffer_tokens: int = setting(
        4096, "A client this many tokens behind loses its stream, not its request", _G, ge=1
    )
    default_max_tokens: int = setting(256, "Output bound of a request that names none", _G, ge=1)
    disconnect_grace_s: float = setting(
        30.0, "A request whose client may come back outlives its stream this long", _G, ge=0
    )
    retention_s: float = setting(600.0, "A finished request can be read this long", _S, gt=0)
    max_retained_requests: int = setting(
        10_000, "Finished requests kept at most; the oldest go first", _S, ge=0
    )
    drain_s: float = setting(
        10.0, "Time to finish what is begun when a service is told to stop", SERVICES, ge=0
    )

    # Logs.
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least level that is logged", SERVICES
    )
    log_format: Literal["json", "console"] = setting("json", "Form of the logs", SERVICES)

    # Traces.
    otlp_endpoint: str = setting(
        "",
        "OpenTelemetry collector for traces, http://HOST:PORT (OTLP over gRPC); empty: none, unless "
        "OTEL_EXPORTER_OTLP_ENDPOINT names one",
        SERVICES,
    )

    # Clients.
    server: str = setting("", "Gateway that client commands call; empty: this host's, by port", ("client",))

    # Web console, on the gateway's HTTP port.
    console: bool = setting(True, "Serve the web console at /console of the HTTP port", _G)
    console_allow_cancel: bool = setting(
        False, "The console cancels for everyone who sees it; with API keys operators always may", _G
    )
    console_show_text: bool = setting(False, "The console shows texts of prompts and outputs", _G)

    # Identity.
    gateway_id: str = setting("", "Name of this gateway; empty: host name and process id", _G)
    scheduler_id: str = setting("", "Name of this scheduler, in the leadership record", _S)
    worker_id: str = setting("", "Name of this worker; empty: host name and process id", _W)

    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # load_settings reads environment and file itself, to know what came from where. A bare
        # Settings(...) is what its caller says and nothing else.
        return (init_settings,)

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, value: str) -> str:
        if value and urlsplit(value).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("must start with redis://, rediss:// or unix://")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _otlp_endpoint(cls, value: str) -> str:
        if value and not (urlsplit(value).scheme in ("http", "https") and urlsplit(value).hostname):
            raise ValueError("must be http://HOST:PORT or https://HOST:PORT")
        return value

    @field_validator("pool", "gateway_id", "scheduler_id", "worker_id", "model_name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        # These become parts of Redis keys; braces and colons would break the hash tag and the key's parts.
        if value and not re.fullmatch(r"[A-Za-z0-9._/-]{1,128}", value):
            raise ValueError("may have at most 128 of [A-Za-z0-9._/-]")
        return value

    @field_validator("scheduler_address")
    @classmethod
    def _address(cls, value: str) -> str:
        if not all(re.fullmatch(r"(unix:.+|[^,]+:\d{1,5})", address) for address in value.split(",")):
            raise ValueError("must be HOST:PORT, or several of them with commas between")
        return value

    @property
    def gateway_address(self) -> str:
        """HOST:PORT at which a client on this machine reaches the gateway."""
        return reachable(self.host, self.port)

    @property
    def client_server(self) -> str:
        """HOST:PORT that the client commands call."""
        return self.server or self.gateway_address

    @property
    def draft_model(self) -> str | None:
        """The draft model, or None for plain decoding.

        A target of the user's own gets no built-in draft: their vocabularies would differ.
        """
        if self.draft == NO_DRAFT:
            return None
        if self.draft:
            return self.draft
        return BUILT_IN_DRAFT if self.target == BUILT_IN_TARGET else None

    def instance_id(self, service: Service) -> str:
        """The name of this process as `service`, unique among its kind."""
        given = {"gateway": self.gateway_id, "scheduler": self.scheduler_id, "worker": self.worker_id}.get(
            service, ""
        )
        return given or re.sub(r"[^A-Za-z0-9._-]", "-", f"{socket.gethostname()}-{os.getpid()}")[:128]

    def check_models(self) -> None:
        """Raises SettingsError for a model that is no folder with safetensors weights."""
        for name, model in (("target", self.target), ("draft", self.draft_model)):
            if model is not None and (wrong := _what_is_wrong(Path(model))):
                built_in = model in (BUILT_IN_TARGET, BUILT_IN_DRAFT)
                what = "the built-in model" if built_in else "the model folder"
                hint = "; make it with models/tiny, or name another with" if built_in else "; correct"
                raise SettingsError(
                    f"{name}: {what} {model} {wrong}{hint} --{name} (from {self.origin(name)})"
                )

    def origin(self, name: str) -> Origin:
        return self._origins.get(name, Origin("default"))

    def public(self, name: str) -> Any:
        """The value as it may be shown: plain JSON types, secrets masked."""
        value = getattr(self, name)
        if isinstance(value, Path):
            return str(value)
        if name in SECRETS:
            return MASKED if value else value
        return mask_url(value) if name == "redis_url" else value

    def to_env(self, **changes: Any) -> dict[str, str]:
        """`LAPS_*` variables that give a child process these settings, with `changes` to them, whatever else
        it inherits and whatever file lies in its folder."""
        given = {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set
        }
        env = {env_name(name): str(value) for name, value in (given | changes).items()}
        inherited = {
            variable: "" for name in type(self).model_fields if (variable := env_name(name)) in os.environ
        }
        origins = {name: [origin.source, origin.detail] for name, origin in self._origins.items()}
        return inherited | env | {ORIGINS_ENV: json.dumps(origins)}

    def __repr_args__(self) -> Any:
        # A repr ends up in logs and tracebacks.
        return [(name, self.public(name)) for name in type(self).model_fields]


def load_settings(flags: Mapping[str, Any] | None = None, config: Path | str | None = None) -> Settings:
    """Reads every source. `flags` are settings by name; a value of None was not given.

    Raises SettingsError, whose message is one line.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    env = {name: v for name, v in EnvSettingsSource(Settings)().items() if not _from_kubernetes(name, v)}
    handed_on = _handed_on()
    # What a parent hands on is all that it has read, its file included.
    file_path = _config_file(config) if handed_on is None or config else None
    file = _read_file(file_path) if file_path else {}

    origins: dict[str, Origin] = {}
    values: dict[str, Any] = {}
    layers: tuple[tuple[Source, Mapping[str, Any]], ...] = (
        ("flag", given),
        ("environment", env),
        ("file", file),
    )
    for source, layer in layers:
        for name, value in layer.items():
            if name not in values:
                detail = {"flag": flag_name(name), "environment": env_name(name), "file": str(file_path)}[
                    source
                ]
                origin = (handed_on or {}).get(name) if source == "environment" else None
                values[name], origins[name] = value, origin or Origin(source, detail)
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsError(_one_line(error, values, origins)) from None
    settings._origins.update(origins)
    return settings


def unknown_variables() -> list[str]:
    """`LAPS_*` variables that no setting reads, most likely misspelt."""
    known = {CONFIG_ENV, ORIGINS_ENV, COMPILED_ENV, *map(env_name, Settings.model_fields)}
    return sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)


def _what_is_wrong(model: Path) -> str:
    """What a model folder lacks that can be seen without loading it; empty: nothing."""
    if not model.is_dir():
        by_name = not model.is_absolute() and model.parts[0] not in (".", "..")
        return "is not there" + (" (models are not fetched by name)" if by_name else "")
    if not (model / "config.json").is_file():
        return "has no config.json, so it holds no model"
    if not any(model.glob("*.safetensors")):
        return "has no *.safetensors weights; other formats are not loaded"
    return ""


def _handed_on() -> dict[str, Origin] | None:
    """Where a parent process had its settings from; None: there is none."""
    try:
        return {name: Origin(*origin) for name, origin in json.loads(os.environ[ORIGINS_ENV]).items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def _from_kubernetes(name: str, value: Any) -> bool:
    # For a Service named laps or laps-scheduler Kubernetes sets LAPS_PORT=tcp://10.0.0.1:50051 in every pod.
    return name.endswith("port") and str(value).startswith(("tcp://", "udp://"))


def _config_file(config: Path | str | None) -> Path | None:
    for path, origin in ((config, "--config"), (os.environ.get(CONFIG_ENV), CONFIG_ENV)):
        if path:
            if not Path(path).is_file():
                raise SettingsError(f"config: there is no file {path} (from {origin})")
            return Path(path)
    return DEFAULT_CONFIG_FILE if DEFAULT_CONFIG_FILE.is_file() else None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        return dict(TomlConfigSettingsSource(Settings, path)())
    except (ValueError, OSError) as error:
        raise SettingsError(f"config: {path} cannot be read: {error}") from None


def _one_line(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, Origin]) -> str:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    origin = origins.get(name, Origin("default"))
    if first["type"] == "extra_forbidden":
        return f"{name}: there is no such setting (from {origin})"
    message = first["msg"].removeprefix("Value error, ").split(", unable")[0]
    value = MASKED if name in SECRETS else mask_url(str(values.get(name)))
    return f"{name}: {message[0].lower()}{message[1:]}, not {value!r} (from {origin})"
