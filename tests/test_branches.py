"""The integers: every row of a head in one view, once; counts around a chunk; the predicate word for word."""

import math
from collections import Counter

import pytest
import torch
from checks import refused
from hypothesis import given
from hypothesis import strategies as st

from modeling_longnet.branches import Branch, Chunk, chunk_slices, count_kept, prefix_lengths, whole_batch
from modeling_longnet.pattern import count_work, make_branches
from modeling_longnet.products import branch_products
from modeling_longnet.reference import count_branches, count_zero_padding


@st.composite
def chunk_cases(draw):
    """A branch with any offsets, and a chunk anywhere in a sequence."""
    w = draw(st.integers(1, 23))
    r = draw(st.integers(1, w))
    heads = draw(st.integers(1, 9))
    style = draw(st.sampled_from(["interleaved", "blocked", "any"]))
    if style == "any":
        offsets = tuple(draw(st.lists(st.integers(0, r - 1), min_size=heads, max_size=heads)))
    else:
        offsets = make_branches((w,), (r,), heads, style)[0].offsets
    start = draw(st.integers(0, 70))
    length = draw(st.integers(1, 61))
    total = start + length + draw(st.integers(0, 30))
    column = draw(st.integers(0, 5))
    return Branch(w, r, offsets), Chunk(0, 1, column, column + length, start, total)


def positions_of(piece, chunk, branch):
    """(head, position in the document) of each element that the views of `rows` show."""
    for i in range(piece.heads):
        for segment in range(piece.segments):
            for j in range(piece.seqlen):
                column = piece.begin + segment * branch.w + piece.first + i * piece.first_stride + j * branch.r
                yield piece.head + i * piece.head_stride, chunk.start + column


def query_positions(product, chunk):
    """(head, position in the document) of each query of a product."""
    view = product.queries
    for i in range(view.heads):
        for segment in range(view.segments):
            for j in range(view.seqlen):
                token = view.first + segment * view.segment_step + i * view.token_step + j * view.rate
                yield view.head + i * view.head_step, chunk.start + token


@given(chunk_cases())
def test_views_show_each_row_of_each_head_once(case):
    branch, chunk = case
    w, r, offsets, *_ = branch
    pieces = chunk_slices(chunk, branch)
    shown = Counter(p for piece in pieces for p in positions_of(piece, chunk, branch))
    expected = {
        (head, p)
        for head, o in enumerate(offsets)
        for p in range(chunk.start, chunk.start + chunk.length)
        if (p % w) % r == o
    }
    assert shown == Counter(expected)


@given(chunk_cases())
def test_rows_outside_the_chunk_are_counted(case):
    branch, chunk = case
    w, r, offsets, *_ = branch
    end = chunk.start + chunk.length
    for piece in chunk_slices(chunk, branch):
        for head, position in positions_of(piece, chunk, branch):
            segment = range(position // w * w, min(position // w * w + w, chunk.total))
            of_head = [p for p in segment if (p % w) % r == offsets[head]]
            assert piece.prefix == sum(p < chunk.start for p in of_head)
            assert piece.suffix == sum(p >= end for p in of_head)
            assert piece.prefix + piece.seqlen + piece.suffix == len(of_head)
    for product in branch_products(chunk, branch, len(offsets), False, "chunk"):
        for head, position in query_positions(product, chunk):
            segment = range(position // w * w, min(position // w * w + w, chunk.total))
            of_head = [p for p in segment if (p % w) % r == offsets[head]]
            assert product.padding == math.ceil(min(w, chunk.total) / r) - len(of_head)


@given(chunk_cases(), st.integers(2, 3))
def test_shared_heads_are_neighbours_with_one_offset(case, repeat):
    branch, chunk = case
    for product in branch_products(chunk, branch, repeat * len(branch.offsets), True, "chunk"):
        keys, queries = product.keys, product.queries
        heads = branch.offsets[keys.head : keys.head + keys.heads]
        assert (queries.head, queries.heads) == (repeat * keys.head, repeat * keys.heads)
        assert queries.head_step == 1
        assert queries.token_step == 0
        assert keys.heads == 1 or (keys.head_step == 1 and keys.token_step == 0 and len(set(heads)) == 1)


@pytest.mark.parametrize(("w", "r", "heads", "offsets", "views"), [
    pytest.param(2048, 1, 12, "interleaved", 1, id="undilated"),
    pytest.param(8192, 4, 12, "interleaved", 3, id="interleaved, r divides H"),
    pytest.param(8192, 4, 12, "blocked", 3, id="blocked, r divides H"),
    pytest.param(32768, 12, 12, "interleaved", 1, id="paper's (32768, 12), a short last row"),
    pytest.param(16384, 16, 8, "interleaved", 1, id="r above H"),
])  # fmt: skip
def test_a_whole_branch_takes_few_views(w, r, heads, offsets, views):
    """Where rows per head are equal, one view shows as many heads as strides allow: that is the speed."""
    (branch,) = make_branches((w,), (r,), heads, offsets)
    equal = w % r == 0
    pieces = chunk_slices(Chunk(0, 1, 0, 4 * w, 0, 4 * w), branch)
    assert len(pieces) <= (views if equal else 2 * views)


@given(st.integers(0, 60), st.integers(0, 8), st.integers(1, 9))
def test_count_kept(length, offset, r):
    assert count_kept(length, offset, r) == len(range(offset, length, r))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True), st.integers(0, 200))
def test_prefix_lengths_hold_every_head(lengths, start):
    lengths = tuple(sorted(lengths))
    branches = make_branches(lengths, tuple(max(1, w // 3) for w in lengths), 5, "interleaved")
    for branch, slots in zip(branches, prefix_lengths(branches, start), strict=True):
        begun = range(start // branch.w * branch.w, start)
        held = [sum((p % branch.w) % branch.r == o for p in begun) for o in branch.offsets]
        assert max(held) <= slots <= math.ceil(min(branch.w, start) / branch.r)


def test_prefix_lengths_of_several_chunks_are_the_longest():
    branches = make_branches((4, 12), (1, 3), 2, "interleaved")
    assert prefix_lengths(branches, 5, 11, 4) == (3, 4)
    assert prefix_lengths(branches) == (0, 0)


def test_a_whole_batch_is_one_chunk():
    (chunk,) = whole_batch(3, 7)
    assert chunk == Chunk(0, 3, 0, 7, 0, 7)
    assert (chunk.batch, chunk.length) == (3, 7)
    assert (Chunk(2, 5, 4, 6, 9, 11).batch, Chunk(2, 5, 4, 6, 9, 11).length) == (3, 2)


@pytest.mark.parametrize(("heads", "r", "offsets", "expected"), [
    (3, 2, "blocked", (0, 0, 1)),
    (8, 4, "blocked", (0, 0, 1, 1, 2, 2, 3, 3)),
    (3, 4, "blocked", (0, 1, 2)),
    (3, 2, "interleaved", (0, 1, 0)),
    (8, 4, "interleaved", (0, 1, 2, 3, 0, 1, 2, 3)),
    (3, 4, "interleaved", (0, 1, 2)),
    (5, 1, "interleaved", (0, 0, 0, 0, 0)),
])  # fmt: skip
def test_head_offsets(heads, r, offsets, expected):
    assert make_branches((16,), (r,), heads, offsets)[0].offsets == expected


@pytest.mark.parametrize(("length", "lengths", "rates"), [
    (64, (16, 64), (1, 4)),
    (64, (16, 128), (1, 2)),
    (512, (8, 64, 512), (1, 2, 8)),
])  # fmt: skip
def test_work_is_the_mean_number_of_keys_seen(length, lengths, rates):
    """Over heads whose offsets are evenly spread; a causal segment of n rows has n (n + 1) / 2 pairs, not n^2 / 2."""
    positions = torch.arange(length)[None]
    counts = count_branches(make_branches(lengths, rates, 8, "interleaved"), positions, positions)
    own = sum(1 / (2 * r) for r in rates)
    assert counts.sum(-1).double().mean() == pytest.approx(count_work(lengths, rates, length) + own)


def test_the_least_dilated_branch_comes_first():
    made = make_branches((4, 8, 16, 32), (4, 3, 1, 1), 2, "interleaved")
    assert [(b.w, b.r) for b in made] == [(16, 1), (32, 1), (8, 3), (4, 4)]


@given(st.data())
def test_count_branches_is_the_rule(data):
    """Section by section as the paper writes it, with nothing but loops."""
    lengths = tuple(sorted(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True))))
    rates = tuple(data.draw(st.integers(1, w)) for w in lengths)
    heads, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 15))
    causal, style = data.draw(st.booleans()), data.draw(st.sampled_from(["interleaved", "blocked"]))
    positions = torch.arange(length)[None]
    counts = count_branches(make_branches(lengths, rates, heads, style), positions, positions, is_causal=causal)
    for head in range(heads):
        for p in range(length):
            for q in range(length):
                expected = 0
                for w, r in zip(lengths, rates, strict=True):
                    o = head % r if style == "interleaved" else head // math.ceil(heads / r)
                    rows = (p % w) % r == o == (q % w) % r
                    expected += p // w == q // w and rows and (q <= p or not causal)
                assert counts[0, head, p, q] == expected


@given(chunk_cases())
def test_zero_padding_of_the_reference_and_of_the_views_agree(case):
    branch, chunk = case
    length = chunk.total
    dense = count_zero_padding((branch,), length)
    seen = torch.zeros_like(dense)
    whole = Chunk(0, 1, 0, length, 0, length)
    for product in branch_products(whole, branch, len(branch.offsets), False, "chunk"):
        for head, position in query_positions(product, whole):
            seen[head, position] = product.padding
    assert torch.equal(dense, seen)


@pytest.mark.parametrize(("lengths", "rates", "words"), [
    pytest.param([], [], ["[]", "at least one"], id="none"),
    pytest.param([4, 8], [1], ["[4, 8]", "[1]", "one dilation rate for each"], id="lengths differ"),
    pytest.param([4], "1", ["two lists"], id="no list"),
    pytest.param([0], [1], ["[0]", "at least 1"], id="w below 1"),
    pytest.param([4], [0], ["[0]", "at least 1"], id="r below 1"),
    pytest.param([8, 4], [1, 1], ["[8, 4]", "must grow"], id="falling"),
    pytest.param([4, 4], [1, 2], ["[4, 4]", "must grow"], id="equal"),
    pytest.param([4, 8], [1, 9], ["9", "8", "larger than its segment length"], id="r above w"),
    pytest.param([4.0], [1], ["4.0", "whole numbers"], id="float"),
    pytest.param([4], [True], ["True", "whole numbers"], id="bool"),
])  # fmt: skip
def test_bad_branches_are_refused(lengths, rates, words):
    with refused(*words):
        make_branches(tuple(lengths), rates if isinstance(rates, str) else tuple(rates), 4, "interleaved")


def test_unknown_offsets_are_refused():
    with refused("head_offsets='diagonal'", "'interleaved'", "'blocked'"):
        make_branches((4,), (1,), 4, "diagonal")
