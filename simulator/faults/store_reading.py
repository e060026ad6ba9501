"""The readings of recovery.lua and inspection.lua that leaders need, on the model's keys."""

from __future__ import annotations

from typing import Any

from simulator.faults.store_commit import Refusal
from simulator.faults.store_model import Entry, Keys


def ask(keys: Keys, function: str, *args: str | int) -> Any:
    """A function that only reads."""
    if function == "laps_read":
        request_id, offset, limit, whole = args
        return _read(keys, str(request_id), int(offset), int(limit), bool(whole))
    _fence(keys, int(args[0]))
    args = args[1:]
    if function == "laps_learnt":
        return [text for item in keys.learnt.items() for text in item]
    if function == "laps_load_waiting":
        return _load_waiting(keys, int(args[0]), int(args[1]), *map(str, args[2:]))
    if function == "laps_load_requests":
        names = 1 + int(args[0])
        return _load_requests(keys, list(map(str, args[1:names])), list(map(str, args[names:])))
    if function == "laps_load_finished":
        return _load_finished(keys, int(args[0]), int(args[1]), *map(str, args[2:]))
    if function == "laps_journal":
        return _journal(keys, str(args[0]), int(args[1]))
    raise NotImplementedError(function)


def _fence(keys: Keys, epoch: int) -> None:
    stored = int(keys.leader.get("epoch", "0"))
    if stored < epoch:
        raise Refusal(f"BEHIND epoch {stored} is stored here, the one that leads is {epoch}")
    if stored > epoch:
        raise Refusal(f"STALE_EPOCH epoch {stored} leads, not epoch {epoch}")


def _load_waiting(keys: Keys, first: int, count: int, *names: str) -> Any:
    rows: list[Any] = []
    places: list[int] = []
    texts: list[str] = []
    others: list[str] = []
    for request_id in _in_order(keys.live)[first : first + count]:
        stored = keys.request.get(request_id, {})
        if stored.get("state") != "queued" or stored.get("log_entries") != "0":
            others.append(request_id)
            continue
        rows += request_id, *(stored.get(name, False) for name in names), keys.prompt.get(request_id, False)
        params = keys.params.get(request_id, "{}")
        if params not in texts:
            texts.append(params)
        places.append(texts.index(params))
    return [rows, places, texts, others]


def _load_requests(keys: Keys, names: list[str], request_ids: list[str]) -> Any:
    flat: list[Any] = []
    for request_id in request_ids:
        stored = keys.request.get(request_id, {})
        log = [entry.tokens for entry in keys.tokens.get(request_id, [])]
        flat += request_id, [stored.get(name, False) for name in names]
        flat += keys.prompt.get(request_id, ""), keys.params.get(request_id, "{}"), log
    return flat


def _load_finished(keys: Keys, first: int, count: int, *names: str) -> Any:
    flat: list[Any] = []
    for request_id in _in_order(keys.finished)[first : first + count]:
        stored = keys.request.get(request_id, {})
        flat += request_id, [stored.get(name, False) for name in names]
    return flat


def _in_order(members: dict[str, float]) -> list[str]:
    return [name for _, name in sorted((score, name) for name, score in members.items())]


def _read(keys: Keys, request_id: str, offset: int, limit: int, whole: bool) -> Any:
    log = keys.tokens.get(request_id, [])
    first = max((i for i, entry in enumerate(log) if entry.offset <= offset), default=0)
    flat: list[Any] = []
    for entry in log[first : first + limit]:
        flat += entry.number, entry.offset, entry.tokens.encode(), _bytes(entry)
    hashed = [text.encode() for item in keys.request.get(request_id, {}).items() for text in item]
    prompt = keys.prompt.get(request_id, "").encode() if whole else b""
    params = keys.params.get(request_id, "{}").encode() if whole else b""
    return [hashed, flat, prompt, params]


def _journal(keys: Keys, after: str, count: int) -> Any:
    first = 0 if after == "-" else int(after[1:].split("-")[0]) + 1
    entries = [entry for entry in keys.journal if entry[0] >= first][:count]
    meta = [int(keys.meta.get(name, "0")) for name in ("journal_seq", "journal_from", "resumed_seq")]
    return [*meta, [value for entry in entries for value in entry]]


def _bytes(entry: Entry) -> bytes:
    return entry.logprobs.encode("utf-8", "surrogateescape")
