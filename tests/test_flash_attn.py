"""The backend "flash_attn" with the package itself, on a GPU; `test_dilated_attention.py` has stand-ins for CPUs.

bfloat16 alone, so that a build of those kernels passes (`benchmarks/flash_attn/build.sh`).

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension.
"""

import pytest
import torch
from checks import assert_low_precision, attend, make_halo, make_model
from test_dilated_attention import NAMES, Case, halo_keys, make_inputs, run

from modeling_longnet import LongNetForCausalLM, dilated_attention
from modeling_longnet.backends import BACKENDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNAVAILABLE = BACKENDS["flash_attn"].unavailable(torch.zeros(1, 1, 1, 64, device=DEVICE, dtype=torch.bfloat16))
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"the backend cannot run: {UNAVAILABLE}")


def make(case: Case, layout="transposed"):
    return [x.to(DEVICE) for x in make_inputs(case, torch.bfloat16, layout)]


def assert_as_precise_as_dense(case: Case, inputs, actual):
    """Error against float64 at most twice the dense reference's own in bfloat16, plus one rounding step."""
    dense = run(case, *inputs, backend="eager")
    for name, exact in run(case, *(x.double() for x in inputs), backend="eager").items():
        assert actual[name].dtype == torch.bfloat16
        assert_low_precision(name, actual[name], dense[name], exact)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("case", [
    pytest.param(Case(2, 300, 6, 6, 64, (32, 64, 128), (1, 2, 4), True, "interleaved"), id="nested"),
    pytest.param(Case(1, 257, 8, 2, 128, (48, 200), (1, 7), True, "blocked"), id="shared heads"),
    pytest.param(Case(3, 90, 32, 8, 64, (2, 30), (1, 5), True, "interleaved"), id="many short segments"),
    pytest.param(Case(2, 1024, 3, 3, 64, (512, 1024), (1, 2), True, "interleaved"), id="whole kernel blocks"),
    pytest.param(Case(2, 1024, 3, 3, 128, (512, 1024), (1, 2), True, "interleaved"), id="whole blocks, 128 wide"),
    pytest.param(Case(1, 200, 4, 4, 128, (16, 60), (3, 4), True, "interleaved"), id="uncovered"),
    pytest.param(Case(1, 300, 4, 4, 40, (128, 256), (1, 2), True, "interleaved"), id="40 wide"),
])  # fmt: skip
def test_low_precision(case, is_causal):
    case = case._replace(is_causal=is_causal)
    inputs = make(case)
    assert_as_precise_as_dense(case, inputs, run(case, *inputs, backend="flash_attn"))


@pytest.mark.parametrize("layout", ["contiguous", "fused", "columns", "expanded"])
def test_any_layout(layout):
    case = Case(2, 150, 4, 2, 64, (32, 128), (1, 2), True, "interleaved")
    inputs = make(case, layout)
    assert_as_precise_as_dense(case, inputs, run(case, *inputs, backend="flash_attn"))


def test_chunks_with_a_prefix():
    """A sequence in three chunks, one of a single token; gradients flow into the prefix of a chunk too."""
    case = Case(1, 300, 4, 2, 64, (64, 256), (1, 4), True, "interleaved")
    inputs = make(case)
    query, key, value, grad_out = (x.transpose(1, 2) for x in inputs)
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    parts = []
    for start, end in ((0, 137), (137, 138), (138, case.length)):
        prefix = make_halo(*(halo_keys(x, case, [start], [end]) for x in leaves[1:]))
        chunks = [[0, 1, 0, end - start, start, end]]
        parts.append(attend(*(x[:, start:end] for x in leaves), case.branches, chunks, prefix, backend="flash_attn"))
    out = torch.cat(parts, 1)
    results = (out.detach(), *torch.autograd.grad(out, leaves, grad_out))
    assert_as_precise_as_dense(case, inputs, {n: x.transpose(1, 2) for n, x in zip(NAMES, results, strict=True)})


def test_compiled_in_one_graph():
    case = Case(1, 300, 4, 4, 64, (64, 256), (1, 4), True, "interleaved")
    inputs = make(case)
    compiled = torch.compile(
        lambda q, k, v: dilated_attention(q, k, v, case.lengths, case.rates, backend="flash_attn"),
        fullgraph=True,
        backend="aot_eager",
    )
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = compiled(*leaves)
    results = (out.detach(), *torch.autograd.grad(out, leaves, inputs[3]))
    assert_as_precise_as_dense(case, inputs, dict(zip(NAMES, results, strict=True)))


def test_a_model_with_flash_attention_2():
    """Logits and gradients of a padded batch, for which `attn_implementation` names the package."""
    ids = torch.randint(3, 29, (2, 150), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    results = []
    for implementation, dtype in (
        ("flash_attention_2", torch.bfloat16), ("eager", torch.bfloat16), ("eager", torch.float64),
    ):  # fmt: skip
        sizes = {"hidden_size": 128, "num_attention_heads": 2, "segment_lengths": [32, 128], "dilation_rates": [1, 2]}
        # Weights rounded to bfloat16, so that the three models are one.
        model = make_model(LongNetForCausalLM, torch.bfloat16, implementation=implementation, **sizes)
        model = model.to(DEVICE, dtype)
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        logits.double().square().mean().backward()
        results.append((logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for name, actual, dense, exact in zip(("logits", "gradients"), *results, strict=True):
        assert_low_precision(name, actual, dense, exact)
