"""Applies a worker's step report to the board. The hot path: it runs for every row of every step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from scheduler_svc.core.board import Board
from scheduler_svc.core.records import (
    MAX_DRAFTED_TOKENS,
    TOKEN_BYTES,
    Emitted,
    FinishReason,
    Request,
    Revoke,
    RevokeReason,
    StepReport,
    Worker,
    unpacked,
)

MAX_REFUSED_ROWS = 3
"""Rows of one request that may be refused before it is given up as failed."""


@dataclass(slots=True)
class Counters:
    """Of one scheduler: a new leadership begins with zeros, in the same process too."""

    reports: int = 0
    reports_refused: int = 0
    """From unknown workers, or with columns that do not fit together."""
    rows: int = 0
    rows_stale: int = 0
    """Of leases that are no more, or repeated: harmless."""
    rows_refused: int = 0
    """Contradict what is stored: the request is taken from the worker and computed anew from there."""
    submitted: int = 0
    joined: int = 0
    refused: int = 0
    finished: int = 0
    preemptions: int = 0
    emitted_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


def apply_report(board: Board, worker: Worker, report: StepReport, counters: Counters, now_s: float) -> None:
    counters.reports += 1
    if report.costs is not None and report.costs != worker.costs:
        worker.costs = report.costs
        board.pool.measure()
    if report.kv_capacity_tokens:
        worker.kv_used_tokens = report.kv_used_tokens
        worker.kv_capacity_tokens = report.kv_capacity_tokens
    worker.steps += 1
    if len(report.lease_ids):
        if _columns_fit(report):
            outside = rows_outside(report, worker.vocabulary_size)
            _apply_rows(board, worker, report, counters, now_s, outside)
        else:
            counters.reports_refused += 1
            for lease_id in report.lease_ids:
                request = _of(board, worker, lease_id)
                if request is not None:
                    _refuse(board, request, "the columns of its report do not fit together", counters, now_s)
    for lease_id, message in report.errors.items():
        request = _of(board, worker, lease_id)
        if request is not None:
            board.finish(
                request, FinishReason.ERROR, now_s, told_by_worker=False, error=message or "the engine failed"
            )
    for lease_id in report.missing:
        request = _of(board, worker, lease_id)
        if request is not None and not request.releasing:
            board.send_again(request)
    for lease_id in report.released:
        request = _of(board, worker, lease_id)
        if request is not None:
            because = "" if request.releasing else "its worker gave it back"
            board.take_back(request, because, keep_kv=True)
    for request_id in report.evicted:
        request = board.live.get(request_id)
        if request is None or request.worker_id != worker.worker_id:
            continue
        if request.releasing or not request.lease_id:
            request.kv_resident = False


def _of(board: Board, worker: Worker, lease_id: int) -> Request | None:
    request = board.leases.get(lease_id)
    return request if request is not None and request.worker_id == worker.worker_id else None


def _columns_fit(report: StepReport) -> bool:
    rows = len(report.lease_ids)
    return (
        len(report.offsets) == rows
        and len(report.emitted_counts) == rows
        and len(report.drafted_counts) == rows
        and len(report.accepted_counts) == rows
        and min(report.emitted_counts) >= 0
        and max(report.drafted_counts) <= MAX_DRAFTED_TOKENS
        and len(set(report.lease_ids)) == rows
        and sum(report.emitted_counts) * TOKEN_BYTES == len(report.token_ids)
    )


def rows_outside(report: StepReport, vocabulary_size: int) -> frozenset[int]:
    """Rows with a token that the model does not have. `vocabulary_size` 0: not known."""
    if not vocabulary_size or not report.token_ids:
        return frozenset()
    tokens = unpacked(report.token_ids)
    if max(tokens) < vocabulary_size:
        return frozenset()
    rows, begin = set(), 0
    for row, emitted in enumerate(report.emitted_counts):
        if emitted and max(tokens[begin : begin + emitted]) >= vocabulary_size:
            rows.add(row)
        begin += emitted
    return frozenset(rows)


def _apply_rows(
    board: Board,
    worker: Worker,
    report: StepReport,
    counters: Counters,
    now_s: float,
    outside: frozenset[int],
) -> None:
    leases = board.leases
    ledger = board.ledger
    # Mostly the rows are those of the last report that did not end, in their order: to look there first
    # spares the search for each lease.
    expected, at = worker.expected_rows, 0
    worker_id = worker.worker_id
    step_s = report.step_s
    tokens = report.token_ids
    finishes, logprobs = report.finishes, report.logprobs
    ids: list[str] = []
    left_out: set[int] = set()
    """Rows that are not among `ids`."""
    without: list[int] = []
    """Rows that are not counted."""
    moved_on: list[Request] = []
    ended: list[tuple[Request, int]] = []
    end_byte = 0
    row = -1
    # They fit together. Compiled, this is a loop over five arrays; `strict` would make a tuple of each row.
    for lease_id, offset, emitted, drafted, accepted in zip(  # noqa: B905
        report.lease_ids,
        report.offsets,
        report.emitted_counts,
        report.drafted_counts,
        report.accepted_counts,
    ):
        row += 1
        begin_byte = end_byte
        end_byte += emitted * TOKEN_BYTES
        request = expected[at] if at < len(expected) else None
        if request is not None and request.lease_id == lease_id != 0:
            at += 1
        else:
            request = leases.get(lease_id)
            if at + 1 < len(expected) and expected[at + 1] is request:
                at += 2
        if request is None or request.worker_id != worker_id:
            counters.rows_stale += 1
            without.append(row)
            continue
        output, spec = request.output, request.spec
        stored_bytes = len(output)
        left_bytes = spec.max_tokens * TOKEN_BYTES - stored_bytes - end_byte + begin_byte
        if (
            offset * TOKEN_BYTES != stored_bytes
            or left_bytes < 0
            or not 0 <= accepted <= drafted
            or emitted > accepted + 1
            or (outside and row in outside)
        ):
            without.append(row)
            if (
                emitted
                and row not in outside
                and offset >= 0
                and output[offset * TOKEN_BYTES :].startswith(tokens[begin_byte:end_byte])
            ):
                counters.rows_stale += 1
            elif row in outside:
                _refuse(board, request, "a row has a token outside the vocabulary", counters, now_s)
            else:
                why = (
                    f"a row at offset {offset} with {emitted} tokens does not continue "
                    f"{request.output_tokens} of {request.spec.max_tokens}"
                )
                _refuse(board, request, why, counters, now_s)
            continue
        request.steps += 1
        request.attained_s += step_s
        if drafted:
            request.drafted_tokens += drafted
            request.accepted_tokens += accepted
            histogram = request.acceptance_histogram
            if accepted >= len(histogram):
                histogram += [0] * (accepted + 1 - len(histogram))
            histogram[accepted] += 1
        if not request.book.unwritten:
            ledger.aged(request)
        if emitted:
            output += tokens[begin_byte:end_byte]
            if request.first_token_s is None:
                request.first_token_s = now_s
                request.cached_tokens = min(report.cached_tokens.get(row, 0), request.spec.prompt_tokens)
            request.last_token_s = now_s
            if logprobs and row in logprobs:
                ledger.emitted_with_logprobs(request, offset, logprobs[row])
                left_out.add(row)
            else:
                ids.append(spec.request_id)
        else:
            left_out.add(row)
        if not left_bytes or row in finishes:
            ended.append((request, row))
        else:
            moved_on.append(request)
    left_out.update(without)
    if ids:
        ledger.emitted.append(_emitted(report, ids, left_out))
    counters.rows += row + 1
    counters.emitted_tokens += _sum(report.emitted_counts, without)
    counters.drafted_tokens += _sum(report.drafted_counts, without)
    counters.accepted_tokens += _sum(report.accepted_counts, without)
    for request, row in ended:
        finish = finishes.get(row)
        if finish is None:
            board.finish(request, FinishReason.LENGTH, now_s, told_by_worker=False)
        else:
            request.matched_stop = finish.matched_stop
            request.matched_stop_token_id = finish.matched_stop_token_id
            board.finish(request, finish.reason, now_s, told_by_worker=True)
    worker.expected_rows = moved_on
    if moved_on:
        if board.policy_follows_steps:
            board.policy.stepped(moved_on)
        board.rank_otherwise(worker_id, now_s)


def _sum(column: list[int], without: list[int]) -> int:
    return sum(column) - sum([column[row] for row in without])


def _emitted(report: StepReport, ids: list[str], left_out: set[int]) -> Emitted:
    """The columns of all rows but those; mostly they are all that there are."""
    if not left_out:
        return Emitted(
            ids,
            report.offsets,
            report.emitted_counts,
            report.token_ids,
            report.drafted_counts,
            report.accepted_counts,
            report.step_s,
        )
    rows = [row for row in range(len(report.lease_ids)) if row not in left_out]
    ends = [0, *accumulate(report.emitted_counts)]
    pieces = [report.token_ids[ends[row] * TOKEN_BYTES : ends[row + 1] * TOKEN_BYTES] for row in rows]
    return Emitted(
        ids,
        [report.offsets[row] for row in rows],
        [report.emitted_counts[row] for row in rows],
        b"".join(pieces),
        [report.drafted_counts[row] for row in rows],
        [report.accepted_counts[row] for row in rows],
        report.step_s,
    )


def _refuse(board: Board, request: Request, why: str, counters: Counters, now_s: float) -> None:
    """The worker's idea of the request contradicts what is stored. What is stored counts: the
    lease ends, and the next one starts from there with context."""
    counters.rows_refused += 1
    book = request.book
    book.refused_rows += 1
    board.ledger.event("row_refused", request, detail=why)
    if book.refused_rows >= MAX_REFUSED_ROWS:
        board.finish(
            request,
            FinishReason.ERROR,
            now_s,
            told_by_worker=False,
            error=f"its worker's reports were refused: {why}",
        )
        return
    board.ledger.revoke(Revoke(request.worker_id, request.lease_id, request.request_id, RevokeReason.ENDED))
    board.take_back(request, "its worker's report was refused", keep_kv=False)
