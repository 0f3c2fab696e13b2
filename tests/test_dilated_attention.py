"""The op against the dense reference, the released implementation's numbers, PyTorch's own attention, and itself cut.

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension.
"""

import importlib.util
import inspect
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from checks import ROUNDING, assert_close, assert_low_precision, attend, make_halo, refused
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

from modeling_longnet import backend_flash, backend_strided, backend_torch, dilated_attention, parse_pattern
from modeling_longnet.attention_autograd import (
    AttentionPlan,
    backward_chunks,
    backward_halo,
    forward_chunks,
    forward_halo,
)
from modeling_longnet.backends import BACKENDS
from modeling_longnet.branches import Chunk, whole_batch
from modeling_longnet.pattern import make_branches
from modeling_longnet.reference import count_branches, count_zero_padding, dense_attention

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("attention_*.safetensors"))
NESTED = ((4, 8, 16), (1, 2, 4))
UNCOVERED = ((8, 12), (3, 4))
NAMES = ("out", "dq", "dk", "dv")


class Case(NamedTuple):
    """Sizes and branches of one call."""

    batch: int
    length: int
    heads: int
    groups: int
    dim: int
    lengths: tuple[int, ...]
    rates: tuple[int, ...]
    is_causal: bool
    head_offsets: str

    @property
    def branches(self):
        return make_branches(self.lengths, self.rates, self.groups, self.head_offsets)


@st.composite
def branch_lists(draw, largest=40):
    """Nested with equal rates, as the paper's, or anything goes."""
    if draw(st.booleans()):
        base, count = draw(st.integers(1, 8)), draw(st.integers(1, 4))
        return tuple(base << i for i in range(count)), tuple(min(1 << i, base << i) for i in range(count))
    lengths = tuple(sorted(draw(st.lists(st.integers(1, largest), min_size=1, max_size=4, unique=True))))
    return lengths, tuple(draw(st.integers(1, w)) for w in lengths)


@st.composite
def cases(draw, longest=41, is_causal=None):
    groups, repeat = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    batch, dim, length = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, longest))
    sizes = {batch, dim, length, groups * repeat} | ({groups} if repeat > 1 else set())
    assume(len(sizes) == (5 if repeat > 1 else 4))  # pairwise different: swapped axes fail
    causal = draw(st.booleans()) if is_causal is None else is_causal
    return Case(
        batch, length, groups * repeat, groups, dim, *draw(branch_lists()), causal,
        draw(st.sampled_from(["interleaved", "blocked"])),
    )  # fmt: skip


def make_inputs(case: Case, dtype=torch.float64, layout="transposed"):
    """q (B, H, L, D), k, v (B, G, L, D) and the gradient of out, in one of the memory layouts users have."""
    torch.manual_seed(sum(case[:5]))
    sizes = [case.heads, case.groups, case.groups, case.heads]

    def random(*shape):  # cast before it is viewed: a cast makes most views contiguous
        return torch.randn(*shape).to(dtype)

    if layout == "contiguous":
        made = [random(case.batch, n, case.length, case.dim) for n in sizes]
    elif layout == "transposed":
        made = [random(case.batch, case.length, n, case.dim).transpose(1, 2) for n in sizes]
    elif layout == "fused":  # slices of one projection, as a fused q, k, v layer gives them
        made = list(random(case.batch, case.length, sum(sizes), case.dim).transpose(1, 2).split(sizes, 1))
    elif layout == "columns":  # the head dimension is not contiguous
        made = [random(case.batch, n, case.dim, case.length).transpose(2, 3) for n in sizes]
    elif layout == "expanded":  # one text, shown for the whole batch
        made = [random(1, n, case.length, case.dim).expand(case.batch, -1, -1, -1) for n in sizes]
    elif layout == "windows":  # rows that overlap, with two strides of 1
        made = [random(case.batch, n, case.length + case.dim - 1).unfold(-1, case.dim, 1) for n in sizes]
    return made


LAYOUTS = ("transposed", "contiguous", "fused", "columns", "expanded", "windows")


def run(case: Case, query, key, value, grad_out, backend="torch", **kwargs):
    """out, dq, dk, dv by name."""
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    out = dilated_attention(
        *inputs, case.lengths, case.rates, is_causal=case.is_causal, head_offsets=case.head_offsets, backend=backend,
        **kwargs,
    )  # fmt: skip
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, inputs, grad_out)), strict=True))


def assert_all_close(actual: dict, expected: dict, tolerance: float = ROUNDING) -> None:
    for name in expected:
        assert_close(name, actual[name], expected[name], tolerance)


@given(cases(), st.sampled_from(LAYOUTS), st.sampled_from([None, 0.3, 1.7]))
def test_equals_the_dense_reference(case, layout, scale):
    inputs = make_inputs(case, layout=layout)
    assert_all_close(run(case, *inputs, scale=scale), run(case, *inputs, backend="eager", scale=scale))


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", [
    pytest.param(Case(2, 1, 3, 3, 5, *NESTED, True, "interleaved"), id="one token"),
    pytest.param(Case(2, 37, 6, 3, 5, *NESTED, True, "blocked"), id="shared heads, ragged"),
    pytest.param(Case(3, 40, 2, 2, 5, (16,), (7,), True, "interleaved"), id="more offsets than heads"),
    pytest.param(Case(3, 29, 2, 2, 5, (100, 1000), (1, 3), True, "interleaved"), id="segments longer than the text"),
    pytest.param(Case(3, 37, 4, 4, 5, *UNCOVERED, True, "interleaved"), id="uncovered queries"),
    pytest.param(Case(2, 48, 6, 6, 5, (9, 10, 11), (1, 3, 4), True, "interleaved"), id="r does not divide w"),
    pytest.param(Case(2, 31, 3, 3, 5, (6, 10), (1, 2), True, "interleaved"), id="segments that do not nest"),
    pytest.param(Case(2, 31, 3, 3, 5, (31, 40), (1, 1), True, "interleaved"), id="the same keys twice"),
    pytest.param(Case(2, 700, 3, 3, 64, (256, 512), (1, 2), True, "interleaved"), id="several kernel blocks"),
    pytest.param(Case(2, 900, 4, 2, 8, (383, 500, 1000), (1, 1, 2), True, "interleaved"), id="calls cut in two"),
    pytest.param(Case(1, 1030, 2, 2, 8, (512, 1026), (1, 2), True, "interleaved"), id="the longest that is cut"),
    pytest.param(Case(3, 90, 32, 8, 48, (2, 30), (1, 5), True, "interleaved"), id="many short segments"),
])  # fmt: skip
def test_edges_equal_the_dense_reference(case, is_causal):
    case = case._replace(is_causal=is_causal)
    inputs = make_inputs(case)
    assert_all_close(run(case, *inputs), run(case, *inputs, backend="eager"))


def test_calls_cut_into_slabs_change_nothing(monkeypatch):
    case = Case(3, 45, 6, 3, 5, *NESTED, True, "interleaved")
    inputs = make_inputs(case)
    whole = run(case, *inputs)
    monkeypatch.setattr(backend_strided, "_CPU_BYTES_PER_CALL", 1)
    assert_all_close(run(case, *inputs), whole)


def test_a_mask_made_in_inference_mode_serves_training():
    """The mask of calls that are cut in two is kept."""
    case = Case(1, 450, 3, 3, 8, (450,), (1,), True, "interleaved")
    inputs = make_inputs(case)
    backend_torch._causal_mask.cache_clear()
    with torch.inference_mode():
        out = dilated_attention(*inputs[:3], case.lengths, case.rates)
    results = run(case, *inputs)
    assert backend_torch._causal_mask.cache_info().misses == 1
    assert torch.equal(out, results["out"])
    assert_all_close(results, run(case, *inputs, backend="eager"))


def test_uncovered_queries_are_zero_and_give_no_gradient():
    case = Case(1, 40, 4, 4, 5, *UNCOVERED, True, "interleaved")
    inputs = make_inputs(case)
    positions = torch.arange(case.length)[None]
    covered = count_branches(case.branches, positions, positions).any(-1)  # (1, H, L)
    assert (~covered).any()
    for backend in ("torch", "eager"):
        results = run(case, *inputs, backend=backend)
        for name in ("out", "dq"):
            assert (results[name][~covered] == 0).all(), name


def test_lse_and_weights_of_the_reference_are_one_softmax():
    """exp(score - lse), times how often a key counts, are the weights; they sum to one."""
    case = Case(2, 21, 3, 3, 5, *NESTED, True, "interleaved")
    query, key, value, _ = make_inputs(case)
    positions = torch.arange(case.length)[None]
    counts = count_branches(case.branches, positions, positions)
    out, weights, lse = dense_attention(query, key, value, counts, 0.4)
    assert_close("weights", weights, counts * (query @ key.transpose(-1, -2) * 0.4 - lse[..., None]).exp())
    assert_close("sum", weights.sum(-1), torch.ones_like(lse))
    assert_close("out", out, weights @ value)


def read_fixture(path):
    with safe_open(path, "pt") as file:
        metadata = {name: json.loads(text) for name, text in file.metadata().items() if text[:1] in "[{tf0123456789"}
        return {name: file.get_tensor(name) for name in file.keys()}, metadata


def without_other_bugs(path) -> bool:
    """Is this file bidirectional, and at most bug 1, the zero keys, in its `out`?"""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return metadata["causal"] == "false" and set(json.loads(metadata["bugs"])) <= {1}


def fixture_case(tensors, metadata) -> Case:
    batch, length, heads, dim = tensors["q"].shape
    return Case(
        batch, length, heads, heads, dim, tuple(metadata["segment_lengths"]), tuple(metadata["dilation_rates"]),
        metadata["causal"], "blocked",
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem.removeprefix("attention_"))
def test_released_numbers(path, backend):
    """The exact rule on TorchScale's inputs, and TorchScale's own output where none of its bugs acts."""
    tensors, metadata = read_fixture(path)
    case = fixture_case(tensors, metadata)
    assert [list(b.offsets) for b in sorted(case.branches, key=lambda b: (b.w, b.r))] == [
        offsets for _, offsets in sorted(
            zip(zip(case.lengths, case.rates, strict=True), metadata["offsets_per_branch"], strict=True)
        )
    ]  # fmt: skip
    inputs = [tensors[name].transpose(1, 2) for name in ("q", "k", "v", "grad_out")]
    results = {name: x.transpose(1, 2) for name, x in run(case, *inputs, backend=backend).items()}
    for name in NAMES:
        assert_close(name, results[name], tensors[f"exact_{name}"])
    if not metadata["bugs"]:
        assert_close("released out", results["out"], tensors["out"])


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem.removeprefix("attention_"))
def test_lse(path):
    tensors, metadata = read_fixture(path)
    case = fixture_case(tensors, metadata)
    plan = AttentionPlan((Chunk(0, case.batch, 0, case.length, 0, case.length),), case.branches, case.is_causal,
                case.dim**-0.5, "torch", False)  # fmt: skip
    _, lse = forward_chunks(tensors["q"], tensors["k"], tensors["v"], plan)
    expected = tensors["exact_lse"].transpose(1, 2)
    assert torch.equal(lse == -torch.inf, expected == -torch.inf)
    assert_close("lse", lse.masked_fill(lse == -torch.inf, 0), expected.masked_fill(expected == -torch.inf, 0))


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize(
    "path", [p for p in FIXTURES if without_other_bugs(p)], ids=lambda path: path.stem.removeprefix("attention_")
)
def test_zero_padding_is_the_released_output(path, backend):
    """With `zero_padding`, bidirectional outputs are TorchScale's wherever bug 1 alone acts, or none."""
    tensors, metadata = read_fixture(path)
    case = fixture_case(tensors, metadata)
    query, key, value = (tensors[name] for name in "qkv")
    if backend == "torch":
        out = attend(query, key, value, case.branches, is_causal=False, zero_padding=True)
    else:
        out = dense_with_padding(case, query, key, value)
    assert_close("out", out, tensors["out"])


def dense_with_padding(case: Case, query, key, value):
    positions = torch.arange(case.length)[None]
    counts = count_branches(case.branches, positions, positions, is_causal=False)
    padding = count_zero_padding(case.branches, case.length)[None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return dense_attention(query, key, value, counts, case.dim**-0.5, padding)[0].transpose(1, 2)


@given(cases(is_causal=False))
def test_zero_padding_equals_the_dense_reference(case):
    query, key, value, grad_out = (x.transpose(1, 2) for x in make_inputs(case))
    results = []
    for dense in (False, True):
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out = dense_with_padding(case, *inputs) if dense else attend(
            *inputs, case.branches, is_causal=False, zero_padding=True
        )  # fmt: skip
        results.append(dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, inputs, grad_out)), strict=True)))
    assert_all_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [
    pytest.param(Case(2, 300, 6, 6, 16, (32, 64, 128), (1, 2, 4), True, "interleaved"), id="nested"),
    pytest.param(Case(1, 257, 8, 2, 24, (48, 200), (1, 7), False, "blocked"), id="shared heads"),
    pytest.param(Case(2, 600, 4, 4, 64, (512,), (1,), True, "interleaved"), id="one branch"),
    pytest.param(Case(1, 200, 4, 4, 8, (16, 60), (3, 4), True, "interleaved"), id="uncovered"),
    pytest.param(Case(1, 300, 4, 4, 16, (16, 32, 64, 128, 256), (1, 2, 4, 6, 12), True, "interleaved"), id="paper"),
])  # fmt: skip
@pytest.mark.parametrize("float32_size", [24_576, 0], ids=["as it is", "gradients never in float32"])
def test_low_precision(case, dtype, float32_size, monkeypatch):
    """Error against float64 at most twice the dense reference's own in that dtype, plus one rounding step."""
    monkeypatch.setitem(BACKENDS, "torch", backend_torch.TorchBackend(float32_size=float32_size))
    inputs = make_inputs(case, dtype)
    exact = run(case, *(x.double() for x in inputs), backend="eager")
    dense = run(case, *inputs, backend="eager")
    fast = run(case, *inputs)
    for name, expected in exact.items():
        assert fast[name].dtype == dtype
        assert_low_precision(name, fast[name], dense[name], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_with_many_branches(dtype):
    """64 equal branches: the merged result is one branch's own, without 64 roundings."""
    case = Case(1, 40, 3, 3, 8, tuple(range(40, 104)), (1,) * 64, True, "interleaved")
    single = case._replace(lengths=(40,), rates=(1,))
    inputs = make_inputs(case, dtype)
    exact = run(single, *(x.double() for x in inputs), backend="eager")
    one_branch = run(single, *inputs)
    for name, value in run(case, *inputs).items():
        assert_low_precision(name, value, one_branch[name], exact[name])


@pytest.mark.parametrize(("shape", "dtype", "expected"), [
    ((1, 2, 96, 128), torch.bfloat16, torch.float32),
    ((1, 2, 192, 128), torch.bfloat16, torch.bfloat16),
    ((1, 2, 300, 64), torch.bfloat16, torch.float32),
    ((1, 2, 513, 64), torch.bfloat16, torch.bfloat16),
    ((1, 2, 300, 32), torch.bfloat16, torch.float32),
    ((1, 2, 800, 32), torch.bfloat16, torch.float32),
    ((1, 2, 192, 128), torch.float16, torch.float32),
    ((1, 2, 16, 16), torch.float64, torch.float64),
])  # fmt: skip
def test_small_gradients_are_computed_in_float32(shape, dtype, expected, monkeypatch):
    """Where the kernel's float32 is faster on a CPU; the products here are one call each."""
    seen, kernel = [], backend_torch.cpu_flash_backward

    def record(*tensors, **options):
        seen.append({x.dtype for x in tensors[:5]})
        return kernel(*tensors, **options)

    monkeypatch.setattr(backend_torch, "cpu_flash_backward", record)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    out = dilated_attention(*inputs, [shape[2]], [1], backend="torch")
    out.backward(torch.randn_like(out))
    assert seen == [{expected}]
    assert {x.grad.dtype for x in inputs} == {dtype}


@pytest.mark.parametrize("queries", [767, 768])
def test_gradients_of_many_queries_stay_in_half_precision(queries):
    query, key = (torch.empty(1, 1, length, 64, dtype=torch.bfloat16) for length in (queries, 64))
    assert backend_torch.TorchBackend()._takes_float32(query, key) == (queries < 768)


@pytest.mark.parametrize(("rates", "expected"), [((1, 2, 4, 8), torch.bfloat16), ((1, 1, 2), torch.float32)])
def test_half_precision_takes_no_larger_copy_where_few_roundings_are_due(rates, expected):
    """If a token is in at most one branch after the first, on average, its dtype holds the sums; else float32 does."""
    case = Case(1, 64, 2, 2, 8, (8, 16, 32, 64)[: len(rates)], rates, True, "interleaved")
    plan = AttentionPlan((Chunk(0, 1, 0, 64, 0, 64),), case.branches, True, 1.0, "torch", False)
    query, key, value, grad_out = (x.transpose(1, 2) for x in make_inputs(case, torch.bfloat16))
    out, lse = forward_chunks(query, key, value, plan)
    grads = backward_chunks(grad_out, query, key, value, out.to(query.dtype), lse, plan)
    assert lse.dtype == torch.float32
    assert {out.dtype, *(grad.dtype for grad in grads)} == {expected}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padding_changes_no_digit(dtype):
    """A text behind 9 columns of padding gives what it gives alone, to the last bit."""
    case = Case(1, 300, 4, 4, 16, (16, 32, 64, 128, 256), (1, 2, 4, 6, 12), True, "interleaved")
    inputs = [x.transpose(1, 2).contiguous() for x in make_inputs(case, dtype)]
    results = []
    for pad in (0, 9):
        query, key, value, grad_out = (torch.nn.functional.pad(x, (0, 0, 0, 0, pad, 0)) for x in inputs)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        out = attend(*leaves, case.branches, [[0, 1, pad, pad + case.length, 0, case.length]])
        results.append([x[:, pad:] for x in (out.detach(), *torch.autograd.grad(out, leaves, grad_out))])
    for name, alone, padded in zip(NAMES, *results, strict=True):
        assert torch.equal(alone, padded), name


@given(cases(is_causal=True))
def test_one_undilated_branch_is_plain_attention(case):
    case = case._replace(lengths=(case.length,), rates=(1,))
    query, key, value, grad_out = make_inputs(case)
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    shared = [x.repeat_interleave(case.heads // case.groups, 1) for x in inputs[1:]]
    out = scaled_dot_product_attention(inputs[0], *shared, is_causal=True)
    expected = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, inputs, grad_out)), strict=True))
    assert_all_close(run(case, query, key, value, grad_out), expected)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_branches_does_not_matter(case, random):
    query, key, value, grad_out = (x.transpose(1, 2) for x in make_inputs(case))
    results = []
    for shuffled in (False, True):
        branches = list(case.branches)
        if shuffled:
            random.shuffle(branches)
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out = attend(*inputs, tuple(branches), is_causal=case.is_causal)
        results.append(dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, inputs, grad_out)), strict=True)))
    assert_all_close(*results)


@given(cases(is_causal=True), st.data(), st.sampled_from(["torch", "eager"]))
def test_no_look_ahead(case, data, backend):
    """Other tokens from t on change no earlier output and get no gradient from one."""
    t = data.draw(st.integers(0, case.length - 1))
    query, key, value, grad_out = make_inputs(case)
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, t:] = torch.randn_like(x[:, :, t:]) * 3
    first, second = (run(case, *x, grad_out, backend=backend)["out"][:, :, :t] for x in ([query, key, value], changed))
    assert_close("out before t", first, second)
    grad_out[:, :, t:] = 0
    results = run(case, query, key, value, grad_out, backend=backend)
    for name in ("dq", "dk", "dv"):
        assert (results[name][:, :, t:] == 0).all(), name


def halo_keys(x, case, starts, ends, after=False):
    """Each branch's (B, G, P, D) rows before (after) each text's chunk, by the rule; what is no row stays NaN."""
    result = []
    for w, r, offsets, *_ in case.branches:
        found = {}
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            inside = range(end, min(-(-end // w) * w, case.length)) if after else range(start // w * w, start)
            for head, o in enumerate(offsets):
                found[row, head] = [p for p in inside if (p % w) % r == o]
        slots = torch.full((case.batch, case.groups, max(map(len, found.values())) + 1, case.dim), torch.nan).to(x)
        slots = slots + 0 * x.sum()  # differentiable in x even where no row lies outside
        for (row, head), positions in found.items():
            if positions:
                slots = slots.index_put(
                    (torch.tensor(row), torch.tensor(head), torch.arange(len(positions))), x[row, positions, head]
                )
        result.append(slots)
    return tuple(result)


@given(cases(is_causal=True, longest=60), st.data())
def test_any_cut_into_chunks_equals_the_whole(case, data):
    """Each text of the batch is cut elsewhere; gradients flow into the rows before a chunk too."""
    query, key, value, grad_out = (x.transpose(1, 2) for x in make_inputs(case))
    counts = data.draw(st.integers(1, 4))
    cuts = [
        [0, *sorted(data.draw(st.lists(st.integers(0, case.length), min_size=counts, max_size=counts))), case.length]
        for _ in range(case.batch)
    ]
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    out = torch.zeros_like(query)
    for i in range(counts + 1):
        starts, ends = [c[i] for c in cuts], [c[i + 1] for c in cuts]
        longest = max(e - s for s, e in zip(starts, ends, strict=True))
        if longest == 0:
            continue
        columns = [min(max(0, case.length - longest), s) for s in starts]
        parts = [torch.stack([x[b, c : c + longest] for b, c in enumerate(columns)]) for x in inputs]
        table = [
            [b, b + 1, s - c, e - c, s, data.draw(st.sampled_from([e, case.length]))]
            for b, (s, e, c) in enumerate(zip(starts, ends, columns, strict=True)) if s < e
        ]  # fmt: skip
        prefix = make_halo(*(halo_keys(x, case, starts, ends) for x in inputs[1:]))
        part = attend(*parts, case.branches, table, prefix)
        for b, (s, e, c) in enumerate(zip(starts, ends, columns, strict=True)):
            out = out.index_put((torch.tensor(b), torch.arange(s, e)), part[b, s - c : e - c])
    grads = torch.autograd.grad(out, inputs, grad_out)
    actual = {name: x.transpose(1, 2) for name, x in zip(NAMES, (out.detach(), *grads), strict=True)}
    assert_all_close(actual, run(case, *(x.transpose(1, 2) for x in (query, key, value, grad_out)), backend="eager"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_of_chunks_with_their_prefixes(dtype):
    """A text read 37 tokens at a time, with the paper's rates."""
    case = Case(1, 300, 4, 4, 16, (16, 32, 64, 128, 256), (1, 2, 4, 6, 12), True, "interleaved")
    inputs = make_inputs(case, dtype)
    exact = run(case, *(x.double() for x in inputs), backend="eager")
    dense = run(case, *inputs, backend="eager")
    query, key, value, grad_out = (x.transpose(1, 2) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    parts = []
    for start in range(0, case.length, 37):
        end = min(start + 37, case.length)
        prefix = make_halo(*(halo_keys(x, case, [start], [end]) for x in leaves[1:]))
        chunks = [[0, 1, 0, end - start, start, end]]
        parts.append(attend(*(x[:, start:end] for x in leaves), case.branches, chunks, prefix))
    out = torch.cat(parts, 1)
    for name, value in zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad_out)), strict=True):
        assert_low_precision(name, value.transpose(1, 2), dense[name], exact[name])


@given(cases(is_causal=False, longest=60), st.data(), st.booleans())
def test_a_bidirectional_chunk_between_its_neighbours(case, data, zero_padding):
    """What a shard of a sequence computes: its own rows, those before it and those after it."""
    start = data.draw(st.integers(0, case.length - 1))
    end = data.draw(st.integers(start + 1, case.length))
    query, key, value, grad_out = (x.transpose(1, 2).contiguous() for x in make_inputs(case))
    grad_out[:, :start] = grad_out[:, end:] = 0
    whole = [x.detach().requires_grad_() for x in (query, key, value)]
    if zero_padding:
        expected_out = dense_with_padding(case, *whole)
    else:
        expected_out = dilated_attention(
            *(x.transpose(1, 2) for x in whole), case.lengths, case.rates, is_causal=False,
            head_offsets=case.head_offsets, backend="eager",
        ).transpose(1, 2)  # fmt: skip
    expected = dict(zip(NAMES, (expected_out, *torch.autograd.grad(expected_out, whole, grad_out)), strict=True))

    plan = AttentionPlan((Chunk(0, case.batch, 0, end - start, start, case.length),), case.branches, False,
                case.dim**-0.5, "torch", zero_padding)  # fmt: skip
    q, k, v, g = (x[:, start:end] for x in (query, key, value, grad_out))
    leaves = [x.detach().requires_grad_() for x in (key, value)]
    starts, ends = [start] * case.batch, [end] * case.batch
    out, lse = forward_chunks(q, k, v, plan)
    sides = {
        side: make_halo(*(halo_keys(x, case, starts, ends, side == "suffix") for x in leaves))
        for side in ("prefix", "suffix")
    }
    for side, halo in sides.items():
        forward_halo(q, out, lse, halo, plan, side)
    assert_close("out", out, expected["out"].detach()[:, start:end])

    saved = BACKENDS["torch"].prepare_backward(out, g)
    dq, dk, dv = backward_chunks(g, q, k, v, saved, lse, plan)
    grads = [
        torch.zeros_like(x).index_add(1, torch.arange(start, end), d) for x, d in zip(leaves, (dk, dv), strict=True)
    ]
    for side, halo in sides.items():
        found = backward_halo(g, q, saved, lse, halo, dq, plan, side)
        for total, part in zip(grads, torch.autograd.grad(halo[:2], leaves, found), strict=True):
            total += part
    assert_close("dq", dq, expected["dq"][:, start:end])
    assert_close("dk", grads[0], expected["dk"])
    assert_close("dv", grads[1], expected["dv"])


def test_tokens_in_no_chunk_get_zero_and_no_gradient():
    case = Case(2, 23, 3, 3, 5, *NESTED, True, "interleaved")
    inputs = [x.transpose(1, 2).detach().requires_grad_() for x in make_inputs(case)[:3]]
    out = attend(*inputs, case.branches, [[0, 1, 4, 20, 0, 16], [1, 2, 0, 7, 0, 7]])
    outside = torch.ones(2, 23, dtype=torch.bool)
    outside[0, 4:20] = outside[1, :7] = False
    assert (out[outside] == 0).all()
    for grad in torch.autograd.grad(out.square().sum(), inputs):
        assert (grad[outside] == 0).all()
        assert (grad[~outside] != 0).any()


def test_a_chunk_without_its_prefix_is_refused():
    case = Case(1, 11, 3, 3, 5, *NESTED, True, "interleaved")
    inputs = [x.transpose(1, 2) for x in make_inputs(case)[:3]]
    chunks = [[0, 1, 0, 11, 3, 14]]
    with refused("prefix"):
        attend(*inputs, case.branches, chunks)
    few = make_halo(*([torch.zeros(1, 3, 2, 5, dtype=torch.float64)] * 3 for _ in range(2)))
    with refused("(4, 1)", "2 slots", "need 3"):
        attend(*inputs, case.branches, chunks, few)


@pytest.mark.parametrize(("backend", "dynamic"), [("auto", False), ("auto", True), ("eager", False)])
def test_compiles_into_one_graph(backend, dynamic):
    torch._dynamo.reset()
    cases = [Case(2, length, 6, 3, 5, *NESTED, True, "interleaved") for length in (11, 19)]

    def attend_and_grad(query, key, value):
        return dilated_attention(query, key, value, *NESTED, backend=backend)

    compiled = torch.compile(attend_and_grad, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for case in cases:
        query, key, value, grad_out = make_inputs(case)
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out = compiled(*inputs)
        actual = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, inputs, grad_out)), strict=True))
        assert_all_close(actual, run(case, query, key, value, grad_out, backend="eager"))
        with torch.no_grad():
            assert_close("out without gradients", compiled(query, key, value), actual["out"])


def test_a_compiled_graph_asks_nothing():
    """Forward and backward query no state of PyTorch: such queries run while the graph is made."""
    torch._dynamo.reset()
    names = set()

    def collect(module, inputs):
        parts = [part for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
        names.update(str(node.target) for part in parts for node in part.graph.nodes if node.op == "call_function")
        return module

    case = Case(2, 11, 6, 3, 5, *NESTED, True, "interleaved")
    inputs = [x.detach().requires_grad_() for x in make_inputs(case)[:3]]
    torch.compile(lambda *qkv: dilated_attention(*qkv, *NESTED), fullgraph=True, backend=collect)(*inputs)
    assert len({name for name in names if "dilated_attention" in name}) == 2
    assert not {name for name in names if "functorch" in name or "is_grad_enabled" in name}


def test_autocast_takes_its_dtype():
    case = Case(2, 37, 6, 3, 8, *NESTED, True, "interleaved")
    query, key, value, grad_out = make_inputs(case, torch.float32)
    inputs = [x.detach().requires_grad_() for x in (query, key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(*inputs, *NESTED)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, inputs, grad_out.bfloat16())
    expected = run(case, *(x.bfloat16() for x in (query, key, value, grad_out)))
    assert torch.equal(out, expected["out"])
    for grad, name in zip(grads, NAMES[1:], strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected[name].float())


def test_autocast_takes_mixed_dtypes():
    """As PyTorch's own attention: queries and keys in float32 after their positions, values in bfloat16."""
    query, key, value = (torch.randn(1, 3, 20, 8) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = dilated_attention(query, key, value.bfloat16(), *NESTED)
        assert torch.equal(mixed, dilated_attention(query, key, value, *NESTED))


def test_the_reference_takes_scores_in_float32():
    """Scores beyond float16's 65,504 before they are scaled."""
    query = torch.full((1, 1, 4, 64), 100.0, dtype=torch.float16)
    value = torch.arange(256, dtype=torch.float16).view(1, 1, 4, 64)
    out = dilated_attention(query, query, value, *NESTED, backend="eager")
    fast = dilated_attention(query, query, value, *NESTED, backend="torch")
    torch.testing.assert_close(out, fast)


def test_autocast_leaves_float64():
    case = Case(2, 21, 3, 3, 5, *NESTED, True, "interleaved")
    inputs = make_inputs(case)[:3]
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(*inputs, *NESTED)
    assert torch.equal(out, dilated_attention(*inputs, *NESTED))


def attend_one(backend, is_causal=True):
    def function(query, key, value):
        """(H, L, D) alone."""
        inputs = (x[None] for x in (query, key, value))
        return dilated_attention(*inputs, *UNCOVERED, is_causal=is_causal, backend=backend)[0]

    return function


@pytest.mark.parametrize("shared", [(), (1, 2), (0,)], ids=["all mapped", "keys shared", "query shared"])
def test_vmap_and_grad(shared):
    """vmap of the gradient, as for per-example gradients, some inputs common to all."""
    case = Case(5, 29, 6, 3, 4, *UNCOVERED, True, "interleaved")
    inputs = make_inputs(case)[:3]
    dims = tuple(None if i in shared else 0 for i in range(3))
    inputs = [x[0] if i in shared else x for i, x in enumerate(inputs)]
    results = []
    for backend in ("torch", "eager"):
        function = attend_one(backend)
        grads = torch.func.grad(lambda *x, f=function: f(*x).square().sum(), argnums=(0, 1, 2))
        out = torch.func.vmap(function, in_dims=dims)(*inputs)
        results.append(dict(zip(NAMES, (out, *torch.func.vmap(grads, in_dims=dims)(*inputs)), strict=True)))
    assert_all_close(*results)


def test_vmap_twice_and_over_another_dimension():
    query, key, value = torch.randn(2, 6, 3, 29, 4), torch.randn(2, 6, 3, 29, 4), torch.randn(2, 6, 3, 29, 4)

    def both(function):
        return torch.func.vmap(torch.func.vmap(function, in_dims=0), in_dims=1, out_dims=1)

    query, key, value = query.double(), key.double(), value.double()
    assert_close("out", both(attend_one("torch"))(query, key, value), both(attend_one("eager"))(query, key, value))


def test_jacobian():
    query, key, value = (torch.randn(2, 13, 3, dtype=torch.float64) for _ in range(3))
    fast, dense = (torch.func.jacrev(attend_one(b), argnums=(0, 1, 2))(query, key, value) for b in ("torch", "eager"))
    for name, actual, expected in zip(NAMES[1:], fast, dense, strict=True):
        assert_close(name, actual, expected)


def test_a_second_derivative_is_refused_by_name():
    query, key, value = (torch.randn(1, 2, 11, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(
        dilated_attention(query, key, value, *NESTED).square().sum(), query, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_forward_mode_of_the_gradient_is_refused():
    """PyTorch's own kernels refuse it too; a derivative of zero would be wrong."""
    case = Case(1, 21, 3, 3, 5, *NESTED, True, "interleaved")
    query, key, value, grad_out = make_inputs(case)
    query.requires_grad_()
    out = dilated_attention(query, key, value, *NESTED)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        torch.autograd.grad(out, query, forward_ad.make_dual(grad_out, torch.ones_like(grad_out)))


def test_the_dense_reference_can_be_differentiated_twice():
    inputs = [torch.randn(1, 2, 6, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def function(*x):
        return dilated_attention(*x, (2, 4), (1, 2), backend="eager")

    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)


def test_gradcheck_of_the_fast_path():
    inputs = [torch.randn(1, heads, 7, 2, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    assert torch.autograd.gradcheck(lambda *x: dilated_attention(*x, (3, 5), (2, 3)), inputs)


def test_only_wanted_gradients():
    """Frozen inputs, and an output gradient of ones that is one number expanded."""
    case = Case(2, 21, 3, 3, 5, *NESTED, True, "interleaved")
    query, key, value, _ = make_inputs(case)
    key.requires_grad_()
    dilated_attention(query, key, value, *NESTED).sum().backward()
    expected = run(case, query, key, value, torch.ones_like(query), backend="eager")
    assert_close("dk", key.grad, expected["dk"])


def test_a_second_copy_of_the_file_beside_the_first():
    """Remote code loads the files again in a process that has the installed package."""
    first = sys.modules["modeling_longnet.attention_autograd"]
    spec = importlib.util.spec_from_file_location("modeling_longnet.second_copy", first.__file__)
    second = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    case = Case(2, 21, 3, 3, 5, *NESTED, True, "interleaved")
    query, key, value, _ = make_inputs(case)
    assert second._namespace != first._namespace
    plan = first.AttentionPlan(whole_batch(2, 21), case.branches, True, 1.0, "torch")
    tensors = [x.transpose(1, 2) for x in (query, key, value)]
    assert torch.equal(second.attend_chunks(*tensors, plan), first.attend_chunks(*tensors, plan))


def flash_forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                  alibi_slopes, return_softmax):  # fmt: skip
    """`_flash_attn_forward` of flash-attn 2.8: (B, L, H, D) in, out and lse (B, H, L) float, and two more."""
    _check_flash(q, k, v)
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    out, lse = _flash_dense(q, k, v, softmax_scale, causal)
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def flash_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                   window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):  # fmt: skip
    """`_flash_attn_backward`: writes dq, dk, dv, from the out and lse it is given (kernels read lse as contiguous)."""
    _check_flash(dout, q, k, v, out, dq, dk, dv)
    assert softmax_lse.is_contiguous()
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    repeat = q.shape[2] // k.shape[2]
    q, k, v, out, dout = (x.transpose(1, 2) for x in (q, k, v, out, dout))
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * softmax_scale
    weights = (scores - softmax_lse[..., None]).exp()
    if causal:
        weights = weights.tril(k.shape[2] - q.shape[2])
    d_scores = weights * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True)) * softmax_scale
    dq.copy_((d_scores @ k).transpose(1, 2))
    for target, x in ((dk, d_scores.transpose(-1, -2) @ q), (dv, weights.transpose(-1, -2) @ dout)):
        target.copy_(x.unflatten(1, (-1, repeat)).sum(2).transpose(1, 2))
    return torch.empty(0)


def _check_flash(*tensors):
    """The kernels take any strides but need the head dimension contiguous."""
    for x in tensors:
        assert x.dim() == 4
        assert x.stride(-1) == 1


def _flash_dense(q, k, v, scale, causal):
    repeat = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), scores.logsumexp(-1)


@pytest.fixture
def fake_flash(monkeypatch):
    """The backend as if flash-attn were installed, its kernels replaced, the check for a GPU lifted."""
    monkeypatch.setattr(backend_flash, "flash_attn_forward", flash_forward)
    monkeypatch.setattr(backend_flash, "flash_attn_backward", flash_backward)
    monkeypatch.setattr(backend_flash, "flash_attn_missing", None)
    monkeypatch.setattr(BACKENDS["flash_attn"], "unavailable", lambda query: None)


@pytest.mark.usefixtures("fake_flash")
@pytest.mark.parametrize("case", [
    pytest.param(Case(2, 37, 6, 3, 8, *NESTED, True, "interleaved"), id="causal, shared heads"),
    pytest.param(Case(3, 29, 5, 5, 8, *UNCOVERED, False, "blocked"), id="bidirectional, uncovered"),
])  # fmt: skip
def test_flash_attn_backend(case):
    inputs = make_inputs(case)
    assert_all_close(run(case, *inputs, backend="flash_attn"), run(case, *inputs, backend="eager"))


@pytest.mark.usefixtures("fake_flash")
def test_flash_attn_backend_with_a_prefix():
    case = Case(2, 37, 6, 3, 8, *NESTED, True, "interleaved")
    query, key, value, grad_out = (x.transpose(1, 2) for x in make_inputs(case))
    cut = 13
    starts, ends = [cut] * case.batch, [case.length] * case.batch
    results = []
    for backend in ("flash_attn", "torch"):
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        prefix = make_halo(*(halo_keys(x, case, starts, ends) for x in inputs[1:]))
        chunks = [[0, case.batch, 0, case.length - cut, cut, case.length]]
        out = attend(*(x[:, cut:] for x in inputs), case.branches, chunks, prefix, backend=backend)
        grads = torch.autograd.grad(out, inputs, grad_out[:, cut:])
        results.append(dict(zip(NAMES, (out.detach(), *grads), strict=True)))
    assert_all_close(*results)


@pytest.mark.usefixtures("fake_flash")
@pytest.mark.parametrize(
    "words", ["w5 24/4:1 once", "6/1 24/4 rotate stagger", "w7 14/2 28/4:2 rotate stagger once every2"]
)
def test_flash_attn_backend_beyond_the_paper(words):
    for length in (1, 4, 13, 24, 50, 61):
        torch.manual_seed(length)
        inputs = [torch.randn(2, heads, length, 8, dtype=torch.float64) for heads in (6, 3, 3)]
        grad_out = torch.randn_like(inputs[0])
        for layer in range(4):
            results = []
            for backend in ("flash_attn", "eager"):
                leaves = [x.clone().requires_grad_() for x in inputs]
                out = dilated_attention(*leaves, **parse_pattern(words), layer=layer, backend=backend)
                grads = torch.autograd.grad(out, leaves, grad_out)
                results.append(dict(zip(NAMES, (out.detach(), *grads), strict=True)))
            assert_all_close(*results)


@pytest.mark.usefixtures("fake_flash")
@pytest.mark.parametrize(("sample", "word"), [
    pytest.param(torch.empty(1, 8, dtype=torch.bfloat16), "CUDA", id="device"),
    pytest.param(torch.empty(1, 8, device="meta"), "CUDA", id="meta"),
])  # fmt: skip
def test_flash_attn_says_why_it_cannot_run(sample, word):
    assert word in backend_flash.FlashAttentionBackend().unavailable(sample)


@pytest.mark.usefixtures("fake_flash")
@pytest.mark.parametrize(("dtype", "dim", "word"), [
    pytest.param(torch.float32, 64, "float16 and bfloat16", id="dtype"),
    pytest.param(torch.bfloat16, 20, "divisible by 8", id="head dimension"),
    pytest.param(torch.bfloat16, 264, "256", id="large head dimension"),
])  # fmt: skip
def test_flash_attn_limits_on_a_gpu(dtype, dim, word):
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, dim))
    assert word in backend_flash.FlashAttentionBackend().unavailable(on_gpu)


def test_flash_attn_interface_is_called_as_documented():
    """The stand-in above has the parameters of flash-attn where it is installed, whose functions are operators."""
    pytest.importorskip("flash_attn.flash_attn_interface")
    for name, stand_in in (("_flash_attn_forward", flash_forward), ("_flash_attn_backward", flash_backward)):
        names = [argument.name for argument in getattr(torch.ops.flash_attn, name).default._schema.arguments]
        expected = list(inspect.signature(stand_in).parameters)
        assert names[: len(expected)] == expected


def shapes(query, key, value=None, dtype=torch.float32):
    return [torch.zeros(x, dtype=dtype) for x in (query, key, value or key)]


@pytest.mark.parametrize(("inputs", "words"), [
    pytest.param(shapes((1, 4, 7, 8), (1, 3, 7, 8)), ["3 key/value heads", "4 query heads"], id="heads"),
    pytest.param(shapes((1, 4, 7, 8), (1, 4, 6, 8)), ["(1, 4, 6, 8)", "length"], id="length"),
    pytest.param(shapes((2, 4, 7, 8), (1, 4, 7, 8)), ["(2, 4, 7, 8)", "batch"], id="batch"),
    pytest.param(shapes((1, 4, 7, 8), (1, 4, 7, 6)), ["head dimension"], id="head dimension"),
    pytest.param(shapes((1, 4, 7, 8), (1, 4, 7, 8), (1, 2, 7, 8)), ["(1, 2, 7, 8)", "alike"], id="value"),
    pytest.param(shapes((4, 7, 8), (4, 7, 8)), ["(4, 7, 8)", "(B, H, L, D)"], id="no batch"),
    pytest.param(shapes((1, 4, 0, 8), (1, 4, 0, 8)), ["(1, 4, 0, 8)", "at least 1"], id="no tokens"),
    pytest.param(shapes((0, 4, 7, 8), (0, 4, 7, 8)), ["at least 1"], id="no rows"),
    pytest.param(shapes((1, 4, 7, 8), (1, 4, 7, 8), dtype=torch.int64), ["torch.int64"], id="integers"),
    pytest.param([torch.zeros(1, 4, 7, 8), *shapes((1, 4, 7, 8), (1, 4, 7, 8), dtype=torch.bfloat16)[:2]],
                 ["torch.float32", "torch.bfloat16"], id="dtypes"),
    pytest.param([torch.zeros(1, 4, 7, 8), *(torch.zeros(1, 4, 7, 8, device="meta") for _ in range(2))],
                 ["meta", "cpu"], id="devices"),
    pytest.param([torch.zeros(1, 4, 7, 8).to_sparse() for _ in range(3)], ["sparse_coo", "dense"], id="layouts"),
])  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(inputs, words):
    with refused(*words):
        dilated_attention(*inputs, *NESTED)


@pytest.mark.parametrize(("kwargs", "words"), [
    pytest.param({"backend": "cudnn"}, ["backend='cudnn'", "'torch'", "'auto'"], id="unknown backend"),
    pytest.param({"backend": "flash_attn"}, ["backend='flash_attn'", "'torch'"], id="backend that cannot run"),
    pytest.param({"head_offsets": "random"}, ["head_offsets='random'", "'blocked'"], id="unknown offsets"),
    pytest.param({"segment_lengths": [4, 2]}, ["[4, 2]"], id="falling"),
    pytest.param({"segment_lengths": [4], "dilation_rates": [5]}, ["5"], id="r above w"),
    pytest.param({"segment_lengths": [4]}, ["[4]", "[1, 2]"], id="lists of different length"),
    pytest.param({"segment_lengths": [4.0, 8]}, ["4.0", "whole"], id="a float"),
    pytest.param({"segment_lengths": 4, "dilation_rates": 1}, ["segment_lengths=4", "two lists"], id="no lists"),
    pytest.param({"scale": 0.0}, ["scale=0.0", "above 0"], id="scale 0"),
    pytest.param({"scale": -1.0}, ["scale=-1.0", "above 0"], id="negative scale"),
    pytest.param({"scale": 1e-300}, ["scale=1e-300", "above 0 in float32"], id="scale 0 in float32"),
    pytest.param({"scale": math.inf}, ["scale=inf", "float32"], id="infinite scale"),
    pytest.param({"segment_lengths": [4, 1 << 63]}, ["9223372036854775808", "2^62"], id="w beyond int64"),
])  # fmt: skip
def test_bad_arguments_are_refused(kwargs, words):
    inputs = shapes((1, 4, 7, 8), (1, 4, 7, 8))
    dilated_attention(*inputs, [4, 8], [1, 2])
    with refused(*words):
        dilated_attention(*inputs, **({"segment_lengths": [4, 8], "dilation_rates": [1, 2]} | kwargs))


def test_auto_takes_the_dense_reference_where_no_kernel_runs():
    out = dilated_attention(*(x.to("meta") for x in shapes((1, 4, 7, 8), (1, 2, 7, 8))), *NESTED)
    assert out.shape == (1, 4, 7, 8)


@pytest.mark.parametrize("size", [1e-30, 1e4], ids=["tiny", "huge"])
def test_scores_of_any_size(size):
    """A softmax between almost equal and almost one-hot keys. An lse of 1e4 rounds gradients away."""
    case = Case(2, 45, 3, 3, 8, *NESTED, True, "interleaved")
    inputs = make_inputs(case, torch.float32)
    inputs[0] = inputs[0] * size
    exact = run(case, *(x.double() for x in inputs), backend="eager")
    dense, fast = run(case, *inputs, backend="eager"), run(case, *inputs)
    for name in ("out",) if size > 1 else NAMES:
        assert_low_precision(name, fast[name], dense[name], exact[name])
    for name, x in fast.items():
        assert torch.isfinite(x).all(), name


def test_offsets_beyond_the_heads_leave_a_head_uncovered_where_the_rule_says():
    """r > H: offsets H .. r - 1 have no head; each of the heads keeps exactly its own rows."""
    out = dilated_attention(*(torch.ones(1, 2, 12, 4, dtype=torch.float64) for _ in range(3)), (6,), (3,))
    rows = torch.tensor([[(p % 6) % 3 == head for p in range(12)] for head in range(2)])
    assert torch.equal(out[0, :, :, 0] != 0, rows)
    assert math.isclose(out.sum().item(), rows.sum().item() * 4)
