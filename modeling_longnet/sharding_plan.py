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
from .packing import Packing, cut_chunks, lay_out, pack


class Shard(NamedTuple):
    """The part of each sequence that this rank of the group holds: rank i holds [borders[i], borders[i + 1])."""

    group: "torch.distributed.ProcessGroup | None"
    rank: int
    borders: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        """First token of this rank, and last token plus one."""
        return self.borders[self.rank], self.borders[self.rank + 1]

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return self.borders[-1]

    def cut(self, x: Tensor) -> Tensor:
        """Return this rank's part: (B, L, ...) -> (B, n, ...)."""
        return x[:, slice(*self.span)]

    def cut_chunks(self, chunks: tuple[Chunk, ...], rank: int) -> tuple[Chunk, ...]:
        """Return the part of whole sequences' chunks that a rank holds, with columns counted from its first."""
        return cut_chunks(chunks, *self.borders[rank : rank + 2])


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

    side: int  # 0 for the prefix, 1 for the suffix
    branch: int
    head: int
    batch_begin: int
    batch_end: int
    first: int
    stride: int
    count: int


def halo_slices(
    shard: Shard, chunks: tuple[Chunk, ...], branches: tuple[Branch, ...], is_causal: bool, rank: int
) -> Iterator[HaloSlice]:
    """Yield what a rank needs from the others, in the order in which senders and receivers list it.

    The chunks and the columns of the result are those of the whole batch, as on one device.
    """
    for chunk in shard.cut_chunks(chunks, rank):
        rows = chunk.batch_begin, chunk.batch_end
        for index, branch in enumerate(branches):
            for piece in chunk_slices(chunk, branch):
                first = shard.borders[rank] + chunk.column_begin + piece.begin + piece.first
                prefix = first - piece.prefix * branch.r, piece.prefix
                suffix = first + piece.seqlen * branch.r, 0 if is_causal else piece.suffix
                for side, (column, count) in enumerate((prefix, suffix)):
                    for i in range(piece.heads if count else 0):
                        head = piece.head + i * piece.head_stride
                        yield HaloSlice(side, index, head, *rows, column + i * piece.first_stride, branch.r, count)


def _count_before(needs: list[HaloSlice], columns: tuple[int, ...]) -> np.ndarray:
    """Return how many slots of each halo slice hold a column before each of these: (len(needs), len(columns))."""
    table = np.array([(need.first, need.stride, need.count) for need in needs], dtype=np.int64)
    first, stride, count = table.reshape(-1, 3, 1).swapaxes(0, 1)
    return np.clip(-((first - np.array(columns)) // stride), 0, count)


def count_received(shard: Shard, needs: list[HaloSlice]) -> np.ndarray:
    """Return how many keys a rank with these needs receives from each rank: (C,) int64."""
    rows = np.array([need.batch_end - need.batch_begin for need in needs], dtype=np.int64)
    return rows @ np.diff(_count_before(needs, shard.borders))


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

    def side_slots(self) -> list[int]:
        """Return the slots of all batch rows and heads on each side."""
        return [self.shape[0] * self.shape[1] * sum(sizes) for sizes in self.sizes]

    def split(self, slots: Tensor) -> Iterator[tuple[str, HaloKV]]:
        """Yield the sides of (all slots, 2, D) keys and values."""
        for side, sizes, part in zip(("prefix", "suffix"), self.sizes, slots.split(self.side_slots()), strict=False):
            part = part.view(*self.shape, sum(sizes), *slots.shape[1:])  # (B, G, P, 2, D)
            yield side, HaloKV(part[..., 0, :], part[..., 1, :], sizes)


def _sent(shard: Shard, needs: list[HaloSlice], heads: int) -> np.ndarray:
    """Return which of this rank's keys a rank with these needs receives: indices into the flattened (B, n, G) keys."""
    begin, end = shard.span
    indices = [np.zeros(0, dtype=np.int64)]
    for need, (low, high) in zip(needs, _count_before(needs, shard.span), strict=True):
        if low < high:
            rows = np.arange(need.batch_begin, need.batch_end)[:, None]
            tokens = rows * (end - begin) + need.first - begin + np.arange(low, high) * need.stride
            indices.append((tokens * heads + need.head).ravel())
    return np.concatenate(indices)


def _received(shard: Shard, needs: list[HaloSlice], shape: tuple[int, int], sizes: np.ndarray) -> np.ndarray:
    """Return the slots of this rank's received keys in the order of arrival; `sizes` is (sides, branches)."""
    batch, heads = shape
    totals, begins = sizes.sum(1), sizes.cumsum(1) - sizes
    slots, owners = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for need, counts in zip(needs, np.diff(_count_before(needs, shard.borders)), strict=True):
        rows = np.arange(need.batch_begin, need.batch_end)[:, None]
        first = need.side * batch * heads * totals[0] + (rows * heads + need.head) * totals[need.side]
        slots.append((first + begins[need.side, need.branch] + np.arange(need.count)).ravel())
        owners.append(np.tile(np.repeat(np.arange(len(counts)), counts), len(rows)))
    return np.concatenate(slots)[np.argsort(np.concatenate(owners), kind="stable")]


@lru_cache(maxsize=64)  # layers may have patterns of their own
def plan_exchange(
    shard: Shard,
    chunks: tuple[Chunk, ...],
    branches: tuple[Branch, ...],
    is_causal: bool,
    batch: int,
    device: torch.device,
) -> Exchange:
    """Plan which keys this rank sends and receives; `chunks` are those of the whole batch, as on one device."""
    shape, ranks = (batch, len(branches[0].offsets)), range(len(shard.borders) - 1)
    needs = [list(halo_slices(shard, chunks, branches, is_causal, rank)) for rank in ranks]
    sizes = np.zeros((1 if is_causal else 2, len(branches)), dtype=np.int64)
    for need in needs[shard.rank]:
        place = need.side, need.branch
        sizes[place] = max(sizes[place], need.count)
    sent = [_sent(shard, needs[rank], shape[1]) for rank in ranks]
    return Exchange(
        is_needed=any(needs),
        send=torch.from_numpy(np.concatenate(sent)).to(device),
        send_counts=[len(x) for x in sent],
        slots=torch.from_numpy(_received(shard, needs[shard.rank], shape, sizes)).to(device),
        receive_counts=count_received(shard, needs[shard.rank]).tolist(),
        shape=shape,
        sizes=tuple(map(tuple, sizes.tolist())),
    )


def pack_shard(
    shard: Shard, batch: int, device: torch.device, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[tuple[Chunk, ...], Packing]:
    """Return the chunks of the whole batch, and the packing of this rank's part of it (see `packing.pack`)."""
    chunks, (begin, end) = whole_batch(batch, shard.total), shard.span
    if attention_mask is not None or position_ids is not None:
        chunks = pack(batch, shard.total, torch.device("cpu"), attention_mask, position_ids, [0] * batch).chunks
    return chunks, lay_out(shard.cut_chunks(chunks, shard.rank), batch, end - begin, device)
