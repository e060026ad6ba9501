"""Logs: one JSON object a line on stderr, with what ties the lines of one request together.

`request_id`, `epoch` and `trace_id` are bound by `bind_context` and follow the current task. Prompts, outputs
and anything else that a user wrote never reach a log: fields with such names are masked, and tracebacks carry
no local variables.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from laps import last_words

LogFormat = Literal["json", "console", "plain"]
"""plain: one short line for a person who watches a command, without what is the same in each."""

PRIVATE_FIELDS = frozenset(
    {
        "prompt",
        "text",
        "content",
        "messages",
        "output",
        "token_ids",
        "prompt_token_ids",
        "output_token_ids",
        "stop",
    }
)
_MASK = "(not logged)"
_SAME_IN_EACH = frozenset({"timestamp", "level", "service", "pool"})


def configure_logging(
    service: str,
    *,
    pool: str = "",
    level: str = "info",
    form: LogFormat = "json",
    stream: TextIO | None = None,
) -> None:
    """Sets up this process's logs, those of libraries included. `level` is a name of `logging`.

    Logging never raises afterwards: what cannot be written is lost.
    """
    out = _LossyStream(stream if stream is not None else sys.stderr)
    number = logging.getLevelNamesMapping()[level.upper()]
    fields = {"service": service} | ({"pool": pool} if pool else {})
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _AddFields(fields),
        mask_private,
    ]
    render = _renderer(form, out)
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", out)),
        # Otherwise loggers made before this call, or in an earlier test, keep their old stream.
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder(), mask_private],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))


def get_logger(**fields: Any) -> structlog.typing.FilteringBoundLogger:
    """A logger: `log.info("worker joined", worker_id=...)`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(**fields)
    return logger


@contextmanager
def bind_context(
    *, request_id: str | None = None, epoch: int | None = None, trace_id: str | None = None
) -> Iterator[None]:
    """Adds these to every line that the current task logs inside the block."""
    given = {"request_id": request_id, "epoch": epoch, "trace_id": trace_id}
    with structlog.contextvars.bound_contextvars(**{k: v for k, v in given.items() if v is not None}):
        yield


def mask_private(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key in PRIVATE_FIELDS.intersection(event):
        event[key] = _MASK
    return event


class _LossyStream:
    """A stream that takes what it can. Of a log that cannot be written (its disk is full, its reader is gone)
    lines are lost, and the service that wrote them goes on: it must not end, or hang, for want of a log."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._failed = False

    def write(self, text: str) -> int:
        try:
            # What could still be written of the line before is none that can be read: this one stands alone.
            self._out.write("\n" + text if self._failed else text)
            self._out.flush()
            self._failed = False
        except (OSError, ValueError):
            # ValueError: it is closed.
            self._failed = True
        return len(text)

    def flush(self) -> None:
        """Each `write` is flushed."""

    def isatty(self) -> bool:
        return self._out.isatty()


class _AddFields:
    def __init__(self, fields: dict[str, str]) -> None:
        self._fields = fields

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        for key, value in self._fields.items():
            event.setdefault(key, value)
        return event


def _plain(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """`12:34:56 CHILD: EVENT: REASON (name: value, ...)`."""
    shown = {
        name: value for name, value in event.items() if value not in ("", None) and name not in _SAME_IN_EACH
    }
    subject = f"{shown.pop('child')}: " if "child" in shown else ""
    text = last_words.sentence(shown)
    rest = ", ".join(
        f"{name.removesuffix('_s').replace('_', ' ')}: {value}{' s' if name.endswith('_s') else ''}"
        for name, value in shown.items()
        if name not in ("event", "exception", *last_words.REASON_FIELDS)
    )
    trace = f"\n{shown['exception']}" if "exception" in shown else ""
    return f"{time.strftime('%H:%M:%S')} {subject}{text}{f' ({rest})' if rest else ''}{trace}"


def _renderer(form: LogFormat, out: _LossyStream) -> list[Processor]:
    if form == "plain":
        return [structlog.processors.format_exc_info, _plain]
    if form == "console":
        colors = out.isatty()
        plain = structlog.dev.plain_traceback
        return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    # structlog shows local variables by default, and those hold prompts.
    transformer = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [
        structlog.processors.ExceptionRenderer(transformer),
        structlog.processors.JSONRenderer(default=str),
    ]
