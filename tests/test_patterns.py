"""Patterns beyond the paper: window, query rates, rotated offsets, staggered segments, keys that count once.

Letters: B batch, L tokens, H query heads, G key/value heads.
"""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch
from checks import assert_close, make_model, refused
from fuzz import attention as fuzz
from fuzz.engine import Draw, run_case
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sharding_worker import launch
from test_hub import run_python
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_longnet import (
    ExportableDecoder,
    LongNetCache,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetModel,
    LongNetSlideConfig,
    LongNetSlideEncoder,
    dilated_attention,
    parse_pattern,
    stream,
)
from modeling_longnet.attention_context import plan_branches
from modeling_longnet.backends import BACKENDS
from modeling_longnet.branches import Chunk, flatten_branch, unflatten_branches
from modeling_longnet.conversion import convert, export_checkpoint, to_torchscale
from modeling_longnet.dilate import DilatedCache, use_dilated_attention
from modeling_longnet.pattern import LONGEST_SEGMENT, Pattern
from modeling_longnet.products import Product, View, _QueryRows, branch_products
from modeling_longnet.reference import count_branches
from modeling_longnet.testing import CACHE

EXACT = 1e-10  # float64, through a few layers
FIELDS = {"window": "window_size", "rates": "query_rates", "rotate": "rotate_offsets", "stagger": "stagger_segments",
          "once": "keys_once", "every": "branch_layer_period"}  # fmt: skip
REMEDIES = [*FIELDS, "all"]
EVERYTHING = {
    "segment_lengths": [8, 16, 64], "dilation_rates": [1, 2, 4], "window_size": 6, "query_rates": [1, 1, 4],
    "rotate_offsets": True, "stagger_segments": True, "keys_once": True, "branch_layer_period": 2,
    "position_embedding": "rope",
}  # fmt: skip


def draw_pattern(draw: Draw, remedy: str, is_causal: bool = True) -> Pattern:
    """A pattern with one of the fields, or with several of them for "all"; keys_once only if causal."""
    names = {remedy} if remedy != "all" else {name for name in FIELDS if draw.flag(0.75)}
    names |= {"window"} if remedy == "every" else set()
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
    period = draw.integer(2, 3) if "every" in names and window else 1
    return Pattern(tuple(lengths), tuple(rates), "interleaved", window, query_rates, *beyond, period)


def has_remedy(pattern: Pattern, remedy: str) -> bool:
    """Whether the field is on: alone, or at least two of them for "all"."""
    chosen = [name for name, field in FIELDS.items() if field in pattern.beyond]
    return len(chosen) > 1 if remedy == "all" else chosen == (["window"] if remedy == "every" else []) + [remedy]


def phases(pattern: Pattern, layer: int) -> list[int]:
    """By the rule: no phase in even layers; in odd ones half a segment or less, so that inner borders stay borders."""
    found, inner = [], 1
    for w in pattern.segment_lengths:
        before = found[-1] if found else 0
        halves = [p for p in range(w // 2 + 1) if (p - before) % inner == 0]
        found.append(max(halves) if pattern.stagger_segments and layer % 2 else 0)
        inner = w
    return found


def times_seen(pattern: Pattern, layer: int, heads: int, head: int, group: int, i: int, j: int, is_causal: bool) -> int:
    """How often query i of a head sees key j: the words of `LongNetConfig`, from its fields alone."""
    if is_causal and j > i:
        return 0
    window, lengths = pattern.window_size or 0, pattern.segment_lengths
    count, inside = int(abs(i - j) < window), abs(i - j) < window
    rates = pattern.query_rates or pattern.dilation_rates
    if layer % pattern.branch_layer_period != pattern.branch_layer_period - 1:
        return count
    layer //= pattern.branch_layer_period
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
            turns = layer // r if pattern.rotate_offsets else 0
            query_is_kept = p % w % rate == (head + turns * heads) % rate
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
                [times_seen(pattern, layer, heads, h, h // repeat, i, j, is_causal) for j in range(length)]
                for i in range(length)
            ]
            for h in range(heads)
        ]
        assert counts[0].tolist() == expected, (seed, pattern, heads, groups, layer)


def test_one_layer_of_r_squared_heads_or_r_layers_of_r_heads_meet_every_pair():
    """Every two tokens of a segment meet in exactly one of them; without rotation three of four pairs never meet."""
    positions = torch.arange(32)[None]

    def meetings(rotate: bool, heads: int, layers: int, period: int = 1):
        window = None if period == 1 else 1  # of the query itself, which then meets itself in every layer
        pattern = Pattern((16,), (4,), rotate_offsets=rotate, window_size=window, branch_layer_period=period)
        counts = [
            count_branches(pattern.branches(heads, heads, i), positions, positions, is_causal=False)
            for i in range(layers)
        ]
        return torch.stack(counts).sum((0, 1, 2))[:16, :16]

    assert (meetings(True, 16, 1) == 1).all()
    assert (meetings(True, 4, 4) == 1).all()
    assert (meetings(True, 2, 8) == 1).all()  # fewer heads than the rate
    assert (meetings(True, 3, 8) > 0).all()
    assert (meetings(True, 6, 4) > 0).all()
    assert (meetings(False, 16, 4) == 0).sum() == 16 * 12
    itself = torch.eye(16, dtype=torch.int64)
    assert (meetings(True, 4, 12, period=3) - 12 * 4 * itself == 1).all()


@pytest.mark.parametrize("period", [1, 2])
def test_every_two_neighbours_share_a_segment_in_an_odd_or_even_layer(period):
    """Of those with branches."""
    fields = {"stagger_segments": True, "window_size": None if period == 1 else 1, "branch_layer_period": period}
    positions, pattern = torch.arange(64)[None], Pattern((4, 16), (1, 1), **fields)
    layers = range(period - 1, 2 * period, period)
    even, odd = (count_branches(pattern.branches(1, 1, i), positions, positions)[0, 0] for i in layers)
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
    pytest.param({"keys_once": True, "window_size": 15}, id="long window once"),
    pytest.param({"keys_once": True, "window_size": 8, "rotate_offsets": True, "query_rates": (1, 1, 4)}, id="most"),
])  # fmt: skip
def test_work_is_the_mean_number_of_keys(fields):
    """Up to half of each query's own key, which a sum over pairs counts and an area does not."""
    pattern = Pattern((16, 64, 256), (1, 2, 4), **fields)
    counted, estimated = mean_keys(pattern, 256, 8), pattern.count_work(256)
    own = sum(1 / (2 * r) for r in pattern.dilation_rates) + (pattern.window_size or 0) / (2 * 256)
    assert 0 <= counted - estimated <= own + 1e-9
    staggered = mean_keys(pattern._replace(stagger_segments=True), 256, 8)
    assert 0.85 * estimated < staggered < counted, "odd layers begin with shorter segments"


# Products: what the kernels compute.


def rows_of(view: View, begin: int, positions: list[int] | None = None):
    """(segment, head, position of each row) of a view; slots of a halo hold `positions[head]`."""
    for segment in range(view.segments):
        for i in range(view.heads):
            first, head = view.first + segment * view.segment_step + i * view.token_step, view.head + i * view.head_step
            places = [first + row * view.rate for row in range(view.seqlen)]
            yield segment, head, [begin + x if positions is None else positions[head][x] for x in places]


def staircase(product: Product) -> Counter:
    """(row, key) that `steps` covers, or the band; rows and keys counted as the product stores them."""
    found, (rows, keys) = Counter(), (product.queries.seqlen, product.keys.seqlen)
    if product.band:
        return Counter((row, key) for row in range(rows) for key in range(row, row + product.band))
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


def pairs_of(branch, chunk: Chunk, heads: int, is_causal: bool, bands: bool) -> Counter:
    """(head, query, key) of all products of a branch, by position."""
    found, repeat = Counter(), heads // len(branch.offsets)
    for kind in ("chunk", "prefix") if is_causal else ("chunk", "prefix", "suffix"):
        positions = None if kind == "chunk" else halo_positions(branch, chunk, kind)
        for product in branch_products(chunk, branch, heads, is_causal, kind, bands):
            steps = staircase(product)
            keys = {(n, head): x for n, head, x in rows_of(product.keys, chunk.start, positions)}
            for segment, head, queries in rows_of(product.queries, chunk.start):
                of_head = keys[segment, head // repeat]
                for (row, key), times in steps.items():
                    found[head, queries[row], of_head[key]] += times
    return found


def check_products(case: tuple, start: int, length: int, after: int, is_causal: bool, bands: bool = False) -> None:
    pattern, heads, groups, layer = case
    chunk, shown = Chunk(0, 1, 3, 3 + length, start, start + length + after), Counter()
    for branch in pattern.branches(groups, heads, layer):
        shown += pairs_of(branch, chunk, heads, is_causal, bands)
    queries, keys = torch.arange(start, start + length)[None], torch.arange(chunk.total)[None]
    counts = count_branches(pattern.branches(groups, heads, layer), queries, keys, is_causal=is_causal)[0]
    counts = counts.repeat_interleave(heads // len(counts), 0)
    assert shown == {(h, start + i, j): counts[h, i, j].item() for h, i, j in counts.nonzero().tolist()}


@given(patterns(), st.integers(0, 60), st.integers(1, 45), st.integers(0, 40), st.booleans())
def test_products_show_each_pair_once(case, start, length, after, bands):
    """Of a chunk with its prefix: each (query, key) of the predicate, and nothing else."""
    check_products(case, start, length, after, True, bands)


@given(patterns(is_causal=False), st.integers(0, 60), st.integers(1, 45), st.integers(0, 40))
def test_bidirectional_products_show_each_pair_once(case, start, length, after):
    check_products(case, start, length, after, False)


def test_the_products_of_a_million_tokens_take_no_loop_over_queries(monkeypatch):
    """However large the rate: in each of 256 inner segments at most three runs of queries per head."""
    branch = Pattern((4096, 1 << 20), (1, 16384), window_size=512, query_rates=(1, 1), keys_once=True).branches(2)[-1]
    calls, spec = [], _QueryRows._spec
    monkeypatch.setattr(_QueryRows, "_spec", lambda *x: calls.append(x) or spec(*x))
    products = branch_products(Chunk(0, 1, 0, 1 << 20, 0, 1 << 20), branch, 2, True, "chunk")
    assert 0 < len(products) <= len(calls) <= 256 * 3 * 2
    assert sum(x.queries.heads * x.queries.seqlen for x in products) <= 2 << 20


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("window", "length"), [(70, 71), (70, 200), (64, 257), (130, 259)])
def test_windows_longer_than_a_block(window, length, is_causal):
    """The products of the op and out and gradients; a band's block has 64 queries."""
    pattern = Pattern((), (), window_size=window)
    check_products((pattern, 2, 1, 0), 0, length, 0, is_causal, bands=True)
    inputs = [torch.randn(2, n, length, 3, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1)]
    results = []
    for backend in ("torch", "eager"):
        out = dilated_attention(*inputs, [], [], window_size=window, is_causal=is_causal, backend=backend)
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, actual, expected)


@given(st.integers(1, 9), st.integers(0, 9), st.one_of(st.none(), st.integers(-9, 12)))
def test_steps_are_the_staircase(rows, keys, diagonal):
    view = View(0, 1, 0, 0, 1, 1, 0, rows, 1)
    product = Product(view, view._replace(seqlen=keys), diagonal)
    expected = {(row, key): 1 for row in range(rows) for key in range(keys) if diagonal is None or key < diagonal + row}
    assert staircase(product) == expected
    assert all(len(range(rows)[a]) == len(range(keys)[b]) for a, b, is_causal in product.steps() if is_causal)


# The op: outputs and every gradient in float64.

COUNTS = {"op": 300, "packed": 30, "sharded": 30, "chunked": 30}


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("remedy", REMEDIES)
def test_equals_the_dense_reference(remedy, kind, monkeypatch):
    drawn = []

    def draw_one(draw: Draw, is_causal: bool, length: int = 0) -> Pattern:
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


# Models: forward, cache, generation, streaming.


def draw_model(draw: Draw, remedy: str, model_class=LongNetModel, **fields):
    """A float64 model of three layers on the fast path and its dense reference."""
    pattern = draw_pattern(draw, remedy, fields.get("is_causal", True))
    groups = draw.integer(1, 3)
    heads = groups * draw.integer(1, 2)
    sizes = {"hidden_size": 4 * heads, "num_attention_heads": heads, "num_key_value_heads": groups}
    options = pattern._asdict() | sizes | {"num_hidden_layers": 3, "position_embedding": "rope"} | fields
    return tuple(make_model(model_class, implementation=name, **options) for name in ("sdpa", "eager"))


def hidden(model, ids, **inputs):
    return model(ids, **inputs).last_hidden_state


@pytest.mark.parametrize("remedy", REMEDIES)
def test_chunks_steps_and_padding_equal_one_forward(remedy):
    """Ragged rows padded on the left and cut anywhere equal the dense reference of each row alone."""
    for seed in range(12):
        draw = Draw(seed)
        model, reference = draw_model(draw, remedy)
        if draw.flag(0.2):
            model.set_attn_implementation("eager")
        lengths = [draw.integer(1, 70) for _ in range(draw.integer(1, 3))]
        width = max(lengths)
        ids = torch.randint(0, 29, (len(lengths), width))
        mask = torch.stack([torch.arange(width) >= width - n for n in lengths])
        cache, end, parts = LongNetCache(model.config, draw.choice([None, 9, 200])), 0, []
        with torch.no_grad():
            while end < width:
                begin, end = end, min(width, end + draw.choice([1, 1, 1, 2, 5, 16, 31]))
                parts.append(hidden(model, ids[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache}))
            for row, n in enumerate(lengths):
                alone = hidden(reference, ids[row : row + 1, width - n :])[0]
                what = f"seed {seed}, row {row}, {model.config.segment_lengths}"
                assert_close(what, torch.cat(parts, 1)[row, width - n :], alone, EXACT)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_state_of_tensors_equals_one_forward(remedy):
    """`ExportableDecoder`: ragged rows begin in a cache and go on in a state."""
    for seed in range(12):
        draw = Draw(seed)
        model, reference = draw_model(draw, remedy, LongNetForCausalLM)
        begin = [draw.integer(1, 40) for _ in range(draw.integer(1, 3))]
        width, steps = max(begin), draw.integer(1, 40)
        ids = torch.randint(0, 29, (len(begin), width + steps))
        mask = torch.stack([torch.arange(width) >= width - n for n in begin])
        decode, parts = ExportableDecoder(model), []
        with torch.no_grad():
            state = decode.state(cache=getattr(model(ids[:, :width], attention_mask=mask), CACHE))
            for column in range(width, width + steps):
                logits, *state = decode(ids[:, column : column + 1], *state)
                parts.append(logits)
            for row, n in enumerate(begin):
                alone = reference(ids[row : row + 1, width - n :]).logits[0, n:]
                assert_close(f"seed {seed}, row {row}", torch.cat(parts, 1)[row], alone, EXACT)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_packed_documents_and_right_padding_equal_each_alone(remedy, is_causal):
    for seed in range(5):
        draw = Draw(seed)
        model, reference = draw_model(draw, remedy, is_causal=is_causal)
        lengths = [draw.integer(1, 40) for _ in range(3)]
        ids = torch.randint(0, 29, (2, sum(lengths)))
        positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
        with torch.no_grad():
            alone = [hidden(reference, part) for part in ids.split(lengths, 1)]
            assert_close("packed", hidden(model, ids, position_ids=positions), torch.cat(alone, 1), EXACT)
            mask = torch.arange(sum(lengths)) < torch.tensor([lengths[0], sum(lengths)])[:, None]
            padded = hidden(model, ids, attention_mask=mask)
            assert_close("padded", padded[0, : lengths[0]], alone[0][0], EXACT)
            assert_close("whole row", padded[1], hidden(reference, ids[1:])[0], EXACT)


def test_gradients_are_those_of_the_dense_reference():
    ids, grads = torch.randint(0, 29, (2, 75)), []
    for implementation in ("sdpa", "eager"):
        model = make_model(LongNetForCausalLM, implementation=implementation, num_hidden_layers=3, **EVERYTHING)
        model(ids, labels=ids).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in grads[1].items():
        # Adding a constant to every key changes no weight: that gradient is rounding alone.
        if "k_proj.bias" not in name:
            assert_close(name, grads[0][name], expected, EXACT)


def make_lm(**overrides):
    """Two of the four layers have branches, and one of these is staggered."""
    fields = {"num_hidden_layers": 4, "pad_token_id": 0, "num_key_value_heads": 3}
    return make_model(LongNetForCausalLM, **(EVERYTHING | fields | overrides))


@pytest.mark.parametrize("options", [
    pytest.param({}, id="greedy"),
    pytest.param({"num_beams": 3}, id="beams"),
    pytest.param({"do_sample": True}, id="sampling"),
])  # fmt: skip
def test_generation_equals_the_one_without_a_cache(options):
    model, ids = make_lm(), torch.randint(1, 29, (2, 21))
    mask = torch.ones_like(ids)
    mask[1, :8] = ids[1, :8] = 0
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        given = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False} | options
        found.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **given))
    assert torch.equal(*found)
    paper = make_lm(**Pattern._field_defaults)
    assert not torch.equal(found[0], paper.generate(ids, attention_mask=mask, **given))


@pytest.mark.parametrize("kind", ["prompt lookup", "assistant"])
def test_drafts_are_taken_back(kind):
    """The cache records what it may have to remove, over borders of segments and over the window."""
    model, ids = make_lm(), torch.randint(1, 29, (1, 7)).repeat(1, 4)
    given = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    options = {"prompt_lookup_num_tokens": 5}
    if kind == "assistant":
        options = {"assistant_model": make_lm(num_hidden_layers=1, branch_layer_period=1)}
        options["assistant_model"].generation_config.num_assistant_tokens = 7
    assert torch.equal(model.generate(ids, **options, **given), model.generate(ids, use_cache=False, **given))


def crop(cache: LongNetCache, back: int) -> str:
    """Remove columns and return the refusal, empty if there is none."""
    try:
        cache.crop(-back)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("remedy", REMEDIES)
def test_crop_is_exact_or_refused(remedy):
    """After a record always exact; without one exact, or refused as keys of a window or segment were discarded."""
    outcomes = Counter()
    for seed in range(20):
        draw = Draw(seed)
        model, _ = draw_model(draw, remedy)
        length, back = draw.integer(2, 60), draw.integer(1, 8)
        is_recorded = draw.flag(0.3)
        ids, new = torch.randint(0, 29, (2, length)), torch.randint(0, 29, (2, 17))
        back = min(back, length - 1)
        cache = LongNetCache(model.config)
        with torch.no_grad():
            if is_recorded:
                hidden(model, ids[:, : length - back], **{CACHE: cache})
                cache.activate_past_recording()
            hidden(model, ids[:, cache.get_seq_length() :], **{CACHE: cache})
            refusal = crop(cache, back)
            outcomes["refused" if refusal else "exact"] += 1
            if refusal:
                assert not is_recorded, f"seed {seed}: {refusal}"
                assert "discarded" in refusal
                continue
            parts = [hidden(model, part, **{CACHE: cache}) for part in new.split([1, 9, 7], 1)]
            whole = hidden(model, torch.cat([ids[:, : length - back], new], 1))[:, length - back :]
        assert_close(f"seed {seed}", torch.cat(parts, 1), whole, EXACT)
    assert min(outcomes["exact"], outcomes["refused"]) > 0


def test_a_crop_that_one_layer_refuses_changes_none():
    """With staggered segments an odd layer passes a border where an even one does not."""
    fields = {"stagger_segments": True, "segment_lengths": [8], "dilation_rates": [1], "num_hidden_layers": 2}
    model, ids = make_model(LongNetModel, **fields, position_embedding="rope"), torch.randint(0, 29, (1, 40))
    partly = 0
    with torch.no_grad():
        for length in range(8, 24):
            cache = LongNetCache(model.config)
            hidden(model, ids[:, :length], **{CACHE: cache})
            if not crop(cache, 2):
                continue
            alone = LongNetCache(model.config)
            hidden(model, ids[:, :length], **{CACHE: alone})
            partly += not crop(alone.layers[0], 2)
            found, whole = hidden(model, ids[:, length:], **{CACHE: cache}), hidden(model, ids)[:, length:]
            assert_close(f"{length} tokens", found, whole)
    assert partly


def test_the_cache_holds_the_papers_rows_and_the_window():
    """In a layer that has branches; the others hold the window alone."""
    model, paper = make_lm(), make_lm(**Pattern._field_defaults)
    sizes = []
    for each in (model, paper):
        cache = LongNetCache(each.config)
        with torch.no_grad():
            each(torch.randint(0, 29, (1, 200)), **{CACHE: cache})
        sizes.append([layer.keys.shape[2] for layer in cache.layers])
    window = EVERYTHING["window_size"]
    assert sizes[0][:2] == [window, sizes[1][1] + window]


def test_rows_are_reordered_and_a_saved_cache_goes_on():
    model, ids, new = make_lm(), torch.randint(0, 29, (3, 43)), torch.randint(0, 29, (3, 12))
    cache, rows = LongNetCache(model.config), torch.tensor([2, 0, 2])
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        cache.reorder_cache(rows)
        loaded = LongNetCache(model.config)
        loaded.load_tensors(cache.to_tensors())
        whole = model(torch.cat([ids[rows], new], 1)).logits[:, 43:]
        for each in (cache, loaded):
            parts = [model(part, **{CACHE: each}).logits for part in new.split([1, 1, 10], 1)]
            assert_close("logits", torch.cat(parts, 1), whole, EXACT)


CHANGES = [
    {"window_size": 5}, {"query_rates": None}, {"rotate_offsets": False}, {"stagger_segments": False},
    {"keys_once": False}, {"branch_layer_period": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_cache_of_another_pattern_is_refused(change, tmp_path):
    model, other, ids = make_lm(), make_lm(**change), torch.randint(0, 29, (1, 20))
    cache = LongNetCache(model.config)
    model(ids, **{CACHE: cache})
    with refused("another config", next(iter(change))):
        other(ids, **{CACHE: cache})
    with refused("saved cache"):
        LongNetCache(other.config).load_tensors(cache.to_tensors())
    state = tmp_path / "state.safetensors"
    list(stream(model, ids[0], state_file=state, progress=False))
    with refused("another model", next(iter(change))):
        list(stream(other, ids[0], state_file=state, progress=False))


@pytest.mark.parametrize("chunk_size", [1, 13, 300])
def test_streaming_resumes(chunk_size, tmp_path):
    model, tokens, state = make_lm(), torch.randint(0, 29, (207,)), tmp_path / "state.safetensors"
    with torch.no_grad():
        expected = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    reader = stream(model, tokens, chunk_size=31, state_file=state, save_seconds=0, progress=False)
    begun = [next(reader), next(reader)]
    reader.close()
    rest = list(stream(model, tokens, chunk_size=chunk_size, state_file=state, progress=False))
    assert rest[0].start > 1
    log_probs = torch.cat([s.log_probs for s in rest])
    torch.testing.assert_close(log_probs, expected[rest[0].start - 1 :].float(), rtol=0, atol=1e-5)
    assert begun[0].start == 1
    assert rest[-1].total == pytest.approx(expected.sum().item(), rel=1e-6)


@pytest.mark.parametrize(("window", "length"), [(512, 700), (513, 513), (513, 1200), (600, 1201)])
def test_windows_by_bands_and_by_blocks(window, length):
    """512 is the largest window that the CPU backend takes by bands; grouped heads, and far keys beside the window."""
    assert BACKENDS["torch"].takes_bands(torch.empty(1, dtype=torch.float64), window) == (window <= 512)
    pattern = Pattern((1024,), (8,), "interleaved", window, (1,), keys_once=True)._asdict()
    inputs = [torch.randn(1, heads, length, 4, dtype=torch.float64) for heads in (2, 1, 1)]
    grad_out, results = torch.randn_like(inputs[0]), []
    for backend in ("torch", "eager"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = dilated_attention(*leaves, **pattern, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad_out)))
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, actual, expected)


# Other ways to run.


def test_two_processes_work_as_one():
    names = "beyond-the-paper", "beyond-the-paper-bidirectional", "beyond-the-paper-packed", "branches-in-some-layers"
    launch("model", *names, processes=2)


@pytest.mark.parametrize("is_causal", [True, False])
def test_compiled_and_exported_op(is_causal):
    """One graph, and a program that keeps the pattern."""
    pattern = {name: EVERYTHING[name] for name in Pattern._fields if name in EVERYTHING} | {"keys_once": is_causal}
    inputs = [torch.randn(1, n, 70, 4, dtype=torch.float64) for n in (4, 2, 2)]

    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return dilated_attention(query, key, value, **pattern, is_causal=is_causal, layer=1, backend="torch")

    expected = dilated_attention(*inputs, **pattern, is_causal=is_causal, layer=1, backend="eager")
    torch.compiler.reset()
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager")
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    grads = [torch.autograd.grad(f(*x).sin().sum(), x) for f, x in zip((compiled, Attention()), leaves, strict=True)]
    for name, a, b in zip("qkv", *grads, strict=True):
        assert_close(f"d{name}", a, b)
    assert_close("compiled", compiled(*inputs), expected)
    assert_close("exported", torch.export.export(Attention(), tuple(inputs)).module()(*inputs), expected)


def test_a_compiled_model():
    torch.compiler.reset()
    model, ids = make_lm(), torch.randint(0, 29, (2, 37))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert_close("logits", compiled(ids, use_cache=False).logits, model(ids).logits, EXACT)


def test_attention_maps_sum_to_one():
    model, ids = make_lm(), torch.randint(0, 29, (2, 50))
    model.set_attn_implementation("eager")
    cache = LongNetCache(model.config)
    with torch.no_grad():
        model(ids[:, :23], **{CACHE: cache})
        maps = model(ids[:, 23:], output_attentions=True, **{CACHE: cache}).attentions
    for x in maps:
        assert_close("sum", x.sum(-1), torch.ones_like(x[..., 0]))


# Encoders.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_slides_of_any_pattern(implementation):
    """Maps of some queries are those of the dense reference in every layer; tiles left out change nothing."""
    torch.manual_seed(0)
    config = LongNetSlideConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
        segment_lengths=[4, 8, 16], dilation_rates=[1, 2, 4], tile_features=5, grid_size=11, window_size=3,
        query_rates=[1, 1, 4], rotate_offsets=True, stagger_segments=True, head_offsets="interleaved",
        attn_implementation=implementation,
    )  # fmt: skip
    encoder = LongNetSlideEncoder(config).double().eval()
    tiles, places, queries = torch.randn(1, 21, 5), torch.randint(0, 11 * 256, (1, 21, 2)), [0, 5, 8]
    mask = torch.ones(1, 21)
    mask[0, 9:12] = 0
    kept = mask[0] != 0
    with torch.no_grad():
        out = encoder(tiles, places, mask, attention_queries=queries)
        alone = encoder(tiles[:, kept], places[:, kept], attention_queries=queries)
        encoder.set_attn_implementation("eager")
        dense = encoder(tiles, places, mask, output_attentions=True)
    assert_close("pooler_output", out.pooler_output, alone.pooler_output)
    assert_close("pooler_output", out.pooler_output, dense.pooler_output, EXACT)
    assert_close("maps", out.attention_maps, torch.stack(dense.attentions)[..., queries, :], EXACT)
    assert len(set(plan_branches(config))) == 3


# Decoders of Transformers.


def make_llama():
    """One whose attention matters: weights far above their usual size."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(20)
    return model


SWITCH = {name: EVERYTHING[name] for name in Pattern._fields if name in EVERYTHING}
CACHES = {"none": None, "own": lambda model: DynamicCache(config=model.config), "bounded": DilatedCache}


def read(model, ids, mask, cut, make_cache):
    """The logits of (B, L) ids, read in pieces of these lengths."""
    positions, cache, parts, end = (mask.cumsum(1) - 1).clamp(min=0), None, [], 0
    if make_cache is not None:
        cache = make_cache(model)
    with torch.no_grad():
        for n in cut:
            new = slice(end, end := end + n)
            inputs = {
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, new],
                "use_cache": cache is not None,
            }
            parts.append(model(ids[:, new], **inputs, **({CACHE: cache} if cache is not None else {})).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("fields", [
    pytest.param({"segment_lengths": [], "dilation_rates": [], "window_size": 24}, id="window alone"),
    pytest.param(SWITCH | {"segment_lengths": [24, 48], "dilation_rates": [1, 4], "query_rates": [1, 1],
                           "window_size": 24}, id="everything"),
])  # fmt: skip
def test_a_text_within_the_window_is_the_models_own_attention(fields, cache):
    model, ids, mask = make_llama(), torch.randint(3, 37, (2, 30)), torch.ones(2, 30, dtype=torch.int64)
    mask[0, :6] = 0
    mask[1, :13] = 0
    cut = [30] if cache == "none" else [15, 1, 1, 9, 4]
    own = read(model, ids, mask, [30], None)
    use_dilated_attention(model, **fields)
    found = read(model, ids, mask, cut, CACHES[cache])
    assert_close("logits", found[mask == 1], own[mask == 1])
    longer = torch.ones_like(mask)
    dilated = read(model, ids, longer, [30], None)
    model.set_attn_implementation("sdpa")
    assert (read(model, ids, longer, [30], None) - dilated)[:, 24:].abs().max() > 1e-3


@pytest.mark.parametrize("cache", ["own", "bounded"])
@pytest.mark.parametrize("cut", [[1] * 71, [40, 1, 1, 29], [3, 20, 1, 47], [64, 7]], ids=str)
def test_a_switched_decoder_reads_in_any_cut(cut, cache):
    model, ids, mask = use_dilated_attention(make_llama(), **SWITCH), torch.randint(3, 37, (3, 71)), torch.ones(3, 71)
    mask[1, :13] = 0
    mask[2, :60] = 0
    found = read(model, ids, mask, cut, CACHES[cache])
    use_dilated_attention(model, backend="eager")
    assert_close("logits", found[mask == 1], read(model, ids, mask, [71], None)[mask == 1], EXACT)


def test_a_switched_decoder_generates_and_loads_again(tmp_path):
    model, ids = use_dilated_attention(make_llama(), **SWITCH), torch.randint(3, 37, (2, 30))
    options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    plain = model.generate(ids, use_cache=False, **options).tolist()
    assert model.generate(ids, **options).tolist() == plain
    assert model.generate(ids, **{CACHE: DilatedCache(model)}, **options).tolist() == plain
    model.save_pretrained(tmp_path)
    named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dilated", dtype=torch.float64)
    assert named.generate(ids, **options).tolist() == plain
    cache = DilatedCache(model)
    use_dilated_attention(model, window_size=5)
    with refused("another config"):
        model(ids, **{CACHE: cache})


def test_a_switched_decoder_takes_the_papers_pattern_again():
    """None removes a window and query rates; what is not given stays."""
    model = use_dilated_attention(make_llama(), **parse_pattern("w8 64/4:1 once"))
    use_dilated_attention(model, **parse_pattern("8/1 32/4"))
    again = use_dilated_attention(make_llama(), [8, 32], [1, 4])
    assert model.config.dilated_attention == again.config.dilated_attention
    with pytest.raises(TypeError, match=r"no argument .windowsize.; it takes .*window_size"):
        use_dilated_attention(model, windowsize=8)


def test_a_switch_of_an_earlier_version_is_the_papers():
    """Its config stores no fields beyond the paper."""
    model, ids = use_dilated_attention(make_llama(), [8, 32], [1, 4]), torch.randint(3, 37, (2, 30))
    with torch.no_grad():
        expected = model(ids).logits
        stored = model.config.dilated_attention
        model.config.dilated_attention = {x: stored[x] for x in stored if x not in FIELDS.values()}
        assert_close("logits", model(ids).logits, expected, 0)


# Saved configs.


def test_a_saved_config_keeps_the_fields(tmp_path):
    model, ids = make_lm(), torch.randint(0, 29, (1, 50))
    model.save_pretrained(tmp_path)
    again = LongNetForCausalLM.from_pretrained(tmp_path)
    assert {name: getattr(again.config, name) for name in EVERYTHING} == EVERYTHING
    with torch.no_grad():
        assert_close("logits", again(ids).logits, model(ids).logits, 0)
        save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / "x.safetensors")
    code = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
x = load_file(sys.argv[1] + "/x.safetensors")
print(json.dumps([type(model).__module__.split(".")[0], torch.equal(model(x["ids"]).logits, x["logits"])]))
"""
    assert run_python(code, tmp_path, home=tmp_path) == ["transformers_modules", True]


def test_a_config_without_the_fields_is_the_papers(tmp_path):
    LongNetConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({name: x for name, x in saved.items() if name not in FIELDS.values()}))
    assert Pattern.of(LongNetConfig.from_pretrained(tmp_path)) == Pattern.of(LongNetConfig())
    assert Pattern.of(LongNetConfig())[3:] == (None, None, False, False, False, 1)


# Refusals.


def test_the_op_asks_for_the_layer_of_a_period():
    """The default layer would have no branches."""
    q, fields = torch.randn(1, 2, 20, 4), parse_pattern("w4 16/4:1 once every2")
    with refused("branch_layer_period=2", "give the layer"):
        dilated_attention(q, q, q, **fields)
    near, far = (dilated_attention(q, q, q, **fields, layer=layer) for layer in (0, 1))
    assert torch.equal(near, dilated_attention(q, q, q, [], [], window_size=4))
    assert torch.equal(far, dilated_attention(q, q, q, **parse_pattern("w4 16/4:1 once")))


@pytest.mark.parametrize(("fields", "words"), [
    pytest.param({"window_size": 0}, ["window_size=0", "at least 1"], id="no window"),
    pytest.param({"window_size": 9}, ["window_size=9", "at most the shortest segment (8)"], id="long window"),
    pytest.param({"window_size": True}, ["window_size"], id="bool window"),
    pytest.param({"window_size": 2.0}, ["window_size"], id="float window"),
    pytest.param({"segment_lengths": [], "dilation_rates": []}, ["at least one"], id="nothing"),
    pytest.param({"segment_lengths": [], "dilation_rates": [1], "window_size": 4}, ["one dilation rate for each"],
                 id="window and half a branch"),
    pytest.param({"query_rates": [1]}, ["query_rates=", "[1, 4]"], id="few query rates"),
    pytest.param({"query_rates": [1, 3]}, ["query_rates=", "1, 3", "divisor"], id="no divisor"),
    pytest.param({"query_rates": [1, 0]}, ["query_rates=", "1, 0"], id="rate of 0"),
    pytest.param({"query_rates": [1, 8]}, ["query_rates=", "1, 8"], id="above the rate"),
    pytest.param({"query_rates": [1, 4], "head_offsets": "blocked"}, ["head_offsets out"], id="blocked rates"),
    pytest.param({"rotate_offsets": True, "head_offsets": "blocked"}, ["head_offsets out"], id="blocked rotation"),
    pytest.param({"keys_once": True, "segment_lengths": [8, 20]}, ["nested", "[8, 20]"], id="once, not nested"),
    pytest.param({"keys_once": True, "is_causal": False}, ["keys_once", "is_causal=True"], id="once, encoder"),
])  # fmt: skip
def test_patterns_that_do_not_fit_are_refused(fields, words):
    base = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}
    with refused(*words):
        LongNetConfig(**(base | {"position_embedding": "rope"} | fields))
    with refused(*words):
        dilated_attention(*torch.randn(3, 1, 4, 9, 4), **(base | fields))


@pytest.mark.parametrize("fields", [
    {"rotate_offsets": "no"}, {"stagger_segments": 1}, {"keys_once": None}, {"layer": 1.5}, {"layer": -1},
], ids=str)  # fmt: skip
def test_the_op_takes_switches_and_a_layer(fields):
    """The config's fields are typed; those of the op are not."""
    [(name, value)] = fields.items()
    with refused(f"{name}={value!r} must be"):
        dilated_attention(*torch.randn(3, 1, 4, 9, 4), [8], [2], **fields)


@pytest.mark.parametrize("fields", [{"window_size": 4}, {"stagger_segments": True}], ids=lambda x: next(iter(x)))
def test_xpos_is_refused_where_positions_never_repeat(fields):
    with refused('position_embedding="xpos"', "window_size or stagger_segments", '"rope"'):
        LongNetConfig(segment_lengths=[8, 32], dilation_rates=[1, 4], **fields)
    rope = LongNetConfig(segment_lengths=[8, 32], dilation_rates=[1, 4], position_embedding="rope", **fields)
    assert rope.position_period == LONGEST_SEGMENT


@pytest.mark.parametrize("fields", [
    {"window_size": 4}, {"query_rates": [1, 1]}, {"rotate_offsets": True}, {"stagger_segments": True},
], ids=lambda x: next(iter(x)))  # fmt: skip
def test_the_released_implementation_has_the_papers_pattern_alone(fields):
    """Neither its zero padding nor its checkpoints."""
    given = {"segment_lengths": [8, 32], "dilation_rates": [1, 4], "position_embedding": "rope", "is_causal": False}
    with refused("attend_zero_padding=True", *fields):
        LongNetConfig(**given, **fields, attend_zero_padding=True)
    with refused(*fields, "TorchScale's LongNet", "only the paper's pattern"):
        to_torchscale(make_model(LongNetModel, **(given | fields | {"position_embedding": "none"})))
    slide = LongNetSlideConfig(
        hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=6, segment_lengths=[8, 32],
        dilation_rates=[1, 4], head_offsets="interleaved", tile_features=5, **fields,
    )  # fmt: skip
    with refused(*fields, "Prov-GigaPath"):
        to_torchscale(LongNetSlideEncoder(slide))


def test_keys_once_is_refused_by_torchscale_and_llamas_names_carry_it():
    """A file with Llama's names holds no settings: conversion takes them all."""
    once = make_lm(num_key_value_heads=6)
    with refused("keys_once=True"):
        to_torchscale(once)
    options = EVERYTHING | {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_act": "gelu"}
    options |= {"head_offsets": "interleaved", "rope_theta": 10000.0}
    again = convert(export_checkpoint(once, "llama_fused"), **options)
    ids = torch.randint(0, 29, (1, 50))
    with torch.no_grad():
        assert_close("logits", again(ids).logits, once(ids).logits)
