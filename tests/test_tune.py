"""The candidates of `benchmarks/tune.py` against dense attention in float64, by Triton's interpreter."""

import json

import pytest
import torch
from checks import assert_close

from modeling_longnet.backends import BACKENDS
from modeling_longnet.positions import apply_rotary

UNAVAILABLE = BACKENDS["triton"].unavailable(torch.zeros(1, 1, 1, 8))
if UNAVAILABLE is not None:
    pytest.skip(f"the interpreter cannot run: {UNAVAILABLE}", allow_module_level=True)
tune = pytest.importorskip("benchmarks.tune")
tune_rotary = pytest.importorskip("benchmarks.tune_rotary")


def run(shape: str, path, *options: str):
    """Run at two segments of more tokens than a block has, the last of them ragged."""
    arguments = ["--length", "40", "--error-length", "155", "--dtype", "float32", "--pattern", "128/1 144/2"]
    arguments += ["--device", "cpu", "--shapes", shape, "--seconds", "0", "--limit", "900", "--stage-limit", "900"]
    tune.main([*arguments, "--output", str(path), *options])
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize(("shape", "dim"), [("2x8", 64), ("1x68", 128)])
def test_candidates_are_checked_and_timed(shape, dim, tmp_path, capsys):
    rows = run(shape, tmp_path / "tune.json")
    printed = capsys.readouterr().out
    names = {str(candidate) for candidate in tune.CANDIDATES[dim]} | {"rotary forward, one kernel"}
    assert names <= {row["candidate"] for row in rows}
    for row in rows:
        assert "failed" not in row, row
        assert row["same_bits"]
        assert row["candidate"] in printed
        assert len(row["seconds"]) >= 3


def test_a_wrong_candidate_is_named_and_not_timed(monkeypatch, tmp_path, capsys):
    launches = tune.launches
    monkeypatch.setattr(tune, "CANDIDATES", {64: [tune.dq(16, 16, 4, 1)]})
    monkeypatch.setattr(tune, "launches", lambda c, calls: launches(c, calls)[: 1 if c.flags else None])
    wrong = [row for row in run("2x8", tmp_path / "tune.json", "--stages", "descriptors") if "failed" in row]
    assert [(row["kernel"], row["failed"], "seconds" in row) for row in wrong] == [("dq", "wrong", False)]
    assert ": wrong" in capsys.readouterr().out


@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_in_one_kernel(batch):
    """Output and gradient of strided input against the package's own in float64."""
    factors = torch.polar(torch.rand(batch, 37, 1, 5) + 0.5, 6 * torch.rand(batch, 37, 1, 5))
    x, grad = torch.randn(2, 3, 37, 10).transpose(1, 2), torch.randn(2, 37, 3, 10)
    results = []
    for function, dtype in ((tune_rotary.apply_rotary, torch.float32), (apply_rotary, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        out = function(leaf, factors.to(torch.complex128 if dtype == torch.float64 else torch.complex64))
        results.append((out, *torch.autograd.grad(out, leaf, grad.to(dtype))))
    for name, found, exact in zip(("out", "gradient"), *results, strict=True):
        assert_close(name, found, exact, 1e-6)
