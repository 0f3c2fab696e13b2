"""Which tokens meet in dilated attention, in integers only (LongNet, arXiv 2307.02486, Eq. 4-8, 13-15).

A **branch** is a pair (w, r): segments of w tokens of which a head keeps every r-th, from its offset o on.
Position p is a **row** of the head when `(p mod w) mod r == o`. A **chunk** is the part [start, start + length)
of a sequence that is at hand; it lies in some columns of a tensor. Everything here turns these numbers into
lists of strided views: nothing is gathered and no index tensor is made.
"""

import math
from functools import lru_cache
from typing import NamedTuple

HEAD_OFFSETS = ("interleaved", "blocked")


class Branch(NamedTuple):
    """One (segment length w, dilation rate r) and the offset of each key/value head."""

    w: int
    r: int
    offsets: tuple[int, ...]


class Chunk(NamedTuple):
    """Tokens [start, start + columns) of a sequence of `total` tokens, in batch rows and columns of a tensor."""

    row_begin: int
    row_end: int
    column_begin: int
    column_end: int
    start: int
    total: int

    @property
    def length(self) -> int:
        return self.column_end - self.column_begin


class Rows(NamedTuple):
    """The rows of some key/value heads in one piece, which one strided view can show.

    Head number i of `heads` is `head + i * head_step`; in each of the piece's `segments` its first row lies
    `row + i * row_step` tokens after the segment's begin in the chunk, the next ones r tokens further each.

    `before` and `after` count the rows of each of these heads in the same segment that lie outside the chunk,
    `padding` the zero rows that the released implementation adds (see `attend_zero_padding`).
    """

    begin: int
    segments: int
    head: int
    heads: int
    head_step: int
    row: int
    row_step: int
    rows: int
    before: int
    after: int
    padding: int


def check_branches(segment_lengths, dilation_rates) -> None:
    """Raise ValueError unless the two lists make branches: equal lengths, 1 <= r <= w, w growing."""
    pairs = f"segment_lengths={segment_lengths}, dilation_rates={dilation_rates}"
    if not all(isinstance(numbers, list | tuple) for numbers in (segment_lengths, dilation_rates)):
        raise ValueError(f"{pairs}: give two lists, such as [2048, 8192] and [1, 4].")
    pairs = f"segment_lengths={list(segment_lengths)}, dilation_rates={list(dilation_rates)}"
    if len(segment_lengths) == 0 or len(segment_lengths) != len(dilation_rates):
        raise ValueError(f"{pairs}: give one dilation rate for each segment length, at least one of each.")
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        if isinstance(w, bool) or isinstance(r, bool) or not (isinstance(w, int) and isinstance(r, int)):
            raise ValueError(f"{pairs}: segment lengths and dilation rates are whole numbers of tokens.")
        if w < 1 or r < 1:
            raise ValueError(f"{pairs}: every segment length and dilation rate must be at least 1.")
        if r > w:
            raise ValueError(
                f"{pairs}: rate {r} is larger than its segment length {w}, so most heads would keep no token; "
                "a rate is at most its segment length."
            )
    if list(segment_lengths) != sorted(set(segment_lengths)):
        raise ValueError(
            f"{pairs}: segment lengths must grow from one branch to the next; sort the pairs, and of two with the "
            "same segments keep the one with the smaller rate."
        )


def make_branches(
    segment_lengths: list[int] | tuple[int, ...],
    dilation_rates: list[int] | tuple[int, ...],
    num_heads: int,
    head_offsets: str,
) -> tuple[Branch, ...]:
    """The branches of `num_heads` key/value heads, least dilated first.

    Offsets: "interleaved" is the paper's `g mod r` (Eq. 13), "blocked" TorchScale's `g // ceil(G / r)`.
    The order does not change the result beyond rounding; a branch of rate 1 in front covers every token.
    """
    check_branches(segment_lengths, dilation_rates)
    if head_offsets not in HEAD_OFFSETS:
        raise ValueError(f"head_offsets={head_offsets!r}: allowed are {', '.join(map(repr, HEAD_OFFSETS))}.")

    def offset(head, r):
        return head % r if head_offsets == "interleaved" else head // math.ceil(num_heads / r)

    pairs = sorted(zip(segment_lengths, dilation_rates, strict=True), key=lambda pair: pair[::-1])
    return tuple(Branch(w, r, tuple(offset(g, r) for g in range(num_heads))) for w, r in pairs)


def count_work(segment_lengths, dilation_rates, length: int) -> float:
    """Keys that a causal query sees on average, per head, in a text of `length` tokens.

    Half of a segment's w / r rows, for every r-th token: `sum_i min(w_i, length) / (2 r_i^2)`.
    """
    return sum(min(w, length) / (2 * r * r) for w, r in zip(segment_lengths, dilation_rates, strict=True))


def count_rows(length: int, offset: int, r: int) -> int:
    """How many of the positions 0 .. length - 1 of a segment are rows of a head with this offset."""
    return max(0, -(-(length - offset) // r))


def _pieces(chunk: Chunk, w: int):
    """Cut a chunk at segment borders: (begin in the chunk, phase in the segment, length, segments)."""
    phase, begin = chunk.start % w, 0
    if phase:
        begin = min(w - phase, chunk.length)
        yield 0, phase, begin, 1
    if whole := (chunk.length - begin) // w:
        yield begin, 0, w, whole
    begin += whole * w
    if begin < chunk.length:
        yield begin, 0, chunk.length - begin, 1


def _runs(specs: list[tuple], step: int, max_row_step: int | None) -> list[tuple[int, int, int]]:
    """Runs (head, heads, row_step) of heads `step` apart with equal counts and evenly growing first rows."""
    runs = []
    for head in (h for first in range(min(step, len(specs))) for h in range(first, len(specs), step)):
        if runs and head == runs[-1][0] + runs[-1][1] * step:
            begin, heads, row_step = runs[-1]
            previous = specs[head - step]
            grows = specs[head][0] - previous[0]
            same_step = grows == row_step if heads > 1 else grows >= 0
            if specs[head][1:] == previous[1:] and same_step and (max_row_step is None or grows <= max_row_step):
                runs[-1] = (begin, heads + 1, grows)
                continue
        runs.append((head, 1, 0))
    return runs


@lru_cache(maxsize=4096)
def chunk_rows(chunk: Chunk, branch: Branch, shared_heads: bool) -> tuple[Rows, ...]:
    """Every row of a branch in a chunk, as few strided views.

    `shared_heads`: several query heads share a key/value head. Then a view only takes neighbouring heads with
    the same offset, so that the query heads are evenly spaced too.
    """
    w, r, offsets = branch
    result = []
    for begin, phase, length, segments in _pieces(chunk, w):
        segment_end = min(w, chunk.total - (chunk.start + begin - phase))
        padded = min(w, chunk.total)
        specs = []
        for o in offsets:
            before, own = count_rows(phase, o, r), count_rows(phase + length, o, r)
            real = count_rows(segment_end, o, r)
            specs.append(((o - phase) % r, own - before, before, real - own, -(-padded // r) - real))
        if shared_heads:
            step, runs = 1, _runs(specs, 1, 0)
        else:
            steps = sorted({1, min(r, len(offsets)), math.ceil(len(offsets) / r)})
            step, runs = min(((s, _runs(specs, s, None)) for s in steps), key=lambda pair: len(pair[1]))
        for head, heads, row_step in runs:
            row, rows, before, after, padding = specs[head]
            if rows:
                result.append(
                    Rows(
                        begin,
                        segments,
                        head,
                        heads,
                        step,
                        row,
                        row_step,
                        rows,
                        before,
                        after,
                        padding,
                    )
                )
    return tuple(result)


def prefix_lengths(branches: tuple[Branch, ...], start: int) -> tuple[int, ...]:
    """Slots that a chunk starting at `start` needs from before it, for each branch: ceil((start mod w) / r)."""
    return tuple(-(-(start % w) // r) for w, r, _ in branches)
