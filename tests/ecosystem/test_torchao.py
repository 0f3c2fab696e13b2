"""torchao: weights of 8 and 4 bits when a folder is loaded."""

import pytest
import torch
from checks import make_model
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

from modeling_longnet import LongNetForCausalLM

quantization = pytest.importorskip("torchao.quantization")

LIBRARY = "torchao"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
GROUPS = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
# A configuration, and the largest relative error of the logits that its bits explain.
WAYS = {
    "8-bit weights": (quantization.Int8WeightOnlyConfig, {}, 0.1),
    "8-bit products": (quantization.Int8DynamicActivationInt8WeightConfig, {}, 0.1),
    "4-bit weights": (quantization.IntxWeightOnlyConfig, GROUPS, 0.5),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_quantized(tmp_path, way):
    """8-bit and 4-bit weights (Int8WeightOnlyConfig, Int8Dynamic..., IntxWeightOnlyConfig): load, generate"""
    make, arguments, largest = way
    ids, model = torch.randint(0, 29, (2, 21)), make_model(LongNetForCausalLM, torch.bfloat16, **SIZES)
    model.save_pretrained(tmp_path)
    loaded = LongNetForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=TorchAoConfig(make(**arguments))
    )
    assert type(loaded.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    actual, expected = loaded(ids).logits.float(), model(ids).logits.float()
    assert 0 < (actual - expected).norm() / expected.norm() < largest
    generated = loaded.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated[:, 21], loaded(ids).logits[:, -1].argmax(-1))


def test_int4_needs_a_gpu(tmp_path):
    """Int4WeightOnlyConfig: torchao's kernels refuse a CPU, with a Llama as with a LongNet"""
    llama = LlamaConfig(vocab_size=29, num_hidden_layers=1, **SIZES)
    for name, model in (("llama", LlamaForCausalLM(llama)), ("ours", make_model(LongNetForCausalLM, **SIZES))):
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        config = TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=32))
        with pytest.raises(RuntimeError, match="conversion"):
            type(model).from_pretrained(tmp_path / name, dtype=torch.bfloat16, quantization_config=config)
