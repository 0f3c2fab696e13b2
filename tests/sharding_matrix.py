"""All tests of sharded sequences: `make test-distributed`, minutes on two cores.

Everything is float64 on gloo, and must equal one process to 1e-12.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sharding_worker import ROOT, TIMEOUT, close, launch, start
from test_examples import TINY, source_file
from transformers.trainer_utils import get_last_checkpoint

LAYOUTS = [(2, 1), (3, 1), (4, 1), (2, 2)]  # sequence x data
IDS = [f"{sequence}x{data}" for sequence, data in LAYOUTS]


@pytest.mark.parametrize("processes", [2, 3, 4, 5])
def test_op_for_any_cut(processes):
    launch("op", 600, processes=processes)


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
    """Return what a Trainer logged and its final weights; losses, summed in float32, are compared separately."""
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


def test_launch_configuration_shards_parameters_on_cpus(one_process_trainer, tmp_path):
    """The stock Trainer under `accelerate launch`; Accelerate itself runs FSDP on accelerators alone."""
    config = ROOT / "configuration" / "accelerate" / "fsdp2_sequence_cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    worker = ["tests/sharding_worker.py", "launched_fsdp2", tmp_path]
    subprocess.run([*command, *worker], cwd=ROOT, env=os.environ | shared, check=True, timeout=240)
    _compare_trainers(tmp_path, one_process_trainer)


@pytest.mark.parametrize(("before", "after"), [((1, 1), (2, 1)), ((2, 2), (4, 1)), ((2, 1), (1, 1))])
def test_checkpoint_resumes_on_another_layout(before, after, one_process_trainer, tmp_path):
    launch("trainer", before[0], tmp_path, 4, processes=before[0] * before[1])
    launch("trainer", after[0], tmp_path, 6, tmp_path / "checkpoint-4", processes=after[0] * after[1])
    _compare_trainers(tmp_path, one_process_trainer)


@pytest.mark.parametrize("data", [1, 2], ids=["2x1", "2x2"])
def test_killed_process_ends_the_others_with_an_error(data, one_process_trainer, tmp_path):
    """No launcher ends the survivors here: they must notice by themselves. The last checkpoint is complete."""
    *survivors, killed = start(["trainer", "2", str(tmp_path), "6", "", "3"], 2 * data, str(tmp_path))
    try:
        assert killed.wait(timeout=120) == -signal.SIGKILL
        end = time.monotonic() + TIMEOUT
        for rank, survivor in enumerate(survivors):
            assert survivor.wait(timeout=max(0, end - time.monotonic())) > 0
            assert re.search(r"Error: .*remote worker", (tmp_path / f"{rank}.log").read_text())
    finally:
        for survivor in survivors:
            survivor.kill()
    last = get_last_checkpoint(tmp_path)
    assert Path(last).name == "checkpoint-2"
    launch("trainer", 2, tmp_path, 6, last, processes=2 * data)
    _compare_trainers(tmp_path, one_process_trainer)


def _finetune(folder: Path, name: str, *launcher: str) -> torch.Tensor:
    """The losses of two steps of `python -m examples.finetune`."""
    options = ["--vocab_size", "300", "--sequence_length", "61", "--held_out", "0.3", "--max_steps", "2"]
    options += ["--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True", "--use_cpu", "True"]
    paths = ["--config", folder / "config.json", "--text", folder / "text", "--output_dir", folder / name]
    subprocess.run(
        [sys.executable, *launcher, "-m", "examples.finetune", *paths, *options],
        env=os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True, timeout=240,
    )  # fmt: skip
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def test_finetuning_launched_by_the_configuration_for_cpus(tmp_path):
    """The losses equal one process's; with data parallelism they would be those of twice the batch."""
    for number in range(6):
        (tmp_path / "text" / f"package{number}").mkdir(parents=True)
        (tmp_path / "text" / f"package{number}" / "a.py").write_text(source_file(f"package{number}", 40))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "longnet", **TINY}))
    configuration = ROOT / "configuration" / "accelerate" / "cpu_gloo.yaml"
    shared = _finetune(tmp_path, "shared", "-m", "accelerate.commands.launch", "--config_file", str(configuration))
    alone = _finetune(tmp_path, "alone")
    assert len(alone) == 2
    torch.testing.assert_close(shared, alone)
