"""The whole matrix of shared sequences: `make test-distributed`, minutes on two cores.

Everything is float64 on gloo, and must equal one process to 1e-12.
"""

from pathlib import Path

import pytest
import torch
from sharding_worker import close, launch, start

LAYOUTS = [(2, 1), (3, 1), (4, 1), (2, 2)]  # sequence x data
IDS = [f"{sequence}x{data}" for sequence, data in LAYOUTS]


@pytest.mark.parametrize("processes", [2, 3, 4, 5])
def test_op_for_any_cut(processes):
    launch("op", 100, processes=processes)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_loss_logits_and_gradients(processes):
    launch("model", processes=processes)


def _compare(given: dict, expected: dict) -> None:
    for name, x in expected.items():
        close(name, given[name], x)


@pytest.fixture(scope="module")
def one_process_loop(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("loop") / "one.pt"
    launch("loop", 1, output, processes=1)
    return torch.load(output)


@pytest.mark.parametrize(("sequence", "data"), LAYOUTS, ids=IDS)
def test_accelerate_loop_with_accumulation_and_clipping(sequence, data, one_process_loop, tmp_path):
    launch("loop", sequence, tmp_path / "loop.pt", processes=sequence * data)
    _compare(torch.load(tmp_path / "loop.pt"), one_process_loop)


@pytest.mark.parametrize("state", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
@pytest.mark.parametrize(("sequence", "data"), [(2, 1), (2, 2)], ids=["2x1", "2x2"])
def test_fsdp2(sequence, data, state, one_process_loop, tmp_path):
    launch("fsdp2", sequence, state, tmp_path, processes=sequence * data)
    _compare(torch.load(tmp_path / f"{state}.pt"), one_process_loop)


def _result(folder: Path) -> dict[str, torch.Tensor]:
    """What a Trainer logged, and its final weights. It adds losses up in float32, so those are compared apart."""
    saved = torch.load(folder / "result.pt", weights_only=True)
    logged = {
        name: torch.tensor([entry[name] for entry in saved["history"] if name in entry], dtype=torch.float64)
        for name in ("loss", "grad_norm", "eval_loss")
    }
    return logged | saved["weights"]


def _compare_trainers(given: Path, expected: Path) -> None:
    given, expected = _result(given), _result(expected)
    one_rounding = torch.finfo(torch.float32).eps * expected["loss"]
    assert (given.pop("loss") - expected.pop("loss")).abs().le(one_rounding).all()
    _compare(given, expected)


@pytest.fixture(scope="module")
def one_process_trainer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    launch("trainer", 1, folder, 6, processes=1)
    return folder


@pytest.mark.parametrize(("sequence", "data"), [(2, 1), (4, 1), (2, 2)], ids=["2x1", "4x1", "2x2"])
def test_stock_trainer(sequence, data, one_process_trainer, tmp_path):
    launch("trainer", sequence, tmp_path, 6, processes=sequence * data)
    _compare_trainers(tmp_path, one_process_trainer)


@pytest.mark.parametrize(("before", "after"), [((1, 1), (2, 1)), ((2, 2), (4, 1)), ((2, 1), (1, 1))])
def test_checkpoint_resumes_on_another_layout(before, after, one_process_trainer, tmp_path):
    launch("trainer", before[0], tmp_path, 4, processes=before[0] * before[1])
    launch("trainer", after[0], tmp_path, 6, tmp_path / "checkpoint-4", processes=after[0] * after[1])
    _compare_trainers(tmp_path, one_process_trainer)


def test_killed_process_ends_the_others_with_an_error(one_process_trainer, tmp_path):
    """No launcher here that would end the survivor: it must find out by itself. The last checkpoint is whole."""
    survivor, killed = start(["trainer", "2", str(tmp_path), "6", "", "3"], 2, str(tmp_path))
    assert killed.wait(timeout=120) == 17
    assert survivor.wait(timeout=60) > 0  # the collectives' time-out is 30 seconds
    assert "remote worker" in (tmp_path / "0.log").read_text()
    launch("trainer", 1, tmp_path, 6, tmp_path / "checkpoint-2", processes=1)
    _compare_trainers(tmp_path, one_process_trainer)
