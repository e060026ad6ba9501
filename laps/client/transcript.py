"""What a stream has delivered so far, and how it goes on where a connection broke. Does no I/O.

Token offsets are exact, text is not: the server holds text back while a character or a possible stop string
is incomplete, and gives the rest out at the end. So a resumed stream does not begin at the last token but at
the beginning of the last chunk. What comes twice is compared with what is there and dropped.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from laps.client.results import Chunk, Completion, Speculation, Timing, TokenLogprob, Usage, from_proto
from laps.client.retry import Backoff, RetryPolicy
from laps.errors import DataLoss, DeadlineExceeded, LapsError, Reason, Unavailable
from laps.v1 import inference_pb2 as pb

DEADLINE_SLACK_S = 5.0
"""A call may outlive the request's timeout by this much, so that the server's own ending arrives."""
_LONGEST_CALL_S = 1e9
"""gRPC counts nanoseconds in 64 bits: a deadline in some hundred years would be one that has passed."""


@dataclass(frozen=True, slots=True)
class Call:
    """The next call to make: Generate or Resume with this request."""

    request: pb.GenerateRequest | pb.ResumeRequest
    timeout_s: float | None


class Transcript:
    """One request's output as its client knows it."""

    def __init__(
        self,
        generate: pb.GenerateRequest | None,
        *,
        request_id: str = "",
        offset: int = 0,
        retry: RetryPolicy | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """A new request, or (`generate` None) one that somebody began, from output token `offset` on."""
        self._generate = generate
        self.request_id = generate.request_id if generate is not None else request_id
        self._first_offset = offset
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._text = ""
        self._overlap = ""
        """Text that we have and the present call will repeat."""
        self._mark = (offset, 0)
        """A token offset and the characters before it: where a resumed stream begins."""
        self._held_text_out = False
        """The last chunk brought text without tokens."""
        self._backoff = Backoff(retry or RetryPolicy(), rng)
        self._calls = 0
        self._began_s = time.monotonic()
        self.result: Completion | None = None

    @property
    def offset(self) -> int:
        """Output tokens before the next new one."""
        return self._first_offset + len(self._token_ids)

    def next_call(self) -> Call:
        """Raises DeadlineExceeded when the request's time is over and the server is still silent."""
        timeout_s = None
        if self._generate is not None and self._generate.HasField("timeout"):
            whole_s = min(self._generate.timeout.ToNanoseconds() / 1e9, _LONGEST_CALL_S)
            timeout_s = whole_s + DEADLINE_SLACK_S - (time.monotonic() - self._began_s)
            if self._calls and timeout_s <= 0:
                raise DeadlineExceeded(f"request {self.request_id} has no answer after {whole_s:g} s")
        self._calls += 1
        mark_offset, mark_chars = self._mark
        self._overlap = self._text[mark_chars:]
        self._held_text_out = False
        if self._generate is not None and not self._begun:
            return Call(self._generate, timeout_s)
        return Call(pb.ResumeRequest(request_id=self.request_id, offset=mark_offset), timeout_s)

    def accept(self, response: pb.GenerateResponse | pb.ResumeResponse) -> Chunk | None:
        """What is new in a message; sets `result` at the end. Raises DataLoss at a contradiction."""
        if response.request_id:
            self.request_id = response.request_id
        if response.WhichOneof("event") == "complete":
            self._finish(response)
            return None
        return self._accept_chunk(response)

    def failed(self, error: LapsError | None) -> float:
        """The call ended with `error`, or (None) as if all were well though the request goes on.

        Returns the seconds to wait before the next call; raises the error when there is to be none.
        """
        if error is None:
            error = Unavailable(
                f"request {self.request_id}: the stream ended early", reason=Reason.STREAM_LOST
            )
        return self._backoff.after(error, begun=self._begun)

    @property
    def _begun(self) -> bool:
        return bool(self._token_ids or self._text)

    def _accept_chunk(self, response: pb.GenerateResponse | pb.ResumeResponse) -> Chunk | None:
        chunk = response.chunk
        known = self.offset - response.offset
        if known < 0:
            raise self._contradiction(f"after {self.offset} tokens comes token {response.offset}")
        ids = list(chunk.token_ids)
        repeated = min(known, len(ids))
        at = response.offset - self._first_offset
        if at < 0:
            raise self._contradiction(f"token {response.offset} was not asked for")
        if self._token_ids[at : at + repeated] != ids[:repeated]:
            raise self._contradiction(f"tokens from {response.offset} on differ from the first time")
        cut = min(len(self._overlap), len(chunk.text))
        if self._overlap[:cut] != chunk.text[:cut]:
            raise self._contradiction(f"the text at token {response.offset} differs from the first time")
        if ids and not self._held_text_out:
            self._mark = (response.offset, len(self._text) - len(self._overlap))
        self._held_text_out = not ids and bool(chunk.text)
        self._overlap = self._overlap[cut:]

        new_ids, new_text = tuple(ids[repeated:]), chunk.text[cut:]
        if not new_ids and not new_text:
            return None
        self._backoff.progress()
        logprobs = tuple(from_proto(TokenLogprob, each) for each in chunk.logprobs[repeated:])
        new = Chunk(self.request_id, self.offset, new_ids, new_text, logprobs)
        self._token_ids += new_ids
        self._text += new_text
        self._logprobs += logprobs
        return new

    def _finish(self, response: pb.GenerateResponse | pb.ResumeResponse) -> None:
        if response.offset > self.offset:
            raise self._contradiction(f"it ends after {response.offset} tokens, {self.offset} have come")
        if self._overlap:
            raise self._contradiction("its text is shorter than the first time")
        complete = response.complete
        self.result = from_proto(
            Completion,
            complete,
            request_id=self.request_id,
            text=self._text,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            usage=from_proto(Usage, complete.usage),
            timing=from_proto(Timing, complete.timing),
            speculation=from_proto(Speculation, complete.speculation),
            resumptions=self._calls - 1,
        )

    def _contradiction(self, what: str) -> DataLoss:
        return DataLoss(f"request {self.request_id}: {what}", reason=Reason.OUTPUT_INCOMPLETE)
