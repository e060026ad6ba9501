"""Gives slots to waiting requests: first the free ones, then those that a policy takes away."""

from __future__ import annotations

from collections.abc import Container

from scheduler_svc.core.board import Board
from scheduler_svc.core.records import FinishReason, Request, Worker

MOST_PASSED_OVER = 256
"""Waiting requests that one search goes past because no worker that could take them now has room for them."""


def place(board: Board, now_s: float) -> int:
    """Fills and preempts until nothing more is to be gained; the number of preemptions."""
    _fill(board, now_s)
    if board.policy.preemptive and len(board.waiting):
        return _preempt(board, now_s)
    return 0


def _fill(board: Board, now_s: float) -> None:
    if board.by_context:
        _fill_by_context(board, now_s)
        return
    while (request := board.first_waiting()) is not None:
        worker = _best_worker(board, request)
        if worker is None:
            return
        if not _fits(board, request, worker, now_s):
            continue
        board.grant(request, worker, board.free[worker.worker_id].pop(), now_s)


def _fill_by_context(board: Board, now_s: float) -> None:
    """Whoever no free worker has room for waits, and the others pass."""
    passed = _PassedOver(board)
    while (request := passed.next()) is not None:
        if not any(slots for name, slots in board.free.items() if not board.pool.workers[name].draining):
            break
        needed_tokens = _needed_tokens(request)
        worker = _best_worker(board, request, needed_tokens)
        if worker is not None:
            board.grant(request, worker, board.free[worker.worker_id].pop(), now_s)
        elif now_s < board.larger_until_s or any(
            _has_room(each, needed_tokens) for each in board.pool.workers.values()
        ):
            passed.over(request)
        else:
            largest_tokens = max(each.context_tokens for each in board.pool.workers.values())
            _end_as_too_long(board, request, needed_tokens, largest_tokens, now_s)
    passed.put_back()


class _PassedOver:
    """Goes through the waiting requests in their order."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._keys: dict[str, tuple[float, ...]] = {}

    def next(self) -> Request | None:
        """The first of those that were not passed over."""
        return self._board.first_waiting() if len(self._keys) < MOST_PASSED_OVER else None

    def over(self, request: Request) -> None:
        """It stays where it is in the queue."""
        waiting = self._board.waiting
        self._keys[request.request_id] = waiting.key(request.request_id)
        waiting.remove(request.request_id)

    def put_back(self) -> None:
        for request_id, key in self._keys.items():
            self._board.waiting.put(request_id, key)


def _best_worker(board: Board, request: Request, needed_tokens: int = 0) -> Worker | None:
    """The worker that holds the request's KV cache if it has a free slot, else the one with the most
    free slots: there a step is shortest, and the load evens out. Its context has room for `needed_tokens`."""
    best, most = None, 0
    for worker_id, slots in board.free.items():
        worker = board.pool.workers[worker_id]
        if not slots or worker.draining or (needed_tokens and not _has_room(worker, needed_tokens)):
            continue
        if request.kv_resident and worker_id == request.worker_id:
            return worker
        if len(slots) > most:
            best, most = worker, len(slots)
    return best


def _needed_tokens(request: Request) -> int:
    return request.spec.prompt_tokens + request.spec.max_tokens


def _has_room(worker: Worker, needed_tokens: int) -> bool:
    return not worker.context_tokens or needed_tokens <= worker.context_tokens


def _fits(board: Board, request: Request, worker: Worker, now_s: float) -> bool:
    """A request accepted while no worker was there may turn out to be longer than the model's context."""
    needed_tokens = _needed_tokens(request)
    if _has_room(worker, needed_tokens):
        return True
    _end_as_too_long(board, request, needed_tokens, worker.context_tokens, now_s)
    return False


def _end_as_too_long(
    board: Board, request: Request, needed_tokens: int, context_tokens: int, now_s: float
) -> None:
    error = f"prompt and max_tokens are {needed_tokens} tokens, the model's context is {context_tokens}"
    board.finish(request, FinishReason.ERROR, now_s, told_by_worker=False, error=error)


def proposed(board: Board, newcomers: set[str]) -> tuple[Request, Request, str] | None:
    """The first of the waiting, the running request that should make room for it, and why. None: nobody
    should. `newcomers` got their slot in this tick and keep it."""
    if board.by_context:
        return _proposed_by_context(board, newcomers)
    newcomer = board.first_waiting()
    return None if newcomer is None else _proposed_for(board, newcomer, _victim(board, newcomers))


def _proposed_by_context(board: Board, newcomers: set[str]) -> tuple[Request, Request, str] | None:
    """Where nobody makes room for the first of the waiting, the first of those is looked at that have room on
    further workers, and so on."""
    passed = _PassedOver(board)
    proposal: tuple[Request, Request, str] | None = None
    contexts = sorted({worker.context_tokens for worker in board.pool.workers.values()})
    limit_tokens: int | None = None
    while proposal is None and limit_tokens != 0 and (newcomer := passed.next()) is not None:
        needed_tokens = _needed_tokens(newcomer)
        if limit_tokens is None or needed_tokens <= limit_tokens:
            proposal = _proposed_for(board, newcomer, _victim(board, newcomers, needed_tokens))
            limit_tokens = max((tokens for tokens in contexts if tokens < needed_tokens), default=0)
        passed.over(newcomer)
    passed.put_back()
    return proposal


def _proposed_for(
    board: Board, newcomer: Request, victim: Request | None
) -> tuple[Request, Request, str] | None:
    if victim is None or victim.spec.priority > newcomer.spec.priority:
        return None
    if victim.spec.priority < newcomer.spec.priority:
        because = f"priority {newcomer.spec.priority} goes before {victim.spec.priority}"
    elif victim.book.overdue:
        return None
    elif newcomer.book.overdue:
        because = f"{newcomer.request_id} is past the starvation bound"
    else:
        because = board.policy.preempts(newcomer, victim)
    return (newcomer, victim, because) if because else None


def _preempt(board: Board, now_s: float) -> int:
    newcomers: set[str] = set()
    preemptions = 0
    while (proposal := proposed(board, newcomers)) is not None:
        newcomer, victim, because = proposal
        worker, slot = board.preempt(victim, because, now_s)
        if not _fits(board, newcomer, worker, now_s):
            board.free[worker.worker_id].append(slot)
            _fill(board, now_s)
            continue
        board.grant(newcomer, worker, slot, now_s)
        newcomers.add(newcomer.request_id)
        preemptions += 1
    return preemptions


def _victim(board: Board, newcomers: set[str], needed_tokens: int = 0) -> Request | None:
    """The running request that should make room first: of the lowest priority, and among those within the
    starvation bound if there are any, the worst by the policy. It runs where there is room for
    `needed_tokens`."""
    worst: tuple[tuple[float, ...], Request] | None = None
    for worker in board.pool.workers.values():
        if worker.draining or (needed_tokens and not _has_room(worker, needed_tokens)):
            continue
        # Most workers did no step since the last tick: their worst is still the same one.
        if worker.worker_id not in board.worst:
            board.worst[worker.worker_id] = worst_of(board, worker, ())
        found = board.worst[worker.worker_id]
        if found is not None and found[1].request_id in newcomers:
            found = worst_of(board, worker, newcomers)
        if found is not None and (worst is None or found[0] > worst[0]):
            worst = found
    return None if worst is None else worst[1]


def worst_of(
    board: Board, worker: Worker, newcomers: Container[str]
) -> tuple[tuple[float, ...], Request] | None:
    """The running request of one worker that should make room first, with its key."""
    running = [request for request in worker.running if request is not None]
    if newcomers:
        running = [request for request in running if request.request_id not in newcomers]
    if not running:
        return None
    priorities = {request.spec.priority for request in running}
    lowest = min(priorities)
    if len(priorities) > 1:
        running = [request for request in running if request.spec.priority == lowest]
    overdue = {request.book.overdue for request in running}
    if len(overdue) > 1:
        running = [request for request in running if not request.book.overdue]
    worst = board.policy.worst(running)
    return (-lowest, not worst.book.overdue, *board.policy.victim_key(worst)), worst
