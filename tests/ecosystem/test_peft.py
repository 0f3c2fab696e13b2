"""PEFT: adapters on every part of the model, saved and loaded."""

import pytest
import torch
from checks import assert_close, make_model

from modeling_longnet import LongNetForCausalLM

peft = pytest.importorskip("peft")

LIBRARY = "peft"

ADAPTERS = {
    "LoRA on attention": {"target_modules": ["q_proj", "v_proj"]},
    "LoRA on embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on lm_head": {"target_modules": ["lm_head"]},
    "trainable_token_indices": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_trains_generates_and_loads(tmp_path, adapter, tied):
    """LoRA on any part, trainable_token_indices, modules_to_save: train, generate, save, load"""
    model = peft.get_peft_model(
        make_model(LongNetForCausalLM, torch.float32, tie_word_embeddings=tied), peft.LoraConfig(**adapter)
    )
    ids = torch.randint(0, 29, (2, 19))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model.train()(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    expected = model.eval()(input_ids=ids).logits
    generated = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated[:, 19], expected[:, -1].argmax(-1))
    model.save_pretrained(tmp_path)
    base = make_model(LongNetForCausalLM, torch.float32, tie_word_embeddings=tied)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close("logits", loaded(input_ids=ids).logits, expected, 1e-6)
