"""Log-probabilities in both of OpenAI's shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fake_scheduler import Stored

from gateway.http.logprobs import LEAST, Entry, for_chat, for_completions
from gateway.tokenizer import Tokenizer
from laps.v1 import generation_pb2

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the end"}


@pytest.fixture(autouse=True)
def with_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler gives each token and the next one in the vocabulary as the likeliest."""

    def logprobs(stored: Stored, start: int, end: int) -> list[generation_pb2.TokenLogprob]:
        top = [-0.5, -1.5][: stored.spec.sampling.logprobs]
        return [
            generation_pb2.TokenLogprob(
                logprob=-0.5,
                top=[
                    generation_pb2.TopLogprob(token_id=max(token - index, 0), logprob=each)
                    for index, each in enumerate(top)
                ],
            )
            for token in stored.planned[start:end]
        ]

    monkeypatch.setattr(Stored, "logprobs", logprobs)


@pytest.mark.parametrize("stream", [False, True])
async def test_chat(http: Any, tokenizer: Tokenizer, stream: bool) -> None:
    answer = await http.client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, stream=stream)
    answers = [chunk async for chunk in answer] if stream else [answer]
    entries = [
        entry for each in answers if each.choices[0].logprobs for entry in each.choices[0].logprobs.content
    ]
    planned = http.stored().planned
    assert [bytes(entry.bytes) for entry in entries] == [tokenizer.token_bytes(token) for token in planned]
    assert all(entry.logprob == -0.5 for entry in entries)
    assert all([top.logprob for top in entry.top_logprobs] == [-0.5, -1.5] for entry in entries)
    assert all(entry.top_logprobs[0].bytes == entry.bytes for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
async def test_completions(http: Any, tokenizer: Tokenizer, stream: bool) -> None:
    answer = await http.client.completions.create(**TEXT, logprobs=2, stream=stream)
    answers = [chunk async for chunk in answer] if stream else [answer]
    text = "".join(each.choices[0].text for each in answers)
    parts = [each.choices[0].logprobs for each in answers if each.choices[0].logprobs]
    tokens = [token for part in parts for token in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    planned = http.stored().planned
    assert len(tokens) == len(planned) == sum(len(part.token_logprobs) for part in parts)
    assert all(top for part in parts for top in part.top_logprobs)
    for token_id, token, offset in zip(planned, tokens, offsets, strict=True):
        raw = tokenizer.token_bytes(token_id)
        if token.startswith("bytes:"):
            assert token == "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        elif token_id > 2 and "\ufffd" not in text[offset : offset + len(token)]:
            assert text[offset : offset + len(token)] == token


async def test_only_the_chosen_token(http: Any) -> None:
    answer = await http.client.completions.create(**TEXT, logprobs=0)
    assert answer.choices[0].logprobs.top_logprobs is None
    chat = await http.client.chat.completions.create(**CHAT, logprobs=True)
    assert all(entry.top_logprobs == [] for entry in chat.choices[0].logprobs.content)


def test_what_json_cannot_say(tokenizer: Tokenizer) -> None:
    from gateway.http.logprobs import Entries

    values = [-math.inf, math.nan, math.inf]
    chunk = generation_pb2.Chunk(
        token_ids=[5, 6, 7], logprobs=[generation_pb2.TokenLogprob(logprob=value) for value in values]
    )
    assert [entry.logprob for entry in Entries(tokenizer).read(chunk)] == [LEAST] * 3


def test_half_a_character() -> None:
    entry = Entry(b"\xe6\x97", -1.0, [(b"\xe6\x97", -1.0), (b"a", -2.0)], 0)
    assert for_chat([entry])["content"][0]["bytes"] == [0xE6, 0x97]
    assert for_completions([entry]) == {
        "tokens": ["bytes:\\xe6\\x97"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{"bytes:\\xe6\\x97": -1.0, "a": -2.0}],
        "text_offset": [0],
    }


def test_special_tokens_have_their_names(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(0) == b"<|end|>"
    assert tokenizer.token_bytes(1 << 20) == b""
