"""The command line `laps`. Commands are imported when they are used, so that `laps --help` is quick."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from laps.errors import LocalError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130

# Name: (module:attribute, one line of help). The order is that of `laps --help`.
_COMMANDS = {
    "up": ("laps.cli.services:up", "Run the whole stack until Ctrl-C."),
    "demo": ("laps.cli.services:demo", "Start the stack, serve a burst of requests, show it, end."),
    "generate": ("laps.cli.generate:generate", "Generate text for a prompt."),
    "queue": ("laps.cli.inspect:queue", "Show the queue, level by level."),
    "request": ("laps.cli.inspect:request", "Show one request."),
    "cancel": ("laps.cli.inspect:cancel", "Cancel a request."),
    "workers": ("laps.cli.inspect:workers", "Show workers and their slots."),
    "pool": ("laps.cli.pool:pool", "Show whether a pool is stopped, and let it go on."),
    "models": ("laps.cli.inspect:models", "Show the models that can be asked for."),
    "top": ("laps.cli.top:top", "Watch queue, slots and acceptance live."),
    "simulate": ("simulator.cli:simulate", "Replay a workload under scheduling policies."),
    "workload": ("simulator.workload_cli:workload", "Make workload files of traces, answers or a pool."),
    "gateway": ("laps.cli.services:gateway", "Run a gateway."),
    "scheduler": ("laps.cli.services:scheduler", "Run a scheduler."),
    "worker": ("laps.cli.services:worker", "Run a worker."),
    "keys": ("laps.cli.keys:keys", "Make API keys."),
    "config": ("laps.cli.config:config", "Show the settings in force and where each comes from."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"laps {version('laps')}")
        ctx.exit()


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def cli() -> None:
    """LAPS serves large language models by speculative decoding."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 1 for an error, 2 for wrong usage."""
    # gRPC's own lines on stderr repeat what our errors say.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # uvloop starts a process by a fork, and in that gRPC runs handlers for programs that go on in the child.
    # Ours becomes another program at once, and up to 5 of 100 were crashed by these handlers before it did.
    # gRPC reads this when it is imported, and not later.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    _open_standard_streams()
    try:
        # Not standalone: click would end the process, and print errors in another form than ours.
        code = cli.main(args=None if argv is None else list(argv), prog_name="laps", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of `laps queue | head` is gone. Python would complain at exit about what it cannot flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (LocalError, OSError) as error:
        _complain(str(error))
        return EXIT_FAILED
    except Exception as error:
        return _defect(error)
    return code if isinstance(code, int) else 0


def _open_standard_streams() -> None:
    """Those that whoever started us has closed lead nowhere. Else the next file that is opened takes such a
    number, and what is printed goes there, or libuv ends the process for it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            # A new file gets the least free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _complain(message: str) -> None:
    click.echo(f"laps: {' '.join(message.split())}", err=True)


def _defect(error: Exception) -> int:
    """Something that should not happen. A service logs where it did; a person gets one line."""
    if sys.flags.dev_mode:
        raise error
    import structlog

    if structlog.is_configured():
        structlog.get_logger().error("ended by a defect", exc_info=error)
    _complain(f"defect: {type(error).__name__}: {error} (python -X dev -m laps.cli shows where)")
    return EXIT_FAILED
