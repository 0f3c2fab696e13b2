"""The patterns of examples/paper against masks written out, and its pipeline at toy size."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

PAPER = Path(__file__).parent.parent / "examples" / "paper"
sys.path[:0] = [str(PAPER), str(PAPER.parent)]  # they are scripts, not a package

import patterns  # noqa: E402

SIZES = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 3, "position_embedding": "rope"}


def written_out(pattern, length):
    """Who sees whom, by the sentence that describes it."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    if pattern.name == "window":
        return (k <= q) & (q - k < pattern.size)
    own = (q // pattern.size == k // pattern.size) & (k <= q)
    summary = (k % pattern.size >= pattern.size - pattern.summary) & (k // pattern.size < q // pattern.size)
    return own | summary


@pytest.mark.parametrize("length", [1, 7, 24, 50])
@pytest.mark.parametrize(
    ("name", "size", "summary"), [("window", 1, 0), ("window", 9, 0), ("sparse", 8, 3), ("sparse", 5, 5)]
)
def test_patterns_are_those_written_out(name, size, summary, length):
    torch.manual_seed(0)
    pattern = patterns.Pattern(name, (64,), (1,), size, summary)
    inputs = [torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    attend = {"window": patterns.attend_window, "sparse": patterns.attend_sparse}[name]
    expected = scaled_dot_product_attention(*inputs, attn_mask=written_out(pattern, length))
    out = attend(*inputs, pattern)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    seed = torch.randn_like(out)
    for x, y in zip(torch.autograd.grad(out, inputs, seed), torch.autograd.grad(expected, inputs, seed), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_equal_seeds_give_equal_weights_and_work_is_matched():
    branches = ((64, 256), (1, 2))
    made = [patterns.make_pattern(name, branches, 512) for name in patterns.PATTERNS]
    models = [patterns.make_model(pattern, 0, **SIZES) for pattern in made]
    for model in models[1:]:
        for x, y in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(x, y)
    assert patterns.count_work(*branches, 512) == made[2].size == 64
    ids = torch.randint(40, (1, 300))
    losses = {p.name: m(ids, labels=ids, use_cache=False).loss.item() for p, m in zip(made, models, strict=True)}
    assert len(set(losses.values())) == 4
