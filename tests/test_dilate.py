"""Transformers' decoders with dilated attention equal their own with one branch, the dense reference with several."""

import copy

import peft
import pytest
import torch
from checks import assert_close, refused
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from examples.evaluate_perplexity import EvaluationArguments, load_model
from modeling_longnet import LongNetConfig, LongNetForCausalLM
from modeling_longnet.attention_context import plan_branches
from modeling_longnet.dilate import DilatedCache, use_dilated_attention
from modeling_longnet.testing import CACHE

SIZES = {
    "vocab_size": 37, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=10, **SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(head_dim=10, tie_word_embeddings=False, **SIZES)),
}
BRANCHES = ([4, 8, 16], [1, 2, 4])


def make_model(family: str = "llama"):
    """A model in float64 whose attention matters: weights far above their usual size."""
    torch.manual_seed(0)
    return sharpen(FAMILIES[family]().double().eval())


def sharpen(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(20)
    return model


def dilated(family: str = "llama", **options):
    return use_dilated_attention(make_model(family), *BRANCHES, **options)


def read(model, ids, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(3, 37, shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_branch_over_the_whole_text_is_the_models_own_attention(family):
    model, ids = make_model(family), ids_of(2, 29)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    own = read(model, ids, attention_mask=mask)
    use_dilated_attention(model, [29], [1])
    assert_close("logits", read(model, ids, attention_mask=mask)[mask == 1], own[mask == 1])
    use_dilated_attention(model, *BRANCHES)
    assert (read(model, ids, attention_mask=mask)[mask == 1] - own[mask == 1]).abs().max() > 1e-3
    model.set_attn_implementation("sdpa")
    assert_close("taken back", read(model, ids, attention_mask=mask), own, 0)


@pytest.mark.parametrize("offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_dense_reference(family, offsets):
    """Also where heads see no key: no branch of rate 1."""
    ids = ids_of(2, 21)
    results = []
    for backend in ("torch", "eager"):
        model = use_dilated_attention(make_model(family), [6, 12], [2, 5], head_offsets=offsets, backend=backend)
        out = model(ids, labels=ids)
        out.loss.backward()
        results.append({"logits": out.logits, **{name: p.grad for name, p in model.named_parameters()}})
    for name, expected in results[1].items():
        # Adding a constant to every key changes no weight: that gradient is rounding alone.
        if "k_proj.bias" not in name:
            assert_close(name, results[0][name], expected, 1e-11)


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_padding_changes_nothing(backend):
    model, ids = dilated(backend=backend), ids_of(3, 23)
    for begin, end in ((0, 23), (9, 23), (0, 5)):
        mask = torch.zeros_like(ids)
        mask[1, begin:end] = 1
        mask[[0, 2]] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = read(model, ids, attention_mask=mask, position_ids=positions)
        assert_close("row", batch[1, begin:end], read(model, ids[1:2, begin:end])[0])
        assert_close("others", batch[[0, 2]], read(model, ids[[0, 2]]))


def test_a_mask_that_is_changed_in_place_counts_as_it_is_now():
    """The layers share one layout within a forward pass; no pass uses that of another."""
    model, ids = dilated(), ids_of(1, 20)
    mask = torch.ones(1, 20, dtype=torch.bool)
    read(model, ids, attention_mask=mask)
    mask[:, :7] = False
    positions = torch.arange(20)[None] - 7
    batch = read(model, ids, attention_mask=mask, position_ids=positions.clamp(min=0))
    assert_close("row", batch[:, 7:], read(model, ids[:, 7:]))


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_packed_documents_do_not_see_each_other(backend):
    model, ids = dilated(backend=backend), ids_of(1, 30)
    lengths = (11, 1, 18)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = read(model, ids, position_ids=positions).split(lengths, 1)
    for part, alone in zip(packed, ids.split(lengths, 1), strict=True):
        assert_close("document", part, read(model, alone))


CACHES = {"own": lambda model: DynamicCache(config=model.config), "bounded": DilatedCache}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("cut", [[37], [1] * 37, [16, 16, 5], [3, 20, 1, 1, 12], [31, 6]], ids=str)
def test_any_cut_into_chunks_gives_the_same(cut, kind):
    model, ids = dilated(), ids_of(3, 37)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    mask[2, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = read(model, ids, attention_mask=mask, position_ids=positions)
    cache, parts, end = CACHES[kind](model), [], 0
    for n in cut:
        new = slice(end, end := end + n)
        parts.append(
            read(model, ids[:, new], attention_mask=mask[:, :end], position_ids=positions[:, new], **{CACHE: cache})
        )
    assert_close("logits", torch.cat(parts, 1)[mask == 1], whole[mask == 1])
    if kind == "bounded":
        assert cache.layers[0].keys.shape[2] == 4 + 8 // 2 + 16 // 4


def test_the_reference_reads_on_from_the_models_own_cache():
    model, ids = dilated(backend="eager"), ids_of(2, 25)
    cache = DynamicCache(config=model.config)
    parts = [read(model, part, **{CACHE: cache}) for part in ids.split([10, 1, 14], 1)]
    assert_close("logits", torch.cat(parts, 1), read(model, ids))


def test_gradients_flow_through_a_chunk_to_those_before():
    """A text read in two parts with the model's own cache, without detaching: as read at once."""
    ids, grads = ids_of(1, 27), []
    for cut in ([27], [10, 17]):
        model = dilated()
        cache = DynamicCache(config=model.config)
        sum(
            model(part, use_cache=True, **{CACHE: cache}).logits.square().sum() for part in ids.split(cut, 1)
        ).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in grads[0].items():
        assert_close(name, grads[1][name], expected, 1e-11)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_the_same_with_every_cache_and_without(family, beams):
    model, ids = dilated(family), ids_of(2, 15)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "num_beams": beams}
    dense = make_model(family).generate(ids, attention_mask=mask, **options)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    own = model.generate(ids, attention_mask=mask, **options)
    bounded = model.generate(ids, attention_mask=mask, **{CACHE: DilatedCache(model)}, **options)
    assert plain.tolist() == own.tolist() == bounded.tolist()
    assert plain.tolist() != dense.tolist()
    alone = model.generate(ids[1:, 6:], **options)
    assert alone[0].tolist() == own[1, 6:].tolist()


@pytest.mark.parametrize("kind", CACHES)
def test_prompt_lookup_takes_its_guesses_back(kind):
    model = dilated()
    ids = ids_of(1, 6).repeat(1, 4)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    cache = CACHES[kind](model)
    cache.activate_past_recording()
    found = model.generate(ids, prompt_lookup_num_tokens=3, **{CACHE: cache}, **options)
    assert found.tolist() == model.generate(ids, **options).tolist()


def layers(count: int):
    return LlamaForCausalLM(LlamaConfig(**(SIZES | {"num_hidden_layers": count}))).double().eval()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_model, ["only with dilated attention"]),
        (lambda: layers(1), ["only with dilated attention"]),
        (lambda: use_dilated_attention(make_model(), [8, 32], [1, 4]), ["another config", "(8, 32)"]),
        (lambda: use_dilated_attention(layers(3), *BRANCHES), ["another config", "3)"]),
    ],
    ids=["dense", "dense-with-one-layer", "branches", "layers"],
)
def test_a_bounded_cache_knows_its_model(other, words):
    cache, model, ids = DilatedCache(dilated()), other(), ids_of(1, 21)
    with refused(*words):
        for part in ids.split(11, 1):
            read(model, part, **{CACHE: cache})


def test_a_bounded_cache_knows_what_became_of_its_model():
    model, ids = dilated(), ids_of(2, 21)
    cache = DilatedCache(model)
    before = read(model, ids, **{CACHE: cache})
    with refused("holds 2 rows", "has 1"):
        read(model, ids[:1], **{CACHE: cache})
    use_dilated_attention(model, [8, 32], [1, 4])
    with refused("another config"):
        read(model, ids, **{CACHE: cache})
    model.set_attn_implementation("sdpa")
    with refused("no longer"):
        read(model, ids, **{CACHE: cache})
    use_dilated_attention(model, *BRANCHES)
    after = read(model, ids, **{CACHE: cache})
    assert_close("what was refused left no trace", torch.cat([before, after], 1), read(model, ids.repeat(1, 2)))


def test_a_saved_model_knows_its_branches(tmp_path):
    """It loads dense, until told to be dilated."""
    model, ids = dilated(head_offsets="blocked"), ids_of(1, 20)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_close("dense", read(loaded, ids), read(make_model(), ids))
    use_dilated_attention(loaded)
    assert loaded.config.dilated_attention == model.config.dilated_attention
    named = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dilated")
    for again in (loaded, named):
        assert_close("logits", read(again, ids), read(model, ids))
    assert (read(make_model(), ids) - read(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("noted", "words"),
    [
        ({"dilation_rates": [9, 9, 9]}, "dilation_rates"),
        ({"segment_lengths": [8, 4, 2]}, "segment_lengths"),
        ({"segment_lengths": None}, "segment_lengths"),
        ({"windows": 3}, "unknown entries: windows"),
    ],
)
def test_a_damaged_note_is_refused_when_it_is_used(noted, words, tmp_path):
    model = dilated()
    model.config.dilated_attention |= noted
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dilated")
    with refused(words):
        loaded(ids_of(1, 20))


def test_masks_of_other_kinds_are_refused():
    """One to be added to scores, and the one of pairs that a static cache brings."""
    model, ids = dilated("qwen3"), ids_of(1, 20)
    with refused("0 and 1"):
        model(ids, attention_mask=torch.tensor([[-torch.inf] * 4 + [0.0] * 16]))
    with refused("static caches have no dilated form"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_what_is_left_out_stays_as_noted():
    model = dilated(head_offsets="blocked", backend="torch")
    noted = dict(model.config.dilated_attention)
    use_dilated_attention(model, backend="eager")
    assert model.config.dilated_attention == noted | {"backend": "eager"}
    use_dilated_attention(model, head_offsets="interleaved")
    assert model.config.dilated_attention == noted | {"backend": "eager", "head_offsets": "interleaved"}
    use_dilated_attention(model, [8, 32], [1, 4])
    assert model.config.dilated_attention["segment_lengths"] == [8, 32]
    assert model.config.dilated_attention["backend"] == "eager"
    model.config.dilated_attention["backend"] = "fast"
    with refused("backend='fast'"):
        use_dilated_attention(model)


@pytest.mark.parametrize("grad", [False, True], ids=["evaluation", "training"])
def test_compiled_it_is_the_same(grad):
    model, ids = use_dilated_attention(layers(1), *BRANCHES).model, ids_of(2, 21)
    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        out = torch.compile(model, backend="eager")(ids, use_cache=False)[0]
    assert_close("hidden states", out, model(ids)[0])
    if grad:
        out.sum().backward()
        assert model.layers[0].self_attn.v_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing, tmp_path):
    """Gradient checkpointing and accumulation take the same steps."""
    model, texts = dilated(), [{"input_ids": t, "labels": t} for t in ids_of(8, 19)]
    weights = []
    for accumulate in (1, 2):
        arguments = TrainingArguments(
            output_dir=tmp_path, max_steps=2, per_device_train_batch_size=4 // accumulate, report_to=[], use_cpu=True,
            gradient_accumulation_steps=accumulate, gradient_checkpointing=checkpointing and accumulate == 2,
            learning_rate=1e-2, optim="sgd", save_strategy="no", disable_tqdm=True, seed=3,
        )  # fmt: skip
        trained = copy.deepcopy(model)
        Trainer(model=trained, args=arguments, train_dataset=texts).train()
        weights.append(trained.state_dict())
    for name, expected in weights[0].items():
        assert_close(name, weights[1][name], expected, 1e-10)
    assert (weights[0]["lm_head.weight"] - model.lm_head.weight).abs().max() > 1e-6


def test_a_training_goes_on_from_its_checkpoint(tmp_path):
    """Stopped after a step and resumed, it gives the weights of an uninterrupted run."""
    texts, weights = [{"input_ids": t, "labels": t} for t in ids_of(8, 19)], []
    for folder, steps in (("whole", [2]), ("resumed", [1, 2])):
        for stop in steps:
            arguments = TrainingArguments(
                output_dir=tmp_path / folder, max_steps=stop, per_device_train_batch_size=4, report_to=[],
                use_cpu=True, save_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True, seed=3,
            )  # fmt: skip
            trainer = Trainer(model=dilated(), args=arguments, train_dataset=texts)
            trainer.train(resume_from_checkpoint=stop > 1 and folder == "resumed")
        weights.append(trainer.model.state_dict())
    for name, expected in weights[0].items():
        assert_close(name, weights[1][name], expected, 0)
    loaded = use_dilated_attention(LlamaForCausalLM.from_pretrained(tmp_path / "resumed" / "checkpoint-2"))
    ids = ids_of(1, 19)
    assert_close("logits", read(loaded, ids), read(trainer.model.eval(), ids))


def add_lora(model, **options):
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config).double().eval()


def test_peft_lora():
    model, ids = dilated(), ids_of(2, 19)
    before = read(model, ids)
    adapted = add_lora(model)
    assert_close("a fresh adapter", read(adapted, ids), before)
    adapted(ids, labels=ids).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("lora_B" in name for name in trained)
    assert all("lora_" in name for name in trained)


def test_a_saved_adapter_needs_its_branches_again(tmp_path):
    adapted, ids = add_lora(dilated(), init_lora_weights=False), ids_of(2, 19)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path).double().eval()
    assert (read(loaded, ids) - read(adapted, ids)).abs().max() > 1e-3
    use_dilated_attention(loaded, *BRANCHES)
    assert_close("logits", read(loaded, ids), read(adapted, ids))
    assert_close("merged", read(copy.deepcopy(adapted).merge_and_unload(), ids), read(adapted, ids))


def test_an_adapted_model_generates_with_every_cache():
    adapted, ids = add_lora(dilated(), init_lora_weights=False), ids_of(2, 19)
    options = {"input_ids": ids, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    own = adapted.generate(**options)
    assert own.tolist() == adapted.generate(use_cache=False, **options).tolist()
    assert own.tolist() == adapted.generate(**{CACHE: DilatedCache(adapted)}, **options).tolist()


def with_config(make, config_class, **fields):
    return lambda: make(config_class(**(SIZES | fields)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            with_config(MistralForCausalLM, MistralConfig, sliding_window=8),
            ["a sliding window in every layer, of 8 tokens (sliding_window=None)"],
        ),
        (
            with_config(Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=0),
            ["only sliding windows", 'layer_types=["full_attention"] * num_hidden_layers'],
        ),
        (
            with_config(Qwen3ForCausalLM, Qwen3Config, layer_types=["full_attention", "chunked_attention"]),
            ["'chunked_attention'", 'layer_types=["full_attention"] * num_hidden_layers'],
        ),
        (with_config(Gemma2ForCausalLM, Gemma2Config, head_dim=10), ["soft cap", "attn_logit_softcapping=None"]),
        (
            with_config(
                DeepseekV3ForCausalLM, DeepseekV3Config, num_key_value_heads=6, n_routed_experts=4, n_group=1,
                topk_group=1, num_experts_per_tok=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
                qk_nope_head_dim=4, v_head_dim=6, moe_intermediate_size=8,
            ),
            ["keys of 8 and values of 6 features"],
        ),
        (
            with_config(
                GptOssForCausalLM, GptOssConfig, head_dim=10, num_local_experts=2,
                layer_types=["full_attention"] * 2, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            ),
            ["attention sinks"],
        ),
        (with_config(LlamaForCausalLM, LlamaConfig, is_causal=False), ["bidirectional attention"]),
        (lambda: T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_ff=8)), ["made of several models"]),
        (lambda: LongNetForCausalLM(LongNetConfig(vocab_size=8, num_hidden_layers=1)), ["does not support"]),
    ],
    ids=["mistral", "qwen2-windows", "chunked", "gemma2", "deepseek", "gpt-oss", "bidirectional", "t5", "longnet"],
)  # fmt: skip
def test_what_has_no_dilated_form_is_refused_by_name(make, words):
    model = make()
    before = model.config._attn_implementation
    with refused(*words):
        use_dilated_attention(model, *BRANCHES)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    "make",
    [
        with_config(MistralForCausalLM, MistralConfig, sliding_window=None),
        with_config(
            Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=8,
            layer_types=["full_attention"] * 2,
        ),
        with_config(Gemma2ForCausalLM, Gemma2Config, head_dim=10, sliding_window=5, attn_logit_softcapping=None),
        with_config(
            Gemma2ForCausalLM, Gemma2Config, head_dim=10, attn_logit_softcapping=None,
            layer_types=["full_attention"] * 2,
        ),
    ],
    ids=["mistral", "qwen2", "gemma2", "gemma2 without windows"],
)  # fmt: skip
def test_the_named_remedies_work(make):
    model, ids = sharpen(make().double().eval()), ids_of(2, 29)
    own = read(model, ids)
    tolerance = 1e-6 if isinstance(model, Gemma2ForCausalLM) else 1e-11  # its softmax is in float32
    assert_close("logits", read(use_dilated_attention(model, [29], [1]), ids), own, tolerance)
    assert (read(use_dilated_attention(model, *BRANCHES), ids) - own).abs().max() > 1e-4


# Models of which some layers have a window, by their type; these compute experts in float32 at most.
EXPERTS = {"afmoe", "beam", "cohere2_moe", "exaone_moe", "kolibri1"}
MIXED = {"cohere2", "cwm", "exaone4", "gemma3_text", "modernbert-decoder", "olmo3", *EXPERTS}


def make_mixed(kind: str):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this release of Transformers has no {kind}")
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, sliding_window=5, head_dim=8))
    return sharpen(model.to(torch.float32 if kind in EXPERTS else torch.float64).eval())


@pytest.mark.parametrize("kind", sorted(MIXED))
def test_layers_with_a_window_stay_as_they_are(kind):
    """One branch over the whole text is the model's own attention, with padding and in `generate`."""
    model, ids = make_mixed(kind), ids_of(2, 29)
    tolerance = 1e-5 if kind in EXPERTS else 1e-11
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    inputs = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    own, written = read(model, ids, attention_mask=mask), model.generate(ids, **inputs)
    use_dilated_attention(model, [64], [1])
    assert_close("logits", read(model, ids, attention_mask=mask)[mask == 1], own[mask == 1], tolerance)
    assert torch.equal(model.generate(ids, **inputs), written)
    use_dilated_attention(model, *BRANCHES)
    assert (read(model, ids, attention_mask=mask)[mask == 1] - own[mask == 1]).abs().max() > 1e-4
    with refused("layers with a sliding window", "leave the cache out"):
        DilatedCache(model)


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo3"])
def test_a_mixed_model_is_its_dense_reference(kind):
    """Logits, gradients, packed documents and reading on from the model's own cache."""
    ids, positions = ids_of(2, 21), torch.arange(21)[None].expand(2, -1)
    packed = torch.cat([torch.arange(9), torch.arange(12)])[None].expand(2, -1)
    results = []
    for backend in ("torch", "eager"):
        model = use_dilated_attention(make_mixed(kind), *BRANCHES, backend=backend)
        cache = DynamicCache(config=model.config)
        found = {"cut": torch.cat([read(model, part, **{CACHE: cache}) for part in ids.split([9, 1, 11], 1)], 1)}
        found["packed"] = read(model, ids, position_ids=packed, use_cache=False)
        out = model(ids, position_ids=positions, labels=ids)
        out.loss.backward()
        results.append(found | {"logits": out.logits} | {name: p.grad for name, p in model.named_parameters()})
    for name, expected in results[1].items():
        assert_close(name, results[0][name], expected, 1e-10)
    assert_close("cut", results[0]["cut"], results[0]["logits"], 1e-10)
    alone = read(model, ids[:, 9:])
    assert_close("second document", results[0]["packed"][:, 9:], alone, 1e-10)


def test_a_mixed_model_trains(tmp_path):
    model = use_dilated_attention(make_mixed("gemma3_text").float(), *BRANCHES)
    rows = [{"input_ids": row, "labels": row} for row in ids_of(4, 33)]
    arguments = TrainingArguments(tmp_path, max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_layers_of_different_sizes_are_refused():
    kind = "gemma4_text"
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this release of Transformers has no {kind}")
    with refused("layers of different sizes"):
        use_dilated_attention(make_mixed(kind), *BRANCHES)


def test_arguments_that_do_not_fit_are_refused():
    model = make_model()
    with refused("segment_lengths and dilation_rates", "stores none"):
        use_dilated_attention(model)
    with refused("one dilation rate for each"):
        use_dilated_attention(model, [4, 8], [1])
    with refused("one dilation rate for each"):
        use_dilated_attention(model, [4, 8])
    with refused("head_offsets='middle'"):
        use_dilated_attention(model, *BRANCHES, head_offsets="middle")
    with refused("backend='fast'"):
        use_dilated_attention(model, *BRANCHES, backend="fast")
    with refused("call use_dilated_attention"):
        DilatedCache(model)
    model.set_attn_implementation("dilated")
    with refused("needs branches"):
        read(model, ids_of(1, 5))


def test_a_period_is_refused_beside_layers_with_a_window():
    """Or no dilated layer might have branches."""
    layer_types = ["full_attention", "sliding_attention"]
    make = with_config(
        Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=8, layer_types=layer_types
    )
    with refused("branch_layer_period must be 1"):
        use_dilated_attention(make(), *BRANCHES, window_size=4, branch_layer_period=2)


def test_calls_that_do_not_fit_are_refused():
    model, ids = dilated(), ids_of(1, 9)
    with refused("static caches"):
        read(model, ids, **{CACHE: StaticCache(config=model.config, max_cache_len=32)})
    with refused("masks of pairs"):
        read(model, ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    with refused("is_causal=False"):
        read(model, ids, is_causal=False)
    cache = DynamicCache(config=model.config)
    read(model, ids, **{CACHE: cache})
    with refused("cannot continue from a cache"):
        read(model, ids, position_ids=torch.arange(9)[None], **{CACHE: cache})
    dense = dilated(backend="eager")
    with refused("DilatedCache needs a fast backend"):
        read(dense, ids, **{CACHE: DilatedCache(dense)})
    model = make_model()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with refused("attention_dropout=0"):
        use_dilated_attention(model, *BRANCHES).train()(ids)


def test_evaluation_with_other_branches(tmp_path):
    """`examples.evaluate_perplexity --segment_lengths`: a LongNet's are replaced, a Llama becomes dilated."""
    given = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}
    ids = ids_of(1, 41)
    llama = make_model()
    llama.save_pretrained(tmp_path / "llama")
    config = LongNetConfig(
        vocab_size=37, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        segment_lengths=[4, 8], dilation_rates=[1, 2],
    )  # fmt: skip
    longnet = LongNetForCausalLM(config).double().eval()
    longnet.save_pretrained(tmp_path / "longnet")
    for name, model in (("llama", llama), ("longnet", longnet)):
        arguments = {"model": str(tmp_path / name), "dtype": "float64"}
        assert_close(name, read(load_model(EvaluationArguments(**arguments)), ids), read(model, ids))
        switched = load_model(EvaluationArguments(**arguments, **given))
        if name == "llama":
            use_dilated_attention(model, **given)
        else:
            wider = LongNetConfig(**(config.to_dict() | given))
            model = LongNetForCausalLM(wider).double().eval()
            model.load_state_dict(longnet.state_dict())
        assert_close(name, read(switched, ids), read(model, ids))
    switched.save_pretrained(tmp_path / "wider")
    assert LongNetConfig.from_pretrained(tmp_path / "wider").segment_lengths == [8, 32]


def test_branches_for_which_positions_do_not_hold_are_refused_at_load_time(tmp_path):
    """xPos with base 16 over a period of a million tokens leaves float32."""
    config = LongNetConfig(
        vocab_size=37, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=6,
        segment_lengths=[4, 8], dilation_rates=[1, 2], xpos_scale_base=16,
    )  # fmt: skip
    LongNetForCausalLM(config).save_pretrained(tmp_path)
    with refused("xpos_scale_base=16 is too small", "[8, 1048576]", "trained model", "shorter segments"):
        LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[8, 1 << 20])
    longer = LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[8, 1 << 10])
    assert plan_branches(longer.config)[0][1].w == 1 << 10


def test_padding_on_the_right_is_refused_with_a_remedy():
    """New tokens follow the padding, which turns it into a hole."""
    model = use_dilated_attention(make_model(), [16], [1])
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    with pytest.raises(ValueError, match=r"pad on the left, as new tokens follow \(tokenizer.padding_side"):
        model.generate(torch.ones_like(mask), attention_mask=mask, max_new_tokens=3, pad_token_id=0)
