"""What Transformers does with a model: generate in all its ways, Trainer, collators, pipelines.

The library's own model tests live in its repository and are not installed with it; these are the checks of theirs
that matter here.
"""

import copy

import pytest
import torch
from checks import assert_close, make_model
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithFlattening,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_longnet import LongNetCache, LongNetForCausalLM
from modeling_longnet.testing import CACHE

LENGTHS = [11, 29, 3, 18]


@pytest.fixture
def model():
    return make_model(LongNetForCausalLM, position_embedding="rope", pad_token_id=0, num_key_value_heads=3)


@pytest.fixture
def prompts():
    return [torch.randint(1, 29, (n,)) for n in LENGTHS]


def left_padded(prompts):
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, new=40, **kwargs):
    """The new tokens."""
    tokens = model.generate(**inputs, max_new_tokens=new, eos_token_id=None, pad_token_id=0, **kwargs)
    begin = 0 if "inputs_embeds" in inputs else inputs["input_ids"].shape[1]
    return tokens[:, begin:]


def greedy_alone(model, prompts, new=40):
    """Without cache, batch or padding: the argmax of the whole text so far."""
    rows = []
    for prompt in prompts:
        text = prompt[None]
        with torch.no_grad():
            for _ in range(new):
                logits = model(text, use_cache=False).logits[:, -1]
                text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        rows.append(text[0, len(prompt) :])
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_left_padded_batch_equals_each_prompt_alone(model, prompts, implementation):
    model.set_attn_implementation(implementation)
    assert torch.equal(generate(model, left_padded(prompts), do_sample=False), greedy_alone(model, prompts))


@pytest.mark.parametrize("kwargs", [
    pytest.param({"use_cache": False}, id="no cache"),
    pytest.param({"prefill_chunk_size": 7}, id="prefill in chunks"),
    pytest.param({"return_dict_in_generate": False, "min_new_tokens": 3}, id="minimum"),
])  # fmt: skip
def test_greedy_does_not_depend_on_how(model, prompts, kwargs):
    inputs = left_padded(prompts)
    expected = generate(model, inputs, do_sample=False)
    assert torch.equal(generate(model, inputs, do_sample=False, **kwargs), expected)


@pytest.mark.parametrize("kwargs", [
    pytest.param({"do_sample": True, "top_k": 5, "temperature": 0.7}, id="sampling"),
    pytest.param({"num_beams": 3, "do_sample": False}, id="beams"),
    pytest.param({"num_beams": 4, "do_sample": False, "num_return_sequences": 2}, id="best beams"),
    pytest.param({"num_beams": 2, "do_sample": True}, id="beams, sampling"),
    pytest.param({"do_sample": True, "num_return_sequences": 3}, id="several samples"),
])  # fmt: skip
def test_sampling_and_beams_equal_those_without_a_cache(model, prompts, kwargs):
    inputs = left_padded(prompts)
    results = []
    for use_cache in (True, False):
        set_seed(3)
        results.append(generate(model, inputs, use_cache=use_cache, **kwargs))
    assert torch.equal(*results)


@pytest.mark.parametrize("kwargs", [
    pytest.param({"assistant": True}, id="assistant"),
    pytest.param({"prompt_lookup_num_tokens": 4}, id="prompt lookup"),
])  # fmt: skip
def test_assisted_decoding_equals_greedy(model, kwargs):
    """Its drafts are taken back with crop, over segment borders too."""
    prompt = {"input_ids": torch.randint(1, 29, (1, 13)).repeat(1, 2)}
    expected = generate(model, prompt, new=60, do_sample=False)
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = make_model(LongNetForCausalLM, seed=1, num_hidden_layers=1, pad_token_id=0)
        kwargs["assistant_model"].generation_config.num_assistant_tokens = 5
    assert torch.equal(generate(model, prompt, new=60, do_sample=False, **kwargs), expected)


@pytest.mark.parametrize("drafts", [5, 20])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_good_assistant_drafts_over_segment_borders(drafts, seed):
    """A noisy copy, never unsure: most drafts are kept, and the others go back over a border."""
    model = make_model(LongNetForCausalLM, seed=seed, position_embedding="rope", pad_token_id=0)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    assistant.generation_config.num_assistant_tokens = drafts
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0
    prompt = torch.randint(1, 29, (1, 13))
    prompt = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    expected = generate(model, prompt, new=60, do_sample=False)
    assert torch.equal(generate(model, prompt, new=60, do_sample=False, assistant_model=assistant), expected)


def test_generate_from_embeddings(model, prompts):
    inputs = left_padded(prompts)
    expected = generate(model, inputs, do_sample=False)
    embeds = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")), **inputs}
    assert torch.equal(generate(model, embeds, do_sample=False), expected)


def test_going_on_from_a_returned_cache(model, prompts):
    """A chat: each turn feeds only what the cache has not seen."""
    inputs = left_padded(prompts)
    expected = generate(model, inputs, new=30, do_sample=False)
    first = model.generate(
        **inputs, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True
    )
    cache = first[CACHE]
    assert type(cache) is LongNetCache
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 10, dtype=torch.int64)], 1)
    inputs = {"input_ids": first.sequences, "attention_mask": mask}
    rest = generate(model, inputs, new=20, do_sample=False, **{CACHE: cache})
    assert torch.equal(rest, expected[:, 10:])


def test_a_cache_of_the_prompt_serves_several_generations(model):
    prompt = torch.randint(1, 29, (1, 21))
    with torch.no_grad():
        cache = model(prompt[:, :-1], **{CACHE: LongNetCache(model.config)})[CACHE]
    for tail in (3, 7):
        text = torch.cat([prompt[:, :-1], torch.full((1, 2), tail)], 1)
        expected = generate(model, {"input_ids": text}, new=9, do_sample=False)
        again = generate(model, {"input_ids": text}, new=9, do_sample=False, **{CACHE: copy.deepcopy(cache)})
        assert torch.equal(again, expected)


def test_streamers_get_every_token(model, prompts):
    class Collect:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.tokens.append("end")

    streamer = Collect()
    prompt = prompts[0][None]
    tokens = generate(model, {"input_ids": prompt}, new=12, do_sample=False, streamer=streamer)
    assert streamer.tokens == [*prompt[0].tolist(), *tokens[0].tolist(), "end"]


def test_scores_and_logits_of_generate(model, prompts):
    inputs = left_padded(prompts)
    result = model.generate(
        **inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True, output_hidden_states=True,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, result.sequences[row, -6:]])[None]
        with torch.no_grad():
            logits = model(text, use_cache=False).logits[0, -7:-1]
        assert_close("logits", torch.stack(result.logits)[:, row], logits, 1e-5)  # generate keeps float32
    assert [len(states) for states in result.hidden_states] == [3] * 6


def test_eos_ends_rows_apart(model, prompts):
    """A row that has ended is padded, the others go on as if alone."""
    inputs = left_padded(prompts)
    plain = generate(model, inputs, do_sample=False)
    eos = int(plain[0, 10])
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=eos, pad_token_id=0)[:, 29:]
    for row in range(4):
        ends = (plain[row] == eos).nonzero().flatten()
        end = int(ends[0]) + 1 if len(ends) else 40
        assert torch.equal(tokens[row, :end], plain[row, :end])
        assert (tokens[row, end:] == 0).all()


def test_generation_config_is_saved_apart(model, tmp_path):
    model.generation_config = GenerationConfig(max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.save_pretrained(tmp_path)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path)
    assert loaded.generate(torch.tensor([[1, 2, 3]])).shape == (1, 10)


class Texts(Dataset):
    """Random texts of unequal length."""

    def __init__(self, count, longest=23):
        generator = torch.Generator().manual_seed(5)
        lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
        self.texts = [torch.randint(1, 29, (n,), generator=generator).tolist() for n in lengths]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        return {"input_ids": self.texts[index]}


def pad_right(features):
    width = max(len(f["input_ids"]) for f in features)
    columns = {"input_ids": [], "labels": [], "attention_mask": []}
    for feature in features:
        ids, rest = feature["input_ids"], width - len(feature["input_ids"])
        columns["input_ids"].append(ids + [0] * rest)
        # A document's first token is the target of none of its own; with padding before it, it must say so.
        columns["labels"].append([-100, *ids[1:]] + [-100] * rest)
        columns["attention_mask"].append([1] * len(ids) + [0] * rest)
    return {name: torch.tensor(rows) for name, rows in columns.items()}


def pad_left(features):
    batch = pad_right(features)
    lengths = batch["attention_mask"].sum(1).tolist()
    return {name: torch.stack([row.roll(-n) for row, n in zip(x, lengths, strict=True)]) for name, x in batch.items()}


def train(folder, collator=pad_right, rows=8, accumulation=1, **kwargs):
    """Weights after two steps of plain gradient descent on 16 texts."""
    model = make_model(LongNetForCausalLM, pad_token_id=0)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, max_steps=2, seed=1,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, max_grad_norm=0.0, logging_steps=1, **kwargs,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Texts(16), data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.mark.parametrize("how", [
    pytest.param({"rows": 1, "accumulation": 8}, id="one by one"),
    pytest.param({"rows": 4, "accumulation": 2}, id="accumulated"),
    pytest.param({"collator": pad_left}, id="padded on the left"),
    pytest.param({"collator": DataCollatorWithFlattening()}, id="packed"),
    pytest.param({"collator": DataCollatorWithFlattening(), "rows": 2, "accumulation": 4}, id="packed, accumulated"),
    pytest.param({"gradient_checkpointing": True}, id="gradient checkpointing"),
])  # fmt: skip
def test_training_does_not_depend_on_how_a_batch_is_cut(tmp_path, how):
    expected, losses = train(tmp_path / "whole")
    weights, other_losses = train(tmp_path / "cut", **how)
    for name, p in expected.items():
        assert_close(name, weights[name], p, 1e-9)
    assert other_losses == pytest.approx(losses, rel=1e-3)  # Trainer rounds them
    assert losses[1] < losses[0]


def test_trainer_evaluates_and_resumes(tmp_path):
    model = make_model(LongNetForCausalLM, torch.float32, pad_token_id=0)
    arguments = TrainingArguments(
        tmp_path, max_steps=4, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=4
    )
    trainer = Trainer(model, arguments, train_dataset=Texts(16), eval_dataset=Texts(8), data_collator=pad_right)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    fresh = make_model(LongNetForCausalLM, torch.float32, seed=9, pad_token_id=0)
    trainer = Trainer(fresh, arguments, train_dataset=Texts(16), eval_dataset=Texts(8), data_collator=pad_right)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert_close(name, q.detach(), p.detach(), 1e-6)
