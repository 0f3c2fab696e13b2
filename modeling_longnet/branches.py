"""The geometry of dilated attention, in integers only (LongNet, arXiv 2307.02486, Eq. 4-8, 13-15).

A **branch** (w, r) cuts the sequence into segments of w tokens. In each segment a head keeps every r-th token, starting
at its offset o: position p is kept when `(p mod w) mod r == o`. A **chunk** is the part [start, start + length) of a
sequence that a tensor holds. A **slice** is a set of kept tokens that one strided view of that tensor can show, so that
nothing is gathered and no index tensor is built.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

HEAD_OFFSETS = ("interleaved", "blocked")
LONGEST_SEGMENT = 1 << 62  # positions are int64


class Branch(NamedTuple):
    """One (segment length w, dilation rate r) and the offset of each key/value head."""

    w: int
    r: int
    offsets: tuple[int, ...]


class Chunk(NamedTuple):
    """Tokens [start, start + length) of a sequence, in the given batch rows and columns of a tensor.

    `total` counts the tokens known so far: the end of the chunk while decoding, the whole sequence for a shard.
    """

    batch_begin: int
    batch_end: int
    column_begin: int
    column_end: int
    start: int
    total: int

    @property
    def length(self) -> int:
        """Tokens of the chunk."""
        return self.column_end - self.column_begin

    @property
    def batch(self) -> int:
        """Batch rows of the chunk."""
        return self.batch_end - self.batch_begin


class Slice(NamedTuple):
    """Kept tokens of some key/value heads in some whole or partial segments, as one strided view shows them.

    Attributes:
        begin: first token of the first segment, counted from the start of the chunk.
        segments: number of segments, w tokens apart.
        head, heads, head_stride: heads `head + i * head_stride` for i < heads.
        first, first_stride: head i keeps token `first + i * first_stride` of a segment, then every r-th one.
        seqlen: kept tokens per head and segment.
        prefix, suffix: kept tokens per head of the same segment that lie before and after the chunk.
        padding: zero keys per head that the released implementation adds (see `attend_zero_padding`).
    """

    begin: int
    segments: int
    head: int
    heads: int
    head_stride: int
    first: int
    first_stride: int
    seqlen: int
    prefix: int
    suffix: int
    padding: int


def check_branches(segment_lengths, dilation_rates) -> None:
    """Raise ValueError unless the two lists make branches: equal lengths, 1 <= r <= w <= 2^62, w growing."""
    pairs = f"segment_lengths={segment_lengths}, dilation_rates={dilation_rates}"
    if not all(isinstance(numbers, list | tuple) for numbers in (segment_lengths, dilation_rates)):
        raise ValueError(f"{pairs}: give two lists, such as [2048, 8192] and [1, 4].")
    pairs = f"segment_lengths={list(segment_lengths)}, dilation_rates={list(dilation_rates)}"
    if len(segment_lengths) == 0 or len(segment_lengths) != len(dilation_rates):
        raise ValueError(f"{pairs}: give one dilation rate for each segment length, at least one of each.")
    numbers = (*segment_lengths, *dilation_rates)
    if not all(isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= LONGEST_SEGMENT for x in numbers):
        raise ValueError(
            f"{pairs}: segment lengths and dilation rates are whole numbers of tokens, at least 1 and at most 2^62."
        )
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        if r > w:
            raise ValueError(f"{pairs}: rate {r} is larger than its segment length {w}; most heads would keep nothing.")
    if list(segment_lengths) != sorted(set(segment_lengths)):
        raise ValueError(f"{pairs}: segment lengths must grow; sort the pairs, of equal ones keep the smaller rate.")


def make_branches(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int], num_heads: int, head_offsets: str
) -> tuple[Branch, ...]:
    """Return the branches for `num_heads` key/value heads, the least dilated first.

    Offsets are `g mod r` if "interleaved" (the paper, Eq. 13) and `g // ceil(G / r)` if "blocked" (TorchScale). The
    order of branches affects the result by rounding only. If the first branch has rate 1, it covers every token.
    """
    check_branches(segment_lengths, dilation_rates)
    if head_offsets not in HEAD_OFFSETS:
        raise ValueError(f"head_offsets={head_offsets!r}: allowed are {', '.join(map(repr, HEAD_OFFSETS))}.")

    def offset(head, r):
        return head % r if head_offsets == "interleaved" else head // math.ceil(num_heads / r)

    pairs = sorted(zip(segment_lengths, dilation_rates, strict=True), key=lambda pair: pair[::-1])
    return tuple(Branch(w, r, tuple(offset(g, r) for g in range(num_heads))) for w, r in pairs)


def count_work(segment_lengths, dilation_rates, length: int) -> float:
    """Return the mean number of keys that a causal query sees per head in a sequence of `length` tokens.

    A kept query sees half of the w / r tokens of its segment, and one in r is kept: sum_i min(w_i, length) / (2 r_i^2).
    """
    return sum(min(w, length) / (2 * r * r) for w, r in zip(segment_lengths, dilation_rates, strict=True))


def count_kept(length: int, offset: int, r: int) -> int:
    """Return how many of the first `length` tokens of a segment a head with this offset keeps."""
    return max(0, -(-(length - offset) // r))


def prefix_lengths(branches: tuple[Branch, ...], *starts: int) -> tuple[int, ...]:
    """Return the prefix slots that each branch of chunks with these starts needs: max of ceil((start mod w) / r)."""
    return tuple(max((-(-(start % w) // r) for start in starts), default=0) for w, r, _ in branches)


def whole_batch(batch: int, length: int) -> tuple[Chunk, ...]:
    """Return the one chunk of a batch without padding whose rows all hold tokens [0, length)."""
    return (Chunk(0, batch, 0, length, 0, length),)


def _cut_at_borders(chunk: Chunk, w: int) -> list[tuple[int, int, int, int]]:
    """Cut a chunk at segment borders: (begin in the chunk, phase in the segment, length, segments) of each part."""
    phase, first = chunk.start % w, min(-chunk.start % w, chunk.length)
    whole, last = divmod(chunk.length - first, w)
    parts = (0, phase, first, 1), (first, 0, w, whole), (first + whole * w, 0, last, 1)
    return [part for part in parts if all(part[2:])]


def _head_runs(specs: list[tuple], stride: int, largest_first_stride: int) -> list[tuple[int, int, int]]:
    """Group heads `stride` apart whose counts are equal and whose first tokens are evenly spaced.

    `specs` holds (first token, counts...) per head; a run is (head, heads, first_stride).
    """
    runs = []
    for first in range(min(stride, len(specs))):
        runs.append((first, 1, 0))
        for head in range(first + stride, len(specs), stride):
            begin, heads, first_stride = runs[-1]
            step = specs[head][0] - specs[head - stride][0]
            # A view takes no negative stride.
            is_evenly_spaced = step == first_stride if heads > 1 else 0 <= step <= largest_first_stride
            if is_evenly_spaced and specs[head][1:] == specs[head - stride][1:]:
                runs[-1] = (begin, heads + 1, step)
            else:
                runs.append((head, 1, 0))
    return runs


def _head_specs(chunk: Chunk, branch: Branch, begin: int, phase: int, length: int) -> list[tuple[int, ...]]:
    """Return (first, seqlen, prefix, suffix, padding) per head for one part of `_cut_at_borders`."""
    w, r, offsets = branch
    segment_end = min(w, chunk.total - (chunk.start + begin - phase))
    padded = -(-min(w, chunk.total) // r)
    specs = []
    for o in offsets:
        prefix, seen, kept = (count_kept(n, o, r) for n in (phase, phase + length, segment_end))
        specs.append(((o - phase) % r, seen - prefix, prefix, kept - seen, padded - kept))
    return specs


@lru_cache(maxsize=4096)
def chunk_slices(chunk: Chunk, branch: Branch, shared_heads: bool) -> tuple[Slice, ...]:
    """Return all kept tokens of a branch in a chunk, in as few slices as possible.

    With `shared_heads`, several query heads share a key/value head: a slice then only joins adjacent heads with equal
    offsets, so that its query heads are evenly spaced too.
    """
    w, r, offsets = branch
    # Adjacent heads; interleaved heads with equal offsets, r apart; blocked ones whose offsets differ by one.
    strides = [1] if shared_heads else sorted({1, min(r, len(offsets)), math.ceil(len(offsets) / r)})
    slices = []
    for begin, phase, length, segments in _cut_at_borders(chunk, w):
        specs = _head_specs(chunk, branch, begin, phase, length)
        candidates = [(stride, _head_runs(specs, stride, 0 if shared_heads else r)) for stride in strides]
        stride, runs = min(candidates, key=lambda pair: len(pair[1]))
        for head, heads, first_stride in runs:
            first, *counts = specs[head]
            slices.append(Slice(begin, segments, head, heads, stride, first, first_stride, *counts))
    return tuple(piece for piece in slices if piece.seqlen)
