"""Liger Kernel: what Trainer's switch does."""

import logging

import pytest
import torch
from checks import make_model
from transformers import Trainer, TrainingArguments

from modeling_longnet import LongNetForCausalLM

pytest.importorskip("liger_kernel.transformers")

LIBRARY = "liger_kernel"


def train(folder, use_liger_kernel, seen):
    """The loss of every step and of an evaluation; the logits of the evaluation go to `seen`."""
    torch.manual_seed(0)
    rows = [{name: torch.randint(0, 29, (21,)) for name in ("input_ids", "labels")} for _ in range(4)]
    model = make_model(LongNetForCausalLM, torch.float32)
    arguments = TrainingArguments(
        folder, use_liger_kernel=use_liger_kernel, use_cpu=True, max_steps=3, logging_steps=1, report_to=[],
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    hook = model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.logits))
    loss = trainer.evaluate()["eval_loss"]
    hook.remove()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], loss


def test_the_switch(tmp_path, caplog):
    """use_liger_kernel: Liger logs that it has no kernels for a LongNet; an evaluation keeps no logits"""
    plain, flat = [], []
    expected = train(tmp_path / "plain", False, plain)
    with caplog.at_level(logging.INFO, logger="liger_kernel.transformers.monkey_patch"):
        assert train(tmp_path / "liger", True, flat) == expected
    assert "no Liger kernels supported for model type: longnet" in caplog.text
    assert plain, "the evaluation ran no forward hook"
    assert all(logits is not None for logits in plain)
    assert flat == [None] * len(plain)
