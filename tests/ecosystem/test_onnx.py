"""ONNX: the dense reference, and a decoding step with its cache, run by ONNX Runtime."""

import pytest
import torch
from checks import assert_close, make_model

from modeling_longnet import ExportableDecoder, LongNetForCausalLM, parse_pattern

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

LIBRARY = "onnxruntime"


def draw(batch, length):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :4] = mask[1, -5:] = 0
    return {"input_ids": torch.randint(0, 29, (batch, length)), "attention_mask": mask}


def test_exported(tmp_path):
    """logits of any batch and length, with a mask, from an attn_implementation="eager" model"""
    model = make_model(LongNetForCausalLM, torch.float32, implementation="eager")
    sizes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in draw(2, 9)}
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (), path, kwargs=draw(3, 21), dynamic_shapes=sizes, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for inputs in (draw(3, 21), draw(2, 37)):
        [actual] = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        real, expected = inputs["attention_mask"].bool(), model(**inputs).logits
        assert_close("logits", torch.from_numpy(actual)[real], expected[real], 1e-5)


def test_exported_decoding(tmp_path):
    """generation with the bounded cache as tensors, by `ExportableDecoder`, any attn_implementation"""
    fields = {"num_hidden_layers": 2, "position_embedding": "rope"} | parse_pattern("w4 8/2:1 16/8 once")
    model = make_model(LongNetForCausalLM, torch.float32, **fields)
    decode, ids, path = ExportableDecoder(model), draw(2, 30)["input_ids"], tmp_path / "decode.onnx"
    state = decode.state(batch_size=2)
    torch.onnx.export(decode, (ids[:, :1], *state), path, dynamo=True, verbose=False)
    session, expected = onnxruntime.InferenceSession(path), model(ids).logits
    names = [x.name for x in session.get_inputs()]
    for column in range(30):
        values = (ids[:, column : column + 1], *state)
        inputs = {name: x.numpy() for name, x in zip(names, values, strict=True)}
        logits, *state = map(torch.from_numpy, session.run(None, inputs))
        assert_close(f"column {column}", logits[:, 0], expected[:, column], 1e-5)
