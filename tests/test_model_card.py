"""The card of the model that comes along, and that model itself."""

import json
import re

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from examples import model_card, try_model
from modeling_longnet import LongNetConfig, LongNetForCausalLM

ROOT = model_card.ROOT
REPORT = {
    "contexts": [32, 64], "perplexity": [9.06, 7.5], "perplexity_error": [0.5, None], "tokens": 4096, "bytes": 9000,
    "blocks": 2, "documents": 1, "command": "c", "machine": "m", "torch": "2", "transformers": "5",
    "date": "2026-01-02",
    "model": {
        "parameters": 1_234_567, "vocab_size": 300, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "position_embedding": "rope", "segment_lengths": [64], "dilation_rates": [8], "window_size": 16,
        "query_rates": [1],
    },
    "text_digest": None,
    "training": {
        "text": "python", "steps": 3, "sequence_length": 32, "tokens": 96, "bfloat16": True,
        "muon_learning_rate": 0.07, "learning_rate": 0.003, "warmup_steps": 5, "seed": 11,
    },
}  # fmt: skip


def test_the_card_is_the_one_of_the_stored_results():
    """If it fails, run `make figures`."""
    assert model_card.CARD.read_text() == str(model_card.make_repository_card())


def test_the_metadata_are_valid_for_the_hub():
    """As huggingface_hub reads them, without a network: every field by its class, the results as a model index."""
    card = ModelCard.load(model_card.CARD, ignore_metadata_errors=False)
    written = yaml.safe_load(card.data.to_yaml())
    assert {"language", "license", "datasets", "model-index", "tags", "metrics", "library_name"} <= written.keys()
    assert yaml.safe_load(ModelCardData(**card.data.to_dict(), ignore_metadata_errors=False).to_yaml()) == written
    scores = json.loads((ROOT / "docs" / "demo.json").read_text())
    expected = {f"{n:,} tokens": round(p, 2) for n, p in zip(scores["contexts"], scores["perplexity"], strict=True)}
    assert len(card.data.eval_results) == len(model_card.SHOWN)
    for result in card.data.eval_results:
        assert isinstance(result, EvalResult)
        assert expected[result.metric_name.removeprefix("perplexity, context of ")] == result.metric_value
        assert result.dataset_type in written["datasets"]


def test_the_card_says_what_a_reader_must_know():
    text = ModelCard.load(model_card.CARD).text
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Use", "Training", "Evaluation", "Limits", "Bias and risks", "Licence", "Citation",
    ]  # fmt: skip
    assert "**Intended use.**" in text
    assert "**Out of scope.**" in text
    assert "$" not in text


def test_numbers_come_from_the_reports():
    other = REPORT | {
        "contexts": [32], "perplexity": [4.53], "perplexity_error": [0.25], "bytes": 9001, "date": "2026-01-03",
        "model": REPORT["model"] | {"window_size": None, "dilation_rates": [1]},
    }  # fmt: skip
    repeated = REPORT | {"perplexity": [9.0, 7.0]}
    text = str(model_card.fill_card(REPORT, [other, repeated]))
    for line in (
        "| 32 | 9.1 +- 0.5 | 4.5 +- 0.2 | 9.0 +- 0.5 |",
        "| 64 | 7.5 |  | 7.0 |",
        "| parameters | 1,234,567 |",
        "Muon (learning rate\n0.07) for the blocks' matrices and AdamW (0.003) for the rest, cosine schedule with 5\n",
        "seed 11.",
    ):
        assert line in text, line
    assert "Its lowest perplexity is 7.50, at a context of 64 tokens." in text
    assert "Its perplexity divided by that of the column *dense* is 2.000 at 32." in text
    assert "Its perplexity divided by that of the column *LongNet, repeated* is 1.007 at 32 and 1.071" in text
    assert "Those of 2026-01-03 used slightly different text" in text


def test_the_model_that_comes_along_is_small_and_the_demos():
    folder = try_model.PRETRAINED
    assert {path.name for path in folder.iterdir()} == set(try_model.FILES)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000
    written = json.loads((ROOT / "configuration" / "longnet-demo.json").read_text())
    config = LongNetConfig.from_pretrained(folder)
    assert {name: getattr(config, name) for name in written} == written
    report = json.loads((ROOT / "docs" / "demo.json").read_text())
    model = LongNetForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == report["model"]["parameters"]
    assert str(model.dtype) == "torch.bfloat16"


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00"], ids=["empty", "binary"])
def test_a_file_without_text_is_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="holds no UTF-8 text"):
        try_model.read_file(tmp_path / "file")
