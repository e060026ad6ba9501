"""Tensor parallelism over one node: every process holds its shard of the target, one of them leads.

The lead runs the whole engine: scheduling, drafting, sampling. The others follow: they hold shards and their
part of the KV, and repeat what the lead does to them, call by call. A call is a message of integers through
the CPU (gloo), so that an idle follower waits without a time limit and notices a dead lead at once; tokens
that lie on a GPU go through the device's own group. All processes build their runner by the same code in the
same order, and every forward pass meets in the collectives that transformers' plan put into the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .cache import SlotCache
from .forward import Runner

# Waiting for the next request may take as long as it likes.
_NO_LIMIT = timedelta(days=365)
_HEAD = 8
_MAX_PLACES = 4096


class _Call(IntEnum):
    STOP = 0
    FORWARD = 1
    COPY = 2
    SWAP = 3
    TAKE_OUT = 4
    PUT_BACK = 5
    LET_GO = 6
    SHRINK = 7
    TRIM = 8


class Group:
    """The processes that share a target; rank 0 leads. Needs the environment that torchrun makes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo", timeout=_NO_LIMIT)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._control: Any = dist.new_group(backend="gloo", timeout=_NO_LIMIT)

    def send(self, call: _Call, *numbers: int, places: Sequence[int] = ()) -> None:
        message = torch.zeros(_HEAD + _MAX_PLACES, dtype=torch.int64)
        head = (int(call), len(places), *numbers)
        message[: len(head)] = torch.tensor(head)
        if places:
            message[_HEAD : _HEAD + len(places)] = torch.tensor(places)
        dist.broadcast(message, 0, group=self._control)

    def receive(self) -> tuple[_Call, list[int], list[int]]:
        """The lead's next call, its numbers, and its places."""
        message = torch.zeros(_HEAD + _MAX_PLACES, dtype=torch.int64)
        dist.broadcast(message, 0, group=self._control)
        call, count, *numbers = message[:_HEAD].tolist()
        return _Call(call), numbers, message[_HEAD : _HEAD + count].tolist()

    def share(self, tensor: Tensor) -> Tensor:
        """Gives the lead's tensor to all; the others pass one of the same shape."""
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
        return tensor

    def agree(self, number: int) -> int:
        """The lead's number, on every process."""
        held = torch.tensor([number], dtype=torch.int64)
        dist.broadcast(held, 0, group=self._control)
        return int(held)

    def stop(self) -> None:
        """The lead sends the others home; call once, last."""
        if self.rank == 0:
            self.send(_Call.STOP)
        dist.destroy_process_group()


class LeadRunner:
    """The target's runner on the lead: has all others do what it does."""

    def __init__(self, runner: Runner, group: Group) -> None:
        self._runner = runner
        self._group = group
        self.cache: Any = _LeadCache(runner.cache, group)

    def forward(
        self,
        tokens: Tensor,
        slots: Sequence[int],
        starts: Sequence[int],
        logits: int,
        pick: Tensor | None = None,
    ) -> Tensor:
        rows, queries = tokens.shape
        self._group.send(
            _Call.FORWARD, logits, rows, queries, int(pick is not None), places=[*slots, *starts]
        )
        tokens = self._group.share(tokens)
        if pick is not None:
            pick = self._group.share(pick)
        return self._runner.forward(tokens, slots, starts, logits, pick)


class _HeldParts(list[Tensor]):
    """The lead's part of a slot in host memory. The others keep theirs under `handle` until this is gone."""

    handle: int = 0


class _LeadCache:
    """The target's cache on the lead; what moves KV is repeated by the others. Growth follows the forward
    passes by itself.
    """

    def __init__(self, cache: SlotCache, group: Group) -> None:
        self._cache = cache
        self._group = group
        self._handles = 0
        self._gone: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self._group.send(_Call.COPY, source, target, tokens)
        self._cache.copy(source, target, tokens)

    def swap(self, first: int, second: int, tokens: int) -> None:
        self._group.send(_Call.SWAP, first, second, tokens)
        self._cache.swap(first, second, tokens)

    def take_out(self, slot: int, tokens: int) -> list[Tensor]:
        self._let_go()
        self._handles += 1
        self._group.send(_Call.TAKE_OUT, slot, tokens, self._handles)
        parts = _HeldParts(self._cache.take_out(slot, tokens))
        parts.handle = self._handles
        weakref.finalize(parts, self._gone.append, self._handles)
        return parts

    def put_back(self, slot: int, parts: Sequence[Tensor], tokens: int) -> None:
        if not isinstance(parts, _HeldParts):
            raise TypeError("parts that this cache has not taken out")
        self._let_go()
        self._group.send(_Call.PUT_BACK, slot, tokens, parts.handle)
        self._cache.put_back(slot, parts, tokens)

    def trim(self, slot: int, tokens: int) -> None:
        if self._cache.written[slot] > tokens:
            self._group.send(_Call.TRIM, slot, tokens)
            self._cache.trim(slot, tokens)

    def shrink(self) -> None:
        self._let_go()
        self._group.send(_Call.SHRINK)
        self._cache.shrink()

    def _let_go(self) -> None:
        while self._gone:
            self._group.send(_Call.LET_GO, self._gone.pop())


@torch.inference_mode()
def follow(group: Group, runner: Runner) -> None:
    """Repeats the lead's calls until told to stop. Raises RuntimeError if the lead dies."""
    cache = runner.cache
    held: dict[int, list[Tensor]] = {}
    while True:
        call, numbers, places = group.receive()
        match call:
            case _Call.FORWARD:
                logits, rows, queries, picks = numbers[:4]
                tokens = group.share(torch.zeros((rows, queries), dtype=torch.int64, device=group.device))
                pick = None
                if picks:
                    pick = group.share(torch.zeros(rows, dtype=torch.int64, device=group.device))
                runner.forward(tokens, places[:rows], places[rows:], logits, pick)
            case _Call.COPY:
                cache.copy(*numbers[:3])
            case _Call.SWAP:
                cache.swap(*numbers[:3])
            case _Call.TAKE_OUT:
                slot, tokens_held, handle = numbers[:3]
                held[handle] = cache.take_out(slot, tokens_held)
            case _Call.PUT_BACK:
                slot, tokens_held, handle = numbers[:3]
                cache.put_back(slot, held[handle], tokens_held)
            case _Call.LET_GO:
                del held[numbers[0]]
            case _Call.TRIM:
                cache.trim(*numbers[:2])
            case _Call.SHRINK:
                cache.shrink()
            case _Call.STOP:
                return
