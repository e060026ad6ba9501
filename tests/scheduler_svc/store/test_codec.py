"""Records to fields and back, and the score that orders a queue."""

from __future__ import annotations

import dataclasses
import math
import re
import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.core.records import FinishReason, Request, RequestSpec, RequestState, StepCosts, Worker
from scheduler_svc.store import codec, layout

finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**31)
texts = st.text(max_size=20)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    spec = RequestSpec(
        request_id="r",
        prompt=struct.pack("<2I", draw(st.integers(0, 2**32 - 1)), 7),
        max_tokens=draw(counts),
        params_json=draw(texts),
        request_class=draw(texts),
        traceparent=draw(texts),
        priority=draw(st.integers(-(2**31), 2**31 - 1)),
        predicted_output_tokens=draw(st.none() | finite),
        deadline_s=draw(st.none() | finite),
        cancel_on_disconnect=draw(st.booleans()),
        disconnect_grace_s=draw(finite),
        digest=draw(texts),
    )
    return Request(
        spec=spec,
        arrival_s=draw(finite),
        arrival_seq=draw(counts),
        state=draw(st.sampled_from(RequestState)),
        steps=draw(counts),
        acceptance_histogram=draw(st.lists(counts, max_size=6)),
        preempted_because=draw(texts),
        first_token_s=draw(st.none() | finite),
        finish_reason=draw(st.none() | st.sampled_from(FinishReason)),
        matched_stop=draw(texts),
        matched_stop_token_id=draw(st.none() | counts),
        level=draw(st.integers(0, 9)),
        rank=draw(finite),
        perceptible=draw(st.booleans()),
        perceived_s=draw(finite),
        lease_id=draw(st.integers(0, 2**63)),
        kv_resident=draw(st.booleans()),
    )


@given(requests())
def test_a_request_survives_the_way_through_its_hash(request):
    flat = codec.new_request_fields(request)
    stored = dict(zip(flat[::2], flat[1::2], strict=True))
    assert tuple(stored) == codec.REQUEST_NAMES
    again = codec.request_from_fields(
        "r", stored, prompt=request.spec.prompt, params_json=request.spec.params_json
    )
    assert again.spec == request.spec
    assert codec.request_values(again) == codec.request_values(request)


def test_every_attribute_of_a_request_has_a_field():
    # `book` and `policy_data` say themselves that they are not stored; output and prompt have keys.
    attributes = {field.name for field in dataclasses.fields(Request)} - {
        "spec",
        "output",
        "policy_data",
        "book",
    }
    of_spec = {field.name for field in dataclasses.fields(RequestSpec)} - {
        "request_id",
        "prompt",
        "params_json",
        "predicted_output_tokens",
    }
    assert attributes | of_spec <= set(codec.REQUEST_NAMES)


def test_a_worker_is_read_as_it_was_written():
    worker = Worker("w", 4, StepCosts(0.001, 0.02, 0.0001, 0.5), device="cpu", draining=True, steps=9)
    flat = codec.worker_fields(worker)
    read = codec.decode_fields(layout.WORKER_FIELDS, dict(zip(flat[::2], flat[1::2], strict=True)))
    written = dataclasses.asdict(worker) | dataclasses.asdict(worker.costs)
    assert read == {name: value for name, value in written.items() if name in read}
    assert written.keys() - read.keys() == {"worker_id", "costs", "running", "expected_rows"}


def test_numbers_of_numpy_are_written_as_numbers():
    request = Request(RequestSpec("r", b"", 1), arrival_s=np.float64(1.5), rank=np.float64(0.1))
    flat = codec.new_request_fields(request)
    assert flat[flat.index("rank") + 1] == "0.1"


@given(st.binary(max_size=40).map(lambda b: b[: len(b) // 4 * 4]))
def test_tokens_survive_as_text(packed):
    assert codec.tokens_from_text(codec.tokens_to_text(packed)) == packed


@given(st.binary(min_size=4, max_size=40).map(lambda b: b[: len(b) // 4 * 4]))
def test_a_prompt_that_stays_text_is_the_same_prompt(packed):
    late = codec.PromptText(codec.tokens_to_text(packed), len(packed) // 4)
    read, written = RequestSpec("r", late, 1), RequestSpec("r", packed, 1)
    assert read.packed_prompt == written.packed_prompt == packed
    assert read.prompt_tokens == written.prompt_tokens
    assert read == written
    assert hash(read) == hash(written)


@given(st.text("01 9x-+.\u0663\n", max_size=8), st.integers(0, 4) | st.integers(2**40, 2**62))
def test_a_damaged_prompt_is_refused_when_it_is_read_and_not_when_it_is_needed(text, tokens):
    whole = re.fullmatch(r"[0-9]+( [0-9]+)*", text, re.ASCII) and len(text.split(" ")) == tokens
    try:
        late = codec.PromptText(text, tokens)
    except ValueError:
        assert not whole
    else:
        assert whole
        assert len(late.packed()) == 4 * tokens


def test_tokens_are_readable():
    assert codec.tokens_to_text(struct.pack("<3I", 1, 4294967295, 0)) == "1 4294967295 0"


# Ranks of a tenth of a millisecond, arrivals up to a million apart: what a queue really holds.
waiting = st.tuples(
    st.integers(-3, 3),
    st.integers(-(10**7), 10**8).map(lambda n: n / 1e4),
    st.integers(0, 40),
)


@given(waiting, waiting)
def test_scores_order_by_priority_then_rank_then_arrival(a, b):
    def run_order(item):
        priority, rank, arrival = item
        return (-priority, rank, arrival)

    score_a, score_b = codec.queue_score(*a), codec.queue_score(*b)
    assert (score_a < score_b) == (run_order(a) < run_order(b))


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1e5))
def test_equal_ranks_run_in_order_of_arrival(a, b, rank):
    assert (codec.queue_score(0, rank, a) < codec.queue_score(0, rank, b)) == (a < b)


@given(st.integers(-100, 100), st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_no_rank_outweighs_a_priority(priority, rank, other_rank):
    assert codec.queue_score(priority + 1, rank, 10**6) < codec.queue_score(priority, other_rank, 0)


def test_a_score_without_priority_is_the_rank():
    assert math.isclose(codec.queue_score(0, 12.5, 100_000), 12.5, rel_tol=1e-9)
