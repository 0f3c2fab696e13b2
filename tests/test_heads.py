"""Task heads: their losses, padding, training by the stock Trainer, and loading through the Auto classes."""

import pytest
import torch
import transformers
from checks import assert_close, make_config, make_model, refused
from safetensors.torch import load_file, save_file
from test_hub import run_python
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from modeling_longnet import LongNetForCausalLM, LongNetImageConfig, LongNetImageEncoder, LongNetModel
from modeling_longnet.image_encoder import LongNetForImageClassification

LENGTHS = [23, 9, 17]
ENCODER = {"is_causal": False, "position_embedding": "rope"}
HEADS = {
    "AutoModelForMaskedLM": {"labels": "tokens"},
    "AutoModelForSequenceClassification": {"labels": "sequences"},
    "AutoModelForTokenClassification": {"labels": "tokens"},
    "AutoModelForQuestionAnswering": {"start_positions": "places", "end_positions": "places"},
}


def make_head(name, dtype=torch.float64, **fields):
    return make_model(getattr(transformers, name).from_config, dtype, **ENCODER | fields)


def pad(rows, side, value):
    """(3, longest) of rows of these lengths, padded with `value`."""
    left = side == "left"
    return torch.nn.utils.rnn.pad_sequence(rows, True, value, padding_side="left" if left else "right")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_over_many_tokens_is_exact(dtype):
    """More tokens than float16 can count, and a sum beyond its range."""
    model = make_head("AutoModelForSequenceClassification", dtype)
    hidden_states = torch.full((1, 70_000, 8), 2.0, dtype=dtype)
    assert (model._pool(hidden_states, None, None) == 2).all()


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in HEADS if "MaskedLM" not in name])
def test_a_padded_batch_equals_each_row_alone(name, side, is_causal):
    model = make_head(name, is_causal=is_causal, pad_token_id=0)
    rows = [torch.randint(1, 29, (n,)) for n in LENGTHS]
    inputs = {"input_ids": pad(rows, side, 0), "attention_mask": pad([torch.ones_like(x) for x in rows], side, 0)}
    logits = model(**inputs)[0]
    for row, ids, real in zip(logits, rows, inputs["attention_mask"].bool(), strict=True):
        expected = model(ids[None])[0][0]
        assert_close("logits", row if "Sequence" in name else row[real], expected, 1e-11)
    if is_causal and "Sequence" in name and side == "right":
        assert_close("without a mask", model(inputs["input_ids"])[0], logits, 1e-11)


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_which_hidden_states_are_classified(is_causal):
    model = make_head("AutoModelForSequenceClassification", is_causal=is_causal)
    ids = torch.randint(0, 29, (2, 13))
    hidden = model.model(ids).last_hidden_state
    assert_close("logits", model(ids).logits, model.score(hidden[:, -1] if is_causal else hidden.mean(1)), 1e-11)


@pytest.mark.parametrize(
    ("count", "labels", "loss"),
    [
        (4, torch.tensor([3, 0, 2]), cross_entropy),
        (1, torch.tensor([0.5, -1.0, 2.0]), lambda logits, labels: mse_loss(logits[:, 0], labels.double())),
        (4, torch.tensor([[0.0, 1, 1, 0]] * 3), lambda x, labels: binary_cross_entropy_with_logits(x, labels.double())),
    ],
    ids=["classes", "values", "several classes"],
)
def test_the_loss_of_sequences(count, labels, loss):
    model = make_head("AutoModelForSequenceClassification", num_labels=count)
    ids = torch.randint(0, 29, (3, 13))
    outputs = model(ids, labels=labels.double() if labels.is_floating_point() else labels)
    assert outputs.logits.shape == (3, count)
    assert_close("loss", outputs.loss, loss(outputs.logits, labels))


def test_the_loss_of_tokens_and_answers():
    ids, labels = torch.randint(0, 29, (2, 13)), torch.randint(0, 5, (2, 13))
    labels[0, 4:] = -100
    model = make_head("AutoModelForTokenClassification", num_labels=5)
    outputs = model(ids, labels=labels)
    expected = cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    assert_close("tokens", outputs.loss, expected, 1e-6)  # Transformers computes it in float32
    model = make_head("AutoModelForQuestionAnswering")
    start, end = torch.tensor([3, 0]), torch.tensor([12, 7])
    outputs = model(ids, start_positions=start, end_positions=end, output_hidden_states=True)
    expected = (cross_entropy(outputs.start_logits, start) + cross_entropy(outputs.end_logits, end)) / 2
    assert_close("answers", outputs.loss, expected)
    assert len(outputs.hidden_states) == 3
    assert_close("of a tuple", model(ids, return_dict=False)[1], outputs.end_logits, 0)


def test_the_loss_of_masked_tokens():
    """Labels are not shifted; the logits of the whole batch are held in eval mode alone."""
    model = make_head("AutoModelForMaskedLM", pad_token_id=0)
    ids, labels = torch.randint(1, 29, (2, 21)), torch.randint(1, 29, (2, 21))
    labels[:, 5:] = -100
    outputs = model(ids, labels=labels)
    expected = cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    assert_close("loss", outputs.loss, expected)
    assert_close("of the batch", model(ids, labels=labels, num_items_in_batch=20).loss, expected * 10 / 20)
    training = model.train()(ids, labels=labels)
    assert_close("in training", training.loss, expected)
    assert training.logits is None
    assert not model.can_generate()
    with refused("labels are next tokens", "shift_labels"):
        make_model(LongNetForCausalLM, is_causal=False)(ids, labels=labels)
    with refused("is_causal=False"):
        AutoModelForMaskedLM.from_config(make_config())


class Rows(torch.utils.data.Dataset):
    """Eight rows whose first token tells every target."""

    def __init__(self, name):
        self.targets = HEADS[name]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(2, 29, (13,), generator=torch.Generator().manual_seed(index))
        ids[0] = index % 2
        kinds = {"tokens": torch.full((13,), index % 2), "sequences": index % 2, "places": index % 2}
        return {"input_ids": ids} | {key: kinds[kind] for key, kind in self.targets.items()}


def train(folder, name, rows, accumulation, steps):
    model = make_head(name, dropout=0.0)
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation, max_steps=steps, seed=1,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, max_grad_norm=0.0, logging_steps=1, per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows(name), eval_dataset=Rows(name))
    trainer.train()
    return model, trainer


@pytest.mark.parametrize("name", HEADS)
def test_trainer_trains_a_head(name, tmp_path):
    """The loss falls, accumulated steps are whole ones, and `predict` gets logits and labels."""
    _, trainer = train(tmp_path, name, 8, 1, 6)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    predicted = trainer.predict(Rows(name))
    logits = predicted.predictions[0] if "Question" in name else predicted.predictions
    assert logits.shape[0] == 8
    assert predicted.label_ids is not None
    one, _ = train(tmp_path, name, 8, 1, 1)
    cut, _ = train(tmp_path, name, 2, 4, 1)
    for (key, p), q in zip(one.named_parameters(), cut.parameters(), strict=True):
        assert_close(key, q.detach(), p.detach(), 1e-9)


@pytest.mark.parametrize("name", HEADS)
def test_weights_of_other_models_load(name, tmp_path):
    """Weights of a language model or a base model; only the head is new."""
    for source in (make_model(LongNetForCausalLM, torch.float32), make_model(LongNetModel, torch.float32, seed=1)):
        source.save_pretrained(tmp_path)
        loaded, info = getattr(transformers, name).from_pretrained(tmp_path, is_causal=False, output_loading_info=True)
        head = {"AutoModelForMaskedLM": "lm_head", "AutoModelForQuestionAnswering": "qa_outputs"}.get(name, "score")
        carried = head == "lm_head" and isinstance(source, LongNetForCausalLM)
        assert {key.split(".")[0] for key in info["missing_keys"]} == (set() if carried else {head})
        for key, p in source.base_model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[key], p), key


REMOTE = """
import transformers
folder, work = sys.argv[1:]
inputs = load_file(work + "/inputs.safetensors")
results, names = {}, []
for name in %r:
    model = getattr(transformers, name).from_pretrained(folder + "/" + name, trust_remote_code=True).eval()
    outputs = model(inputs["images"]) if "Image" in name else model(inputs["ids"])
    results[name] = outputs[0].detach().contiguous()
    names.append(type(model).__module__)
    model.save_pretrained(work + "/again")
    names.append(type(getattr(transformers, name).from_pretrained(work + "/again", trust_remote_code=True)).__module__)
# A folder of the language model holds the code of every head.
other = transformers.AutoModelForSequenceClassification.from_pretrained(
    folder + "/AutoModelForMaskedLM", trust_remote_code=True, num_labels=3
)
names.append(type(other).__module__)
save_file(results, work + "/results.safetensors")
print(json.dumps(names))
"""


def test_heads_load_without_the_package(tmp_path):
    """Through the Auto classes, with remote code, in an interpreter without this package."""
    ids, images, expected = torch.randint(0, 29, (2, 13)), torch.randn(2, 3, 8, 8), {}
    models = {name: make_head(name, torch.float32) for name in HEADS}
    models["AutoModelForImageClassification"] = AutoModelForImageClassification.from_config(make_image_config())
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
        expected[name] = model(images if "Image" in name else ids)[0]
    save_file({"ids": ids, "images": images}, tmp_path / "inputs.safetensors")
    modules = run_python(REMOTE % list(models), tmp_path, tmp_path, home=tmp_path)
    assert all(name.startswith("transformers_modules.") for name in modules), modules
    found = load_file(tmp_path / "results.safetensors")
    for name, logits in expected.items():
        assert torch.equal(found[name], logits), name


def test_a_head_has_its_own_model_card(tmp_path):
    make_head("AutoModelForTokenClassification", torch.float32).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert "from transformers import AutoModelForTokenClassification" in card


def make_image_config(**fields):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    return LongNetImageConfig(segment_lengths=[4], dilation_rates=[1], **sizes | fields)


def test_images_are_classified(tmp_path):
    """With the head of a checkpoint (LongViT has one), with a new one, and by Trainer."""
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 4, 2, 3, 1, 4])
    encoder = LongNetImageEncoder(make_image_config(num_classes=5)).eval()
    encoder.save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    outputs = model(images, labels=labels, output_hidden_states=True)
    assert_close("logits", outputs.logits, encoder(images).logits, 0)
    assert_close("loss", outputs.loss, cross_entropy(outputs.logits, labels), 1e-6)
    assert len(outputs.hidden_states) == 2
    assert_close("of a tuple", model(images, return_dict=False)[0], outputs.logits, 0)
    other = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other(images).logits.shape == (6, 7)
    other.save_pretrained(tmp_path / "other")
    assert LongNetImageEncoder.from_pretrained(tmp_path / "other").config.num_classes == 7
    new = AutoModelForImageClassification.from_config(make_image_config(num_labels=5))
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    arguments = TrainingArguments(
        tmp_path / "trained", max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=3e-3
    )
    trainer = Trainer(new, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_a_classifier_leaves_the_callers_config_alone():
    config = make_image_config()
    assert LongNetForImageClassification(config).head.out_features == 2
    assert config.num_classes == 0
    assert LongNetImageEncoder(config)(torch.randn(1, 3, 8, 8)).logits is None


def test_two_numbers_of_classes_are_refused():
    with refused("num_classes=5 contradicts num_labels=3"):
        make_image_config(num_classes=5, num_labels=3)
    with refused("num_classes=2 contradicts num_labels=1"):
        make_image_config(num_classes=2, id2label={0: "a"})
    assert make_image_config(num_classes=3, num_labels=3).num_labels == 3


@pytest.mark.parametrize("name", [name for name in HEADS if "MaskedLM" not in name])
def test_shared_sequences_are_refused(name, monkeypatch):
    model = make_head(name)
    monkeypatch.setattr(type(model), "sequence_group", lambda self: "a group")
    with refused("whole sequences"):
        model(torch.randint(0, 29, (2, 13)))


def test_every_head_is_registered():
    for auto in (AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        assert auto.from_config(make_config()).__class__.__name__ == auto.__name__.replace("AutoModel", "LongNet")
