"""`laps up`: the whole stack until Ctrl-C."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from contextlib import suppress

from laps import logs, runtime
from laps.security.tls import TlsFiles
from laps.setting import mask_url
from laps.settings import Settings, unknown_variables
from laps.stack import Stack

_KILL_SLACK_S = 3.0
"""For killing what has not stopped in its time."""


def run(settings: Settings) -> int:
    """Runs until it is told to stop; returns the exit code."""
    form: logs.LogFormat = settings.log_format if "log_format" in settings.model_fields_set else "plain"
    level = "warning" if settings.log_level == "info" else settings.log_level
    # Warnings are what a person wants to see here: the children's logs have the rest.
    logs.configure_logging("up", pool=settings.pool, level=level, form=form)
    settings.check_models()
    for variable in unknown_variables():
        say(f"laps: {variable} is set but there is no such setting ('laps config' lists them)")

    async def start(lifetime: runtime.Lifetime) -> runtime.Stop:
        stack = Stack(settings)
        try:
            say(f"Starting with {count(settings.workers, 'worker')} ...")
            await stack.start()
            await stack.wait_ready()
        except BaseException:
            await stack.stop(drain_s=0)
            raise
        say(welcome(stack))

        async def stop(_drain_s: float) -> None:
            say("Stopping ...")
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
    command = needed_variables(settings) + own_command()
    return f"""
LAPS is up.
  gateway    {stack.gateway_address}{http}
  scheduler  {stack.scheduler_address}
  store      {mask_url(stack.redis_url)}
  workers    {settings.workers} with {count(settings.slots, "slot")} each
  logs       {stack.log_dir}

Try, in another terminal:
  {command} generate "def fibonacci(n):" --max-tokens 64{server}
  {command} top{server}
Ctrl-C ends it."""


def needed_variables(settings: Settings) -> str:
    """What a client of this stack must set, before its command."""
    needed = ""
    if TlsFiles.of_edge(settings) is not None:
        needed += f"LAPS_TLS_CA={shlex.quote(settings.tls_ca or 'CA.pem')} "
    return needed + ("LAPS_API_KEY=KEY " if settings.api_keys_file else "")


def own_command() -> str:
    """What to type for `laps` in another terminal: `make up` starts one that need not be on PATH."""
    started_as = sys.argv[0]
    by_path = os.path.basename(started_as) == "laps" and shutil.which("laps") != os.path.abspath(started_as)
    return shlex.quote(started_as) if by_path else "laps"


def say(text: str) -> None:
    """Prints. Nobody may be there to read it, and the stack must be stopped in good order all the same."""
    with suppress(OSError):
        print(text, flush=True)


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
