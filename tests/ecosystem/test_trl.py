"""TRL: fine-tuning, preferences, rewards, reinforcement learning."""

import pytest
import torch
from checks import make_model
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from modeling_longnet import LongNetForCausalLM

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

LIBRARY = "trl"
COMMON = {
    "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_steps": 3, "logging_steps": 1, "save_strategy": "no",
    "per_device_train_batch_size": 2, "learning_rate": 1e-2, "bf16": False,
}  # fmt: skip
PROMPTS = ["what is two plus three?", "what is five?", "is two five?", "two?"]


def make(make_model_of, tokenizer, **fields):
    """A model of this tokenizer's size, branches that end within the texts."""
    return make_model(
        make_model_of, torch.float32, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, **fields,
    )  # fmt: skip


def preferences():
    return Dataset.from_list([{"prompt": p, "chosen": " it is five.", "rejected": " what?"} for p in PROMPTS])


def check(trainer):
    """Train; the loss is finite, and every trainable weight that the loss reaches has moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert torch.isfinite(torch.tensor(losses)).all()
    moved = [not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before]
    assert sum(moved) > 0.9 * len(moved)
    return losses


@pytest.mark.parametrize("how", ["plain", "packed", "completion only", "LoRA"])
def test_sft(tokenizer, tmp_path, how):
    """SFTTrainer: plain, packed, completion only, LoRA"""
    options = {"packed": {"packing": True, "max_length": 32}, "completion only": {"completion_only_loss": True}}
    arguments = trl.SFTConfig(str(tmp_path), **COMMON, **options.get(how, {}))
    rows = [{"prompt": p, "completion": " it is five."} for p in PROMPTS]
    rows = rows if how == "completion only" else [{"text": x["prompt"] + x["completion"]} for x in rows]
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"]) if how == "LoRA" else None
    model = make(LongNetForCausalLM, tokenizer)
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(rows * 4), processing_class=tokenizer, peft_config=config
    )
    losses = check(trainer)
    assert losses[-1] < losses[0]


@pytest.fixture
def saved(tokenizer, tmp_path):
    """A model loaded from a folder, from which TRL loads it once more as its reference."""
    make(LongNetForCausalLM, tokenizer).save_pretrained(tmp_path / "saved")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)


@pytest.mark.parametrize("how", ["given", "by name", "LoRA"])
def test_dpo(tokenizer, saved, tmp_path, how):
    """DPOTrainer: with a reference model, with one loaded by name, with LoRA"""
    arguments, options, model = trl.DPOConfig(str(tmp_path), **COMMON, trust_remote_code=True), {}, saved
    if how != "by name":
        model = make(LongNetForCausalLM, tokenizer)
    if how == "given":
        options["ref_model"] = make(LongNetForCausalLM, tokenizer)
    if how == "LoRA":
        options["peft_config"] = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=preferences(), processing_class=tokenizer, **options)
    check(trainer)


def test_reward(tokenizer, tmp_path):
    """RewardTrainer on AutoModelForSequenceClassification with one label"""
    arguments = trl.RewardConfig(str(tmp_path), **COMMON)
    model = make(AutoModelForSequenceClassification.from_config, tokenizer, num_labels=1)
    check(trl.RewardTrainer(model, args=arguments, train_dataset=preferences(), processing_class=tokenizer))


@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["no reference", "reference"])
def test_grpo(tokenizer, saved, tmp_path, beta):
    """GRPOTrainer: generate, score, train; without and with a reference model"""
    arguments = trl.GRPOConfig(
        str(tmp_path), **COMMON | {"per_device_train_batch_size": 4}, num_generations=4, beta=beta,
        max_completion_length=12, trust_remote_code=True,
    )  # fmt: skip
    rewarded = []

    def reward(completions, **kwargs):
        rewarded.extend(completions)
        return [float(len(set(text))) for text in completions]

    prompts = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    trainer = trl.GRPOTrainer(saved, reward, args=arguments, train_dataset=prompts, processing_class=tokenizer)
    check(trainer)
    assert len(rewarded) == 12
