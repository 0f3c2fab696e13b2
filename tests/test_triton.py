"""The Triton kernels against the dense reference: on a GPU where there is one, else on the CPU by Triton's interpreter.

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

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
    make_inputs,
    outside_rows,
    run,
)

from modeling_longnet import LongNetForCausalLM, attend, attend_triton, dilated_attention
from modeling_longnet.branches import Branch, Chunk, prefix_lengths
from modeling_longnet.dilated_attention import (
    Outside,
    Plan,
    attend_chunks,
    backward_chunks,
    backward_outside,
    forward_chunks,
    forward_outside,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 3e-6  # float32 against float64, a few hundred additions
pytestmark = pytest.mark.skipif(
    attend_triton.unavailable(torch.zeros(1, 1, 1, 8, device=DEVICE)) is not None,
    reason=f"the Triton kernels cannot run: {attend_triton.unavailable(torch.zeros(1, 1, 1, 8, device=DEVICE))}",
)


def make(case: Case, dtype=torch.float32, layout="transposed"):
    return [x.to(DEVICE) for x in make_inputs(case, dtype, layout)]


def exact(case: Case, inputs):
    return run(case, *(x.double() for x in inputs), backend="eager")


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", [
    pytest.param(Case(2, 1, 3, 3, 5, *NESTED, True, "interleaved"), id="one token"),
    pytest.param(Case(1, 37, 6, 3, 20, (4, 16), (1, 4), True, "blocked"), id="shared heads, ragged"),
    pytest.param(Case(3, 40, 2, 2, 5, (16,), (7,), True, "interleaved"), id="more offsets than heads"),
    pytest.param(Case(1, 29, 2, 2, 17, (100, 1000), (1, 3), True, "interleaved"), id="segments longer than the text"),
    pytest.param(Case(1, 37, 4, 4, 5, *UNCOVERED, True, "interleaved"), id="uncovered queries"),
    pytest.param(Case(1, 31, 4, 4, 5, (9, 10, 11), (1, 3, 4), True, "interleaved"), id="r does not divide w"),
    pytest.param(Case(2, 300, 2, 1, 64, (150, 280), (1, 2), True, "interleaved"), id="several blocks"),
    pytest.param(Case(1, 70, 2, 2, 130, (64,), (1,), True, "interleaved"), id="large heads"),
])  # fmt: skip
def test_equals_the_dense_reference(case, is_causal):
    case = case._replace(is_causal=is_causal)
    inputs = make(case)
    assert_all_close(run(case, *inputs, backend="triton"), exact(case, inputs), TOLERANCE)


@pytest.mark.parametrize("layout", ["contiguous", "fused", "columns", "expanded"])
def test_any_layout(layout):
    case = Case(2, 35, 4, 2, 6, (8, 32), (1, 2), True, "interleaved")
    inputs = make(case, layout=layout)
    assert_all_close(run(case, *inputs, backend="triton", scale=0.7), run(
        case, *(x.double() for x in inputs), backend="eager", scale=0.7), TOLERANCE)  # fmt: skip


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
def test_chunks_with_the_rows_before_them(groups):
    """A text read 37 tokens at a time; gradients flow into the rows before a chunk too."""
    case = Case(1, 100, 4, groups, 16, (16, 64), (1, 6), True, "interleaved")
    inputs = make(case)
    query, key, value, grad_out = (x.transpose(1, 2) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    parts = []
    for start in range(0, case.length, 37):
        end = min(start + 37, case.length)
        before = Outside(*(outside_rows(x, case, [start], [end]) for x in leaves[1:]))
        chunks = torch.tensor([[0, 1, 0, end - start, start, end]])
        part = (x[:, start:end] for x in leaves)
        parts.append(attend_chunks(*part, case.branches, chunks=chunks, before=before, backend="triton"))
    out = torch.cat(parts, 1)
    actual = dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, grad_out)), strict=True))
    assert_all_close({name: x.transpose(1, 2) for name, x in actual.items()}, exact(case, inputs), TOLERANCE)


@pytest.mark.parametrize("zero_padding", [False, True])
def test_a_bidirectional_chunk_between_its_neighbours(zero_padding):
    """What a shard of a sequence computes: its own rows, those before it and those after it."""
    case, start, end = Case(2, 45, 4, 2, 7, (10, 40), (1, 3), False, "interleaved"), 13, 31
    query, key, value, grad_out = (x.transpose(1, 2).contiguous() for x in make_inputs(case, torch.float64))
    grad_out[:, :start] = grad_out[:, end:] = 0
    whole = [x.detach().requires_grad_() for x in (query, key, value)]
    if zero_padding:
        expected = dense_with_padding(case, *whole)
    else:
        expected = dilated_attention(
            *(x.transpose(1, 2) for x in whole), case.lengths, case.rates, is_causal=False, backend="eager"
        ).transpose(1, 2)
    grads = torch.autograd.grad(expected, whole, grad_out)

    plan = Plan((Chunk(0, case.batch, 0, end - start, start, case.length),), case.branches, False,
                case.dim**-0.5, "triton", zero_padding)  # fmt: skip
    query, key, value, grad_out = (x.to(DEVICE, torch.float32) for x in (query, key, value, grad_out))
    q, k, v, g = (x[:, start:end].contiguous() for x in (query, key, value, grad_out))
    leaves = [x.detach().requires_grad_() for x in (key, value)]
    starts, ends = [start] * case.batch, [end] * case.batch
    out, lse = forward_chunks(q, k, v, plan)
    sides = {after: Outside(*(outside_rows(x, case, starts, ends, after) for x in leaves)) for after in (False, True)}
    for after, rows in sides.items():
        forward_outside(q, out, lse, Outside(*(tuple(x.detach() for x in pair) for pair in rows)), plan, after)
    assert_close("out", out.cpu(), expected.detach()[:, start:end], TOLERANCE)

    dq, dk, dv = backward_chunks(g, q, k, v, out, lse, plan)
    columns = torch.arange(start, end, device=DEVICE)
    totals = [torch.zeros_like(x).index_add(1, columns, d) for x, d in zip(leaves, (dk, dv), strict=True)]
    for after, rows in sides.items():
        given = Outside(*(tuple(x.detach() for x in pair) for pair in rows))
        found = backward_outside(g, q, out, lse, given, dq, plan, after)
        pairs = zip(
            totals, torch.autograd.grad(rows.keys + rows.values, leaves, found.keys + found.values), strict=True
        )
        for total, part in pairs:
            total += part
    assert_close("dq", dq.cpu(), grads[0][:, start:end], TOLERANCE)
    assert_close("dk", totals[0].cpu(), grads[1], TOLERANCE)
    assert_close("dv", totals[1].cpu(), grads[2], TOLERANCE)


def test_texts_in_parts_of_a_batch():
    """Two texts of different length and place; tokens in none get 0 and no gradient."""
    case = Case(2, 23, 3, 3, 5, *NESTED, True, "interleaved")
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        made = [x.transpose(1, 2) for x in make_inputs(case, torch.float32)]
        query, key, value, grad_out = (x.to(DEVICE if backend == "triton" else "cpu", dtype) for x in made)
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        chunks = torch.tensor([[0, 1, 4, 20, 0, 16], [1, 2, 0, 7, 0, 7]])
        out = attend_chunks(*leaves, case.branches, chunks=chunks, backend=backend)
        grads = torch.autograd.grad(out, leaves, grad_out)
        results.append(dict(zip(NAMES, (x.detach().cpu() for x in (out, *grads)), strict=True)))
    assert_all_close(*results, TOLERANCE)


@pytest.fixture
def _new_launches():
    """Launches are kept; those of a test that changes what they are made from are its own."""
    for kept in (attend_triton._forward_launch, attend_triton._backward_launches):
        kept.cache_clear()
    yield
    for kept in (attend_triton._forward_launch, attend_triton._backward_launches):
        kept.cache_clear()


@pytest.mark.usefixtures("_new_launches")
@pytest.mark.parametrize("blocks", [(16, 32), (32, 16)])
def test_any_size_of_blocks(blocks, monkeypatch):
    """Blocks of keys larger and smaller than those of queries."""
    case = Case(1, 75, 2, 2, 16, (70,), (1,), True, "interleaved")
    chosen = attend_triton.Blocks(*blocks, 4, 2)
    monkeypatch.setattr(attend_triton, "forward_blocks", lambda dtype, dim: chosen)
    monkeypatch.setattr(attend_triton, "backward_blocks", lambda dtype, dim: (chosen, chosen))
    inputs = make(case)
    assert_all_close(run(case, *inputs, backend="triton"), exact(case, inputs), TOLERANCE)


@pytest.mark.parametrize(("sample", "words"), [
    (torch.zeros(1, 1, 1, 8, dtype=torch.float64, device=DEVICE), ["float64", "'eager'"]),
    (torch.zeros(1, 1, 1, 257, device=DEVICE), ["up to 256", "257"]),
    (torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), ["'torch'"]),
    (torch.zeros(1, 1, 1, 8, device="meta"), ["'meta'", "'torch'"]),
])  # fmt: skip
def test_says_why_it_cannot_run(sample, words):
    with refused("backend='triton' cannot run", *words):
        attend.choose_backend("triton", sample)


@pytest.mark.usefixtures("_new_launches")
def test_rows_far_apart_are_counted_in_64_bits(monkeypatch):
    monkeypatch.setattr(attend_triton, "_NARROW", 0)
    case = Case(1, 100, 4, 2, 16, (16, 64), (1, 6), True, "interleaved")
    inputs = make(case)
    assert_all_close(run(case, *inputs, backend="triton"), exact(case, inputs), TOLERANCE)
    monkeypatch.undo()
    layout = attend_triton._Layout.of(*[torch.empty(1, 1, 64, 64, device="meta")] * 3)
    assert layout.is_wide(Branch(1 << 40, 1 << 20, (0,)), 2048)
    assert not layout.is_wide(Branch(1 << 20, 1 << 10, (0,)), 1024)


def test_heads_far_apart():
    """2^30 elements lie between two heads, so head 2 lies beyond what 32 bits count; no memory lies behind most."""
    case = Case(1, 40, 3, 3, 8, (16, 40), (1, 2), True, "interleaved")
    storage = torch.UntypedStorage((2 << 31) + 40 * 8 * 2, device="cpu")
    shape, strides = (1, 3, 40, 8), (1, 1 << 30, 8, 1)
    x = torch.empty(0, dtype=torch.float16).set_(storage, 0, shape, strides)
    x.copy_(torch.randn(shape))
    if DEVICE != "cpu":
        x = torch.empty(0, dtype=x.dtype, device=DEVICE).set_(storage.to(DEVICE), 0, shape, strides)
    near = x.contiguous()
    grad_out = torch.randn_like(near)
    assert_all_close(
        run(case, x, x, x, grad_out, backend="triton"), run(case, near, near, near, grad_out, backend="triton"), 0
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_vmap_of_the_gradient(batch):
    """One output, many directions: what is the same for all is shown, not repeated."""
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


def test_rows_before_a_chunk_in_any_layout():
    """Keys with another element contiguous, values laid out otherwise."""
    case, start = Case(2, 60, 4, 2, 6, (16, 64), (1, 3), True, "interleaved"), 25
    made = [x.transpose(1, 2) for x in make_inputs(case, torch.float32)]
    results = []
    for backend in ("triton", "torch"):
        query, key, value, grad_out = (x.to(DEVICE if backend == "triton" else "cpu") for x in made)
        before = [outside_rows(x, case, [start] * 2, [case.length] * 2) for x in (key, value)]
        keys = [x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in before[0]]
        values = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in before[1]]
        own = [x[:, start:].detach().requires_grad_() for x in (query, key, value)]
        chunks = torch.tensor([[0, 2, 0, case.length - start, start, case.length]])
        outside = Outside(tuple(keys), tuple(values))
        out = attend_chunks(*own, case.branches, chunks=chunks, before=outside, backend=backend)
        leaves = [*own, *keys, *values]
        grads = torch.autograd.grad(out, leaves, grad_out[:, start:])
        results.append({str(i): x.detach().cpu().nan_to_num() for i, x in enumerate((out, *grads))})
    assert_all_close(*results, TOLERANCE)


def test_zero_padding_beside_very_low_scores():
    """The zero keys outweigh all others, or there are none and the others' weights are tiny."""
    case = Case(1, 12, 1, 1, 16, (8,), (1,), False, "interleaved")
    query, key = torch.full((1, 12, 1, 16), 10.0), torch.full((1, 12, 1, 16), -10.0)
    value = torch.randn(1, 12, 1, 16)
    chunks = torch.tensor([[0, 1, 0, 12, 0, 12]])
    options = {"chunks": chunks, "is_causal": False, "scale": 0.25, "zero_padding": True}
    expected = attend_chunks(query, key, value, case.branches, **options)
    actual = attend_chunks(*(x.to(DEVICE) for x in (query, key, value)), case.branches, backend="triton", **options)
    assert_close("out", actual.cpu(), expected, TOLERANCE)


def test_a_branch_without_rows_between_others():
    """No head keeps one of the 9 tokens in the branch that comes second; on a GPU its kernel ends at once."""
    case = Case(1, 9, 2, 2, 16, (20, 40, 60), (1, 2, 20), True, "interleaved")
    made = [x.transpose(1, 2) for x in make_inputs(case, torch.float32)]
    chunks, start = torch.tensor([[0, 1, 0, 9, 5, 14]]), 5
    results = []
    for backend in ("triton", "torch"):
        query, key, value, grad_out = (x.to(DEVICE if backend == "triton" else "cpu") for x in made)
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        rows = prefix_lengths(case.branches, start)
        before = Outside(*(tuple(x[:, :1].transpose(1, 2).expand(-1, -1, n, -1) for n in rows) for x in (key, value)))
        out = attend_chunks(*leaves, case.branches, chunks=chunks, before=before, backend=backend)
        grads = torch.autograd.grad(out, leaves, grad_out)
        results.append(dict(zip(NAMES, (x.detach().cpu() for x in (out, *grads)), strict=True)))
    assert_all_close(*results, TOLERANCE)


def test_an_empty_shard_has_no_products():
    empty = torch.zeros(2, 0, 3, 5, device=DEVICE)
    assert attend_triton.sum_products(empty, empty).shape == (2, 0, 3)


def test_head_offsets_of_no_known_kind_are_refused():
    with refused("(1, 0)", "neither interleaved"):
        attend_triton._slots(Branch(4, 2, (1, 0)))


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    case = Case(2, 70, 6, 3, 16, (32, 64), (1, 2), True, "interleaved")
    inputs = make(case)
    backend = "triton" if DEVICE == "cpu" else "auto"
    assert attend.choose_backend(backend, inputs[0]) == "triton"
    compiled = torch.compile(
        lambda q, k, v: dilated_attention(q, k, v, case.lengths, case.rates, backend=backend),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
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


def test_kept_launches_are_those_that_triton_prepares():
    """Compiled for an H100 by a driver that launches nothing, so that it needs no GPU."""
    script = Path(__file__).with_name("triton_launches.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(script.parents[1]), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    names = ["_forward_kernel"] * 2 + ["_delta_kernel"] + ["_backward_keys_kernel", "_backward_queries_kernel"] * 2
    for calls in json.loads(done.stdout).values():
        shifted, first, again, longer, elsewhere = (call["launches"] for call in calls.values())
        for launches in (shifted, first, longer):
            assert [launch[0] for launch in launches] == names
        # Other kernels, as values are read otherwise; but nothing else is different. (delta reads no values.)
        assert [a[3] == b[3] for a, b in zip(shifted, first, strict=True)] == [
            name == "_delta_kernel" for name in names
        ]
        assert [launch[5] for launch in shifted] == [launch[5] for launch in first]
        assert again == first
        assert [launch[:6] for launch in elsewhere] == [launch[:6] for launch in first]
        assert [{launch[6] for launch in launches} for launches in (first, elsewhere)] == [{0}, {7}]
        # The same kernels for another length, with its own numbers.
        assert [launch[3] for launch in longer] == [launch[3] for launch in first]
        assert all(launch[5]["length"] == launch[5]["left"] for launch in longer if "length" in launch[5])
        assert all(a[5] != b[5] for a, b in zip(longer, first, strict=True))
        assert [call["prepared"] for call in calls.values()] == [7, 6, 0, 0, 0]


@pytest.mark.usefixtures("_new_launches")
def test_each_device_has_its_own_launches(monkeypatch):
    monkeypatch.setattr(attend_triton, "_can_overlap", lambda device: True)
    layout = attend_triton._Layout.of(*[torch.empty(1, 64, 2, 16, device="meta")] * 5)
    first, second, third = (
        attend_triton._forward_launch(
            layout._replace(device=torch.device("cuda", i)), Chunk(0, 1, 0, 64, 0, 64), Branch(32, 1, (0, 0)), "own",
            True, True, 1.0, False, False,
        ) for i in (0, 1, 0)
    )  # fmt: skip
    assert first is third
    assert first.kept is not second.kept
    assert [first.device.index, second.device.index] == [0, 1]


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU launches what was compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_launches_give_the_same_bits(dtype):
    """In a later call, on another stream and in a CUDA graph; from addresses that 16 does not divide, nearly."""
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
