"""What the store refuses, as exceptions. The codes are those of `functions.lua`."""

from __future__ import annotations


class StoreError(Exception):
    """Something is wrong between this process and the store."""

    code = "STORE"


class StoreUnavailable(StoreError):
    """The store does not answer, or cannot write now. The outcome of a write is unknown;
    the same call may be made again."""

    code = "UNAVAILABLE"


class StoreBehind(StoreUnavailable):
    """The server that was read does not know yet what another one has stored: a replica, or what was the
    primary until now."""

    code = "BEHIND"


class StoreFull(StoreUnavailable):
    """The store has reached its memory limit and has refused the write."""

    code = "OOM"


class StaleLeader(StoreError):
    """Another scheduler leads the pool, or this one resigned. Nothing was written."""

    code = "STALE_EPOCH"


class Alarm(StoreError):
    """The store does not hold what this process knows to be true. Going on would tell clients
    two stories: the pool must stop. Nothing was written."""


class HistoryWentBack(Alarm):
    """The store has lost commits that it had acknowledged."""

    code = "HISTORY_WENT_BACK"


class LogConflict(Alarm):
    """Something that is stored would have been changed: a commit, a log entry, an ending."""

    code = "LOG_CONFLICT"


class SequenceGap(LogConflict):
    """A commit or a log entry before this one is missing."""

    code = "SEQ_GAP"


class UnknownRequest(LogConflict):
    """A change of a request that the store does not know."""

    code = "UNKNOWN_REQUEST"


class AlreadyStored(LogConflict):
    """A request was submitted a second time."""

    code = "REQUEST_EXISTS"


class AlreadyFinished(LogConflict):
    """A change of a request that has ended, or a second end."""

    code = "ALREADY_FINISHED"


class RecordDamaged(Alarm):
    """A record is not what was written: somebody else has written to the store."""

    code = "RECORD_DAMAGED"


class PoolStopped(StoreError):
    """An alarm was raised, by this process or another one, and no operator has let the pool go on yet."""

    code = "STOPPED"


class WrongSchema(StoreError):
    """The store was written by a version of LAPS with another layout."""

    code = "SCHEMA"


BY_CODE: dict[str, type[StoreError]] = {
    "OOM": StoreFull,
    "LOADING": StoreUnavailable,
    "READONLY": StoreUnavailable,
    "MISCONF": StoreUnavailable,
    "NOREPLICAS": StoreUnavailable,
    "BUSY": StoreUnavailable,
    "BEHIND": StoreBehind,
    "STALE_EPOCH": StaleLeader,
    "HISTORY_WENT_BACK": HistoryWentBack,
    "SEQ_GAP": SequenceGap,
    "SEQ_CONFLICT": LogConflict,
    "LOG_GAP": SequenceGap,
    "LOG_CONFLICT": LogConflict,
    "UNKNOWN_REQUEST": UnknownRequest,
    "REQUEST_EXISTS": AlreadyStored,
    "ALREADY_FINISHED": AlreadyFinished,
    "NOT_FINISHED": LogConflict,
    "SCHEMA": WrongSchema,
    "STOPPED": PoolStopped,
}
"""First word of an error reply of Redis or of our functions."""


def from_reply(message: str) -> StoreError:
    """The exception for an error reply such as `SEQ_GAP commit 9 after 7`."""
    code, _, _ = message.partition(" ")
    return BY_CODE.get(code, StoreError)(message)
