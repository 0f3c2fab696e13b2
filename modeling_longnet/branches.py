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


class Branch(NamedTuple):
    """One (segment length w, dilation rate r), and which tokens the heads keep in it.

    Attributes:
        w, r, offsets: key/value head g keeps every r-th token of a segment as keys, from offsets[g] on.
        query_rate, query_offsets: query head h keeps every query_rate-th token as queries, from query_offsets[h] on.
            0 and empty: queries are kept where their keys are (the paper).
        phase: place of the sequence's first token in its segment; the places before it are empty.
        is_window: no segments; a query sees the last w tokens, itself included (bidirectional: w - 1 after it too).
        after_window: if above 0, a query sees no key among its last `after_window` tokens, which a window covers.
        after_segment, after_phase: if above 0, a query sees no key in its segment of the branch with this w and phase.
    """

    w: int
    r: int
    offsets: tuple[int, ...]
    query_rate: int = 0
    query_offsets: tuple[int, ...] = ()
    phase: int = 0
    is_window: bool = False
    after_window: int = 0
    after_segment: int = 0
    after_phase: int = 0

    @property
    def covers_all(self) -> bool:
        """Whether every token sees at least one key, itself."""
        return self.r == 1 and not self.after_window and not self.after_segment


def flatten_branch(branch: Branch) -> list[int]:
    """Return a branch as whole numbers: the lengths of its two lists, then its fields."""
    w, r, offsets, query_rate, query_offsets, *others = branch
    return [len(offsets), len(query_offsets), *offsets, *query_offsets, w, r, query_rate, *others]


@lru_cache(maxsize=256)
def unflatten_branches(numbers: tuple[int, ...]) -> tuple[Branch, ...]:
    """Rebuild branches from the concatenated lists of `flatten_branch`."""
    branches, i = [], 0
    while i < len(numbers):
        groups, heads = numbers[i : i + 2]
        i += 2 + groups + heads
        offsets, query_offsets = numbers[i - heads - groups : i - heads], numbers[i - heads : i]
        w, r, query_rate, phase, is_window, *after = numbers[i : i + len(Branch._fields) - 2]
        branches.append(Branch(w, r, offsets, query_rate, query_offsets, phase, bool(is_window), *after))
        i += len(Branch._fields) - 2
    return tuple(branches)


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
        """Number of tokens."""
        return self.column_end - self.column_begin

    @property
    def batch(self) -> int:
        """Number of batch rows."""
        return self.batch_end - self.batch_begin


class View(NamedTuple):
    """Heads `head + i * head_step` for i < heads, in `segments` segments, `segment_step` tokens apart.

    Row j of the i-th head is token `first + i * token_step + j * rate` of the chunk, or that slot of a halo.
    """

    first: int
    segments: int
    segment_step: int
    head: int
    heads: int
    head_step: int
    token_step: int
    seqlen: int
    rate: int


class Slice(NamedTuple):
    """Kept tokens of some key/value heads in some whole or partial segments, as one strided view shows them.

    Attributes:
        begin: first token of the first segment, counted from the start of the chunk.
        segments: number of segments, w tokens apart.
        head, heads, head_stride: heads `head + i * head_stride` for i < heads.
        first, first_stride: head i keeps token `first + i * first_stride` of a segment, then every r-th one.
        seqlen: kept tokens per head and segment.
        prefix, suffix: kept tokens per head of the same segment that lie before and after the chunk.
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

    def view(self, branch: Branch) -> View:
        """Return the view that shows the slice in a chunk's tensor."""
        heads = self.head, self.heads, self.head_stride
        first = self.begin + self.first
        return View(first, self.segments, branch.w, *heads, self.first_stride, self.seqlen, branch.r)

    def head_index(self) -> slice:
        """Return the key/value heads as an index."""
        return slice(self.head, self.head + (self.heads - 1) * self.head_stride + 1, self.head_stride)


def count_kept(length: int, offset: int, r: int) -> int:
    """Return how many of the first `length` tokens of a segment a head with this offset keeps."""
    return max(0, -(-(length - offset) // r))


def prefix_lengths(branches: tuple[Branch, ...], *starts: int) -> tuple[int, ...]:
    """Return the prefix slots that each branch of chunks with these starts needs, for the head that needs most."""
    return tuple(max((_prefix_length(branch, start) for start in starts), default=0) for branch in branches)


def _prefix_length(branch: Branch, start: int) -> int:
    if branch.is_window:
        return min(start, branch.w - 1)
    return -(-min(start, (start + branch.phase) % branch.w) // branch.r)


def whole_batch(batch: int, length: int) -> tuple[Chunk, ...]:
    """Return the one chunk of a batch without padding whose rows all hold tokens [0, length)."""
    return (Chunk(0, batch, 0, length, 0, length),)


class Part(NamedTuple):
    """The part of a branch's segments that lies in a chunk: one partial segment, or several whole ones.

    Attributes:
        begin: first token, counted from the start of the chunk.
        place: its place in the segment.
        length, segments: tokens in each segment, and number of segments.
        ghost: leading places of the segment that lie before the sequence.
    """

    begin: int
    place: int
    length: int
    segments: int
    ghost: int

    def count(self, end: int, offset: int, r: int) -> int:
        """Return how many tokens of the segment before place `end` exist and are kept."""
        return count_kept(end, offset, r) - count_kept(self.ghost, offset, r) if end > self.ghost else 0

    def counts(self, chunk: Chunk, branch: Branch, offset: int) -> tuple[int, int, int]:
        """Return how many keys of the segment are kept before the chunk, up to its end, and in all of the sequence."""
        segment_end = min(branch.w, chunk.total - (chunk.start + self.begin - self.place))
        before, seen, kept = (
            self.count(end, offset, branch.r) for end in (self.place, self.place + self.length, segment_end)
        )
        return before, seen, kept


def cut_at_borders(chunk: Chunk, branch: Branch) -> list[Part]:
    """Cut a chunk at the borders of a branch's segments."""
    w = branch.w
    place = (chunk.start + branch.phase) % w
    first = min(-place % w, chunk.length)
    whole, last = divmod(chunk.length - first, w)
    parts = (0, place, first, 1), (first, 0, w, whole), (first + whole * w, 0, last, 1)
    return [Part(*part, max(0, part[1] - part[0] - chunk.start)) for part in parts if all(part[2:])]


def even_runs(specs: list[tuple], strides: Sequence[int], largest_step: int) -> tuple[int, list[tuple[int, ...]]]:
    """Group heads whose first tokens are evenly spaced and whose counts are equal, in as few runs as possible.

    Args:
        specs: per head two numbers that may be evenly spaced, such as its first query and first key, then counts.
        strides: candidate distances between neighbouring heads of a run.
        largest_step: the most by which either number may grow between neighbours; a view takes no negative stride.

    Returns:
        The stride, and (first head, heads, step of each of the two numbers) of each run.
    """
    candidates = [(stride, _even_runs(specs, stride, largest_step)) for stride in strides]
    return min(candidates, key=lambda pair: len(pair[1]))


def _even_runs(specs: list[tuple], stride: int, largest_step: int) -> list[tuple[int, ...]]:
    runs = []
    for first in range(min(stride, len(specs))):
        runs.append((first, 1, 0, 0))
        for head in range(first + stride, len(specs), stride):
            begin, heads, *steps = runs[-1]
            spec, last = specs[head], specs[head - stride]
            new = [a - b for a, b in zip(spec[:2], last[:2], strict=True)]
            is_even = new == steps if heads > 1 else all(0 <= step <= largest_step for step in new)
            if is_even and spec[2:] == last[2:]:
                runs[-1] = (begin, heads + 1, *new)
            else:
                runs.append((head, 1, 0, 0))
    return runs


def head_strides(heads: int, r: int) -> list[int]:
    """Return the candidate distances between evenly spaced heads: adjacent, interleaved or blocked."""
    return sorted({1, min(r, heads), math.ceil(heads / r)})


def _key_specs(chunk: Chunk, branch: Branch, part: Part) -> list[tuple[int, ...]]:
    """Return (first, 0, seqlen, prefix, suffix) per key/value head for one part."""
    specs = []
    for o in branch.offsets:
        before, seen, kept = part.counts(chunk, branch, o)
        specs.append(((o - part.place) % branch.r, 0, seen - before, before, kept - seen))
    return specs


@lru_cache(maxsize=4096)
def chunk_slices(chunk: Chunk, branch: Branch) -> tuple[Slice, ...]:
    """Return all kept keys of a branch in a chunk, in as few slices as possible.

    Where queries have their own offsets, slices without a key are kept: their prefix and suffix still count.
    """
    slices = []
    for part in [] if branch.is_window else cut_at_borders(chunk, branch):
        specs = _key_specs(chunk, branch, part)
        stride, runs = even_runs(specs, head_strides(len(specs), branch.r), branch.r)
        for head, heads, step, _ in runs:
            first, _, *counts = specs[head]
            slices.append(Slice(part.begin, part.segments, head, heads, stride, first, step, *counts))
    if branch.is_window:
        halo = min(chunk.start, branch.w - 1), min(chunk.total - chunk.start - chunk.length, branch.w - 1)
        slices = [Slice(0, 1, 0, len(branch.offsets), 1, 0, 0, chunk.length, *halo)]
    return tuple(piece for piece in slices if piece.seqlen or branch.query_offsets)
