"""Commands that run services. Each service is a function `run(settings) -> exit code` of its package."""

from __future__ import annotations

import importlib

import click

from laps.cli.options import settings_options
from laps.errors import LocalError
from laps.settings import COMPILED_ENV, Settings


def _run(module: str, settings: Settings) -> int:
    from laps.runtime import resting_collector

    try:
        with resting_collector():
            service = importlib.import_module(module)
    except ImportError as error:
        if error.name != COMPILED_ENV:
            raise
        raise LocalError(str(error)) from None
    code: int = service.run(settings)
    return code


@click.command()
@settings_options("gateway")
def gateway(settings: Settings) -> int:
    """Run a gateway: the clients' edge of a pool."""
    return _run("gateway.main", settings)


@click.command()
@settings_options("scheduler")
def scheduler(settings: Settings) -> int:
    """Run a scheduler. Several may run for one pool: one leads, the others stand by."""
    return _run("scheduler_svc.main", settings)


@click.command()
@settings_options("worker")
def worker(settings: Settings) -> int:
    """Run a worker: it drafts and verifies tokens."""
    return _run("worker_svc.main", settings)


@click.command()
@settings_options(hide=frozenset({"server", "gateway_id", "scheduler_id", "worker_id"}))
def up(settings: Settings) -> int:
    """Run the whole stack until Ctrl-C: store, scheduler, gateway and workers, each a process.

    A process that dies is started again. Without --redis-url the built-in store keeps its data in --data-dir.
    """
    return _run("laps.up", settings)


@click.command()
@settings_options(hide=frozenset({"server", "gateway_id", "scheduler_id", "worker_id"}))
def demo(settings: Settings) -> int:
    """Start the whole stack, serve a burst of requests with the built-in models, show it, end."""
    return _run("laps.demo", settings)
