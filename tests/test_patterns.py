"""Patterns beyond the paper: window, query rates, rotated offsets, staggered segments, keys that count once.

Letters: B batch, L tokens, H query heads, G key/value heads.
"""

import json
import random
import shutil
from collections import Counter
from itertools import pairwise

import pytest
import torch
from checks import assert_close, make_model, refused
from fuzz import attention as fuzz
from fuzz.engine import Draw, run_case
from hypothesis import given
from hypothesis import strategies as st
from sharding_worker import launch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_longnet import (
    LongNetCache,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetModel,
    LongNetSlideConfig,
    LongNetSlideEncoder,
    dilated_attention,
    stream,
)
from modeling_longnet.attention_context import layer_branches
from modeling_longnet.branches import LONGEST_SEGMENT, Chunk, Pattern, flatten_branch, unflatten_branches
from modeling_longnet.conversion import convert, export_checkpoint, to_torchscale
from modeling_longnet.dilate import DilatedCache, use_dilated_attention
from modeling_longnet.products import Product, View, branch_products
from modeling_longnet.reference import count_branches
from modeling_longnet.testing import CACHE

EXACT = 1e-10  # float64, through a few layers
FIELDS = {"window": "window_size", "rates": "query_rates", "rotate": "rotate_offsets", "stagger": "stagger_segments",
          "once": "keys_once"}  # fmt: skip
REMEDIES = [*FIELDS, "all"]
EVERYTHING = {
    "segment_lengths": [8, 16, 64], "dilation_rates": [1, 2, 4], "window_size": 6, "query_rates": [1, 1, 4],
    "rotate_offsets": True, "stagger_segments": True, "keys_once": True, "position_embedding": "rope",
}  # fmt: skip


def draw_pattern(draw: Draw, remedy: str, is_causal: bool = True) -> Pattern:
    """A pattern with one of the fields, or with several of them for "all"; keys_once only if causal."""
    names = {remedy} if remedy != "all" else {name for name in FIELDS if draw.flag(0.75)}
    is_nested = "once" in names or draw.flag()
    lengths = [draw.integer(1, 8)]
    for _ in range(draw.integer(0, 2)):
        last = lengths[-1]
        lengths.append(last * draw.integer(2, 4) if is_nested else last + draw.integer(1, 20))
    rates = [draw.integer(1, min(w, 6)) for w in lengths]
    window = draw.integer(1, lengths[0]) if "window" in names else None
    if remedy == "window" and draw.flag(0.1):
        lengths, rates = [], []
    divisors = (draw.choice([a for a in range(1, r + 1) if r % a == 0]) for r in rates)
    query_rates = tuple(divisors) if "rates" in names else None
    beyond = "rotate" in names, "stagger" in names, "once" in names and is_causal
    return Pattern(tuple(lengths), tuple(rates), "interleaved", window, query_rates, *beyond)


def has_remedy(pattern: Pattern, remedy: str) -> bool:
    """Whether the field is on: alone, or at least two of them for "all"."""
    chosen = [name for name, field in FIELDS.items() if getattr(pattern, field)]
    return len(chosen) > 1 if remedy == "all" else chosen == [remedy]


def phases(pattern: Pattern, layer: int) -> list[int]:
    """By the rule: no phase in even layers; in odd ones half a segment or less, so that inner borders stay borders."""
    found, inner = [], 1
    for w in pattern.segment_lengths:
        before = found[-1] if found else 0
        halves = [p for p in range(w // 2 + 1) if (p - before) % inner == 0]
        found.append(max(halves) if pattern.stagger_segments and layer % 2 else 0)
        inner = w
    return found


def times_seen(pattern: Pattern, layer: int, head: int, group: int, i: int, j: int, is_causal: bool) -> int:
    """How often query i of a head sees key j: the words of `LongNetConfig`, from its fields alone."""
    if is_causal and j > i:
        return 0
    window, lengths = pattern.window_size or 0, pattern.segment_lengths
    count, inside = int(abs(i - j) < window), abs(i - j) < window
    rates = pattern.query_rates or pattern.dilation_rates
    for w, r, rate, phase in zip(lengths, pattern.dilation_rates, rates, phases(pattern, layer), strict=True):
        p, q = i + phase, j + phase
        shared = p // w == q // w
        key_offset = group % r
        query_is_kept = p % w % r == key_offset
        if pattern.rotate_offsets:
            key_offset = (group + group // r + layer) % r
        elif rate < r:
            key_offset = r - 1
        if pattern.rotate_offsets or rate < r:
            query_is_kept = p % w % rate == head % rate
        count += shared and query_is_kept and q % w % r == key_offset and not (pattern.keys_once and inside)
        inside = shared or abs(i - j) < window
    return count


@st.composite
def patterns(draw, is_causal=True):
    """Any of the remedies' patterns, heads, and a layer of either kind."""
    remedy, seed = draw(st.sampled_from(REMEDIES)), draw(st.integers(0, 10**6))
    groups, repeat = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return draw_pattern(Draw(seed), remedy, is_causal), groups * repeat, groups, draw(st.integers(0, 4))


# The rule.


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_the_reference_is_the_rule(remedy, is_causal):
    for seed in range(25):
        draw = Draw(seed)
        pattern, length = draw_pattern(draw, remedy, is_causal), draw.integer(1, 30)
        groups, repeat, layer = draw.integer(1, 4), draw.integer(1, 3), draw.integer(0, 3)
        pattern.check(is_causal)
        positions, heads = torch.arange(length)[None], groups * repeat
        counts = count_branches(pattern.branches(groups, heads, layer), positions, positions, is_causal=is_causal)
        counts = counts.repeat_interleave(heads // counts.shape[1], 1)
        expected = [
            [
                [times_seen(pattern, layer, h, h // repeat, i, j, is_causal) for j in range(length)]
                for i in range(length)
            ]
            for h in range(heads)
        ]
        assert counts[0].tolist() == expected, (seed, pattern, heads, groups, layer)


def test_one_layer_of_r_squared_heads_or_r_layers_of_r_heads_meet_every_pair():
    """Each two tokens of a segment in exactly one of them; without rotation three of four never meet."""
    positions = torch.arange(32)[None]

    def meetings(rotate: bool, heads: int, layers: int):
        pattern = Pattern((16,), (4,), rotate_offsets=rotate)
        counts = [
            count_branches(pattern.branches(heads, heads, i), positions, positions, is_causal=False)
            for i in range(layers)
        ]
        return torch.stack(counts).sum((0, 1, 2))[:16, :16]

    assert (meetings(True, 16, 1) == 1).all()
    assert (meetings(True, 4, 4) == 1).all()
    assert (meetings(False, 16, 4) == 0).sum() == 16 * 12


def test_every_two_neighbours_share_a_segment_in_an_odd_or_even_layer():
    positions, pattern = torch.arange(64)[None], Pattern((4, 16), (1, 1), stagger_segments=True)
    even, odd = (count_branches(pattern.branches(1, 1, i), positions, positions)[0, 0] for i in range(2))
    neighbours = [x.diagonal(-1) for x in (even, odd)]
    assert min(x.min() for x in neighbours) == 0
    assert (neighbours[0] + neighbours[1]).min() > 0


@given(patterns())
def test_staggered_borders_stay_nested(case):
    """An inner segment never crosses a border of the next one, where lengths nest."""
    pattern, _, groups, layer = case
    pattern = pattern._replace(stagger_segments=True)
    branches = [b for b in pattern.branches(groups, groups, layer) if not b.is_window]
    branches.sort(key=lambda b: b.w)
    for inner, outer in pairwise(branches):
        if outer.w % inner.w == 0:
            assert (outer.phase - inner.phase) % inner.w == 0
        assert 0 <= outer.phase <= outer.w // 2


@given(patterns())
def test_once_no_key_counts_twice(case):
    pattern, heads, groups, layer = case
    positions = torch.arange(50)[None]
    counts = count_branches(pattern.branches(groups, heads, layer), positions, positions)
    assert not pattern.keys_once or counts.max() <= 1
    if pattern.window_size and pattern.keys_once:
        near = torch.ones(50, 50).tril().triu(1 - pattern.window_size) > 0
        assert (counts[..., near] == 1).all()


@given(patterns())
def test_branches_survive_as_numbers(case):
    pattern, heads, groups, layer = case
    branches = pattern.branches(groups, heads, layer)
    numbers = tuple(int(n) for branch in branches for n in flatten_branch(branch))
    assert unflatten_branches(numbers) == branches


def mean_keys(pattern: Pattern, length: int, heads: int) -> float:
    """Keys that a query sees on average over heads and over an even and an odd layer, counted by the reference."""
    positions = torch.arange(length)[None]
    layers = (pattern.branches(heads, heads, i) for i in range(2 * max(pattern.dilation_rates)))
    counts = [count_branches(branches, positions, positions).double().sum(-1).mean() for branches in layers]
    return sum(counts).item() / len(counts)


@pytest.mark.parametrize("fields", [
    pytest.param({}, id="paper"),
    pytest.param({"window_size": 8}, id="window"),
    pytest.param({"query_rates": (1, 1, 4)}, id="rates"),
    pytest.param({"rotate_offsets": True}, id="rotate"),
    pytest.param({"keys_once": True}, id="once"),
    pytest.param({"keys_once": True, "window_size": 8}, id="window once"),
    pytest.param({"keys_once": True, "window_size": 8, "rotate_offsets": True, "query_rates": (1, 1, 4)}, id="most"),
])  # fmt: skip
def test_work_is_the_mean_number_of_keys(fields):
    """Without staggering: short of what the diagonal adds, at most one key per branch (half of each row's own)."""
    pattern = Pattern((16, 64, 256), (1, 2, 4), **fields)
    counted, estimated = mean_keys(pattern, 256, 8), pattern.count_work(256)
    assert abs(counted - estimated) <= 0.5 * len(pattern.branches(8)), (counted, estimated)


# Products: what the kernels compute.


def rows_of(view: View, begin: int, positions: list[int] | None = None):
    """(segment, head, position of each row) of a view; slots of a halo hold `positions[head]`."""
    for segment in range(view.segments):
        for i in range(view.heads):
            first, head = view.first + segment * view.segment_step + i * view.token_step, view.head + i * view.head_step
            places = [first + row * view.rate for row in range(view.seqlen)]
            yield segment, head, [begin + x if positions is None else positions[head][x] for x in places]


def staircase(product: Product) -> Counter:
    """(row, key) that `steps` covers, rows and keys counted as the product stores them."""
    found, (rows, keys) = Counter(), (product.queries.seqlen, product.keys.seqlen)
    for of_rows, of_keys, is_causal in product.steps():
        for a, row in enumerate(range(rows)[of_rows]):
            for b, key in enumerate(range(keys)[of_keys]):
                if not is_causal or b <= a:
                    found[(rows - 1 - row, keys - 1 - key) if product.is_reversed else (row, key)] += 1
    return found


def halo_positions(branch, chunk: Chunk, kind: str) -> list[list[int]]:
    """By key/value head, the positions whose keys a prefix or suffix holds, in the order of its slots."""
    start, end, w, phase = chunk.start, chunk.start + chunk.length, branch.w, branch.phase
    found = []
    for offset in branch.offsets:
        if branch.is_window:
            prefix, suffix = range(max(0, start - w + 1), start), range(end, min(chunk.total, end + w - 1))
        else:
            kept = [p for p in range(chunk.total) if (p + phase) % w % branch.r == offset]
            prefix = [p for p in kept if p < start and (p + phase) // w == (start + phase) // w]
            suffix = [p for p in kept if p >= end and (p + phase) // w == (end - 1 + phase) // w]
        found.append(list(prefix if kind == "prefix" else suffix))
    return found


def pairs_of(branch, chunk: Chunk, heads: int, is_causal: bool) -> Counter:
    """(head, query, key) of all products of a branch, by position."""
    found, repeat = Counter(), heads // len(branch.offsets)
    for kind in ("chunk", "prefix") if is_causal else ("chunk", "prefix", "suffix"):
        positions = None if kind == "chunk" else halo_positions(branch, chunk, kind)
        for product in branch_products(chunk, branch, heads, is_causal, kind):
            steps = staircase(product)
            keys = {(n, head): x for n, head, x in rows_of(product.keys, chunk.start, positions)}
            for segment, head, queries in rows_of(product.queries, chunk.start):
                of_head = keys[segment, head // repeat]
                for (row, key), times in steps.items():
                    found[head, queries[row], of_head[key]] += times
    return found


@given(patterns(), st.integers(0, 60), st.integers(1, 45), st.integers(0, 40))
def test_products_show_each_pair_once(case, start, length, after):
    """Of a chunk with its prefix: each (query, key) of the predicate, and nothing else."""
    pattern, heads, groups, layer = case
    chunk = Chunk(0, 1, 3, 3 + length, start, start + length + after)
    check_products(pattern, heads, groups, layer, chunk, True)


@given(patterns(is_causal=False), st.integers(0, 60), st.integers(1, 45), st.integers(0, 40))
def test_bidirectional_products_show_each_pair_once(case, start, length, after):
    pattern, heads, groups, layer = case
    chunk = Chunk(0, 1, 3, 3 + length, start, start + length + after)
    check_products(pattern, heads, groups, layer, chunk, False)


def check_products(pattern: Pattern, heads: int, groups: int, layer: int, chunk: Chunk, is_causal: bool) -> None:
    shown = Counter()
    for branch in pattern.branches(groups, heads, layer):
        shown += pairs_of(branch, chunk, heads, is_causal)
    queries, keys = torch.arange(chunk.start, chunk.start + chunk.length)[None], torch.arange(chunk.total)[None]
    counts = count_branches(pattern.branches(groups, heads, layer), queries, keys, is_causal=is_causal)[0]
    counts = counts.repeat_interleave(heads // len(counts), 0)
    expected = {(h, chunk.start + i, j): counts[h, i, j].item() for h, i, j in counts.nonzero().tolist()}
    assert shown == expected


@given(st.integers(1, 9), st.integers(0, 9), st.one_of(st.none(), st.integers(-9, 12)))
def test_steps_are_the_staircase(rows, keys, diagonal):
    view = View(0, 1, 0, 0, 1, 1, 0, rows, 1)
    product = Product(view, view._replace(seqlen=keys), diagonal)
    expected = {
        (row, key): 1 for row in range(rows) for key in range(keys) if diagonal is None or key < diagonal + row
    }
    assert staircase(product) == expected
    assert all(len(range(rows)[a]) == len(range(keys)[b]) for a, b, is_causal in product.steps() if is_causal)


# The op: outputs and every gradient in float64.

COUNTS = {"op": 300, "packed": 50, "sharded": 50, "chunked": 50}


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("remedy", REMEDIES)
def test_equals_the_dense_reference(remedy, kind, monkeypatch):
    drawn = []

    def draw_one(draw: Draw, is_causal: bool) -> Pattern:
        drawn.append(draw_pattern(draw, remedy, is_causal))
        return drawn[-1]

    monkeypatch.setattr(fuzz, "draw_pattern", draw_one)
    monkeypatch.setattr(fuzz, "DTYPES", (torch.float64,))
    monkeypatch.setattr(fuzz, "draw_length", lambda draw, usual=60: draw.integer(1, usual))
    seed = counted = 0
    while counted < COUNTS[kind]:
        outcome = run_case(fuzz.CASES[kind], Draw(seed))
        assert outcome.status == "passed", f"seed {seed}: {outcome.notes}\n{outcome.trace}"
        counted += has_remedy(drawn[-1], remedy)
        seed += 1
