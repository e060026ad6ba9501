"""The fast way to the tokenizer gives what transformers gives."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_model import write

from gateway.chat import ChatTemplate
from gateway.tokenizer import Tokenizer, TokenizerError, load_tokenizer
from laps.errors import InvalidArgument
from laps.settings import BUILT_IN_TARGET

TURNS = [("system", "Be brief."), ("user", "Hello,\n  <|end|> w\u00f6rld \u65e5\u672c \U0001f642")]


@pytest.fixture(scope="module")
def both(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    folder = Path(BUILT_IN_TARGET) if Path(BUILT_IN_TARGET).is_dir() else model_folder
    return load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


async def test_prompts_are_those_of_transformers(both: Any) -> None:
    ours, theirs = both
    for text in ("Hello, world", TURNS[1][1], " \t\n", "x" * 20_000):
        assert list(await ours.encode(text)) == theirs(text)["input_ids"]


async def test_chats_are_those_of_transformers(both: Any) -> None:
    ours, theirs = both
    turns = [{"role": role, "content": content} for role, content in TURNS]
    expected = theirs.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(await ours.encode_chat(TURNS)) == list(expected["input_ids"])


def test_texts_are_those_of_transformers(both: Any) -> None:
    ours, theirs = both
    ids = [token_id * 7919 % ours.vocabulary_size for token_id in range(500)]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


TRAINED = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% set kept = 1 %}"
    "{% endgeneration %}{{ kept is defined }}{% else %}{{ message | tojson(sort_keys=true) }}{% endif %}"
    "{% endfor %}{{ messages | tojson(separators=(',', ':'), ensure_ascii=true) }}"
)


async def test_marks_of_training_change_nothing(both: Any) -> None:
    """Checkpoints that were tuned with TRL have them in their templates."""
    turns = [("user", "hi <b>"), ("assistant", "yo \u00fc")]
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = both[1].apply_chat_template(messages, chat_template=TRAINED, tokenize=False)
    assert ChatTemplate(TRAINED, {}).render(turns) == expected


def test_a_template_that_cannot_be_read_refuses_messages_alone(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text("{% unheard_of %}")
    tokenizer = load_tokenizer(str(folder))
    assert len(asyncio.run(tokenizer.encode("Hello"))) > 0
    with pytest.raises(InvalidArgument, match=r"cannot be read: .*unheard_of"):
        asyncio.run(tokenizer.encode_chat([("user", "hi")]))


async def test_a_template_may_refuse(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="no such role") as caught:
        await tokenizer.encode_chat([("bad", "x")])
    assert caught.value.field == "messages"


def test_missing_folders_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no model folder"):
        load_tokenizer(str(tmp_path / "nothing"))
    write(tmp_path / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
