"""What must hold between any two events."""

from __future__ import annotations

from scheduler_svc.core.board import MANY_RUNNING, Board
from scheduler_svc.core.placement import worst_of
from scheduler_svc.core.records import RequestState


def check_board(board: Board) -> None:
    """Raises AssertionError that says what does not hold."""
    for request_id, request in board.live.items():
        assert request.request_id == request_id
        assert request.finish_reason is None, f"{request_id} is live and has ended"
        assert request.output_tokens <= request.spec.max_tokens, f"{request_id} is longer than allowed"
        if request.state is RequestState.RUNNING:
            assert board.leases.get(request.lease_id) is request, f"{request_id} runs without a lease"
            assert request_id not in board.waiting, f"{request_id} runs and waits"
        else:
            assert request.state in (RequestState.QUEUED, RequestState.PREEMPTED)
            assert not request.lease_id, f"{request_id} waits with a lease"
            assert not request.releasing
            assert request_id in board.waiting, f"{request_id} neither runs nor waits"
        if request.lease_id:
            assert request.worker_id in board.pool.workers, f"{request_id} runs on a worker that is gone"
            slot_holder = board.pool.workers[request.worker_id].running[request.slot]
            if request.releasing:
                assert request.lease_id in board.releasing
                assert slot_holder is not request
            else:
                assert slot_holder is request, f"{request_id} is not in its slot"
        if request.kv_resident:
            assert request.worker_id in board.pool.workers, (
                f"the KV cache of {request_id} is on a worker that is gone"
            )
    assert len(board.waiting) + len(board.leases) == len(board.live)
    for lease_id, request in board.leases.items():
        assert request.lease_id == lease_id
        assert board.live.get(request.request_id) is request
    assert set(board.releasing) <= set(board.leases)
    assert set(board.free) == set(board.pool.workers)
    for worker_id, worker in board.pool.workers.items():
        empty = {slot for slot, holder in enumerate(worker.running) if holder is None}
        assert empty == set(board.free[worker_id]), f"the free slots of {worker_id} are miscounted"
        assert len(board.free[worker_id]) == len(empty)
        found = board.worst.get(worker_id)
        assert found is None or found[1] in worker.running, f"the first victim of {worker_id} runs elsewhere"
        if worker_id in board.worst and len(board.leases) <= MANY_RUNNING:
            assert board.worst[worker_id] == worst_of(board, worker, ()), (
                f"the first victim of {worker_id} is another one"
            )
    assert set(board.worst) <= set(board.pool.workers)
    waiting_prompts = sum(
        request.spec.prompt_tokens for request in board.live.values() if request.request_id in board.waiting
    )
    assert waiting_prompts == board.waiting_prompt_tokens
    assert board.pool.live == len(board.live)


def check_work_conserving(board: Board) -> None:
    """After a tick: nothing waits while a slot is free."""
    if len(board.waiting):
        idle = [name for name, slots in board.free.items() if slots and not board.pool.workers[name].draining]
        assert not idle, f"requests wait while {idle} have free slots"
