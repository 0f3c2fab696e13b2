"""Folders and state files that 68edab1 saved, before the inside was rebuilt: they load and give the same numbers."""

import shutil
from pathlib import Path

import pytest
import torch
from checks import assert_close
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from modeling_longnet import stream

FOLDER = Path(__file__).parent / "fixtures" / "saved_by_68edab1"
TOLERANCE = 2e-5  # float32, on another machine too


def load(name: str, auto=AutoModel):
    return auto.from_pretrained(FOLDER / name).eval(), load_file(FOLDER / f"{name}.safetensors")


def test_language_model():
    model, expected = load("language_model", AutoModelForCausalLM)
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"] == 1
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    assert_close("logits", logits[real], expected["logits"][real], TOLERANCE)
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(generated, expected["generated"])


def test_slide_encoder():
    model, expected = load("slide_encoder")
    with torch.no_grad():
        outputs = model(expected["tiles"], expected["coordinates"], attention_queries=[0, 5])
    for name in ("pooler_output", "layer_embeddings", "attention_maps"):
        assert_close(name, outputs[name], expected[name], TOLERANCE)


def test_image_encoder():
    model, expected = load("image_encoder")
    with torch.no_grad():
        outputs = model(expected["pixel_values"])
    for name in ("last_hidden_state", "logits"):
        assert_close(name, outputs[name], expected[name], TOLERANCE)


@pytest.mark.parametrize("chunk_size", [13, 60])
def test_a_reading_resumes_from_its_state(tmp_path, chunk_size):
    model, expected = load("language_model", AutoModelForCausalLM)
    state = shutil.copy(FOLDER / "stream_state.safetensors", tmp_path)
    parts = list(stream(model, expected["tokens"], chunk_size=chunk_size, state_file=state, progress=False))
    begin = parts[0].start
    assert begin > 1
    log_probs = torch.cat([part.log_probs for part in parts])
    assert_close("log-probabilities", log_probs, expected["log_probs"][begin - 1 :], TOLERANCE)
    total = expected["log_probs"].double().sum().item()
    assert parts[-1].total == pytest.approx(total, rel=1e-5)
