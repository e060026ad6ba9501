"""Options made from the settings, and those that all client commands share."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from laps.errors import LocalError
from laps.setting import Service, flag_name, type_name, used_by
from laps.settings import Settings, load_settings

if TYPE_CHECKING:
    from laps.client import Client
    from laps.errors import LapsError

Command = Callable[..., Any]

_CLIENT_CONNECT_ATTEMPTS = 3
_WONDER_AFTER_S = 2.0
_TELL_EVERY_S = 10.0
_ONE_OUTAGE_S = 5.0
"""A failure that comes so long after the last wait begins another outage."""


NOT_OF_THE_STORE = frozenset(
    name for name in Settings.model_fields if name != "pool" and not name.startswith(("redis_", "tls_"))
)
"""To be hidden from a command that asks a pool's store itself."""


def settings_options(*services: Service, hide: frozenset[str] = frozenset()) -> Callable[[Command], Command]:
    """Gives a command a flag for each setting that one of these services reads, and the argument `settings`.

    No service named: all settings.
    """
    names = [
        name
        for name, field in Settings.model_fields.items()
        if name not in hide and (not services or set(services) & set(used_by(field)))
    ]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(*, config_file: Path | None, **values: Any) -> Any:
            flags = {name: values.pop(name) for name in names}
            return command(settings=load_settings(flags, config_file), **values)

        wrapped: Command = run
        for name in reversed(names):
            wrapped = _option(name)(wrapped)
        return click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="TOML file of settings.",
        )(wrapped)

    return decorate


def _option(name: str) -> Callable[[Command], Command]:
    field = Settings.model_fields[name]
    shown = "" if field.default in ("", None) else f"  [default: {field.default}]"
    # Values go on as text: the settings judge them, and say in one form which source was wrong.
    return click.option(
        flag_name(name),
        name,
        metavar=type_name(field).upper(),
        help=f"{field.description}.{shown}",
        default=None,
    )


def store_connection(settings: Settings) -> dict[str, Any]:
    """What a connection to the pool's store needs besides its URL and the pool.

    Raises:
        LocalError: no store is named, or a certificate cannot be used.
    """
    from laps.security.tls import TlsFiles
    from scheduler_svc.main import store_tls

    if not settings.redis_url:
        raise LocalError("redis_url: say which store, with --redis-url or LAPS_REDIS_URL")
    return store_tls(settings, TlsFiles.of_service(settings))


def client_options(command: Command) -> Command:
    """Gives a command a flag for each of the client's settings and `--json`, and the arguments `client` and
    `as_json`."""

    @functools.wraps(command)
    def run(*, settings: Settings, as_json: bool, **values: Any) -> Any:
        with _open_client(settings) as client:
            return command(client=client, as_json=as_json, **values)

    with_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(run)
    return settings_options("client")(with_json)


def _open_client(settings: Settings) -> Client:
    from laps.client import Client, RetryPolicy
    from laps.security.tls import TlsFiles

    retry = RetryPolicy(connect_attempts=_CLIENT_CONNECT_ATTEMPTS, on_wait=waiting_told())
    return Client(
        settings.client_server,
        retry=retry,
        tls=TlsFiles.of_client(settings),
        api_key=settings.api_key,
        max_message_bytes=settings.max_message_bytes,
    )


def waiting_told(now_s: Callable[[], float] = time.monotonic) -> Callable[[LapsError, float], None]:
    """Tells on standard error that a command goes on trying, where a person would begin to wonder."""
    began_s = told_s = last_s = float("-inf")

    def tell(error: LapsError, wait_s: float) -> None:
        nonlocal began_s, told_s, last_s
        at_s = now_s()
        if at_s - last_s > _ONE_OUTAGE_S:
            began_s = at_s
        last_s = at_s + wait_s
        if last_s - began_s >= _WONDER_AFTER_S and at_s - told_s >= _TELL_EVERY_S:
            told_s = at_s
            click.echo(f"still trying, {error.message}", err=True)

    return tell


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Prints dataclasses and plain values as JSON."""
    click.echo(json.dumps(value, default=_plain, indent=indent, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
