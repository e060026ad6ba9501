"""Stop strings in the text of a tokenizer that spells rare characters in byte tokens, as Llama 2 does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.byte_fallback import byte_fallback_backend
from worker_svc.engine import FinishReason, StoppingConfig
from worker_svc.engine.stopping import StopChecker

ALPHABET = "ab \n\u00fc\u65e5\u672c\U0001f99c\U0001f642"
LONG = 10_000


TOKENIZER: Any = PreTrainedTokenizerFast(
    tokenizer_object=byte_fallback_backend("User", ":"), unk_token="<unk>", eos_token="</s>"
)


def _checker(stop: tuple[str, ...], prompt: list[int], output: list[int]) -> StopChecker:
    return StopChecker(StoppingConfig(stop=stop), (), LONG, TOKENIZER, prompt, output)


def _first_stop(tokens: list[int], prompt_tokens: int, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Tokens of the output until the whole text behind the prompt holds a stop string."""
    whole = prompt_tokens
    while TOKENIZER.decode(tokens[:whole]).endswith("\ufffd"):
        whole -= 1
    begin = len(TOKENIZER.decode(tokens[:whole]))
    for count in range(prompt_tokens + 1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:count])
        if text.endswith("\ufffd"):
            continue
        ends = [(text.index(one, begin) + len(one), one) for one in stop if one in text[begin:]]
        if ends:
            return count - prompt_tokens, min(ends)[1]
    return None


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(ALPHABET, min_size=1, max_size=24),
    stop=st.lists(st.text(ALPHABET, min_size=1, max_size=3), min_size=1, max_size=2, unique=True),
    data=st.data(),
)
def test_a_stop_string_is_found_where_it_is_in_the_whole_text(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    """Wherever the prompt ends, inside a character too, and wherever it was resumed."""
    stops = tuple(stop)
    tokens = TOKENIZER(text).input_ids
    prompt_tokens = data.draw(st.integers(1, len(tokens)), label="prompt tokens")
    prompt, output = tokens[:prompt_tokens], tokens[prompt_tokens:]
    expected = _first_stop(tokens, prompt_tokens, stops)
    had = data.draw(st.integers(0, (expected[0] if expected else len(output) + 1) - 1), label="had")
    checker = _checker(stops, prompt, output[:had])
    assert checker.count == had
    for count, token_id in enumerate(output[had:], start=had + 1):
        reason, matched = checker.push(token_id)
        if reason is not None:
            assert (count, matched) == expected
            return
    assert expected is None


@pytest.mark.parametrize("stop", ["\n", "\n\n", "\nUser"])
def test_byte_tokens_behind_long_characters(stop: str) -> None:
    tokens = TOKENIZER("ab \U0001f99c\U0001f99c\n\nUser: c").input_ids
    checker = _checker((stop,), TOKENIZER("a").input_ids, [])
    ends = [matched for reason, matched in map(checker.push, tokens) if reason is FinishReason.STOP]
    assert ends[0] == stop


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each decode from here on."""
    decoded: list[int] = []
    decode = TOKENIZER.decode

    def counted(ids: list[int], **options: Any) -> Any:
        decoded.append(len(ids))
        return decode(ids, **options)

    monkeypatch.setattr(TOKENIZER, "decode", counted)
    return decoded


def test_a_resumed_output_is_not_read_again_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    output = TOKENIZER("ab \U0001f99c\n" * 500).input_ids
    decoded = _counted(monkeypatch)
    _checker(("\nUser",), TOKENIZER("a").input_ids, output)
    assert len(decoded) < 20
    assert max(decoded) < 40


@pytest.mark.parametrize("filler", ["</s>", "<0xFF>"])
def test_what_came_before_tokens_without_text_is_known_when_resumed(filler: str) -> None:
    """Nothing may lie between the halves of a stop string but tokens without text, however many."""
    output = [*TOKENIZER("b User").input_ids, *[TOKENIZER.convert_tokens_to_ids(filler)] * 200]
    checker = _checker(("User:",), TOKENIZER("a").input_ids, output)
    reason, _ = checker.push(TOKENIZER.convert_tokens_to_ids(":"))
    assert reason is (FinishReason.STOP if filler == "</s>" else None)


@pytest.mark.parametrize("byte", ["<0xFF>", "<0x80>", "<0x0A>"])
def test_a_long_run_of_bytes_costs_no_more_with_each(monkeypatch: pytest.MonkeyPatch, byte: str) -> None:
    decoded = _counted(monkeypatch)
    checker = _checker(("x",), TOKENIZER("a").input_ids, [])
    for _ in range(300):
        assert checker.push(TOKENIZER.convert_tokens_to_ids(byte)) == (None, None)
    assert max(decoded) < 40
