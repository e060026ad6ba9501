"""Lossless through the whole stack: what clients get is what the target alone would write."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from laps.client import AsyncClient
from laps.client.results import Completion
from laps.stack import Stack
from tests.stack import reference
from tests.stack.conftest import SharedStack, StartStack, patient_stack, until_held

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]

MAX_TOKENS = 40
CONTEXT_TOKENS = 512
SLOTS = 8


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def two_workers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SharedStack]:
    settings = {
        "workers": 2,
        "slots": SLOTS // 2,
        "context_tokens": CONTEXT_TOKENS,
        "policy": "laps-sd-paper",
    }
    async with patient_stack(tmp_path_factory.mktemp("two-workers"), **settings) as both:
        yield both


async def check_greedy(stack: Stack, client: AsyncClient, texts: list[str]) -> None:
    """Every prompt at once, each of a higher priority than the one before it. The workers are frozen until
    the first ones have all slots, so that latecomers push out whoever runs."""
    encoded = [reference.encode(text, CONTEXT_TOKENS - MAX_TOKENS) for text in texts]

    async def one(number: int, ids: list[int]) -> Completion:
        return await client.generate(ids, max_tokens=MAX_TOKENS, priority=min(number, 100))

    workers = [stack.children["worker-0"], stack.children["worker-1"]]
    for worker in workers:
        worker.signal(signal.SIGSTOP)
    asked = [asyncio.create_task(one(number, ids)) for number, ids in enumerate(encoded[:SLOTS])]
    await until_held(client, SLOTS, running=SLOTS)
    asked += [asyncio.create_task(one(number, ids)) for number, ids in enumerate(encoded[SLOTS:], SLOTS)]
    await until_held(client, len(encoded))
    for worker in workers:
        worker.signal(signal.SIGCONT)
    served = await asyncio.gather(*asked)
    assert sum(one.timing.preemptions for one in served) > 0
    assert sum(one.speculation.num_accepted_tokens for one in served) > 0
    outputs = [list(one.token_ids) for one in served]
    different = await asyncio.to_thread(
        lambda: [
            number
            for number, (ids, output) in enumerate(zip(encoded, outputs, strict=True))
            if not reference.is_greedy(ids, output, MAX_TOKENS)
        ]
    )
    assert different == []


@pytest.mark.asyncio(loop_scope="session")
async def test_greedy_output_is_the_targets_own(two_workers: SharedStack, prompts: list[str]) -> None:
    await check_greedy(*two_workers, prompts[:24])


@pytest.mark.asyncio(loop_scope="session")
async def test_greedy_output_on_spec_bench(two_workers: SharedStack, specbench_prompts: list[str]) -> None:
    await check_greedy(*two_workers, specbench_prompts)


@pytest.mark.asyncio(loop_scope="session")
async def test_a_seed_gives_the_same_output_on_any_stack(
    two_workers: SharedStack, start_stack: StartStack, prompts: list[str]
) -> None:
    """Other slots, workers, policies and draft lengths; other neighbours, other preemptions."""
    encoded = [reference.encode(text, CONTEXT_TOKENS - MAX_TOKENS) for text in prompts[:12]]

    async def outputs(client: AsyncClient, order: int) -> list[tuple[int, ...]]:
        async def one(number: int, ids: list[int]) -> tuple[int, ...]:
            completion = await client.generate(
                ids,
                max_tokens=MAX_TOKENS,
                temperature=0.9,
                top_p=0.95,
                seed=number,
                priority=order * number,
            )
            return completion.token_ids

        return list(await asyncio.gather(*(one(number, ids) for number, ids in enumerate(encoded))))

    second = await outputs(two_workers[1], -1)
    async with start_stack(workers=1, slots=2, policy="fcfs", draft_tokens=1) as (_, client):
        first = await outputs(client, 1)
    assert first == second
    assert len(set(first)) > 6  # some may end at once, alike


@pytest.mark.asyncio(loop_scope="session")
async def test_sampled_output_has_the_targets_distribution(shared_stack: SharedStack) -> None:
    """Pearson's chi-square over all outputs of three tokens from the two likeliest each."""
    prompt, draws, length = "def ", 320, 3
    ids = reference.encode(prompt, CONTEXT_TOKENS)
    _, client = shared_stack
    slots = asyncio.Semaphore(32)

    async def one() -> tuple[int, ...]:
        async with slots:
            made = await client.generate(ids, temperature=1.0, top_k=2, max_tokens=length, ignore_eos=True)
            return made.token_ids

    drawn = Counter(await asyncio.gather(*(one() for _ in range(draws))))
    expected = await asyncio.to_thread(reference.sequence_probabilities, ids, length, 2)
    assert set(drawn) <= set(expected)
    # Outcomes too rare for the approximation count together.
    wanted = {output: probability * draws for output, probability in expected.items()}
    rare = [output for output in wanted if wanted[output] < 5]
    cells = [(drawn[output], wanted[output]) for output in wanted if output not in rare]
    if rare:
        cells.append((sum(drawn[o] for o in rare), max(sum(wanted[o] for o in rare), 1e-9)))
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    # 0.9999 quantiles for up to 7 degrees of freedom: one false alarm in 10,000 runs.
    quantiles = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 6: 27.86, 7: 29.88}
    assert chi_square < quantiles[max(1, len(cells) - 1)], cells


@pytest.mark.asyncio(loop_scope="session")
async def test_streams_give_each_token_once(shared_stack: SharedStack, prompts: list[str]) -> None:
    _, client = shared_stack
    await asyncio.gather(*(check_stream(client, prompt) for prompt in prompts[:6]))


async def check_stream(client: AsyncClient, prompt: str) -> None:
    offset, text = 0, ""
    async with client.stream(prompt, max_tokens=32) as stream:
        async for chunk in stream:
            assert chunk.offset == offset
            offset += len(chunk.token_ids)
            text += chunk.text
    made = stream.result
    assert offset == len(made.token_ids)
    tokenizer = reference.target()[1]
    assert text == made.text == tokenizer.decode(made.token_ids, skip_special_tokens=True)
