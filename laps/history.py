"""How far a pool's stored history has been seen."""

from __future__ import annotations

from dataclasses import dataclass, field

from laps.v1 import history_pb2


@dataclass(frozen=True, slots=True, order=True)
class HistoryPoint:
    """A commit of a pool, and who wrote it. A later point is a greater one.

    Timelines are numbered: a new one begins when an operator accepts a store that has lost something
    (`laps pool resume`). What was seen of earlier ones does not count any more.
    """

    timeline: int = 0
    epoch: int = 0
    commit_seq: int = 0
    term: str = field(default="", compare=False)
    """A random name of the epoch, because a store that came back older gives its number a second time.
    Empty: not known."""

    def until(self, commit_seq: int) -> HistoryPoint:
        """At this commit of the same term, if that is later."""
        # Not by `replace`, which takes several times as long: this runs for every commit.
        return HistoryPoint(self.timeline, self.epoch, max(self.commit_seq, commit_seq), self.term)

    def to_proto(self) -> history_pb2.HistoryPoint:
        return history_pb2.HistoryPoint(
            timeline=self.timeline, epoch=self.epoch, commit_seq=self.commit_seq, term=self.term
        )

    @classmethod
    def from_proto(cls, message: history_pb2.HistoryPoint) -> HistoryPoint:
        return cls(message.timeline, message.epoch, message.commit_seq, message.term)

    def __str__(self) -> str:
        return f"timeline {self.timeline}, epoch {self.epoch}, commit {self.commit_seq}"
