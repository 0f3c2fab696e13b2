"""The patterns of examples/paper against masks written out, and its pipeline at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from modeling_longnet.branches import count_work

PAPER = Path(__file__).parent.parent / "examples" / "paper"
sys.path[:0] = [str(PAPER), str(PAPER.parent)]  # they are scripts, not a package

import figures  # noqa: E402
import patterns  # noqa: E402
import recall  # noqa: E402

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


def test_the_pipeline_at_toy_size(tmp_path):
    """Every cell, twice: the second run finds them all done; then tables and plots of them."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, PAPER / "run.py", "--quick", "--results", tmp_path],
            env=os.environ | {"PYTHONPATH": str(PAPER.parent.parent)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert "[1/" not in done.stdout
    shown = subprocess.run(
        [sys.executable, PAPER / "figures.py", "--results", tmp_path], capture_output=True, text=True, check=True
    ).stdout
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name.split("-")[0] for name in results} == {"sweep", "tokens", "time", "recall"}
    for name in ("tokens-dense-64-0", "tokens-longnet-128-0"):
        assert f"{results[name]['scores']['perplexity'][-1]:.2f}" in shown
    assert results["tokens-sparse-64-0"]["cell"]["rate"] in (2e-3, 4e-3)
    assert {"patterns.png", "text.png", "recall.png", "summary.md"} <= {path.name for path in tmp_path.iterdir()}


def test_planted_pairs_are_asked_for_at_their_distance():
    tokens, distances = recall.make_texts(3, 200, 6, 16, seed=0)
    for text, distance in zip(tokens, distances, strict=True):
        places = np.flatnonzero(distance)
        assert len(places) == 6
        assert (distance[places] >= 16).all()
        assert (text[places] == text[places - distance[places]]).all()
        assert (text[places + 1] == text[places - distance[places] + 1]).all()
        assert len(set(text[places])) == 6  # each key stands in the text twice, so only its own value is right
        assert (np.isin(text, text[places])).sum() == 12


def test_recall_is_counted_by_distance():
    class Oracle(torch.nn.Module):
        """Says the value of every key that is nearer than 50 tokens, and filler otherwise."""

        def forward(self, ids, logits_to_keep, use_cache):
            logits = torch.zeros(1, len(logits_to_keep), recall.VOCABULARY)
            for row, place in enumerate(logits_to_keep):
                near = ids[0, max(0, place - 50) : place] == ids[0, place]
                value = ids[0, place + 1] if near.any() else recall.VOCABULARY - 1
                logits[0, row, value] = 1
            return SimpleNamespace(logits=logits)

    found = recall.score(Oracle(), *recall.make_texts(4, 200, 6, 16, seed=0), [16, 50, 200])
    assert found["asked"][0] + found["asked"][1] == 24
    assert found["right"] == [found["asked"][0], 0]


def test_path_is_counted_in_layers():
    steps = figures.path_steps([4, 16], [1, 4], heads=4, length=16)
    assert steps[15] == 0
    assert (steps[12:15] == 1).all()
    assert (steps[[3, 7, 11]] == 1).all()
    assert (steps[[0, 1, 2, 4, 5, 6]] == 2).all()


def test_equal_seeds_give_equal_weights_and_work_is_matched():
    branches = ((64, 256), (1, 2))
    made = [patterns.make_pattern(name, branches, 512) for name in patterns.PATTERNS]
    models = [patterns.make_model(pattern, 0, **SIZES) for pattern in made]
    for model in models[1:]:
        for x, y in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(x, y)
    assert count_work(*branches, 512) == made[2].size == 64
    ids = torch.randint(40, (1, 300))
    losses = {p.name: m(ids, labels=ids, use_cache=False).loss.item() for p, m in zip(made, models, strict=True)}
    assert len(set(losses.values())) == 4
