"""`laps up`: the whole stack until Ctrl-C."""

from __future__ import annotations

import sys

from laps import logs, runtime
from laps.setting import mask_url
from laps.settings import Settings
from laps.stack import Stack

_KILL_SLACK_S = 3.0
"""For killing what has not stopped in its time."""


def run(settings: Settings) -> int:
    """Runs until SIGTERM or SIGINT; returns the exit code."""
    form = "console" if sys.stderr.isatty() else settings.log_format
    level = "warning" if settings.log_level == "info" else settings.log_level
    # Warnings are what a person wants to see here: the children's logs have the rest.
    logs.configure_logging("up", pool=settings.pool, level=level, form=form)
    settings.check_models()

    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        stack = Stack(settings)
        try:
            print(f"Starting with {count(settings.workers, 'worker')} ...", flush=True)
            await stack.start()
            await stack.wait_ready()
        except BaseException:
            await stack.stop(drain_s=0)
            raise
        print(welcome(stack), flush=True)

        async def stop(_drain_s: float) -> None:
            print("Stopping ...", flush=True)
            await stack.stop()

        return stop

    return runtime.run(runtime.run_until_signalled(start, settings.drain_s + _KILL_SLACK_S))


def welcome(stack: Stack) -> str:
    """Where everything listens, and a first thing to try."""
    settings = stack.settings
    server = (
        "" if stack.gateway_address == Settings().gateway_address else f" --server {stack.gateway_address}"
    )
    http = f"\n  OpenAI     {stack.http_url}" if stack.http_url else ""
    http += f"\n  console    {stack.console_url}" if stack.console_url else ""
    return f"""
LAPS is up.
  gateway    {stack.gateway_address}{http}
  scheduler  {stack.scheduler_address}
  store      {mask_url(stack.redis_url)}
  workers    {settings.workers} with {count(settings.slots, "slot")} each
  logs       {stack.log_dir}

Try, in another terminal:
  laps generate "def fibonacci(n):" --max-tokens 64{server}
  laps top{server}
Ctrl-C ends it."""


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
