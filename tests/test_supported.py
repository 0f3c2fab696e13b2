"""Flags and plans tell other software what it may split or replace in a model: the result is right, or refused."""

import fnmatch

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from checks import assert_close, refused
from sharding_worker import launch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from modeling_longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    LongNetImageConfig,
    LongNetImageEncoder,
    LongNetModel,
    LongNetPreTrainedModel,
    LongNetSlideConfig,
    LongNetSlideEncoder,
    SequenceSharding,
    use_dilated_attention,
)

SIZES = {
    "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "segment_lengths": [4], "dilation_rates": [1],
}  # fmt: skip
IDS = torch.zeros(1, 3, dtype=torch.int64)


def make_text(model_class, **fields):
    return model_class(LongNetConfig(**SIZES | {"vocab_size": 7} | fields))


def make_slides():
    return LongNetSlideEncoder(LongNetSlideConfig(tile_features=5, **SIZES))


def make_images(**fields):
    return LongNetImageEncoder(LongNetImageConfig(image_size=8, patch_size=4, **SIZES, **fields))


MODELS = {
    "LongNetModel": (lambda: make_text(LongNetModel), {"input_ids": IDS}),
    "LongNetForCausalLM": (lambda: make_text(LongNetForCausalLM), {"input_ids": IDS}),
    "LongNetSlideEncoder": (
        make_slides,
        {"tiles": torch.zeros(1, 3, 5), "coordinates": torch.zeros(1, 3, 2, dtype=torch.int64)},
    ),
    "LongNetImageEncoder": (make_images, {"pixel_values": torch.zeros(1, 3, 8, 8)}),
}


@pytest.fixture(params=MODELS)
def model_and_inputs(request):
    make, inputs = MODELS[request.param]
    return make(), inputs


@pytest.mark.parametrize("make", [
    pytest.param(lambda: make_text(LongNetForCausalLM), id="language model"),
    pytest.param(lambda: make_text(LongNetForCausalLM, tie_word_embeddings=True), id="tied"),
    pytest.param(lambda: make_text(LongNetModel, vocab_size=None), id="no vocabulary"),
    pytest.param(lambda: make_text(LongNetModel, final_layer_norm=False), id="no final norm"),
    pytest.param(make_slides, id="slides"),
    pytest.param(make_images, id="images"),
    pytest.param(lambda: make_images(final_layer_norm=True), id="images, final norm"),
])  # fmt: skip
def test_the_fsdp_plan_names_what_is_there(make):
    """Every rule matches, and the rules hold all but the encoders' own parameters."""
    model = make()
    names = [name for name, _ in model.named_modules()]
    for rule in model.fsdp_plan:
        assert fnmatch.filter(names, rule), f"{rule} matches nothing"
    left = [
        n for n, _ in model.named_parameters() if not any(fnmatch.fnmatch(n, f"{rule}.*") for rule in model.fsdp_plan)
    ]
    assert {name.split(".")[0] for name in left} <= {"tile_embed", "cls_token", "norm", "patch_embed", "position_embed"}


def test_models_sharded_by_their_plan_train_as_whole_ones(tmp_path):
    tied = make_text(LongNetForCausalLM, tie_word_embeddings=True)
    for name, (model, inputs) in {
        "text": (MODELS["LongNetForCausalLM"][0](), {"input_ids": IDS, "labels": IDS}),
        "tied": (tied, {"input_ids": IDS, "labels": IDS}),
        "slides": (make_slides(), MODELS["LongNetSlideEncoder"][1] | {"tiles": torch.randn(1, 3, 5).double()}),
        "images": (make_images(), {"pixel_values": torch.randn(1, 3, 8, 8).double()}),
    }.items():
        model.save_pretrained(tmp_path / name)
        torch.save(inputs, tmp_path / name / "inputs.pt")
    launch("fsdp_plan", tmp_path, processes=2)


def test_the_fsdp_plan_is_not_saved(tmp_path):
    make_text(LongNetForCausalLM).save_pretrained(tmp_path)
    assert "fsdp_plan" not in (tmp_path / "config.json").read_text()


def test_gradient_checkpointing_changes_no_gradient(model_and_inputs):
    model, inputs = model_and_inputs
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        calls = []
        hook = model.base_model.layers[0].self_attn.register_forward_hook(lambda *args, calls=calls: calls.append(args))
        model.train()(**inputs)[0].sum().backward()
        hook.remove()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert_close(name, gradients[1][name], expected, 1e-6)


def test_flags_say_what_is_supported(model_and_inputs):
    model, _ = model_and_inputs
    assert model.supports_gradient_checkpointing
    assert not model.supports_context_parallel
    assert not model.is_backend_compatible(), "vLLM and SGLang ask this before they replace the attention"
    assert not model.supports_tp_plan
    assert not model.supports_pp_plan
    assert not model._can_compile_fullgraph
    assert not model._supports_flex_attn


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"pp_size": 2}, {"fsdp_size": 2, "tp_size": 2}], ids=str)
def test_splitting_a_layer_or_the_stack_is_refused(model_and_inputs, sizes, tmp_path):
    """Transformers' pipeline looks for a norm named `norm`: it would apply the final norm after every stage."""
    model, _ = model_and_inputs
    model.save_pretrained(tmp_path)
    with refused("no tensor or pipeline parallelism", "fsdp_size", "'tp_size': 2" if "tp_size" in sizes else "pp_size"):
        type(model).from_pretrained(tmp_path, distributed_config=sizes)
    type(model).from_pretrained(tmp_path, distributed_config={"tp_size": 1, "fsdp_size": 1, "pp_size": 1})


def test_continuous_batching_is_refused():
    """Transformers would return empty texts, with an error in each result."""
    model = make_text(LongNetForCausalLM)
    with refused("continuous batching", "generate() on batches"):
        model.generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=3)
    with refused("continuous batching"), model.continuous_batching_context_manager():
        pass


def subclasses(base):
    return {base}.union(*map(subclasses, base.__subclasses__()))


@pytest.mark.parametrize("model_class", sorted(subclasses(LongNetPreTrainedModel), key=lambda x: x.__name__))
def test_no_class_takes_a_servers_attention(model_class):
    """vLLM asks the first class of the folder's `auto_map`, whichever that is."""
    assert not model_class.is_backend_compatible()
    assert not model_class._supports_attention_backend


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_a_servers_attention_is_refused(model_and_inputs, server, monkeypatch):
    """Servers register their attention, build the model for it whatever the flags say, and call it without a cache."""
    dense = {server: lambda *args, **kwargs: pytest.fail("dense attention ran")}
    monkeypatch.setattr(AttentionInterface, "_global_mapping", AttentionInterface._global_mapping | dense)
    model, inputs = model_and_inputs
    config = model.config
    config.get_text_config()._attn_implementation = server
    with refused(f"attn_implementation='{server}'", "'eager', 'sdpa'"):
        type(model)(config)(**inputs)
    if "input_ids" in inputs:
        with refused(f"attn_implementation='{server}'"):
            type(model)(config)(**inputs, use_cache=False, return_dict=False, attention_instances={})


@pytest.mark.parametrize("sharding", [ParallelismConfig, SequenceSharding])
def test_dilated_attention_of_a_llama_needs_whole_sequences(sharding, monkeypatch):
    """Accelerate would drop its mask and hand each process a part; SequenceSharding does not shard such a model."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = use_dilated_attention(LlamaForCausalLM(LlamaConfig(vocab_size=7, **sizes)), [4], [1])
    expected = model(IDS).logits
    for size in (1, 2):
        monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", sharding(cp_size=size))
        if size == 1:
            assert torch.equal(model(IDS).logits, expected)
            continue
        with refused(f"{sharding.__name__} with cp_size=2", "use_dilated_attention", "whole sequences"):
            model(IDS)
        model.set_attn_implementation("sdpa")
        model(IDS)


def test_accelerates_own_context_parallelism_is_refused(model_and_inputs, monkeypatch):
    model, inputs = model_and_inputs
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(cp_size=2))
    with refused("ParallelismConfig with cp_size=2", "SequenceSharding"):
        model(**inputs)
