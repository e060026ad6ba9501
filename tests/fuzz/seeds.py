"""Good inputs of each target."""

from __future__ import annotations

import json

from laps.v1 import generation_pb2, inference_pb2, scheduler_pb2, worker_pb2

LEASE = (1 << 32) | 1
"""The liar's; the next one is its neighbour's."""

_GENERATE = inference_pb2.GenerateRequest(
    request_id="r",
    token_ids=generation_pb2.TokenIds(ids=[1, 2, 3]),
    sampling=generation_pb2.SamplingParams(
        temperature=0.5, top_p=0.9, seed=1, logprobs=2, frequency_penalty=0.5, logit_bias={3: -1.5}
    ),
    stopping=generation_pb2.StoppingParams(max_tokens=4, stop=["x"], stop_token_ids=[5]),
    priority=1,
)
_CHAT = inference_pb2.GenerateRequest(
    messages=generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content="x")])
)
_SPEC = scheduler_pb2.RequestSpec(
    request_id="acme:r",
    pool="p",
    prompt_token_ids=b"\1\0\0\0",
    stopping=generation_pb2.StoppingParams(max_tokens=4),
    digest=b"d" * 32,
)


def report(lease: int = LEASE, tokens: bytes = b"\2\0\0\0\3\0\0\0") -> worker_pb2.StepReport:
    return worker_pb2.StepReport(
        epoch=1,
        step=1,
        lease_ids=[lease],
        offsets=[0],
        emitted_counts=[len(tokens) // 4],
        drafted_counts=[3],
        accepted_counts=[1],
        token_ids=tokens,
        timings=worker_pb2.StepTimings(step_s=0.01),
    )


_HELLO = worker_pb2.WorkerHello(
    worker_id="liar",
    pool="p",
    slots=2,
    vocabulary_size=1000,
    costs=worker_pb2.StepCosts(draft_token_s=0.001, verify_s=0.01),
    resident=[worker_pb2.ResidentRequest(request_id="honest", output_tokens=2)],
)

SEEDS: dict[str, list[bytes]] = {
    "grpc": [_GENERATE.SerializeToString(), _CHAT.SerializeToString()],
    "http": [
        json.dumps({"prompt": "x", "max_tokens": 3, "stop": ["a"], "logprobs": 2, "stream": True}).encode(),
        json.dumps({"prompt": ["x", [1, 2]], "n": 3, "seed": -1}).encode(),
        json.dumps(
            {"messages": [{"role": "user", "content": "x"}], "temperature": 0.5, "logit_bias": {"3": -1}}
        ).encode(),
    ],
    "submissions": [
        scheduler_pb2.SubmitRequest(
            spec=_SPEC, gateway_id="g", quota=scheduler_pb2.TenantQuota(max_queued_requests=1)
        ).SerializeToString()
    ],
    "worker": [
        worker_pb2.SessionRequest(report=report()).SerializeToString(),
        worker_pb2.SessionRequest(report=report(LEASE + 1)).SerializeToString(),
        worker_pb2.SessionRequest(report=report(tokens=b"\xff" * 8)).SerializeToString(),
        worker_pb2.SessionRequest(hello=_HELLO).SerializeToString(),
    ],
    "records": [b"running\n1\n2\n0\n0\n1\n0.5\n3\n1 2 3\n{}", b"finished\n" * 40 + b'{"sampling": {}}'],
}
