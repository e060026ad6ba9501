"""The text of a stream: no broken character, nothing of a stop string.

Tokens wait here together with their text, so that text and tokens of a stream always fit: after n
tokens a client has exactly the text of these n tokens (a character belongs to the token that
completes it). That makes Resume exact without knowing what was held back in the lost stream. Two
things are held back: text that may belong to a stop string, and a last token that ends inside a
character, whose bytes may stay incomplete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gateway.stops import StopMatcher
from gateway.text_decoding import REPLACEMENT, TextDecoder


class Release(NamedTuple):
    """What may go to the client now: so many further tokens, with their text."""

    tokens: int
    text: str


class Detokenizer:
    """One output. `end_token_ids` may end it; the text of the one that does is not part of it."""

    def __init__(
        self,
        decoder: TextDecoder,
        stop: Sequence[str] = (),
        end_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._decoder = decoder
        self._matcher = StopMatcher(stop) if stop else None
        self._end_token_ids = end_token_ids
        self._length = 0
        """Characters of the whole text so far."""
        self._held = ""
        """The end of the text, not released."""
        self._held_ends: deque[int] = deque()
        """Length of the text after each token that is not released."""
        self._matches: dict[str, int] = {}
        """Complete stop strings at which the output may just have ended, with their positions."""
        self._end_token: int | None = None
        """The last token, when it is one that may end the output; its text is not decoded yet."""
        self._clean_end = True
        """Whether the text so far ends with a whole character."""
        self._at_resume_point = False

    def skip(self, token_ids: Iterable[int]) -> None:
        """Takes the tokens that the client has already, with their text. Only before `push`."""
        for token_id in token_ids:
            self._take(token_id)
        self._drop_held(len(self._held_ends))
        self._at_resume_point = True

    def push(self, token_ids: Sequence[int]) -> Release:
        """Adds output tokens."""
        if self._holds_nothing and self._end_token_ids.isdisjoint(token_ids):
            # The common case, and cheap: whole characters, none of which can be part of an end.
            text = self._decoder.push_whole(token_ids)
            if text is not None:
                self._length += len(text)
                self._at_resume_point = self._at_resume_point and not token_ids
                return Release(len(token_ids), text)
        for token_id in token_ids:
            self._at_resume_point = False
            if self._end_token is not None:
                self._take(self._end_token)
                self._end_token = None
            if token_id in self._end_token_ids:
                # Decoded when it turns out not to have ended the output.
                self._supersede_matches()
                self._end_token = token_id
            else:
                self._take(token_id)
        return self._release()

    def finish(self, matched_stop: str = "", matched_stop_token_id: int | None = None) -> Release:
        """The rest. The text ends before the stop string or stop token that ended the output."""
        ended_by_token = self._end_token is not None and self._end_token == matched_stop_token_id
        if self._end_token is not None and not ended_by_token:
            self._take(self._end_token)
        if self._at_resume_point:
            # The stream that delivered the last token delivered this as well.
            return Release(0, "")
        text = self._held + self._decoder.flush()
        if matched_stop:
            cut = self._matches.get(matched_stop)
            if cut is None:
                found = text.find(matched_stop)
                cut = self._length if found < 0 else self._held_start + found
            text = text[: max(cut - self._held_start, 0)]
        tokens = len(self._held_ends) + ended_by_token
        self._held, self._end_token = "", None
        self._held_ends.clear()
        return Release(tokens, text)

    @property
    def _holds_nothing(self) -> bool:
        return self._matcher is None and not self._held_ends and self._end_token is None

    @property
    def _held_start(self) -> int:
        return self._length - len(self._held)

    def _take(self, token_id: int) -> None:
        self._supersede_matches()
        new = self._decoder.push(token_id)
        if new:
            if self._matcher is not None:
                for stop, position in self._matcher.push(new):
                    self._matches.setdefault(stop, position)
            self._held += new
            self._length += len(new)
        self._clean_end = not self._decoder.pending and not self._held.endswith(REPLACEMENT)
        self._held_ends.append(self._length)

    def _supersede_matches(self) -> None:
        # A worker judges stop strings where the text ends cleanly. Another token after such a place says
        # that the match did not count, as before min_tokens.
        if self._matches and self._clean_end:
            self._matches.clear()

    def _release(self) -> Release:
        limit = self._length
        if self._matcher is not None:
            limit = min([self._matcher.partial_start, *self._matches.values()])
        ends = self._held_ends
        tokens = 0
        if limit == self._length:
            tokens = len(ends)
        else:
            for end in ends:
                if end > limit:
                    break
                tokens += 1
        if tokens == len(ends) and tokens and self._decoder.pending and self._end_token is None:
            tokens -= 1
        return Release(tokens, self._drop_held(tokens))

    def _drop_held(self, tokens: int) -> str:
        """Removes the first held tokens; returns their text."""
        if not tokens:
            return ""
        if tokens == len(self._held_ends):
            end = self._held_ends[-1]
            self._held_ends.clear()
        else:
            for _ in range(tokens):
                end = self._held_ends.popleft()
        chars = end - self._held_start
        text, self._held = self._held[:chars], self._held[chars:]
        return text
