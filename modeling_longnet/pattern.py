"""The pattern of attention: which tokens the heads of every layer keep, and which keys their queries see.

The first fields of `Pattern` are the paper's (LongNet, arXiv 2307.02486, Eq. 4-8 and 13-15), the others go beyond it.
"""

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from .branches import Branch

HEAD_OFFSETS = ("interleaved", "blocked")
LONGEST_SEGMENT = 1 << 62  # positions are int64


class Pattern(NamedTuple):
    """Which keys a model's queries see: the branches of every layer and head. The first three fields are the paper's.

    Attributes:
        segment_lengths, dilation_rates: w and r of each branch, ascending w.
        head_offsets: "interleaved" (g mod r, the paper's Eq. 13) or "blocked" (g // ceil(G / r), TorchScale's).
        window_size: tokens of a sliding window beside the branches, of which there may then be none; None: no window.
        query_rates: a query rate for each branch, a divisor of its r: a head keeps every query_rate-th token as a
            query. 1 lets every query see the branch (r times the work). None: r, as in the paper.
        rotate_offsets: a head keeps queries and keys at two offsets, which change from layer to layer, so that any two
            tokens of a segment meet in some head or layer of r * ceil(r / heads) layers with branches.
        stagger_segments: odd layers place the borders of segments half a segment earlier.
        keys_once: a branch leaves out the region of the branch before it, so that no key counts twice.
        branch_layer_period: n for branches in every n-th layer; the others have only the window.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: str = "interleaved"
    window_size: int | None = None
    query_rates: tuple[int, ...] | None = None
    rotate_offsets: bool = False
    stagger_segments: bool = False
    keys_once: bool = False
    branch_layer_period: int = 1

    @classmethod
    def parse(cls, words: str) -> "Pattern":
        """Return the pattern that is written in one line, such as "w256 512/1 2048/8:1 rotate stagger once every2".

        The words are a window (w and its size), branches (w/r, or w/r:query_rate), flags, and "every" with a number of
        layers.

        Raises:
            ValueError: names the word that is none of these, or a second window or period.
        """
        flags = {"rotate": "rotate_offsets", "stagger": "stagger_segments", "once": "keys_once"}
        branches, fields = [], {}
        if not isinstance(words, str):
            raise ValueError(f"pattern {words!r}: give one line of text, such as 'w256 2048/8:1 once'.")
        for word in words.split():
            if word in flags:
                fields[flags[word]] = True
            elif (match := re.fullmatch(r"w(\d+)", word)) and "window_size" not in fields:
                fields["window_size"] = int(match[1])
            elif (match := re.fullmatch(r"every(\d+)", word)) and "branch_layer_period" not in fields:
                fields["branch_layer_period"] = int(match[1])
            elif match := re.fullmatch(r"(\d+)/(\d+)(?::(\d+))?", word):
                branches.append([int(x or match[2]) for x in match.groups()])
            else:
                raise ValueError(
                    f"pattern {words!r}: {word!r} must be a window such as w256 (one at most), a branch such as "
                    f"2048/4 or 2048/8:1, one of {', '.join(flags)}, or every2 (layers)."
                )
        w, r, rates = (tuple(x) for x in zip(*branches, strict=True)) if branches else ((), (), ())
        return cls(w, r, query_rates=None if rates == r else rates, **fields)

    @classmethod
    def of(cls, config) -> "Pattern":
        """Return the pattern that a config, or anything with these attributes, describes."""
        values = (getattr(config, name, default) for name, default in cls._defaults().items())
        return cls(*(tuple(x) if isinstance(x, list) else x for x in values))

    @property
    def beyond(self) -> dict[str, object]:
        """The fields beyond the paper that are set, by name."""
        fields = zip(self._fields[3:], self[3:], strict=True)
        return {name: x for name, x in fields if x != self._field_defaults[name]}

    @classmethod
    def _defaults(cls) -> dict:
        return dict.fromkeys(cls._fields, ()) | cls._field_defaults

    def check(self, is_causal: bool = True, num_layers: int | None = None) -> None:
        """Raise ValueError unless the fields make branches and fit each other, and a model of `num_layers` layers."""
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
        for name in ("rotate_offsets", "stagger_segments", "keys_once"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")
        if (self.rotate_offsets or rates is not None) and self.head_offsets != "interleaved":
            raise ValueError("rotate_offsets and query_rates choose offsets themselves: leave head_offsets out.")
        if self.keys_once and any(long % short for short, long in pairwise(w)):
            raise ValueError(
                f"keys_once needs nested segments, each length a multiple of the one before; got {list(w)}."
            )
        if self.keys_once and not is_causal:
            raise ValueError("keys_once needs causal attention (is_causal=True).")
        period, of = self.branch_layer_period, num_layers or LONGEST_SEGMENT
        if not _is_count(period) or period > of or (period > 1 and not (window and w)):
            up_to = "" if num_layers is None else f" to the number of layers ({num_layers})"
            raise ValueError(
                f"branch_layer_period={period!r} must be a whole number from 1{up_to}; above 1 it needs branches, "
                "and a window_size for the layers without them."
            )

    def branches(self, num_kv_heads: int, num_heads: int | None = None, layer: int | None = None) -> tuple[Branch, ...]:
        """Return a layer's branches for these key/value and query heads (None: as many), the least dilated first.

        The order affects the result by rounding only. If any branch covers every token, the first does.
        """
        if layer is None and self.branch_layer_period > 1:
            raise ValueError(f"branch_layer_period={self.branch_layer_period}: give the layer too, from 0.")
        layer = 0 if layer is None else layer
        if not (isinstance(layer, int) and layer >= 0):
            raise ValueError(f"layer={layer!r} must be a whole number of at least 0.")
        heads, groups = num_heads or num_kv_heads, range(num_kv_heads)
        result, rates = [], self.query_rates or self.dilation_rates
        window, segment, phase = self.window_size or 0, 0, 0
        if window:
            result.append(Branch(window, 1, (0,) * num_kv_heads, is_window=True))
        if (layer + 1) % self.branch_layer_period:
            return tuple(result)
        layer //= self.branch_layer_period  # those with branches rotate and stagger among themselves
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
            queries = (0, ())  # kept where keys are
            if self.rotate_offsets or rate < r:
                turn = heads * (layer // r) if self.rotate_offsets else 0  # after r layers all key offsets were there
                queries = rate, tuple((h + turn) % rate for h in range(heads))
            after = (window, inner, inner_phase) if self.keys_once else (0, 0, 0)
            result.append(Branch(w, r, offsets, *queries, phase, False, *after))
        return tuple(sorted(result, key=lambda branch: (not branch.covers_all, branch.r, branch.w)))

    def write(self) -> str:
        """Return the line that `parse` reads. Raises ValueError for blocked offsets, which it has no word for."""
        if self.head_offsets != "interleaved":
            raise ValueError(f"head_offsets={self.head_offsets!r} cannot be written in one line.")
        rates = self.query_rates or self.dilation_rates
        triples = zip(self.segment_lengths, self.dilation_rates, rates, strict=True)
        words = [f"w{self.window_size}"] * (self.window_size is not None)
        words += [f"{w}/{r}" + (f":{rate}" if rate != r else "") for w, r, rate in triples]
        flags = {"rotate": self.rotate_offsets, "stagger": self.stagger_segments, "once": self.keys_once}
        words += [word for word, is_on in flags.items() if is_on]
        return " ".join(words + [f"every{self.branch_layer_period}"] * (self.branch_layer_period > 1))

    def describe(self, is_causal: bool = True) -> str:
        """Return a sentence that says which keys a query sees."""
        branches = ", ".join(f"({w}, {r})" for w, r in zip(self.segment_lengths, self.dilation_rates, strict=True))
        if self.window_size is None and self.dilation_rates == (1,):
            return f"Dense attention: branch {branches}."
        if self.window_size is None:
            near = f"up to {self.segment_lengths[0]} tokens of its own segment"
            return f"Branches {branches}: a query sees {near}, and farther ones ever more sparsely."
        where = f", in one layer of {self.branch_layer_period}," if self.branch_layer_period > 1 else ""
        shown = f" and{where} one key in r of its segment of w: branches (w, r) = {branches}" if branches else ""
        near = f"the last {self.window_size} tokens"
        if not is_causal:
            near = f"the tokens up to {self.window_size - 1} on either side"
        return f"A query sees {near}{shown}."

    @staticmethod
    def _phase(w: int, inner: int, inner_phase: int) -> int:
        """Return about w / 2, so that borders of the inner segments stay borders of this one."""
        return inner_phase + (w // 2 - inner_phase) // inner * inner if inner else w // 2

    def count_work(self, length: int, num_layers: int | None = None) -> float:
        """Return the mean number of keys that a causal query sees per head and layer in a sequence of `length` tokens.

        A branch shows half of its region, one key in r, to one query in query_rate: sum_i min(w_i, length) /
        (2 r_i query_rate_i); with keys_once, less the region before it. Exact up to each query's own key (half a key
        per branch) if whole segments fill the sequence; a ragged end or staggered segments show less.
        """
        period = self.branch_layer_period
        share = num_layers // period / num_layers if num_layers else 1 / period  # of the layers, with branches
        window = self.window_size or 0
        work = window * (1 - window / (2 * length)) if window < length else length / 2
        left_out, before = window if self.keys_once else 0, 0.0
        rates = self.query_rates or self.dilation_rates
        for w, r, rate in zip(self.segment_lengths, self.dilation_rates, rates, strict=True):
            tokens = min(w, length)
            region = max(0, tokens - left_out) ** 2 / (2 * tokens)  # of the segment, before the window
            work += (region - before) / (r * rate) * share
            before = region if self.keys_once else 0.0
        return work


@lru_cache(maxsize=64)  # every forward pass needs them, every decoding step too
def layer_branches(
    pattern: Pattern, num_kv_heads: int, num_heads: int, num_layers: int
) -> tuple[tuple[Branch, ...], ...]:
    """Return the branches of each layer of a model with these key/value and query heads."""
    return tuple(pattern.branches(num_kv_heads, num_heads, layer) for layer in range(num_layers))


def parse_pattern(words: str) -> dict[str, object]:
    """Return the arguments of `dilated_attention`, `LongNetConfig` or `use_dilated_attention` for a written pattern.

    Words: w256 (window), 2048/8 or 2048/8:1 (segment/rate:query rate), rotate, stagger, once, every2 (branches in
    every 2nd layer only). Raises ValueError for any other word.

    Example:
        >>> parse_pattern("w256 2048/8:1 once")["window_size"]
        256
    """
    return {name: x for name, x in Pattern.parse(words)._asdict().items() if name != "head_offsets"}


def _is_count(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= LONGEST_SEGMENT


def check_branches(segment_lengths, dilation_rates, allows_none: bool = False) -> None:
    """Raise ValueError unless the two lists make branches: equal lengths, 1 <= r <= w <= 2^62, w growing."""
    pairs = f"segment_lengths={segment_lengths}, dilation_rates={dilation_rates}"
    if not all(isinstance(numbers, list | tuple) for numbers in (segment_lengths, dilation_rates)):
        raise ValueError(
            f"{pairs}: give two lists, such as [2048, 8192] and [1, 4]; a pattern in one line is given "
            'as **parse_pattern("w256 2048/8:1 once").'
        )
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
