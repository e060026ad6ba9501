"""The readings of inspection.lua that leaders need, on the model's keys."""

from __future__ import annotations

from typing import Any

from simulator.faults.store_model import Entry, Keys


def ask(keys: Keys, function: str, *args: str | int) -> Any:
    """A function that only reads."""
    if function == "laps_load":
        return _load(keys, *args)
    if function == "laps_read":
        request_id, offset, limit, whole = args
        return _read(keys, str(request_id), int(offset), int(limit), bool(whole))
    raise NotImplementedError(function)


def _current(keys: Keys, request_id: str) -> dict[str, str]:
    """A request's hash, with how far its log is stored now."""
    stored = dict(keys.request.get(request_id, {}))
    if request_id in keys.progress:
        stored["log_entries"], stored["output_tokens"] = keys.progress[request_id].split()
    return stored


def _load(
    keys: Keys, source: str | int, first: str | int, count: str | int, whole: str | int, *names: Any
) -> Any:
    members = keys.live if source == "live" else keys.finished
    begin = int(first)
    flat: list[Any] = []
    for _, request_id in sorted((score, name) for name, score in members.items())[begin : begin + int(count)]:
        stored = _current(keys, request_id) if int(whole) else keys.request.get(request_id, {})
        flat += request_id, [stored.get(name, False) for name in names]
        if int(whole):
            log = [entry.tokens for entry in keys.tokens.get(request_id, [])]
            flat += keys.prompt.get(request_id, ""), keys.params.get(request_id, "{}"), log
    return flat


def _read(keys: Keys, request_id: str, offset: int, limit: int, whole: bool) -> Any:
    log = keys.tokens.get(request_id, [])
    first = max((i for i, entry in enumerate(log) if entry.offset <= offset), default=0)
    flat: list[Any] = []
    for entry in log[first : first + limit]:
        flat += entry.number, entry.offset, entry.tokens.encode(), _bytes(entry)
    hashed = [text.encode() for item in _current(keys, request_id).items() for text in item]
    prompt = keys.prompt.get(request_id, "").encode() if whole else b""
    params = keys.params.get(request_id, "{}").encode() if whole else b""
    return [hashed, flat, prompt, params]


def _bytes(entry: Entry) -> bytes:
    return entry.logprobs.encode("utf-8", "surrogateescape")
