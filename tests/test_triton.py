"""The Triton kernels against the dense reference: on a GPU if there is one, else on the CPU by Triton's interpreter.

Letters: B batch, L tokens, H query heads, G key/value heads, P slots of a prefix or halo, D head dimension.
"""

import json
import os
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checks import assert_close, make_model, refused
from test_dilated_attention import (
    NAMES,
    NESTED,
    UNCOVERED,
    Case,
    assert_all_close,
    assert_low_precision,
    dense_with_padding,
    halo_keys,
    make_inputs,
    run,
)

from modeling_longnet import LongNetForCausalLM, backend_triton, compat, dilated_attention
from modeling_longnet.attention_autograd import (
    AttentionPlan,
    HaloKV,
    attend_chunks,
    backward_chunks,
    backward_halo,
    forward_chunks,
    forward_halo,
)
from modeling_longnet.backend import BranchCall
from modeling_longnet.backends import BACKENDS, choose_backend
from modeling_longnet.branches import Branch, Chunk, prefix_lengths
from modeling_longnet.pattern import Pattern
from modeling_longnet.reference import count_branches, dense_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 3e-6  # float32 against float64, a few hundred additions
TRITON = BACKENDS["triton"]
UNAVAILABLE = TRITON.unavailable(torch.zeros(1, 1, 1, 8, device=DEVICE))
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"the Triton kernels cannot run: {UNAVAILABLE}")


def make(case: Case, dtype=torch.float32, layout="transposed"):
    return [x.to(DEVICE) for x in make_inputs(case, dtype, layout)]


def exact(case: Case, inputs):
    return run(case, *(x.double() for x in inputs), backend="eager")


def make_plan(case: Case, *chunks: Chunk, backend="triton", zero_padding=False):
    return AttentionPlan(chunks, case.branches, case.is_causal, case.dim**-0.5, backend, zero_padding)


def make_halo(keys, values):
    """Join each branch's (B, G, P, D) keys and values, as `halo_keys` returns them."""
    return HaloKV(torch.cat(keys, 2), torch.cat(values, 2), tuple(x.shape[2] for x in keys))


class Beyond(NamedTuple):
    """Sizes and pattern of one call, as `Case` for the paper's pattern."""

    length: int
    heads: int
    groups: int
    dim: int
    pattern: Pattern
    layer: int = 1
    is_causal: bool = True

    @property
    def branches(self):
        self.pattern.check(self.is_causal)
        return self.pattern.branches(self.groups, self.heads, self.layer)


EVERYTHING = Pattern((16, 48), (2, 6), "interleaved", 5, (2, 3), True, True, True)
SUMMARIES = Pattern((24,), (4,), "interleaved", 4, (1,), keys_once=True)
STAGGERED = Pattern((12, 30), (1, 3), rotate_offsets=True, stagger_segments=True)
ONCE = Pattern((17, 51), (1, 2), stagger_segments=True, keys_once=True)
SYMMETRIC = Pattern((20,), (4,), "interleaved", 7, (2,), True, True)


def beyond_inputs(case: Beyond, dtype=torch.float64, batch=1):
    """q (B, L, H, D), k, v (B, L, G, D) and the gradient of out."""
    torch.manual_seed(case.length)
    sizes = case.heads, case.groups, case.groups, case.heads
    return [torch.randn(batch, case.length, n, case.dim).to(DEVICE, dtype) for n in sizes]


def dense(case: Beyond, inputs, cuts=()):
    """out, dq, dk and dv of the dense reference in the dtype of the inputs; the sequence is cut into documents."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    ends = [*cuts, case.length]
    sizes = [end - begin for begin, end in zip([0, *cuts], ends, strict=True)]
    positions = torch.cat([torch.arange(size) for size in sizes])[None].to(DEVICE)
    documents = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None].to(DEVICE)
    counts = count_branches(case.branches, positions, positions, documents, documents, case.is_causal)
    out, _, _ = dense_attention(*(x.transpose(1, 2) for x in leaves), counts, case.dim**-0.5)
    grads = torch.autograd.grad(out, leaves, inputs[3].transpose(1, 2))
    return dict(zip(NAMES, (out.detach().transpose(1, 2), *grads), strict=True))


def halo_slots(case: Beyond, x, start, end, side="prefix"):
    """Each branch's (B, G, P, D) tokens before (after) a chunk in its first (last) segment; other slots stay NaN."""
    border, outside = (start, range(start)) if side == "prefix" else (end - 1, range(end, case.length))
    result = []
    for branch in case.branches:
        w, r, offsets, *_ = branch
        segments = {p: (p + branch.phase) // w for p in range(case.length)}
        near = [p for p in outside if (abs(p - border) < w if branch.is_window else segments[p] == segments[border])]
        kept = [[p for p in near if branch.is_window or (p + branch.phase) % w % r == o] for o in offsets]
        slots = x.new_full((len(x), len(offsets), max(map(len, kept)) + 1, case.dim), torch.nan) + 0 * x.sum()
        for head, tokens in enumerate(kept):
            if tokens:
                index = torch.arange(len(x))[:, None], torch.tensor(head), torch.arange(len(tokens))
                slots = slots.index_put(index, x[:, tokens, head])
        result.append(slots)
    return tuple(result)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", [
    pytest.param(Case(2, 1, 3, 3, 5, *NESTED, True, "interleaved"), id="one token"),
    pytest.param(Case(1, 37, 6, 3, 20, (4, 16), (1, 4), True, "blocked"), id="shared heads, ragged"),
    pytest.param(Case(3, 40, 2, 2, 5, (16,), (7,), True, "interleaved"), id="more offsets than heads"),
    pytest.param(Case(1, 29, 2, 2, 17, (100, 1000), (1, 3), True, "interleaved"), id="longer segments than sequence"),
    pytest.param(Case(1, 37, 4, 4, 5, *UNCOVERED, True, "interleaved"), id="uncovered queries"),
    pytest.param(Case(1, 31, 4, 4, 5, (9, 10, 11), (1, 3, 4), True, "interleaved"), id="r does not divide w"),
    pytest.param(Case(2, 300, 2, 1, 64, (150, 280), (1, 2), True, "interleaved"), id="several blocks"),
    pytest.param(Case(1, 70, 2, 2, 130, (64,), (1,), True, "interleaved"), id="large heads"),
])  # fmt: skip
def test_equals_the_dense_reference(case, is_causal):
    case = case._replace(is_causal=is_causal)
    inputs = make(case)
    assert_all_close(run(case, *inputs, backend="triton"), exact(case, inputs), TOLERANCE)


@pytest.mark.parametrize("layout", ["contiguous", "fused", "columns", "expanded", "mixed"])
def test_any_layout(layout):
    case = Case(2, 35, 4, 2, 6, (8, 32), (1, 2), True, "interleaved")
    inputs = make(case, layout="contiguous" if layout == "mixed" else layout)
    if layout == "mixed":
        inputs[2] = make(case, layout="expanded")[2]
    expected = run(case, *(x.double() for x in inputs), backend="eager", scale=0.7)
    assert_all_close(run(case, *inputs, backend="triton", scale=0.7), expected, TOLERANCE)


@pytest.mark.parametrize("dtype", [
    torch.float32, torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16")),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("case", [
    pytest.param(Case(1, 300, 4, 4, 16, (32, 128), (1, 2), True, "interleaved"), id="nested"),
    pytest.param(Case(1, 257, 8, 2, 24, (48, 200), (1, 7), False, "blocked"), id="shared heads"),
    pytest.param(Case(1, 200, 2, 2, 8, (16, 60, 64), (1, 1, 4), True, "interleaved"), id="sums in float32"),
    pytest.param(Case(1, 150, 2, 2, 128, (150,), (1,), True, "interleaved"), id="128 wide"),
    pytest.param(Case(1, 140, 2, 1, 200, (70, 140), (1, 2), True, "interleaved"), id="200 wide"),
])  # fmt: skip
def test_low_precision(case, dtype):
    """Error against float64 at most twice the dense reference's own in that dtype, plus one rounding step."""
    inputs = make(case, dtype)
    dense = run(case, *inputs, backend="eager")
    fast = run(case, *inputs, backend="triton")
    for name, expected in exact(case, inputs).items():
        assert fast[name].dtype == dtype
        assert_low_precision(name, fast[name], dense[name], expected)


@pytest.mark.parametrize("groups", [2, 4])
def test_chunks_with_a_prefix(groups):
    """A sequence read 37 tokens at a time; gradients flow into the prefix of a chunk too."""
    case = Case(1, 100, 4, groups, 16, (16, 64), (1, 6), True, "interleaved")
    inputs = make(case)
    query, key, value, grad_out = (x.transpose(1, 2) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    parts = []
    for start in range(0, case.length, 37):
        end = min(start + 37, case.length)
        prefix = make_halo(*(halo_keys(x, case, [start], [end]) for x in leaves[1:]))
        plan = make_plan(case, Chunk(0, 1, 0, end - start, start, end))
        parts.append(attend_chunks(*(x[:, start:end] for x in leaves), plan, prefix))
    out = torch.cat(parts, 1)
    actual = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad_out)), strict=True))
    assert_all_close({name: x.transpose(1, 2) for name, x in actual.items()}, exact(case, inputs), TOLERANCE)


@pytest.mark.parametrize(("case", "zero_padding"), [
    (Case(2, 45, 4, 2, 7, (10, 40), (1, 3), False, "interleaved"), False),
    (Case(2, 45, 4, 2, 7, (10, 40), (1, 3), False, "interleaved"), True),
    (Beyond(45, 4, 2, 7, SYMMETRIC, 3, False), False),
], ids=["", "zero padding", "beyond the paper"])  # fmt: skip
def test_a_bidirectional_chunk_between_its_neighbours(case, zero_padding):
    """What a shard of a sequence computes: its own keys, those before it and those after it."""
    batch, start, end = 2, 13, 31
    made = beyond_inputs(case, torch.float64, batch)
    made[3][:, :start] = made[3][:, end:] = 0
    if zero_padding:
        whole = [x.cpu().requires_grad_() for x in made[:3]]
        expected = dense_with_padding(case, *whole)
        grads = torch.autograd.grad(expected, whole, made[3].cpu())
        expected = dict(zip(NAMES, (expected.detach(), *grads), strict=True))
    else:
        expected = {name: x.cpu() for name, x in dense(case, made).items()}

    chunk = Chunk(0, batch, 0, end - start, start, case.length)
    plan = make_plan(case, chunk, zero_padding=zero_padding)
    query, key, value, grad_out = (x.float() for x in made)
    q, k, v, g = (x[:, start:end].contiguous() for x in (query, key, value, grad_out))
    leaves = [x.detach().requires_grad_() for x in (key, value)]
    out, lse = forward_chunks(q, k, v, plan)
    halos = {side: make_halo(*(halo_slots(case, x, start, end, side) for x in leaves)) for side in ("prefix", "suffix")}
    detached = {side: HaloKV(halo.key.detach(), halo.value.detach(), halo.slots) for side, halo in halos.items()}
    for side, halo in detached.items():
        forward_halo(q, out, lse, halo, plan, side)
    assert_close("out", out.cpu(), expected["out"][:, start:end], TOLERANCE)

    saved = TRITON.prepare_backward(out, g)
    dq, dk, dv = backward_chunks(g, q, k, v, saved, lse, plan)
    columns = torch.arange(start, end, device=DEVICE)
    totals = [torch.zeros_like(x).index_add(1, columns, d) for x, d in zip(leaves, (dk, dv), strict=True)]
    for side, halo in halos.items():
        found = backward_halo(g, q, saved, lse, detached[side], dq, plan, side)
        parts = torch.autograd.grad((halo.key, halo.value), leaves, found)
        for total, part in zip(totals, parts, strict=True):
            total += part
    assert_close("dq", dq.cpu(), expected["dq"][:, start:end], TOLERANCE)
    assert_close("dk", totals[0].cpu(), expected["dk"], TOLERANCE)
    assert_close("dv", totals[1].cpu(), expected["dv"], TOLERANCE)


def both_backends(made):
    """Yield the tensors for Triton in float32, then for PyTorch's kernels on the CPU in float64."""
    for backend, device, dtype in (("triton", DEVICE, torch.float32), ("torch", "cpu", torch.float64)):
        yield backend, [x.to(device, dtype) for x in made]


def test_sequences_in_parts_of_a_batch():
    """Two sequences of different length and place; tokens in none get 0 and no gradient."""
    case = Case(2, 23, 3, 3, 5, *NESTED, True, "interleaved")
    results = []
    made = [x.transpose(1, 2) for x in make_inputs(case, torch.float32)]
    for backend, (query, key, value, grad_out) in both_backends(made):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        plan = make_plan(case, Chunk(0, 1, 4, 20, 0, 16), Chunk(1, 2, 0, 7, 0, 7), backend=backend)
        out = attend_chunks(*leaves, plan)
        grads = torch.autograd.grad(out, leaves, grad_out)
        results.append(dict(zip(NAMES, (x.detach().cpu() for x in (out, *grads)), strict=True)))
    assert_all_close(*results, TOLERANCE)


@pytest.fixture
def _new_launches():
    """The arguments of launches are cached: clear them around a test that changes what they are made from."""
    backend_triton._launch.cache_clear()
    yield
    backend_triton._launch.cache_clear()


@pytest.mark.usefixtures("_new_launches")
@pytest.mark.parametrize("blocks", [(16, 32), (32, 16)])
def test_any_size_of_blocks(blocks, monkeypatch):
    """Blocks of keys larger and smaller than those of queries."""
    case = Case(1, 75, 2, 2, 16, (70,), (1,), True, "interleaved")
    monkeypatch.setattr(backend_triton, "block_sizes", lambda kernel, dtype, dim: (*blocks, 4, 2))
    inputs = make(case)
    assert_all_close(run(case, *inputs, backend="triton"), exact(case, inputs), TOLERANCE)


@pytest.mark.parametrize(("sample", "words"), [
    (torch.zeros(1, 1, 1, 8, dtype=torch.float64, device=DEVICE), ["float64", "'eager'"]),
    (torch.zeros(1, 1, 1, 257, device=DEVICE), ["up to 256", "257"]),
    (torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), ["'torch'"]),
    (torch.zeros(1, 1, 1, 8, device="meta"), ["'meta'", "'torch'"]),
])  # fmt: skip
def test_the_error_gives_the_reason(sample, words):
    with refused("backend='triton' cannot run", *words):
        choose_backend("triton", sample)


@pytest.mark.usefixtures("_new_launches")
def test_wide_strides_take_64_bits(monkeypatch):
    monkeypatch.setattr(backend_triton, "_INT32_ELEMENTS", 0)
    case = Case(1, 100, 4, 2, 16, (16, 64), (1, 6), True, "interleaved")
    inputs = make(case)
    assert_all_close(run(case, *inputs, backend="triton"), exact(case, inputs), TOLERANCE)
    monkeypatch.undo()
    layout = backend_triton._Layout.of(*[torch.empty(1, 1, 64, 64, device="meta")] * 3)
    assert layout.is_wide(1 << 20, 2048)
    assert not layout.is_wide(1 << 10, 1024)


@pytest.mark.parametrize(("case", "strides"), [
    pytest.param(Case(1, 40, 3, 3, 8, (16, 40), (1, 2), True, "interleaved"), (1, 1 << 30, 8, 1), id="heads"),
    pytest.param(Case(1, 40, 3, 3, 8, (40,), (4,), True, "interleaved"), (1, 8, 1 << 26, 1), id="tokens"),
])  # fmt: skip
def test_memory_far_apart(case, strides):
    """More elements than 32 bits count between two heads, or the tokens of a block; most memory is never touched."""
    shape = 1, 3, 40, 8
    storage = torch.UntypedStorage(2 * (sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1))
    x = torch.empty(0, dtype=torch.float16).set_(storage, 0, shape, strides)
    x.copy_(torch.randn(shape))
    if DEVICE != "cpu":
        x = torch.empty(0, dtype=x.dtype, device=DEVICE).set_(storage.to(DEVICE), 0, shape, strides)
    near = x.contiguous()
    grad_out = torch.randn_like(near)
    expected = run(case, near, near, near, grad_out, backend="triton")
    assert_all_close(run(case, x, x, x, grad_out, backend="triton"), expected, 0)


@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_of_the_gradient(batch):
    """One output, many directions: what is the same for all is expanded, not repeated."""
    case = Case(batch, 21, 3, 3, 5, *NESTED, True, "interleaved")
    results = []
    for backend in ("triton", "torch"):
        query, key, value, _ = make_inputs(case, torch.float32)
        made = [x.to(DEVICE if backend == "triton" else "cpu") for x in (query, key, value)]

        def attend_by(*inputs, backend=backend):
            return dilated_attention(*inputs, *NESTED, backend=backend)

        out, pull = torch.func.vjp(attend_by, *made)
        directions = torch.stack([query, key, value]).to(out.device)
        results.append(dict(zip(NAMES[1:], (x.cpu() for x in torch.vmap(pull)(directions)), strict=True)))
    assert_all_close(*results, TOLERANCE)


def test_a_prefix_in_any_layout():
    """Prefix keys whose head dimension is not contiguous, and prefix values in another layout."""
    case, start = Case(2, 60, 4, 2, 6, (16, 64), (1, 3), True, "interleaved"), 25
    made = [x.transpose(1, 2) for x in make_inputs(case, torch.float32)]
    chunk = Chunk(0, 2, 0, case.length - start, start, case.length)
    results = []
    for backend in ("triton", "torch"):
        query, key, value, grad_out = (x.to(DEVICE if backend == "triton" else "cpu") for x in made)
        prefix = make_halo(*(halo_keys(x, case, [start] * 2, [case.length] * 2) for x in (key, value)))
        prefix_key = prefix.key.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
        prefix_value = prefix.value.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        inputs = [x[:, start:].detach().requires_grad_() for x in (query, key, value)]
        out = attend_chunks(
            *inputs, make_plan(case, chunk, backend=backend), HaloKV(prefix_key, prefix_value, prefix.slots)
        )
        grads = torch.autograd.grad(out, [*inputs, prefix_key, prefix_value], grad_out[:, start:])
        results.append({str(i): x.detach().cpu().nan_to_num() for i, x in enumerate((out, *grads))})
    assert_all_close(*results, TOLERANCE)


def test_zero_padding_beside_very_low_scores():
    """The zero keys outweigh all others, or there are none and the others' weights are tiny."""
    case = Case(1, 12, 1, 1, 16, (8,), (1,), False, "interleaved")
    query, key = torch.full((1, 12, 1, 16), 10.0), torch.full((1, 12, 1, 16), -10.0)
    value = torch.randn(1, 12, 1, 16)
    plan = make_plan(case, Chunk(0, 1, 0, 12, 0, 12), zero_padding=True)
    assert plan.scale == 0.25
    expected = attend_chunks(query, key, value, plan._replace(backend="torch"))
    actual = attend_chunks(*(x.to(DEVICE) for x in (query, key, value)), plan)
    assert_close("out", actual.cpu(), expected, TOLERANCE)


def test_a_branch_that_keeps_no_token_between_others():
    """No head keeps one of the 9 tokens in the branch that comes second; on a GPU its kernel returns at once."""
    case = Case(1, 9, 2, 2, 16, (20, 40, 60), (1, 2, 20), True, "interleaved")
    made = [x.transpose(1, 2) for x in make_inputs(case, torch.float32)]
    chunk, slots = Chunk(0, 1, 0, 9, 5, 14), prefix_lengths(case.branches, 5)
    results = []
    for backend in ("triton", "torch"):
        query, key, value, grad_out = (x.to(DEVICE if backend == "triton" else "cpu") for x in made)
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        prefix = HaloKV(*(x[:, :1].transpose(1, 2).expand(-1, -1, sum(slots), -1) for x in (key, value)), slots)
        out = attend_chunks(*leaves, make_plan(case, chunk, backend=backend), prefix)
        grads = torch.autograd.grad(out, leaves, grad_out)
        results.append(dict(zip(NAMES, (x.detach().cpu() for x in (out, *grads)), strict=True)))
    assert_all_close(*results, TOLERANCE)


def test_delta_of_an_empty_shard():
    empty = torch.zeros(2, 0, 3, 5, device=DEVICE)
    assert TRITON.prepare_backward(empty, empty).shape == (2, 0, 3)


@pytest.mark.usefixtures("_new_launches")
@pytest.mark.parametrize(("case", "blocks"), [
    pytest.param(Beyond(53, 4, 2, 16, EVERYTHING), (16, 32), id="everything, shared heads"),
    pytest.param(Beyond(49, 2, 2, 5, SUMMARIES), (16, 16), id="summaries"),
    pytest.param(Beyond(57, 3, 3, 64, STAGGERED), (16, 16), id="rotated and staggered"),
    pytest.param(Beyond(60, 2, 1, 16, ONCE), (32, 16), id="keys once without a window"),
    pytest.param(Beyond(75, 2, 1, 16, Pattern((), (), window_size=37)), (16, 16), id="a window"),
    pytest.param(Beyond(61, 4, 2, 16, SYMMETRIC, 3, False), (16, 32), id="bidirectional"),
])  # fmt: skip
def test_patterns_beyond_the_paper(case, blocks, monkeypatch):
    monkeypatch.setattr(backend_triton, "block_sizes", lambda kernel, dtype, dim: (*blocks, 4, 2))
    if case.length % 2 == 0:
        monkeypatch.setattr(backend_triton, "_INT32_ELEMENTS", 0)  # 64-bit offsets
    inputs = beyond_inputs(case, torch.float32)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend_chunks(*leaves, make_plan(case, Chunk(0, 1, 0, case.length, 0, case.length)))
    actual = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, inputs[3])), strict=True))
    assert_all_close(actual, dense(case, [x.double() for x in inputs]), TOLERANCE)


@pytest.mark.usefixtures("_new_launches")
@pytest.mark.parametrize("is_packed", [False, True], ids=["with prefixes", "packed"])
@pytest.mark.parametrize(("case", "cuts"), [
    pytest.param(Beyond(53, 2, 2, 16, EVERYTHING), (13, 30), id="everything"),
    pytest.param(Beyond(40, 2, 2, 16, SUMMARIES), (3, 30), id="summaries"),
])  # fmt: skip
def test_chunks_of_patterns_beyond_the_paper(case, cuts, is_packed, monkeypatch):
    """Chunks of one sequence with their prefixes, whose gradients count too, or of one document each."""
    monkeypatch.setattr(backend_triton, "block_sizes", lambda kernel, dtype, dim: (16, 16, 4, 2))
    inputs = beyond_inputs(case, torch.float32)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    parts = []
    for a, b in pairwise([0, *cuts, case.length]):
        chunk = Chunk(0, 1, 0, b - a, 0, b - a) if is_packed else Chunk(0, 1, 0, b - a, a, b)
        prefix = None if is_packed else make_halo(*(halo_slots(case, x, a, b) for x in leaves[1:]))
        parts.append(attend_chunks(*(x[:, a:b] for x in leaves), make_plan(case, chunk), prefix))
    out = torch.cat(parts, 1)
    actual = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, inputs[3])), strict=True))
    assert_all_close(actual, dense(case, [x.double() for x in inputs], cuts if is_packed else ()), TOLERANCE)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter takes too long")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize(("pattern", "is_causal"), [
    pytest.param(Pattern((256, 1024), (1, 4), "interleaved", 128, None, True, True, True), True, id="everything"),
    pytest.param(Pattern((2048,), (8,), "interleaved", 256, (1,), keys_once=True), True, id="summaries"),
    pytest.param(Pattern((300, 700), (2, 6), "interleaved", 100, (1, 3), True, True), False, id="bidirectional"),
])  # fmt: skip
def test_patterns_beyond_the_paper_on_a_gpu(pattern, is_causal, dim, dtype):
    """Many blocks of the sizes that are launched, twice: the second call gives the same bits."""
    case = Beyond(1500, 8, 4, dim, pattern, 1, is_causal)
    inputs, plan = beyond_inputs(case, dtype, batch=2), make_plan(case, Chunk(0, 2, 0, case.length, 0, case.length))
    results = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        out = attend_chunks(*leaves, plan)
        grads = torch.autograd.grad(out, leaves, inputs[3])
        results.append(dict(zip(NAMES, (out.detach(), *grads), strict=True)))
    rounded, exact_results = dense(case, inputs), dense(case, [x.double() for x in inputs])
    for name, expected in exact_results.items():
        assert torch.equal(results[0][name], results[1][name]), name
        assert_low_precision(name, results[0][name], rounded[name], expected)


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    case = Case(2, 70, 6, 3, 16, (32, 64), (1, 2), True, "interleaved")
    inputs = make(case)
    backend = "triton" if DEVICE == "cpu" else "auto"
    assert choose_backend(backend, inputs[0]) == "triton"
    compiled = torch.compile(
        lambda q, k, v: dilated_attention(q, k, v, case.lengths, case.rates, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = compiled(*leaves)
    actual = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, inputs[3])), strict=True))
    assert_all_close(actual, exact(case, inputs), TOLERANCE)


@pytest.mark.skipif(DEVICE == "cpu", reason="only on a GPU")
def test_a_model_on_a_gpu_is_that_on_a_cpu():
    """Loss, gradients and generation of a padded batch."""
    model = make_model(LongNetForCausalLM, torch.float32)
    ids = torch.randint(3, 29, (2, 45))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
        results.append((loss.detach().cpu(), grads, model.generate(**inputs, max_new_tokens=20, do_sample=False).cpu()))
    (loss, grads, tokens), (gpu_loss, gpu_grads, gpu_tokens) = results
    assert_close("loss", gpu_loss, loss, 1e-5)
    assert_close("gradients", gpu_grads, grads, 1e-4)
    assert torch.equal(gpu_tokens, tokens)


# Of one call with two branches: one launch per branch forward; delta once, then two launches per branch backward.
KERNELS = ["forward_kernel"] * 2 + ["delta_kernel"] + ["backward_dkdv_kernel", "backward_dq_kernel"] * 2
OVERLAPS = [False, True, False, False, True, True, True]
BEYOND = {
    "first": [
        ("forward_kernel", "window", 40), ("forward_kernel", "segments", 16), ("forward_kernel", "shifted", 40),
        ("delta_kernel", None, 75),
        ("backward_dkdv_kernel", "window", 20), ("backward_dq_kernel", "window", 40),
        ("backward_dkdv_kernel", "segments", 8), ("backward_dq_kernel", "segments", 16),
        ("backward_dkdv_kernel", "shifted", 10), ("backward_dq_kernel", "shifted", 40),
    ],
    "prefix": [
        ("forward_kernel", "window", 40), ("forward_kernel", "segments", 16), ("forward_kernel", "shifted", 48),
        ("forward_kernel", "window", 4), ("forward_kernel", "segments", 8), ("forward_kernel", "shifted", 8),
    ],
}  # fmt: skip
PROGRAMS = {
    "causal": {"first": [40, 24, 75, 20, 40, 12, 24], "longer": [48, 24, 86, 24, 48, 12, 24]},
    "bidirectional": {"first": [24, 8, 38, 24, 24, 8, 8], "longer": [32, 12, 49, 32, 32, 12, 12]},
}


def test_launches_compiled_for_an_h100():
    """By a driver that launches nothing and needs no GPU."""
    script = Path(__file__).with_name("triton_launches.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    # A window and two branches, in the second of which a head's queries are at one of two places: offsets and borders
    # are data, so another layer takes the same kernels, and so does another start.
    beyond = results.pop("beyond")
    assert {name: call["compiled"] for name, call in beyond.items()} == {
        "first": 9, "next layer": 0, "prefix": 3, "later": 0,
    }  # fmt: skip
    for name, launches in BEYOND.items():
        assert [
            (launch["kernel"], launch["numbers"].get("VISIBLE"), launch["grid"][0])
            for launch in beyond[name]["launches"]
        ] == launches
    assert set(results) == set(PROGRAMS)
    for case, calls in results.items():
        shifted, first, again, longer, elsewhere, wide = (call["launches"] for call in calls.values())
        for launches in (shifted, first, longer, wide):
            assert [launch["kernel"] for launch in launches] == KERNELS
            assert [launch["overlaps"] for launch in launches] == OVERLAPS
        for name, programs in PROGRAMS[case].items():
            assert [launch["grid"] for launch in calls[name]["launches"]] == [[n, 1, 1] for n in programs]
        # Other kernels, as values are read otherwise; but nothing else is different. (delta reads no values.)
        same_function = [a["function"] == b["function"] for a, b in zip(shifted, first, strict=True)]
        assert same_function == [name == "delta_kernel" for name in KERNELS]
        assert [launch["numbers"] for launch in shifted] == [launch["numbers"] for launch in first]
        assert again == first
        assert elsewhere == [launch | {"stream": 7} for launch in first]
        assert {launch["stream"] for launch in first} == {0}
        # The same kernels for another length, with its own numbers.
        assert [launch["function"] for launch in longer] == [launch["function"] for launch in first]
        numbers = [launch["numbers"] for launch in longer]
        assert all(n["length"] == n["remaining"] for n in numbers if "length" in n)
        assert all(a["numbers"] != b["numbers"] for a, b in zip(longer, first, strict=True))
        assert all(launch["numbers"].get("WIDE", True) for launch in wide)
        assert [call["compiled"] for call in calls.values()] == [7, 6, 0, 0, 0, 6]


def test_without_private_names_of_triton(monkeypatch):
    """Nothing overlaps and nothing counts as interpreted, but compat.py can be imported."""
    assert compat.HAS_TRITON_GDC
    assert compat.TRITON_IS_INTERPRETED == (DEVICE == "cpu")
    for module in ("triton.knobs", "triton.language.extra.cuda"):
        monkeypatch.setitem(sys.modules, module, None)
    names = runpy.run_path(compat.__file__)
    assert not names["HAS_TRITON_GDC"]
    assert not names["TRITON_IS_INTERPRETED"]
    monkeypatch.setattr(backend_triton, "HAS_TRITON_GDC", False)
    assert not backend_triton._can_overlap.__wrapped__(torch.device("cuda", 0))


@pytest.mark.usefixtures("_new_launches")
def test_each_device_has_its_own_launches(monkeypatch):
    monkeypatch.setattr(backend_triton, "_can_overlap", lambda device: True)
    layout = backend_triton._Layout.of(*[torch.empty(1, 64, 2, 16, device="meta")] * 3)
    call = BranchCall(Chunk(0, 1, 0, 64, 0, 64), Branch(32, 1, (0, 0)), "chunk", True, 1.0, is_first=True)
    first, second, third = (
        backend_triton._launch("forward", call, layout._replace(device=torch.device("cuda", i))) for i in (0, 1, 0)
    )
    assert first is third
    assert first is not second
    assert [first.device.index, second.device.index] == [0, 1]
    assert first.arguments["PRECISION"] == "tf32x3"


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU launches what was compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_later_launches_give_the_same_bits(dtype):
    """In a later call, on another stream and in a CUDA graph; to rounding at addresses not divisible by 16."""
    case = Case(1, 300, 4, 2, 64, (64, 256), (1, 3), True, "interleaved")
    inputs = make(case, dtype)
    first = run(case, *inputs, backend="triton")
    others = [run(case, *inputs, backend="triton")]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        others.append(run(case, *inputs, backend="triton"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        others.append(run(case, *inputs, backend="triton"))
    graph.replay()
    torch.cuda.synchronize()
    for other in others:
        for name in NAMES:
            assert torch.equal(first[name], other[name]), name
    moved = [torch.empty(x.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(x.shape).copy_(x) for x in inputs]
    for name, x in run(case, *moved, backend="triton").items():
        torch.testing.assert_close(x, first[name])
