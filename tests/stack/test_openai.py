"""OpenAI's client at a whole stack with the built-in models."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.stack.conftest import SharedStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]

PROMPT = "def add(a, b):"


@pytest.mark.asyncio(loop_scope="session")
async def test_the_same_output_by_http_and_by_grpc(shared_stack: SharedStack) -> None:
    stack, client = shared_stack
    async with openai.AsyncOpenAI(base_url=stack.http_url, api_key="unused") as theirs:
        expected, whole, chunks = await asyncio.gather(
            client.generate(PROMPT, max_tokens=24),
            theirs.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, logprobs=2),
            theirs.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stream=True),
        )
        streamed = "".join([chunk.choices[0].text async for chunk in chunks])
        chat = await theirs.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "What does os.path.join do?"}],
            max_completion_tokens=16,
            seed=7,
        )
    assert whole.choices[0].text == streamed == expected.text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(expected.token_ids)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert all(logprob <= 0 for logprob in logprobs.token_logprobs)
    assert whole.model_extra is not None
    speculation = whole.model_extra["laps"]["speculation"]
    # How many are drafted is the engine's choice: none, where that is faster.
    assert 0 < speculation["num_steps"] <= len(expected.token_ids)
    assert 0 <= speculation["num_accepted_tokens"] <= speculation["num_draft_tokens"]
    assert chat.choices[0].finish_reason in ("stop", "length")


@pytest.mark.asyncio(loop_scope="session")
async def test_a_known_beginning_is_told_by_both_faces(shared_stack: SharedStack) -> None:
    """What the worker took from another prompt's KV cache, by way of the scheduler and its store."""
    stack, client = shared_stack
    system = [300 + place for place in range(40)]
    first = await client.generate([*system, 7, 8, 9], max_tokens=2)
    second = await client.generate([*system, 9, 8], max_tokens=2)
    async with openai.AsyncOpenAI(base_url=stack.http_url, api_key="unused") as theirs:
        third = await theirs.completions.create(model="tiny", prompt=[*system, 8, 9], max_tokens=2)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == len(system)
    assert third.usage is not None
    assert third.usage.prompt_tokens_details is not None
    assert third.usage.prompt_tokens_details.cached_tokens == len(system)
