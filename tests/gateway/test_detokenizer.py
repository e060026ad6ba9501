"""Text that leaves in pieces is the decode of the whole, whatever the pieces, stops and resume points."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_model import stop_end

from gateway.chat import ChatTemplate
from gateway.detokenizer import Detokenizer
from gateway.text_decoding import REPLACEMENT, WindowDecoder
from gateway.tokenizer import ModelLimits, Tokenizer
from tests.byte_fallback import byte_fallback_backend

shared = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Few distinct characters, so that stop strings occur, overlap and repeat.
STOPS = st.lists(st.text(alphabet="the nd\u65e5\n\ufffd", min_size=1, max_size=4), max_size=3, unique=True)


def tokens_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Random ids (mostly broken characters) mixed with real text (mostly whole ones)."""
    ids = st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=12)
    words = st.text(alphabet="the end\n\u65e5\u672c\u8a9e\U0001f642\u00fc", max_size=8)
    encode = tokenizer._backend.encode
    pieces = st.one_of(ids, words.map(lambda text: encode(text).ids))
    return st.lists(pieces, max_size=6).map(lambda parts: [token for part in parts for token in part])


def pieces_of(data: st.DataObject, tokens: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8), label="cuts"))
    edges = [0, *cuts, len(tokens)]
    return [tokens[start:end] for start, end in itertools.pairwise(edges)]


def deliver(
    tokenizer: Tokenizer, pieces: list[list[int]], stops: list[str], matched: str, offset: int = 0
) -> list[tuple[int, str]]:
    """(tokens, text) of every message, as a stream would send them."""
    detokenizer = Detokenizer(tokenizer.decoder(), stops)
    sent = []
    for piece in pieces:
        skipped = piece[:offset]
        if skipped:
            detokenizer.skip(skipped)
            offset -= len(skipped)
        sent.append(tuple(detokenizer.push(piece[len(skipped) :])))
    sent.append(tuple(detokenizer.finish(matched)))
    return sent


def planned(
    tokenizer: Tokenizer, tokens: list[int], stops: list[str], min_tokens: int = 0
) -> tuple[list[int], str, str]:
    """The output as a worker would end it: its tokens, its text, the stop string that matched."""
    stopping = SimpleNamespace(stop=stops, min_tokens=min_tokens)
    end = stop_end(tokenizer._backend, tokens, stopping)
    if end is None:
        return tokens, tokenizer.decode(tokens), ""
    count, matched, position = end
    return tokens[:count], tokenizer.decode(tokens[:count])[:position], matched


@shared
@given(data=st.data())
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    tokens = data.draw(tokens_of(tokenizer))
    sent = deliver(tokenizer, pieces_of(data, tokens), [], "")
    assert "".join(text for _, text in sent) == tokenizer.decode(tokens)
    assert sum(count for count, _ in sent) == len(tokens)


@shared
@given(data=st.data())
def test_no_broken_character_before_the_end(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="the \u65e5\u672c\U0001f642\u00fc", max_size=20))
    tokens = tokenizer._backend.encode(text).ids
    for _, piece in deliver(tokenizer, [[token] for token in tokens], [], ""):
        assert "\ufffd" not in piece


@shared
@given(data=st.data(), stops=STOPS, min_tokens=st.integers(0, 6))
def test_text_ends_before_the_stop(
    tokenizer: Tokenizer, data: st.DataObject, stops: list[str], min_tokens: int
) -> None:
    raw = data.draw(tokens_of(tokenizer))
    tokens, text, matched = planned(tokenizer, raw, stops, min_tokens)
    sent = deliver(tokenizer, pieces_of(data, tokens), stops, matched)
    assert "".join(piece for _, piece in sent) == text
    assert sum(count for count, _ in sent) == len(tokens)


@shared
@given(data=st.data(), stops=STOPS)
def test_resumed_at_any_message_it_goes_on_exactly(
    tokenizer: Tokenizer, data: st.DataObject, stops: list[str]
) -> None:
    tokens, text, matched = planned(tokenizer, data.draw(tokens_of(tokenizer)), stops)
    sent = deliver(tokenizer, pieces_of(data, tokens), stops, matched)
    messages = data.draw(st.integers(0, len(sent)), label="messages that arrived")
    offset = sum(count for count, _ in sent[:messages])
    had = "".join(piece for _, piece in sent[:messages])
    rest = deliver(tokenizer, pieces_of(data, tokens), stops, matched, offset)
    assert had + "".join(piece for _, piece in rest) == text
    assert offset + sum(count for count, _ in rest) == len(tokens)


@shared
@given(data=st.data(), stops=STOPS)
def test_resumed_at_any_offset_it_gives_the_tail(
    tokenizer: Tokenizer, data: st.DataObject, stops: list[str]
) -> None:
    tokens, text, matched = planned(tokenizer, data.draw(tokens_of(tokenizer)), stops)
    offset = data.draw(st.integers(0, len(tokens)), label="offset")
    first = deliver(tokenizer, pieces_of(data, tokens), stops, matched, offset)
    # A character belongs to the token that completes it; whoever has all tokens has all text.
    decoder = tokenizer.decoder()
    had = "".join(decoder.push(token) for token in tokens[:offset])
    expected = text[len(had) :] if offset < len(tokens) else ""
    assert "".join(piece for _, piece in first) == expected
    assert sum(count for count, _ in first) == len(tokens) - offset


@shared
@given(data=st.data())
def test_window_decoder_joins_to_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """The decoder for other tokenizers, on text that has whole characters."""
    text = data.draw(st.text(alphabet="the \u65e5\u672c\U0001f642\u00fc", max_size=30))
    decoder = WindowDecoder(tokenizer.decode)
    tokens = tokenizer._backend.encode(text).ids
    assert "".join(decoder.push(token) for token in tokens) + decoder.flush() == text


BYTE_TEXT = "ab \n\u00fc\u65e5\u672c\U0001f99c\U0001f642"


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    template = ChatTemplate.load(tmp_path_factory.mktemp("empty"))
    return Tokenizer(byte_fallback_backend("END"), template, ModelLimits())


@shared
@given(data=st.data(), text=st.text(BYTE_TEXT, max_size=30))
def test_bytes_as_tokens_join_to_the_whole(byte_tokenizer: Tokenizer, data: st.DataObject, text: str) -> None:
    tokens = byte_tokenizer._backend.encode(text).ids
    whole = byte_tokenizer.decode(tokens)
    decoder = byte_tokenizer.decoder()
    assert isinstance(decoder, WindowDecoder)
    assert "".join(map(decoder.push, tokens)) + decoder.flush() == whole
    sent = deliver(byte_tokenizer, pieces_of(data, tokens), [], "")
    assert "".join(piece for _, piece in sent) == whole
    assert sum(count for count, _ in sent) == len(tokens)


@shared
@given(
    data=st.data(),
    text=st.text(BYTE_TEXT, max_size=30),
    stops=st.lists(st.text(BYTE_TEXT, min_size=1, max_size=3), min_size=1, max_size=3, unique=True),
)
def test_bytes_as_tokens_end_before_the_stop(
    byte_tokenizer: Tokenizer, data: st.DataObject, text: str, stops: list[str]
) -> None:
    raw = byte_tokenizer._backend.encode(text).ids
    tokens, expected, matched = planned(byte_tokenizer, raw, stops)
    sent = deliver(byte_tokenizer, pieces_of(data, tokens), stops, matched)
    assert "".join(piece for _, piece in sent) == expected
    assert sum(count for count, _ in sent) == len(tokens)


@shared
@given(
    prompt=st.text(BYTE_TEXT, min_size=1, max_size=30),
    output=st.text(BYTE_TEXT, max_size=30),
    cut=st.integers(0, 3),
)
def test_a_text_goes_on_where_its_prompt_ends(
    byte_tokenizer: Tokenizer, prompt: str, output: str, cut: int
) -> None:
    """Also with a space, which the decoder drops at the beginning of a text, and inside a character."""
    encode = byte_tokenizer._backend.encode
    whole = encode(prompt + output).ids
    at = max(1, len(encode(prompt).ids) - cut)
    before, tokens = whole[:at], whole[at:]
    text = byte_tokenizer.decode(before)
    while text.endswith(REPLACEMENT):
        at -= 1
        text = byte_tokenizer.decode(whole[:at])
    decoder = byte_tokenizer.decoder(before)
    told = "".join(map(decoder.push, tokens)) + decoder.flush()
    assert told == (byte_tokenizer.decode(whole)[len(text) :] if tokens else "")


def test_a_stop_that_begins_with_the_first_space_is_no_text(byte_tokenizer: Tokenizer) -> None:
    encode = byte_tokenizer._backend.encode
    before, tokens = encode("b").ids, encode("b a").ids[-1:]
    detokenizer = Detokenizer(byte_tokenizer.decoder(before), [" a"])
    assert detokenizer.push(tokens) == (0, "")
    assert detokenizer.finish(" a") == (1, "")


@pytest.mark.parametrize("byte", ["<0xFF>", "<0x80>", "<0x0A>"])
def test_a_run_of_bytes_is_decoded_in_bounded_pieces(byte: str) -> None:
    backend = byte_fallback_backend("END")
    decoded: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return str(backend.decode(list(ids)))

    decoder = WindowDecoder(decode)
    for _ in range(300):
        decoder.push(backend.token_to_id(byte))
    assert max(decoded) < 40


def test_text_waits_while_it_may_be_a_stop(tokenizer: Tokenizer) -> None:
    encode = tokenizer._backend.encode
    detokenizer = Detokenizer(tokenizer.decoder(), ["\n\nb"])
    assert detokenizer.push(encode("a").ids) == (1, "a")
    assert detokenizer.push(encode("\n").ids) == (0, "")
    assert detokenizer.push(encode("c").ids) == (2, "\nc")


def test_a_stop_before_min_tokens_is_text(tokenizer: Tokenizer) -> None:
    encode = tokenizer._backend.encode
    detokenizer = Detokenizer(tokenizer.decoder(), ["x"])
    assert detokenizer.push(encode("x").ids) == (0, "")
    assert detokenizer.push(encode("y").ids) == (2, "xy")
    assert detokenizer.push(encode("x").ids) == (0, "")
    assert detokenizer.finish("x") == (1, "")


def test_a_stop_token_has_no_text(tokenizer: Tokenizer) -> None:
    stop_id = tokenizer._backend.token_to_id("a")
    detokenizer = Detokenizer(tokenizer.decoder(), end_token_ids=frozenset({stop_id}))
    assert detokenizer.push([stop_id, *tokenizer._backend.encode("b").ids]) == (2, "ab")
    assert detokenizer.push([stop_id]) == (0, "")
    assert detokenizer.finish(matched_stop_token_id=stop_id) == (1, "")


@pytest.mark.parametrize("count", [2_000, 8_000])
def test_work_per_token_does_not_grow(tokenizer: Tokenizer, count: int) -> None:
    """Held text stays short however long the output is."""
    detokenizer = Detokenizer(tokenizer.decoder(), ["never this"])
    tokens = tokenizer._backend.encode("the end of the story ").ids
    for index in range(count):
        detokenizer.push([tokens[index % len(tokens)]])
        assert len(detokenizer._held) < 16
        assert len(detokenizer._held_ends) < 16
