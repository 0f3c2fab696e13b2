"""What Transformers does with a model: generate in all its ways, Trainer, collators, pipelines.

Transformers' tests of models and training run by `make test-transformers`. Its tests of generation are in no
distribution of it: these are the checks of theirs that matter here.
"""

import copy

import pytest
import torch
from checks import assert_close, make_model, refused
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithFlattening,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.generation.utils import DeferredStopCheck

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


def generate_whole(model, text, new):
    """The text and its greedy continuation, without cache."""
    return torch.cat([text, greedy_alone(model, list(text), new)], 1)


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
    pytest.param({"do_sample": True, "min_p": 0.1, "typical_p": 0.9, "repetition_penalty": 1.3}, id="penalties"),
    pytest.param({"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 2}, id="beams, no repetition"),
    pytest.param({"guidance_scale": 1.5}, id="guidance"),
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
    pytest.param({"assistant": True, "do_sample": True, "top_k": 1}, id="assistant, sampling"),
    pytest.param({"prompt_lookup_num_tokens": 4}, id="prompt lookup"),
    pytest.param({"prompt_lookup_num_tokens": 4, "do_sample": True, "top_k": 1}, id="prompt lookup, sampling"),
    pytest.param({"assistant_early_exit": 1}, id="the first layer drafts"),
])  # fmt: skip
def test_assisted_decoding_equals_greedy(model, kwargs):
    """Its drafts are taken back with crop, over segment borders too."""
    prompt = {"input_ids": torch.randint(1, 29, (1, 13)).repeat(1, 2)}
    expected = generate(model, prompt, new=60, do_sample=False)
    kwargs = {"do_sample": False} | kwargs
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = make_model(LongNetForCausalLM, seed=1, num_hidden_layers=1, pad_token_id=0)
        kwargs["assistant_model"].generation_config.num_assistant_tokens = 5
    assert torch.equal(generate(model, prompt, new=60, **kwargs), expected)
    assert torch.equal(generate(model, prompt, new=60, do_sample=False), expected), "the model is as it was"


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


def test_a_model_without_its_decorators_generates(model, prompts):
    """As Accelerate leaves it after `unwrap_model(keep_fp32_wrapper=False)`."""
    expected = generate(model, {"input_ids": prompts[0][None]})
    model.forward = type(model).forward.__wrapped__.__get__(model)
    assert torch.equal(generate(model, {"input_ids": prompts[0][None]}), expected)


def test_early_exit_leaves_the_model_whole():
    """Also if the draft holds the pad token, and if it is interrupted."""
    model = make_model(LongNetForCausalLM, num_hidden_layers=4, pad_token_id=0)
    inputs = {"input_ids": torch.randint(1, 29, (1, 9), generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        model.lm_head.weight[0] *= 3  # the pad token is written now and then
    expected = generate(model, inputs)
    assert (expected == 0).any()
    logits = model(**inputs).logits
    assert torch.equal(generate(model, inputs, assistant_early_exit=2), expected)
    assert torch.equal(model(**inputs).logits, logits)

    def interrupt(*args):
        if model.config.num_hidden_layers == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, inputs, assistant_early_exit=2)
    hook.remove()
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(generate(model, inputs), expected)


class NoForward(torch.nn.Module):
    """Stands in for the blocks: nothing may be computed before the refusal."""

    def forward(self, *args, **kwargs):
        raise AssertionError("the prompt was read before it was refused")


@pytest.mark.parametrize("how", ["a mask", "no mask", "a pad token in a prompt"])
def test_padding_behind_the_prompt_is_refused_at_once(model, prompts, how):
    width = max(map(len, prompts))
    inputs = left_padded(prompts)
    inputs = {name: torch.stack([x.roll(len(p) - width) for x, p in zip(xs, prompts, strict=True)])
              for name, xs in inputs.items()}  # fmt: skip
    words = ["row 0", "attention_mask row 0", 'padding_side = "left"']
    if how != "a mask":
        inputs.pop("attention_mask")
        words = ["row 0 of the prompts holds the pad token", "without an attention_mask", "torch.ones_like"]
    if how == "a pad token in a prompt":
        inputs = {"input_ids": torch.tensor([[3, 0, 5]])}
    layers, model.model.layers = model.model.layers, torch.nn.ModuleList([NoForward(), NoForward()])
    with refused(*words):
        generate(model, inputs)
    model.model.layers = layers
    given = torch.tensor([[3, 0, 5]])
    found = generate(model, {"input_ids": given, "attention_mask": torch.ones_like(given)})
    assert torch.equal(found, greedy_alone(model, [given[0]]))


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


def test_beams_continue_from_a_cache(model):
    prompt = torch.randint(1, 29, (1, 21))
    expected = generate(model, {"input_ids": prompt}, new=12, num_beams=3, do_sample=False)
    with torch.no_grad():
        cache = model(prompt[:, :-1], **{CACHE: LongNetCache(model.config)})[CACHE]
    cache.batch_repeat_interleave(3)
    assert torch.equal(
        generate(model, {"input_ids": prompt}, new=12, num_beams=3, do_sample=False, **{CACHE: cache}), expected
    )


def test_a_given_cache_is_marked(model):
    """By this mark `generate` knows a cache that the caller keeps, in which it must take back a surplus step."""
    ids, cache = torch.randint(1, 29, (1, 5)), LongNetCache(model.config)
    generate(model, {"input_ids": ids}, new=3, do_sample=False, **{CACHE: cache})
    assert cache._is_user_defined
    assert not cache.layers[0].record_past
    made = model.generate(ids, max_new_tokens=3, pad_token_id=0, return_dict_in_generate=True)[CACHE]
    assert not getattr(made, "_is_user_defined", False)


def test_a_late_stop_leaves_a_given_cache_whole(model, monkeypatch):
    """Where the device should not wait, `generate` stops one step late, takes that back and ends its recording."""

    class Event:
        def __init__(self, *args, **kwargs):
            pass

        record = synchronize = lambda self: None

    monkeypatch.setattr(DeferredStopCheck, "is_supported", lambda device, cache, returned, is_assistant: returned)
    monkeypatch.setattr(torch, "Event", Event)
    ids = torch.randint(1, 29, (1, 13))
    plain = generate(model, {"input_ids": ids}, new=30, do_sample=False)
    eos = int(plain[0, 12])
    first = int((plain[0] == eos).nonzero()[0])
    cache = LongNetCache(model.config)
    short = model.generate(
        ids, max_new_tokens=30, do_sample=False, eos_token_id=eos, pad_token_id=0, **{CACHE: cache}
    )  # fmt: skip
    assert torch.equal(short[:, 13:], plain[:, : first + 1])
    assert cache.get_seq_length() == 13 + first
    assert not any(layer.record_past for layer in cache.layers)
    assert torch.equal(
        generate(model, {"input_ids": short}, new=9, do_sample=False, **{CACHE: cache}),
        plain[:, first + 1 : first + 10],
    )


def test_generation_without_a_prompt(model):
    """From the token that begins a text."""
    tokens = model.generate(bos_token_id=3, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens, generate_whole(model, torch.tensor([[3]]), 9))


def test_continuing_from_a_cache_of_embeddings(model):
    ids = torch.randint(1, 29, (2, 14))
    embeds = model.get_input_embeddings()(ids)
    expected = generate(model, {"input_ids": ids}, new=12, do_sample=False)
    first = model.generate(
        inputs_embeds=embeds, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True,
    )  # fmt: skip
    embeds = torch.cat([embeds, model.get_input_embeddings()(first.sequences)], 1)
    rest = generate(model, {"inputs_embeds": embeds}, new=7, do_sample=False, **{CACHE: first[CACHE]})
    assert torch.equal(rest, expected[:, 5:])


def test_a_prompt_has_no_logits_but_the_last(model, monkeypatch):
    """Its other tokens' would be the largest tensor of a long prompt."""
    widths, forward = [], model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: (widths.append(x.shape[1]), forward(x))[1])
    generate(model, {"input_ids": torch.randint(1, 29, (2, 17))}, new=4, do_sample=False)
    assert widths == [1] * 4


@pytest.mark.parametrize(("how", "rows"), [
    pytest.param({"do_sample": False}, 2, id="greedy"),
    pytest.param({"do_sample": True, "top_k": 7}, 2, id="sampling"),
    pytest.param({"num_beams": 3, "do_sample": False}, 6, id="beams"),
    pytest.param({"num_beams": 3, "do_sample": True}, 6, id="beams, sampling"),
])  # fmt: skip
def test_the_returned_dict(model, how, rows):
    """Everything that may be asked for, by its shape; the tokens are those without asking."""
    model.set_attn_implementation("eager")
    inputs = left_padded([torch.randint(1, 29, (n,)) for n in (7, 5)])
    set_seed(3)
    plain = generate(model, inputs, new=11, **how)
    set_seed(3)
    asked = ("scores", "logits", "hidden_states", "attentions")
    result = model.generate(
        **inputs, max_new_tokens=11, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True,
        **{f"output_{name}": True for name in asked}, **how,
    )  # fmt: skip
    assert torch.equal(result.sequences[:, 7:], plain)
    assert all(len(result[name]) == 11 for name in asked)
    assert {tuple(x.shape) for x in (*result.scores, *result.logits)} == {(rows, 29)}
    assert [tuple(x.shape) for x in result.hidden_states[0]] == [(rows, 7, 24)] * 3
    assert {tuple(x.shape) for step in result.hidden_states[1:] for x in step} == {(rows, 1, 24)}
    assert [tuple(x.shape) for x in result.attentions[0]] == [(rows, 6, 7, 7)] * 2
    for step in result.attentions[1:]:  # what a bounded cache holds, and the new token
        for x in step:
            assert x.shape[:3] == (rows, 6, 1)
            assert x.shape[3] <= 1 + 4 + 8 // 2 + 16 // 4
            assert_close("sum", x.sum(-1), torch.ones(rows, 6, 1, dtype=torch.float64))
    assert type(result[CACHE]) is LongNetCache
    assert result[CACHE].get_seq_length() == 7 + 10
    if rows == 6:
        assert result.sequences_scores.shape == (2,)
        assert result.beam_indices.shape == (2, 11)


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


def make_trainer(folder, model, **kwargs):
    arguments = TrainingArguments(
        folder, report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=3,
        include_for_metrics=["inputs", "loss"],
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 29, (8, 17)).tolist()]
    return Trainer(model, arguments, eval_dataset=rows, data_collator=default_data_collator, **kwargs)


@pytest.mark.parametrize("return_dict", [True, False])
def test_metrics_get_the_logits(tmp_path, return_dict):
    """`compute_metrics` and `predict`: values, not only shapes."""
    model, seen = make_model(LongNetForCausalLM, torch.float32, return_dict=return_dict), []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"accuracy": (prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean().item()}

    trainer = make_trainer(tmp_path, model, compute_metrics=compute_metrics)
    if not return_dict:  # a cache cannot be gathered
        model.config.use_cache = False
    ids = torch.tensor([row["input_ids"] for row in trainer.eval_dataset])
    with torch.no_grad():
        logits = model(ids).logits if return_dict else model(ids)[0]
    accuracy = (logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean().item()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(accuracy)
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.metrics["test_accuracy"] == pytest.approx(accuracy)
    assert_close("logits", torch.from_numpy(predicted.predictions), logits, 1e-5)
    assert seen[0].inputs.shape == ids.shape
    assert len(seen[0].losses) == 8


def test_a_loss_of_ones_own_reads_the_logits_in_training(tmp_path):
    class Squared(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.loss + outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    model = make_model(LongNetForCausalLM, torch.float32)
    model.logits_with_labels = True
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    before = model.lm_head.weight.detach().clone()
    Squared(model, arguments, train_dataset=Texts(4), data_collator=pad_right).train()
    assert not torch.equal(model.lm_head.weight, before)


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
