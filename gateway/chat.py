"""The model's own chat template, rendered as transformers' `apply_chat_template` renders it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from laps.errors import InvalidArgument
from laps.logs import get_logger

log = get_logger()

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """Turns messages into the prompt's text. A model without a template refuses messages."""

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._template: Template | None = None
        self._problem = "the model has no chat template; give text or token_ids"
        if source:
            try:
                self._template = _environment().from_string(source)
            except TemplateError as error:
                # Everything else can be served without it.
                self._problem = f"the model's chat template cannot be read: {error}; give text or token_ids"
                log.error("chat template cannot be read, messages are refused", error=str(error))

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        config = _read_json(folder / "tokenizer_config.json")
        separate = folder / "chat_template.jinja"
        source = (
            separate.read_text() if separate.is_file() else _default_template(config.get("chat_template"))
        )
        given = _read_json(folder / "special_tokens_map.json") | config
        tokens = {name: _content(given[name]) for name in _SPECIAL_TOKENS if given.get(name)}
        return cls(source, tokens)

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The prompt for (role, content) pairs. Raises InvalidArgument where the template refuses them."""
        if self._template is None:
            raise InvalidArgument("messages", self._problem)
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return _render(self._template, turns, self._special_tokens)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            # The message is the template's own, such as "roles must alternate"; it quotes no content.
            reason = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise InvalidArgument("messages", f"the model's chat template refuses them: {reason}") from None


def _render(template: Template, turns: list[dict[str, str]], special_tokens: Mapping[str, str]) -> str:
    return template.render(
        messages=turns, add_generation_prompt=True, tools=None, documents=None, **special_tokens
    )


def _environment() -> ImmutableSandboxedEnvironment:
    # The template comes with the weights and is not trusted: sandboxed, without access to anything.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks for training what an assistant said."""

    tags = {"generation"}  # noqa: RUF012  # as jinja declares it

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would change prompts.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _default_template(given: Any) -> str | None:
    if isinstance(given, list):
        by_name = {entry["name"]: entry["template"] for entry in given}
        given = by_name.get("default")
    return given if isinstance(given, str) else None


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}
