"""Requests end where they should, to the token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker_svc.engine import (
    EngineRequest,
    FinishReason,
    InvalidRequestError,
    ModelPair,
    SamplingConfig,
    StoppingConfig,
    admission,
)
from worker_svc.engine.stopping import StopChecker

PROMPT = [40, 41, 42]
LONG = 60


@pytest.fixture(scope="module")
def full(tools: Any, text_pair: ModelPair) -> list[int]:
    """A long sampled output whose text is the quarry for stop strings."""
    stopping = StoppingConfig(max_tokens=LONG, ignore_eos=True)
    request = EngineRequest("full", PROMPT, sampling=_SAMPLING, stopping=stopping)
    return tools.drain(tools.engine(text_pair), [request])["full"].tokens


_SAMPLING = SamplingConfig(temperature=1.0, seed=3)


def _run(
    tools: Any, pair: ModelPair, draft_tokens: int = 4, output: list[int] | None = None, **stopping: Any
) -> Any:
    config = StoppingConfig(**({"max_tokens": LONG, "ignore_eos": True} | stopping))
    request = EngineRequest("a", PROMPT, output or [], sampling=_SAMPLING, stopping=config)
    return tools.drain(tools.engine(pair, draft_tokens=draft_tokens), [request])["a"]


def _expected(pair: ModelPair, full: list[int], stop: str) -> int | None:
    """Tokens needed until the text holds the stop string."""
    for count in range(1, len(full) + 1):
        text = pair.tokenizer.decode(full[:count], skip_special_tokens=True)
        if stop in text:
            return count
    return None


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, 150),
    length=st.integers(1, 9),
    draft_tokens=st.integers(0, 5),
    resumed=st.integers(0, 3),
)
def test_stop_strings_anywhere(
    tools: Any,
    text_pair: ModelPair,
    full: list[int],
    start: int,
    length: int,
    draft_tokens: int,
    resumed: int,
) -> None:
    """A stop string is found wherever it lies, also across tokens; the output ends with the token that
    completes it.
    """
    text = text_pair.tokenizer.decode(full, skip_special_tokens=True)
    stop = text[start : start + length]
    if not stop or "\ufffd" in stop:
        return
    count = _expected(text_pair, full, stop)
    assert count is not None
    head = full[: min(resumed, count - 1)]
    output = _run(tools, text_pair, draft_tokens, head, stop=(stop, "never\x00seen"))
    assert output.tokens == full[:count]
    assert output.finish is FinishReason.STOP
    assert output.matched_stop == stop


def test_stop_strings_do_not_match_the_prompt(tools: Any, text_pair: ModelPair, full: list[int]) -> None:
    stop = text_pair.tokenizer.decode(PROMPT)
    if _expected(text_pair, full, stop) is None:
        assert _run(tools, text_pair, stop=(stop,)).tokens == full


@pytest.mark.parametrize("draft_tokens", [0, 4])
def test_stop_token_is_emitted_and_ends(
    tools: Any, text_pair: ModelPair, full: list[int], draft_tokens: int
) -> None:
    stop_id = full[17]
    output = _run(tools, text_pair, draft_tokens, stop_token_ids=(stop_id,))
    assert output.tokens == full[: full.index(stop_id) + 1]
    assert output.finish is FinishReason.STOP
    assert output.matched_stop == stop_id


@pytest.mark.parametrize("draft_tokens", [0, 4])
@pytest.mark.parametrize("max_tokens", [1, 2, 13])
def test_max_tokens(
    tools: Any, text_pair: ModelPair, full: list[int], max_tokens: int, draft_tokens: int
) -> None:
    output = _run(tools, text_pair, draft_tokens, max_tokens=max_tokens)
    assert output.tokens == full[:max_tokens]
    assert output.finish is FinishReason.LENGTH
    assert output.matched_stop is None


@pytest.mark.parametrize("draft_tokens", [0, 1, 4])
def test_min_tokens(tools: Any, pair: ModelPair, draft_tokens: int) -> None:
    """Neither end-of-sequence nor a stop id is chosen before min_tokens; what is chosen instead is the next
    best.
    """
    eos = pair.eos_token_ids[0]
    ended_early = 0
    for seed in range(5):
        sampling = SamplingConfig(temperature=4.0, seed=seed)
        outputs = {}
        for name, min_tokens in (("free", 0), ("held", 15)):
            stopping = StoppingConfig(max_tokens=30, min_tokens=min_tokens, stop_token_ids=(7, 9))
            engine = tools.engine(pair, draft_tokens=draft_tokens)
            request = EngineRequest(name, [5, 6], sampling=sampling, stopping=stopping)
            outputs |= tools.drain(engine, [request])
        free, held = outputs["free"], outputs["held"]
        assert len(held.tokens) >= 15
        assert not {eos, 7, 9} & set(held.tokens[:14])
        if len(free.tokens) < 15:
            ended_early += 1
            assert free.tokens[-1] in (eos, 7, 9)
            assert held.tokens[: len(free.tokens) - 1] == free.tokens[:-1]
    assert ended_early


def test_min_tokens_delays_stop_strings(tools: Any, text_pair: ModelPair, full: list[int]) -> None:
    stop = text_pair.tokenizer.decode(full[:1]) or " "
    output = _run(tools, text_pair, stop=(stop,), min_tokens=10)
    assert len(output.tokens) >= 10


def test_eos(tools: Any, pair: ModelPair) -> None:
    sampling = SamplingConfig(temperature=3.0, seed=4)
    eos = pair.eos_token_ids[0]
    outputs = tools.drain(
        tools.engine(pair),
        [
            EngineRequest("ends", [5], sampling=sampling),
            EngineRequest("goes on", [5], sampling=sampling, stopping=StoppingConfig(ignore_eos=True)),
        ],
    )
    ends, goes_on = outputs["ends"], outputs["goes on"]
    assert ends.finish is FinishReason.STOP
    assert ends.matched_stop == eos
    assert ends.tokens[-1] == eos
    assert goes_on.finish is FinishReason.LENGTH
    assert goes_on.tokens[: len(ends.tokens)] == ends.tokens


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: StoppingConfig(max_tokens=0), "max_tokens"),
        (lambda: StoppingConfig(max_tokens=3, min_tokens=4), "min_tokens"),
        (lambda: StoppingConfig(stop=("",)), "stop"),
        (lambda: StoppingConfig(stop="text"), "stop"),
        (lambda: SamplingConfig(temperature=-1.0), "temperature"),
        (lambda: SamplingConfig(temperature=float("nan")), "temperature"),
        (lambda: SamplingConfig(top_p=0.0), "top_p"),
        (lambda: SamplingConfig(min_p=1.5), "min_p"),
        (lambda: SamplingConfig(top_k=-1), "top_k"),
        (lambda: SamplingConfig(repetition_penalty=0.0), "repetition_penalty"),
        (lambda: SamplingConfig(repetition_penalty=1e-38), "repetition_penalty"),
        (lambda: SamplingConfig(repetition_penalty=101.0), "repetition_penalty"),
        (lambda: SamplingConfig(logprobs=1000), "logprobs"),
        (lambda: SamplingConfig(seed=1 << 64), "seed"),
        (lambda: EngineRequest("", [1]), "request_id"),
        (lambda: EngineRequest("a", []), "prompt_token_ids"),
    ],
)
def test_bad_values_name_their_field(make: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: "):
        make()


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([5, 64], {}, "token id 64 at position 1 is outside the vocabulary of 64"),
        ([5, -1], {}, "token id -1 at position 1"),
        ([5] * 160, {}, "160 tokens leave no room for output in a context of 160 tokens"),
        (
            [5] * 100,
            {"max_tokens": 61},
            "100 prompt tokens and 61 output tokens exceed the context of 160 tokens",
        ),
        ([5], {"stop": ("x",)}, "stop strings need a tokenizer"),
        ([5], {"stop_token_ids": (99,)}, "token id 99 at position 0"),
    ],
)
def test_requests_that_do_not_fit(
    tools: Any, pair: ModelPair, prompt: list[int], changes: dict[str, Any], message: str
) -> None:
    engine = tools.engine(pair)
    with pytest.raises(ValueError, match=message):
        engine.add(EngineRequest("a", prompt, stopping=StoppingConfig(**changes)))
    assert engine.running == ()
    assert engine.resident() == {}


class _Letters:
    """Token 97 is 'a'."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(map(chr, ids))


def _checker(stop: tuple[str, ...], min_tokens: int) -> StopChecker:
    return StopChecker(StoppingConfig(stop=stop, min_tokens=min_tokens), (), 1000, _Letters(), [97], [])


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", min_size=1, max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=3, unique=True),
    min_tokens=st.integers(0, 20),
)
def test_a_stop_string_counts_where_it_is_completed(text: str, stop: list[str], min_tokens: int) -> None:
    """One that was completed before min_tokens is not found again in what is kept for longer ones."""
    checker = _checker(tuple(stop), min_tokens)
    for count, char in enumerate(text, start=1):
        reason, matched = checker.push(ord(char))
        ending = {one for one in stop if text[:count].endswith(one)} if count >= min_tokens else set()
        assert (reason is FinishReason.STOP) == bool(ending)
        if ending:
            assert matched in ending
            return


def test_an_old_stop_string_is_not_reported_late() -> None:
    checker = _checker(("ab", "bbbbbbbb"), 4)
    assert [checker.push(ord(char))[0] for char in "abaaaa"] == [None] * 6
    assert checker.push(ord("b")) == (FinishReason.STOP, "ab")


@pytest.mark.parametrize("repeated", ["eos", "half of a character"])
def test_tokens_without_text_do_not_make_each_other_dearer(text_pair: ModelPair, repeated: str) -> None:
    """With `ignore_eos` a model may go on with its end-of-sequence token for the rest of the context."""
    decoded: list[int] = []

    class Tokenizer:
        def decode(self, ids: list[int], **options: Any) -> str:
            decoded.append(len(ids))
            text = text_pair.tokenizer.decode(ids, **options)
            return str(text) if repeated == "eos" else "\ufffd" * len(ids)

    eos = min(text_pair.eos_token_ids)
    checker = StopChecker(StoppingConfig(stop=("x",)), (), 10_000, Tokenizer(), PROMPT, ())
    for _ in range(500):
        assert checker.push(eos) == (None, None)
    assert max(decoded) < 40


def test_who_goes_on_where_it_was_is_not_judged_anew(
    tools: Any, text_pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coming back to a slot must not read the output again; with other rules or other tokens it is read."""
    stopping = StoppingConfig(max_tokens=LONG, stop=("never\x00seen",), ignore_eos=True)
    engine = tools.engine(text_pair)
    request = EngineRequest("a", PROMPT, stopping=stopping)
    engine.add(request)
    output = engine.step().tokens_of(0)
    made: list[int] = []

    class Counted(StopChecker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self.count)

    monkeypatch.setattr(admission, "StopChecker", Counted)
    engine.preempt("a")
    engine.add(replace(request, output_token_ids=output, draft_tokens=0))
    assert made == []
    result = engine.step()
    assert (result.offsets, result.drafted_counts) == ((len(output),), (0,))
    output += result.tokens_of(0)
    engine.preempt("a")
    shorter = replace(stopping, max_tokens=len(output) + 1)
    engine.add(replace(request, output_token_ids=output, stopping=shorter))
    assert made == [len(output)]
    assert engine.step().finish == (FinishReason.LENGTH,)


def test_one_that_has_finished_goes_on_with_the_same_tokens(tools: Any, text_pair: ModelPair) -> None:
    """Its end is taken back where nobody has stored it; other rules may then let it run on."""
    engine = tools.engine(text_pair, hold_finished=True)
    free = EngineRequest("free", PROMPT, stopping=StoppingConfig(max_tokens=20, ignore_eos=True))
    expected = tools.drain(engine, [free])["free"].tokens
    engine.drop("free")
    stop_id = expected[7]
    request = replace(
        free, request_id="a", stopping=StoppingConfig(20, stop_token_ids=(stop_id,), ignore_eos=True)
    )
    ended = tools.drain(engine, [request])["a"].tokens
    assert ended == expected[: expected.index(stop_id) + 1]
    engine.add(replace(request, output_token_ids=ended))
    more = engine.step().tokens_of(0)
    assert more
    assert more == expected[len(ended) : len(ended) + len(more)]
