"""Drafting by looking up: what followed the last tokens when the request's own text had them before.

Text repeats itself (names in code, quotations, set phrases), so the continuation of the latest earlier
occurrence of the last n tokens is often right, and costs no model. How often depends chiefly on n, so each
length of match has an acceptance estimate of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .acceptance import AcceptanceEstimate

# Longest first. On text of the built-in kind a match of 6 tokens goes on right in 96% of cases, one of 3 in
# 75%, one of 2 in 70%, and one of a single token in 31%, which is too little to be worth a verification.
# Matches of 12 go on for longer than those of 6, which is what decides how long a proposal may be.
MATCH_TOKENS = (12, 6, 3, 2)


# Of a long prompt, so many tokens are entered in one step: about a millisecond.
_PORTION_TOKENS = 1024


class NgramIndex:
    """Where each n-gram of a growing token list last ended, for each n of MATCH_TOKENS.

    A text that is long from the start is entered in portions, one with each search, from its end on. Holds
    hashes and positions, not tokens. Emitted tokens are never taken back, so nothing is ever removed.
    """

    def __init__(self) -> None:
        self._next: tuple[dict[int, int], ...] = tuple({} for _ in MATCH_TOKENS)
        # N-grams that end in this range are entered.
        self._begin = self._end = -1

    def find(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """The longest indexed n for which the last n tokens occurred earlier, and the position behind their
        latest earlier occurrence; None if there is none, or none that is entered yet.

        tokens: what it was at the last call, and more. O(1) for each token added since then, and for each of
        a portion.
        """
        length = len(tokens)
        if self._end < 0:
            self._begin = self._end = length
        # The n-gram that ends the list has no continuation yet: it is entered when it has one.
        for end in range(self._end, length):
            for size, known in zip(MATCH_TOKENS, self._next, strict=True):
                if size <= end:
                    known[hash(tuple(tokens[end - size : end]))] = end
        self._end = max(self._end, length)
        least = max(self._begin - _PORTION_TOKENS, 1)
        for end in range(self._begin - 1, least - 1, -1):
            for size, known in zip(MATCH_TOKENS, self._next, strict=True):
                if size <= end:
                    known.setdefault(hash(tuple(tokens[end - size : end])), end)
        self._begin = least
        for size, known in zip(MATCH_TOKENS, self._next, strict=True):
            if size < length:
                wanted = tokens[length - size :]
                found = known.get(hash(tuple(wanted)))
                if found is not None and tokens[found - size : found] == wanted:
                    return size, found
        return None


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next, after a match of `matched` tokens."""

    matched: int
    tokens: list[int]


class PromptLookup:
    """The lookup of one request: its index, its acceptance by length of match, and its present proposal."""

    def __init__(self, priors: Mapping[int, AcceptanceEstimate]) -> None:
        """priors: estimates of all requests together by length of match, from `shared_priors`."""
        self._index = NgramIndex()
        self._acceptance = {size: AcceptanceEstimate(prior) for size, prior in priors.items()}
        self.proposal: Proposal | None = None

    def propose(self, tokens: Sequence[int], limit: int) -> tuple[int, Sequence[float]]:
        """Looks up what may follow `tokens`, at most `limit` of it.

        Returns the number of tokens found, and by length the chance that so many are all accepted.
        """
        self.proposal = None
        match = self._index.find(tokens) if limit > 0 else None
        if match is None:
            return 0, ()
        matched, position = match
        found = list(tokens[position : position + limit])
        period = len(tokens) - position
        # Behind the end of the text its repetition is assumed to go on.
        while len(found) < limit:
            found.append(found[len(found) - period])
        self.proposal = Proposal(matched, found)
        return limit, self._acceptance[matched].survival

    def observe(self, emitted: Sequence[int]) -> None:
        """Learns from what the request really emitted, whether the proposal was used or not: what is emitted
        is the target's choice in any case, so a lookup is judged without being paid for.
        """
        if self.proposal is None:
            return
        judged = min(len(self.proposal.tokens), len(emitted))
        right = 0
        while right < judged and self.proposal.tokens[right] == emitted[right]:
            right += 1
        self._acceptance[self.proposal.matched].observe(judged, right)


def shared_priors() -> dict[int, AcceptanceEstimate]:
    """Acceptance of all requests' lookups together, by length of match."""
    return {size: AcceptanceEstimate() for size in MATCH_TOKENS}
