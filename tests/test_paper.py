"""The patterns of examples/paper against masks written out, and its pipeline at toy size."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from examples.paper import cells, figures, patterns, recall, run
from modeling_longnet.testing import count_work

ROOT = Path(__file__).parent.parent
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
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def shown_by(module: str, *options: str) -> str:
        command = [sys.executable, "-m", f"examples.paper.{module}", *options, "--results", str(tmp_path)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert "done" in shown_by("run", "--quick")
    assert "done" not in shown_by("run", "--quick")
    shown = shown_by("figures")
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name.split("-")[0] for name in results} == {
        "sweep", "base", "full", "long", "tokens", "time", "recall_base", "recall_base_longnet", "sweep_recall",
        "recall", "far", "extended", "time_long", "time_extended",
    }  # fmt: skip
    pattern, window = (results[f"long-{name}-64-0"] for name in ("w16_64-4q1_once", "w16"))
    timed = results["time_long-w16-64-0"]
    assert abs(timed["tokens"] - window["tokens"] * pattern["seconds"] / window["seconds"]) <= 64
    command = f"python -m examples.paper.run --quick --results {tmp_path}"
    assert {result["command"] for result in results.values()} == {command}
    for name in ("tokens-dense-64-0", "tokens-longnet-128-0"):
        assert f"{results[name]['scores']['perplexity'][-1]:.2f}" in shown
    found = {rate: results[f"sweep-sparse-{rate:g}"]["scores"]["perplexity"][-1] for rate in (1e-3, 2e-3)}
    assert results["tokens-sparse-64-0"]["cell"]["rate"] == min(found, key=found.get)
    missed = {rate: cells.sweep_score(results[f"sweep_recall-window-{rate:g}"]) for rate in (1e-3, 2e-3)}
    assert results["far-window-0"]["cell"]["rate"] == min(missed, key=missed.get)
    assert np.isfinite(results["base-dense-0"]["loss"])
    assert "nan" not in shown
    assert {"patterns.png", "text.png", "recall.png", "summary.md"} <= {path.name for path in tmp_path.iterdir()}


def test_a_fresh_clone_trains_the_weights_again_that_a_cell_begins_with(tmp_path):
    """Results without weights, as in the repository, and one cell missing."""
    settings = run.QUICK | {"name": "test", "jobs": 2}  # in processes of their own
    base = run.recall_base_cells(settings, 0)
    assert run.run_missing(base, settings, tmp_path, None, float("inf")) is True
    others = {f"recall-{name}-0": run.recall_cell(settings, "recall", name, 0, 1e-3) for name in ("dense", "window")}
    assert run.run_missing(others, settings, tmp_path, None, float("inf")) is True
    before = json.loads((tmp_path / "recall-dense-0.json").read_text())
    (tmp_path / "recall_base-0.safetensors").unlink()
    assert all(run.run_missing(part, settings, tmp_path, None, float("inf")) for part in (base, others))
    assert not (tmp_path / "recall_base-0.safetensors").exists()  # nothing is missing
    (tmp_path / "recall-dense-0.json").unlink()
    assert run.run_missing(others, settings, tmp_path, None, time.monotonic() - 1) is False  # no time
    assert run.run_missing(others, settings, tmp_path, None, float("inf")) is True
    assert json.loads((tmp_path / "recall-dense-0.json").read_text())["losses"] == before["losses"]
    (tmp_path / "recall_base-0.json").unlink()
    (tmp_path / "recall_base-0.safetensors").unlink()
    assert run.is_done("recall-dense-0", others["recall-dense-0"], settings, tmp_path)
    assert not run.is_done("recall-dense-0", others["recall-dense-0"], settings | {"recall_texts": 3}, tmp_path)
    changed = {name: cell | {"rate": 5e-3} for name, cell in others.items()}  # other settings are not taken for done
    with pytest.raises(SystemExit, match="recall_base-0"):
        run.run_missing(changed, settings, tmp_path, None, float("inf"))


def test_results_of_another_text_are_run_again(tmp_path):
    """The text is that of the installed packages; a new one gives another digest, and a base of its own."""
    texts = []
    for name in ("one", "two"):
        for number in range(3):
            folder = tmp_path / name / f"package{number}"
            folder.mkdir(parents=True)
            (folder / "a.py").write_text("".join(f"{name}_{number}_{i} = {i}\n" for i in range(400)))
        settings = run.QUICK | {"text": str(tmp_path / name)}
        text = cells.load_documents(settings)
        texts.append((settings | {"digest": text.digest}, text))
    assert texts[0][0]["digest"] != texts[1][0]["digest"]
    results = tmp_path / "results"
    results.mkdir()
    losses = []
    for settings, text in texts:
        base = {
            name: cell
            for name, cell in run.base_sweep_cells(settings).items()
            if name == f"sweep-base-dense-{settings['base_rates'][0]:g}"
        }
        assert run.run_missing(base, settings, results, text, float("inf"))
        (result,) = (json.loads(path.read_text()) for path in results.glob("*.json"))
        assert result["cell"]["digest"] == text.digest
        losses.append(result["losses"])
    assert losses[0] != losses[1]


def test_planted_passages_come_again_at_their_distance():
    tokens, distances = recall.make_texts(3, 400, 16, seed=0)
    for text, distance in zip(tokens, distances, strict=True):
        places = np.flatnonzero(distance)
        assert len(places) > 60
        assert len(places) % (recall.PASSAGE - 1) == 0
        assert (distance[places] >= 16).all()
        assert (text[places] == text[places - distance[places]]).all()
        assert (text[places + 1] == text[places + 1 - distance[places]]).all()
        known = text[text < recall.KEYS]  # each token of a passage stands in the text twice, so only its own follows
        assert (np.unique(known, return_counts=True)[1] == 2).all()


def test_a_passkey_is_the_only_passage():
    tokens, distances = recall.make_texts(5, 400, 16, seed=0, passages=1)
    assert ((distances > 0).sum(1) == recall.PASSAGE - 1).all()
    assert ((tokens < recall.KEYS).sum(1) == 2 * recall.PASSAGE).all()


def test_recall_is_counted_by_distance():
    class Oracle(torch.nn.Module):
        """Continues passages that come again within 50 tokens, and predicts filler otherwise."""

        def forward(self, ids, logits_to_keep, use_cache):
            logits = torch.zeros(1, len(logits_to_keep), recall.VOCABULARY)
            for row, place in enumerate(logits_to_keep):
                near = ids[0, max(0, place - 49) : place] == ids[0, place]
                told = ids[0, place + 1] if near.any() else recall.VOCABULARY - 1
                logits[0, row, told] = 1
            return SimpleNamespace(logits=logits)

    tokens, distances = recall.make_texts(4, 400, 16, seed=0)
    found = recall.score(Oracle(), tokens, distances, [16, 50, 400])
    assert sum(found["asked"]) == (distances > 0).sum()
    assert min(found["asked"]) > 0
    assert found["right"] == [found["asked"][0], 0]


def test_path_is_counted_in_layers():
    steps = figures.path_steps([4, 16], [1, 4], heads=4, length=16)
    assert steps[15] == 0
    assert (steps[12:15] == 1).all()
    assert (steps[[3, 7, 11]] == 1).all()
    assert (steps[[0, 1, 2, 4, 5, 6]] == 2).all()


def test_equal_seeds_give_equal_weights_and_work_is_matched():
    branches = ((64, 256), (1, 2))
    made = [patterns.make_pattern(name, branches, 512) for name in patterns.RIVALS]
    models = [patterns.make_model(pattern, 0, **SIZES) for pattern in made]
    for model in models[1:]:
        for x, y in zip(model.parameters(), models[0].parameters(), strict=True):
            assert torch.equal(x, y)
    for pattern in made[1:]:
        assert patterns.count_keys(pattern, 512) == pytest.approx(count_work(*branches, 512), rel=0.02)
    ids = torch.randint(40, (1, 300))
    losses = {p.name: m(ids, labels=ids, use_cache=False).loss.item() for p, m in zip(made, models, strict=True)}
    assert len(set(losses.values())) == 4


def test_quality_table_sums_the_buckets_of_each_distance():
    """One pattern: 3 of 8 tokens recalled up to 256 back, 1 of 6 beyond. What has not been run stays empty."""
    recall = {"edges": [32, 128, 256, 1024, 2048], "right": [1, 2, 1, 0], "asked": [4, 4, 2, 4]}
    work = patterns.make_pattern("w64", ((), ()), 2048)._asdict()
    name = f"recall-window{figures.LONGER}-0"
    results = {name: {"recall": recall, "work": work, "cell": {"length": 2048, "pattern": "window"}}}
    rows = {
        line.split("|")[1].strip(): line.split("|")[2:-1] for line in figures.quality_table(results).splitlines()[2:8]
    }
    assert [cell.strip() for cell in rows["sliding window"]] == ["", "", "63", "38 % (one run)", "17 % (one run)"]
    assert not "".join(rows["dense attention"]).strip()
