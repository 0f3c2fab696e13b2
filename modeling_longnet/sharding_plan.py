"""Which keys a shard of a sequence needs from other devices, in integers only (LongNet, section 3.1, Fig. 4).

A shard is a chunk of the sequence. Its halo is what its queries see outside of it: kept tokens of the segments that its
borders cut. Every rank derives the needs of all ranks from the same arithmetic, so nothing is negotiated.

Letters: B batch, L tokens of the whole sequence, n of a shard, C shards, G key/value heads, P halo slots, S keys sent,
R keys received.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention_autograd import HaloKV
from .branches import Branch, Chunk, chunk_slices, whole_batch
from .packing import Packing, pack


class Shard(NamedTuple):
    """The part of each sequence that this rank of the group holds: rank i holds [borders[i], borders[i + 1])."""

    group: "torch.distributed.ProcessGroup | None"
    rank: int
    borders: tuple[int, ...]

    @property
    def begin(self) -> int:
        """First token of this rank."""
        return self.borders[self.rank]

    @property
    def end(self) -> int:
        """Last token of this rank, plus one."""
        return self.borders[self.rank + 1]

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return self.borders[-1]

    def cut(self, x: Tensor) -> Tensor:
        """Return this rank's part: (B, L, ...) -> (B, n, ...)."""
        return x[:, self.begin : self.end]

    def cut_chunks(self, chunks: tuple[Chunk, ...], rank: int) -> tuple[Chunk, ...]:
        """Return the part of whole sequences' chunks that a rank holds, with columns counted from its first."""
        begin, end = self.borders[rank : rank + 2]
        parts = []
        for c in chunks:
            low, high = max(begin, c.column_begin), min(end, c.column_end)
            if low < high:
                start = c.start + low - c.column_begin
                parts.append(Chunk(c.batch_begin, c.batch_end, low - begin, high - begin, start, c.total))
        return tuple(parts)


def shard_borders(length: int, size: int, shortest_segment: int) -> tuple[int, ...]:
    """Return where `size` equal shards of a sequence begin and end; the last ones may be short or empty.

    Shards longer than the shortest segment are multiples of it, so that its branch needs no other device.
    """
    n = -(-length // size)
    if n > shortest_segment:
        n = -(-n // shortest_segment) * shortest_segment
    return tuple(min(i * n, length) for i in range(size + 1))


class HaloSlice(NamedTuple):
    """The halo keys of one head on one side: slot j < count holds column `first + j * stride`."""

    is_suffix: bool
    branch: int
    head: int
    batch_begin: int
    batch_end: int
    first: int
    stride: int
    count: int

    def between(self, low: int, high: int) -> np.ndarray:
        """Return the slots whose columns are in [low, high)."""
        begin, end = (min(self.count, max(0, -(-(x - self.first) // self.stride))) for x in (low, high))
        return np.arange(begin, end)


def halo_slices(
    shard: Shard, chunks: tuple[Chunk, ...], branches: tuple[Branch, ...], is_causal: bool, rank: int
) -> Iterator[HaloSlice]:
    """Yield what a rank needs from the others, in the order in which senders and receivers list it.

    Args:
        chunks: those of the whole batch, as on one device. Columns of the result count in the whole batch too.
    """
    for chunk in shard.cut_chunks(chunks, rank):
        for index, branch in enumerate(branches):
            for piece in chunk_slices(chunk, branch, False):
                first = shard.borders[rank] + chunk.column_begin + piece.begin + piece.first
                sides = [(False, piece.prefix, first - piece.prefix * branch.r)]
                sides += [] if is_causal else [(True, piece.suffix, first + piece.seqlen * branch.r)]
                for is_suffix, count, column in sides:
                    for i in range(piece.heads if count else 0):
                        head = piece.head + i * piece.head_stride
                        rows = chunk.batch_begin, chunk.batch_end
                        yield HaloSlice(is_suffix, index, head, *rows, column + i * piece.first_stride, branch.r, count)


def count_received(shard: Shard, needs: list[HaloSlice]) -> np.ndarray:
    """Return how many keys a rank with these needs receives from each rank: (C,) int64."""
    borders = np.array(shard.borders)
    total = np.zeros(len(borders) - 1, dtype=np.int64)
    for need in needs:
        below = np.clip(-(-(borders - need.first) // need.stride), 0, need.count)
        total += np.diff(below) * (need.batch_end - need.batch_begin)
    return total


class Exchange(NamedTuple):
    """The all-to-all of one layer, the same for every layer of a forward pass.

    Attributes:
        is_needed: some rank of the group needs keys of another.
        send: (S,) int64, indices into the flattened (B, n, G) keys in the order of sending.
        slots: (R,) int64, the halo slot of each received key: an index into the flattened (B, G, P) prefix, followed by
            the flattened suffix.
        send_counts, receive_counts: keys sent to and received from each rank.
        shape: B and G. sizes: slots of each branch in the prefix and, unless causal, in the suffix.
    """

    is_needed: bool
    send: Tensor
    send_counts: list[int]
    slots: Tensor
    receive_counts: list[int]
    shape: tuple[int, int]
    sizes: tuple[tuple[int, ...], ...]

    def count_slots(self) -> int:
        """Return the slots of all batch rows, heads and sides."""
        return self.shape[0] * self.shape[1] * sum(map(sum, self.sizes))

    def split(self, slots: Tensor) -> Iterator[tuple[str, HaloKV]]:
        """Yield the sides of (all slots, 2, D) keys and values."""
        counts = [self.shape[0] * self.shape[1] * sum(sizes) for sizes in self.sizes]
        for side, sizes, part in zip(("prefix", "suffix"), self.sizes, slots.split(counts), strict=False):
            part = part.view(*self.shape, sum(sizes), *slots.shape[1:])  # (B, G, P, 2, D)
            yield side, HaloKV(part[..., 0, :], part[..., 1, :], sizes)


def _flat_indices(need: HaloSlice, numbers: np.ndarray, row_size: int, stride: int, first: int) -> np.ndarray:
    """Return `first + numbers * stride` in each batch row of `row_size` places."""
    rows = np.arange(need.batch_begin, need.batch_end)[:, None] * row_size
    return (rows + first + numbers * stride).ravel()


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _sent(shard: Shard, needs: list[HaloSlice], heads: int) -> np.ndarray:
    """Return which of this rank's keys a rank with these needs receives: indices into the flattened (B, n, G) keys."""
    row_size = (shard.end - shard.begin) * heads
    parts = []
    for need in needs:
        first = (need.first - shard.begin) * heads + need.head
        numbers = need.between(shard.begin, shard.end)
        parts.append(_flat_indices(need, numbers, row_size, need.stride * heads, first))
    return _concatenate(parts)


def _received(shard: Shard, needs: list[HaloSlice], shape: tuple[int, int], sizes: np.ndarray) -> np.ndarray:
    """Return the slots of this rank's received keys in the order of arrival; `sizes` is (sides, branches)."""
    batch, heads = shape
    totals, begins = sizes.sum(1), sizes.cumsum(1) - sizes
    slots, owners = [], []
    for need in needs:
        side, numbers = int(need.is_suffix), np.arange(need.count)
        first = side * batch * heads * totals[0] + need.head * totals[side] + begins[side, need.branch]
        slots.append(_flat_indices(need, numbers, heads * totals[side], 1, first))
        owner = np.searchsorted(shard.borders, need.first + numbers * need.stride, side="right") - 1
        owners.append(np.tile(owner, need.batch_end - need.batch_begin))
    return _concatenate(slots)[np.argsort(_concatenate(owners), kind="stable")]


@lru_cache(maxsize=16)
def plan_exchange(
    shard: Shard,
    chunks: tuple[Chunk, ...],
    branches: tuple[Branch, ...],
    is_causal: bool,
    batch: int,
    device: torch.device,
) -> Exchange:
    """Plan which keys this rank sends and receives.

    Args:
        chunks: those of the whole batch, as on one device.
    """
    shape, ranks = (batch, len(branches[0].offsets)), range(len(shard.borders) - 1)
    needs = [list(halo_slices(shard, chunks, branches, is_causal, rank)) for rank in ranks]
    own_needs = needs[shard.rank]
    sizes = np.zeros((1 if is_causal else 2, len(branches)), dtype=np.int64)
    for need in own_needs:
        sizes[int(need.is_suffix), need.branch] = max(sizes[int(need.is_suffix), need.branch], need.count)
    sent = [_sent(shard, needs[rank], shape[1]) for rank in ranks]
    return Exchange(
        is_needed=any(needs),
        send=torch.from_numpy(_concatenate(sent)).to(device),
        send_counts=[len(x) for x in sent],
        slots=torch.from_numpy(_received(shard, own_needs, shape, sizes)).to(device),
        receive_counts=count_received(shard, own_needs).tolist(),
        shape=shape,
        sizes=tuple(map(tuple, sizes.tolist())),
    )


def pack_shard(
    shard: Shard, batch: int, device: torch.device, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[tuple[Chunk, ...], Packing]:
    """Return the chunks of the whole batch, and the packing of this rank's part of it (see `packing.pack`)."""
    if attention_mask is None and position_ids is None:
        chunks, documents = whole_batch(batch, shard.total), None
        positions = torch.arange(shard.begin, shard.end, device=device)[None]
    else:
        chunks, positions, documents = pack(batch, shard.total, torch.device("cpu"), attention_mask, position_ids)
        positions = shard.cut(positions).to(device)
        documents = None if documents is None else shard.cut(documents).to(device)
    return chunks, Packing(shard.cut_chunks(chunks, shard.rank), positions, documents)
