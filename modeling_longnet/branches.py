"""The geometry of dilated attention, in integers only (LongNet, arXiv 2307.02486, Eq. 4-8, 13-15).

A **branch** (w, r) cuts the sequence into segments of w tokens. In each segment a head keeps every r-th token, starting
at its offset o: position p is kept when `(p mod w) mod r == o`. A **chunk** is the part [start, start + length) of a
sequence that a tensor holds. A **slice** is a set of kept tokens that one strided view of that tensor can show, so that
nothing is gathered and no index tensor is built.
"""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

HEAD_OFFSETS = ("interleaved", "blocked")
LONGEST_SEGMENT = 1 << 62  # positions are int64


class Branch(NamedTuple):
    """One (segment length w, dilation rate r), and which tokens the heads keep in it.

    Attributes:
        w, r, offsets: key/value head g keeps every r-th token of a segment as keys, from offsets[g] on.
        query_rate, query_offsets: query head h keeps every query_rate-th token as queries, from query_offsets[h] on.
            0 and empty: the tokens that its keys are kept at (the paper).
        phase: the first token of a sequence stands at this place of its segment; none lies before it.
        is_window: no segments; a query sees the last w tokens, itself included.
        after_window: if above 0, a query sees no key among its last `after_window` tokens: a window shows those.
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
        """Whether every token sees a key: itself."""
        return self.r == 1 and not self.after_window and not self.after_segment


def flatten_branch(branch: Branch) -> list[int]:
    """Return a branch as whole numbers: the lengths of its two lists, then its fields."""
    w, r, offsets, query_rate, query_offsets, *others = branch
    return [len(offsets), len(query_offsets), *offsets, *query_offsets, w, r, query_rate, *others]


@lru_cache(maxsize=256)
def unflatten_branches(numbers: tuple[int, ...]) -> tuple[Branch, ...]:
    """Return the branches whose `flatten_branch` one after another make these numbers."""
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
        """Tokens of the chunk."""
        return self.column_end - self.column_begin

    @property
    def batch(self) -> int:
        """Batch rows of the chunk."""
        return self.batch_end - self.batch_begin


class View(NamedTuple):
    """Heads `head + i * head_step` for i < heads, in `segments` segments, `segment_step` tokens apart.

    Row j of such a head is token `first + i * token_step + j * rate` of the chunk, or that slot of a halo.
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

    def view(self, branch: Branch) -> View:
        """Return the view that shows the slice in a chunk's tensor."""
        heads = self.head, self.heads, self.head_stride
        first = self.begin + self.first
        return View(first, self.segments, branch.w, *heads, self.first_stride, self.seqlen, branch.r)

    def head_index(self) -> slice:
        """Return the key/value heads as an index."""
        return slice(self.head, self.head + (self.heads - 1) * self.head_stride + 1, self.head_stride)


class Pattern(NamedTuple):
    """Which keys a model's queries see: the branches of every layer and head. The first three fields are the paper's.

    Attributes:
        segment_lengths, dilation_rates: w and r of each branch, ascending w.
        head_offsets: "interleaved" (g mod r, the paper's Eq. 13) or "blocked" (g // ceil(G / r), TorchScale's).
        window_size: tokens of a sliding window before the branches, which may then be none; None for no window.
        query_rates: a query rate for each branch, a divisor of its r: a head keeps every query_rate-th token as a
            query. 1 lets every query see the branch (r times the work). None: r, as in the paper.
        rotate_offsets: a head keeps queries and keys at two offsets, which turn from layer to layer, so that any two
            tokens of a segment meet in some head or layer.
        stagger_segments: odd layers place the borders of segments half a segment earlier.
        keys_once: a branch leaves out the region of the branch before it, so that no key counts twice.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: str = "interleaved"
    window_size: int | None = None
    query_rates: tuple[int, ...] | None = None
    rotate_offsets: bool = False
    stagger_segments: bool = False
    keys_once: bool = False

    @classmethod
    def parse(cls, words: str) -> "Pattern":
        """Return the pattern that one line writes: "w256 2048/8:1 512/1 rotate stagger once".

        These are a window (w and its size), branches (w/r, or w/r:query_rate), and what is switched on.

        Raises:
            ValueError: names the word that is none of these.
        """
        flags = {"rotate": "rotate_offsets", "stagger": "stagger_segments", "once": "keys_once"}
        branches, fields = [], {}
        for word in words.split():
            if word in flags:
                fields[flags[word]] = True
            elif match := re.fullmatch(r"w(\d+)", word):
                fields["window_size"] = int(match[1])
            elif match := re.fullmatch(r"(\d+)/(\d+)(?::(\d+))?", word):
                branches.append([int(x or match[2]) for x in match.groups()])
            else:
                raise ValueError(
                    f"pattern {words!r}: {word!r} is no window such as w256, no branch such as 2048/4 or 2048/8:1, and "
                    f"none of {', '.join(flags)}."
                )
        w, r, rates = (tuple(x) for x in zip(*branches, strict=True)) if branches else ((), (), ())
        return cls(w, r, query_rates=None if rates == r else rates, **fields)

    @classmethod
    def of(cls, config) -> "Pattern":
        """Return the pattern that a config, or anything with these attributes, describes."""
        values = (getattr(config, name, default) for name, default in cls._defaults().items())
        return cls(*(tuple(x) if isinstance(x, list) else x for x in values))

    @classmethod
    def _defaults(cls) -> dict:
        return dict.fromkeys(cls._fields, ()) | cls._field_defaults

    def check(self, is_causal: bool = True) -> None:
        """Raise ValueError unless the fields make branches and fit each other."""
        check_branches(self.segment_lengths, self.dilation_rates, allows_none=self.window_size is not None)
        w, r, window = self.segment_lengths, self.dilation_rates, self.window_size
        if self.head_offsets not in HEAD_OFFSETS:
            raise ValueError(f"head_offsets={self.head_offsets!r}: allowed are {', '.join(map(repr, HEAD_OFFSETS))}.")
        if window is not None and not (_is_count(window) and window <= min(w, default=LONGEST_SEGMENT)):
            raise ValueError(
                f"window_size={window!r} must be None or a number of tokens, at least 1 and at most the shortest "
                f"segment ({min(w, default=LONGEST_SEGMENT)})."
            )
        rates = self.query_rates
        if rates is not None and not (
            isinstance(rates, list | tuple)
            and len(rates) == len(r)
            and all(_is_count(a) and b % a == 0 for a, b in zip(rates, r, strict=True))
        ):
            raise ValueError(
                f"query_rates={rates!r}: give None, or for each of dilation_rates={list(r)} a divisor of it; 1 lets "
                "every query see that branch."
            )
        if (self.rotate_offsets or rates is not None) and self.head_offsets != "interleaved":
            raise ValueError("rotate_offsets and query_rates choose offsets themselves: leave head_offsets alone.")
        if self.keys_once and any(long % short for short, long in pairwise(w)):
            raise ValueError(
                f"keys_once needs nested segments, each length a multiple of the one before; got {list(w)}."
            )
        if self.keys_once and not is_causal:
            raise ValueError("keys_once needs causal attention (is_causal=True).")

    def branches(self, num_kv_heads: int, num_heads: int | None = None, layer: int = 0) -> tuple[Branch, ...]:
        """Return a layer's branches for these key/value and query heads (None: as many), the least dilated first.

        The order affects the result by rounding only. If any branch covers every token, the first does.
        """
        heads, groups = num_heads or num_kv_heads, range(num_kv_heads)
        result, rates = [], self.query_rates or self.dilation_rates
        window, segment, phase = self.window_size or 0, 0, 0
        if window:
            result.append(Branch(window, 1, (0,) * num_kv_heads, is_window=True))
        for w, r, rate in zip(self.segment_lengths, self.dilation_rates, rates, strict=True):
            inner, inner_phase = segment, phase
            segment, phase = w, self._phase(w, inner, phase) if self.stagger_segments and layer % 2 else 0
            if self.rotate_offsets:
                offsets = tuple((g + g // r + layer) % r for g in groups)
            elif rate < r:  # the last token of every r, as in Sparse Transformers (arXiv 1904.10509, section 4.3)
                offsets = (r - 1,) * num_kv_heads
            elif self.head_offsets == "interleaved":
                offsets = tuple(g % r for g in groups)
            else:
                offsets = tuple(g // math.ceil(num_kv_heads / r) for g in groups)
            queries = (0, ())  # the tokens of the keys
            if self.rotate_offsets or rate < r:
                queries = rate, tuple(h % rate for h in range(heads))
            after = (window, inner, inner_phase) if self.keys_once else (0, 0, 0)
            result.append(Branch(w, r, offsets, *queries, phase, False, *after))
        return tuple(sorted(result, key=lambda branch: (not branch.covers_all, branch.r, branch.w)))

    def describe(self) -> str:
        """Return a sentence or two that say which keys a query sees."""
        branches = ", ".join(f"({w}, {r})" for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True))
        if self.window_size is None:
            reach = (
                f"a query sees up to {self.segment_lengths[0]} tokens of its own segment, and ever fewer farther ones"
            )
            return f"Branches {branches}: {reach}."
        shown = f", and of longer segments one key in r: branches (w, r) = {branches}" if branches else ""
        return f"A query sees the last {self.window_size} tokens{shown}."

    @staticmethod
    def _phase(w: int, inner: int, inner_phase: int) -> int:
        """Return about w / 2, so that borders of the inner segments stay borders of this one."""
        return inner_phase + (w // 2 - inner_phase) // inner * inner if inner else w // 2

    def count_work(self, length: int) -> float:
        """Return the mean number of keys that a causal query sees per head in a sequence of `length` tokens.

        A branch shows half of its region, one key in r, to one query in query_rate: sum_i min(w_i, length) /
        (2 r_i query_rate_i); with keys_once, less the region before it. Exact up to each query's own key (half a key
        per branch) if whole segments fill the sequence; a ragged end or staggered segments show less.
        """
        window = self.window_size or 0
        work = window * (1 - window / (2 * length)) if window < length else length / 2
        left_out, before = window if self.keys_once else 0, 0.0
        rates = self.query_rates or self.dilation_rates
        for w, r, rate in zip(self.segment_lengths, self.dilation_rates, rates, strict=True):
            tokens = min(w, length)
            region = max(0, tokens - left_out) ** 2 / (2 * tokens)  # of the segment, before the window
            work += (region - before) / (r * rate)
            before = region if self.keys_once else 0.0
        return work


def _is_count(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= LONGEST_SEGMENT


def check_branches(segment_lengths, dilation_rates, allows_none: bool = False) -> None:
    """Raise ValueError unless the two lists make branches: equal lengths, 1 <= r <= w <= 2^62, w growing."""
    pairs = f"segment_lengths={segment_lengths}, dilation_rates={dilation_rates}"
    if not all(isinstance(numbers, list | tuple) for numbers in (segment_lengths, dilation_rates)):
        raise ValueError(f"{pairs}: give two lists, such as [2048, 8192] and [1, 4].")
    pairs = f"segment_lengths={list(segment_lengths)}, dilation_rates={list(dilation_rates)}"
    if len(segment_lengths) < (not allows_none) or len(segment_lengths) != len(dilation_rates):
        raise ValueError(f"{pairs}: give one dilation rate for each segment length, at least one of each.")
    if not all(map(_is_count, (*segment_lengths, *dilation_rates))):
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
    """Return the paper's branches for `num_heads` key/value heads, the least dilated first."""
    pattern = Pattern(segment_lengths, dilation_rates, head_offsets)
    pattern.check()
    return pattern.branches(num_heads)


def count_work(segment_lengths, dilation_rates, length: int) -> float:
    """Return `Pattern.count_work` of the paper's pattern."""
    return Pattern(segment_lengths, dilation_rates).count_work(length)


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
    """What of a branch's segments lies in a chunk: one partial segment, or whole ones.

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
        strides: of which heads, so far apart, a run may be made.
        largest_step: between two neighbours of a run; a view takes no negative stride.

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
    """Return which heads may be evenly spaced: adjacent ones, interleaved ones, blocked ones."""
    return sorted({1, min(r, heads), math.ceil(heads / r)})


def _key_specs(chunk: Chunk, branch: Branch, part: Part) -> list[tuple[int, ...]]:
    """Return (first, 0, seqlen, prefix, suffix, padding) per key/value head for one part."""
    w, r, offsets = branch[:3]
    segment_end = min(w, chunk.total - (chunk.start + part.begin - part.place))
    padded = -(-min(w, chunk.total) // r)
    ends = part.place, part.place + part.length, segment_end
    specs = []
    for o in offsets:
        prefix, seen, kept = (part.count(end, o, r) for end in ends)
        specs.append(((o - part.place) % r, 0, seen - prefix, prefix, kept - seen, padded - kept))
    return specs


@lru_cache(maxsize=4096)
def chunk_slices(chunk: Chunk, branch: Branch) -> tuple[Slice, ...]:
    """Return all kept keys of a branch in a chunk, in as few slices as possible.

    Where queries have offsets of their own, slices without a key tell what lies before and after the chunk.
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
        slices = [Slice(0, 1, 0, len(branch.offsets), 1, 0, 0, chunk.length, *halo, 0)]
    return tuple(piece for piece in slices if piece.seqlen or branch.query_offsets)
