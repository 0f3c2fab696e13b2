"""The model: block, initialisation, loss, what it gives and what it refuses.

Letters: B batch, L tokens, E hidden size, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

import copy
import math
import pickle

import pytest
import torch
from checks import assert_close, make_config, make_model, refused
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, layer_norm, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_longnet import LongNetCache, LongNetForCausalLM, LongNetModel
from modeling_longnet.testing import CACHE

VARIANTS = [
    pytest.param({}, id="xpos"),
    pytest.param({"position_embedding": "rope", "num_key_value_heads": 3}, id="rope, shared heads"),
    pytest.param(
        {"position_embedding": "none", "tie_word_embeddings": True, "hidden_act": "silu"}, id="no positions, tied"
    ),
    pytest.param({"head_offsets": "blocked", "num_key_value_heads": 2, "embedding_scale": 3.0}, id="blocked, scaled"),
    pytest.param(
        {"segment_lengths": [6, 10], "dilation_rates": [2, 3], "final_layer_norm": False}, id="uncovered, no norm"
    ),
]


def random_ids(batch=2, length=37):
    return torch.randint(0, 29, (batch, length))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual, expected, tolerance=1e-11):
    for name in expected:
        assert_close(name, actual[name], expected[name], tolerance)


# The fast path and the dense reference


@pytest.mark.parametrize("variant", VARIANTS)
def test_sdpa_equals_eager(variant):
    fast, dense = (make_model(LongNetForCausalLM, implementation=name, **variant) for name in ("sdpa", "eager"))
    ids = random_ids()
    assert_close("logits", fast(ids).logits, dense(ids).logits, 1e-11)
    losses = [model(ids, labels=ids).loss for model in (fast, dense)]
    assert_close("loss", *losses)
    assert_same_gradients(*(gradients(m, loss) for m, loss in zip((fast, dense), losses, strict=True)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_undilated_branch_with_rope_is_a_plain_transformer(implementation):
    """The whole block written out with PyTorch's attention and a rotation matrix at each absolute position."""
    model = make_model(
        LongNetModel, implementation=implementation, position_embedding="rope", segment_lengths=[64],
        dilation_rates=[1], num_key_value_heads=3, hidden_act="gelu",
    )  # fmt: skip
    ids = random_ids()
    h = model.embed_tokens(ids)
    for layer in model.layers:
        attention, ffn = layer.self_attn, layer.ffn
        x = norm(layer.self_attn_layer_norm, h)
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2)
                   for p in (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
        k, v = rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        out = scaled_dot_product_attention(rotate(q), k, v, is_causal=True).transpose(1, 2).flatten(-2)
        h = h + attention.out_proj(norm(attention.inner_attn_ln, out))
        x = nn.functional.gelu(ffn.fc1(norm(layer.ffn_layer_norm, h)))
        h = h + ffn.fc2(norm(ffn.ffn_layernorm, x))
    assert_close("hidden", model(ids).last_hidden_state, norm(model.layer_norm, h), 1e-11)


def norm(module, x):
    return layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5)


def rotate(x):
    """Rotate pairs (2i, 2i+1) of (B, H, L, D) by n * 10000 ** (-2i / D)."""
    y = torch.empty_like(x)
    for i in range(x.shape[-1] // 2):
        angle = torch.arange(x.shape[2], dtype=torch.float64) * 10000.0 ** (-2 * i / x.shape[-1])
        even, odd = x[..., 2 * i], x[..., 2 * i + 1]
        y[..., 2 * i], y[..., 2 * i + 1] = (
            even * angle.cos() - odd * angle.sin(),
            odd * angle.cos() + even * angle.sin(),
        )
    return y


def test_a_causal_model_does_not_look_ahead():
    model = make_model(LongNetModel)
    ids = random_ids()
    changed = ids.clone()
    changed[:, 20:] = random_ids(2, 17)
    assert_close("before", model(changed).last_hidden_state[:, :20], model(ids).last_hidden_state[:, :20])


@pytest.mark.parametrize("variant", [{}, {"attend_zero_padding": True}], ids=["exact", "zero padding"])
def test_a_bidirectional_model(variant):
    """The first token sees later ones; fast path and reference agree, forward and backward."""
    fast, dense = (
        make_model(LongNetModel, implementation=name, is_causal=False, **variant) for name in ("sdpa", "eager")
    )
    ids = random_ids()
    outs = [model(ids).last_hidden_state for model in (fast, dense)]
    assert_close("hidden", outs[0], outs[1], 1e-11)
    assert_same_gradients(*(gradients(m, out.square().mean()) for m, out in zip((fast, dense), outs, strict=True)))
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % 29
    assert (fast(changed).last_hidden_state[:, 0] != outs[0][:, 0]).any()


@pytest.mark.parametrize("labels", [False, True])
def test_a_call_cannot_change_the_direction(labels):
    model, ids = make_model(LongNetForCausalLM), random_ids()
    with refused("is_causal=False: set it in the config"):
        model(ids, is_causal=False, labels=ids if labels else None)
    assert_close("as configured", model(ids, is_causal=True).logits, model(ids).logits)


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights():
    model, ids = make_model(LongNetForCausalLM), random_ids()
    model.compile(backend="eager")
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(copied.lm_head.weight)
    assert not copied(ids).logits.any()
    assert model(ids).logits.any()


def test_set_attn_implementation():
    model = make_model(LongNetForCausalLM)
    ids = random_ids()
    fast = model(ids).logits
    model.set_attn_implementation("eager")
    outputs = model(ids, output_attentions=True)
    assert len(outputs.attentions) == 2
    assert_close("logits", fast, outputs.logits, 1e-11)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(ids).logits, fast)


def test_flash_attention_2_without_the_package_is_an_error_with_its_name(tmp_path):
    model = make_model(LongNetForCausalLM, torch.float32)
    model.save_pretrained(tmp_path)
    with pytest.raises((ImportError, ValueError), match=r"flash[_-]attn|FlashAttention"):
        LongNetForCausalLM.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with refused("flash-attn"):
        make_model(LongNetForCausalLM, torch.float32, attention_backend="flash_attn")(random_ids())
    model.config._attn_implementation = model.model.config._attn_implementation = "flex_attention"
    with refused("flex_attention", "'eager'", "'sdpa'"):
        model(random_ids())


def test_attention_maps():
    """(B, H, L, L) that sum to one, zero on what a query cannot see, and make the outputs."""
    model = make_model(LongNetModel, implementation="eager", num_key_value_heads=3)
    ids = random_ids()
    outputs = model(ids, output_attentions=True, output_hidden_states=True)
    layer = model.layers[0]
    assert len(outputs.attentions) == 2
    weights = outputs.attentions[0]
    assert weights.shape == (2, 6, 37, 37)
    assert_close("sum", weights.sum(-1), torch.ones(2, 6, 37, dtype=torch.float64))
    assert (weights.triu(1) == 0).all()
    assert (weights[:, :, 16:, :16] == 0).all()  # the next segment of the longest branch
    value = layer.self_attn.v_proj(layer.self_attn_layer_norm(outputs.hidden_states[0])).unflatten(-1, (3, 4))
    mixed = (weights @ value.transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2).flatten(-2)
    h = outputs.hidden_states[0] + layer.self_attn.out_proj(layer.self_attn.inner_attn_ln(mixed))
    assert_close("hidden", h + layer.ffn(layer.ffn_layer_norm(h)), outputs.hidden_states[1], 1e-11)


def test_maps_of_the_fast_path_are_refused():
    with refused("'sdpa'", 'attn_implementation="eager"'):
        make_model(LongNetModel)(random_ids(), output_attentions=True)


def test_hidden_states():
    model = make_model(LongNetForCausalLM)
    ids = random_ids()
    outputs = model(ids, output_hidden_states=True)
    states = outputs.hidden_states
    assert len(states) == 3
    assert torch.equal(states[0], model.model.embed_tokens(ids))
    assert_close("last", model.lm_head(states[-1]), outputs.logits)
    assert model(ids).hidden_states is None


def test_inputs_embeds_and_tuples():
    model = make_model(LongNetForCausalLM, embedding_scale=2.0)
    ids = random_ids()
    outputs = model(ids)
    embeds = model.get_input_embeddings()(ids) * 2
    assert torch.equal(model(inputs_embeds=embeds).logits, outputs.logits)
    assert torch.equal(model(ids, return_dict=False)[0], outputs.logits)
    assert type(outputs[CACHE]) is LongNetCache
    assert getattr(model(ids, use_cache=False), CACHE) is None


def test_a_model_without_vocabulary():
    model = make_model(LongNetModel, vocab_size=None)
    assert model(inputs_embeds=torch.randn(1, 5, 24, dtype=torch.float64)).last_hidden_state.shape == (1, 5, 24)
    assert model.get_input_embeddings() is None
    assert model.get_output_embeddings() is None
    model.enable_input_require_grads()
    with refused("vocab_size", "inputs_embeds"):
        model(random_ids())
    with refused("vocab_size=None"):
        make_model(LongNetForCausalLM, vocab_size=None)


# Training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("position_embedding", ["xpos", "none"])
def test_gradient_checkpointing(reentrant, position_embedding):
    model = make_model(LongNetForCausalLM, position_embedding=position_embedding).train()
    ids = random_ids()
    expected = gradients(model, model(ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    outputs = model(ids, labels=ids, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3
    assert getattr(outputs, CACHE) is None
    assert_same_gradients(gradients(model, outputs.loss), expected)


def test_gradient_checkpointing_refuses_a_cache():
    """Recomputing a block would take its tokens into the cache a second time."""
    model = make_model(LongNetForCausalLM).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = random_ids()
    with refused("gradient checkpointing", "cache"):
        model(ids, labels=ids, **{CACHE: LongNetCache(model.config)})


@pytest.mark.parametrize("field", ["dropout", "activation_dropout", "drop_path_rate"])
def test_dropout_is_off_in_eval_and_on_in_training(field):
    plain, dropping = (make_model(LongNetModel, torch.float32, **{field: p}) for p in (0.0, 0.5))
    ids = random_ids(5)
    expected = plain(ids).last_hidden_state
    assert torch.equal(dropping(ids).last_hidden_state, expected)
    dropping.train()
    first, second = (dropping(ids, use_cache=False).last_hidden_state for _ in range(2))
    assert (first != second).any()
    assert (first != expected).any()


def test_drop_path_drops_whole_texts_and_grows_the_others():
    """The first block keeps all, the last drops with the full rate; the mean over draws is what eval gives."""
    model = make_model(LongNetModel, torch.float64, drop_path_rate=0.25).train()
    assert [layer.drop_path for layer in model.layers] == [0.0, 0.25]
    branch = torch.ones(4000, 3, 2, dtype=torch.float64)
    dropped = model.layers[1]._drop(branch)
    assert set(dropped.unique().tolist()) == {0.0, 4 / 3}
    assert (dropped == dropped[:, :1, :1]).all()
    assert abs(dropped.mean().item() - 1) < 5 * math.sqrt(0.25 / 0.75 / 4000)
    assert torch.equal(model.layers[0]._drop(branch), branch)


def test_initialisation_is_magnetos():
    """Xavier normal with gain sqrt(ln 2N) on v, out, fc1, fc2; N(0, 1/E) embeddings; no bias."""
    torch.manual_seed(0)
    model = LongNetForCausalLM(make_config(hidden_size=384, intermediate_size=640, num_hidden_layers=3, vocab_size=900))
    gain = math.sqrt(math.log(6))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name or "_ln" in name:
            assert (p == 1).all(), name
        else:
            scaled = any(part in name for part in ("v_proj", "out_proj", "fc1", "fc2"))
            std = 384**-0.5 if "embed" in name or "lm_head" in name else math.sqrt(2 / sum(p.shape))
            expected = std * (gain if scaled else 1)
            assert abs(p.std().item() / expected - 1) < 5 / math.sqrt(2 * p.numel()), name
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name


def test_initializer_range():
    model = LongNetForCausalLM(make_config(hidden_size=384, vocab_size=900, initializer_range=0.01))
    for p in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert abs(p.std().item() / 0.01 - 1) < 5 / math.sqrt(2 * p.numel())


def test_the_padding_tokens_embedding_gets_no_gradient():
    model = make_model(LongNetForCausalLM, pad_token_id=3)
    ids = random_ids()
    grads = gradients(model, model(ids, labels=ids).loss)["model.embed_tokens.weight"]
    assert (ids == 3).any()
    assert (grads[3] == 0).all()
    assert (grads[4] != 0).any()


def test_tied_weights(tmp_path):
    model = make_model(LongNetForCausalLM, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = random_ids()
    assert_close("logits", loaded(ids).logits, model(ids).logits)
    untied = make_model(LongNetForCausalLM)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(tied):
    model = make_model(LongNetForCausalLM, tie_word_embeddings=tied)
    ids = random_ids()
    with torch.no_grad():
        before = model(ids).logits
    model.resize_token_embeddings(35)
    assert model.config.vocab_size == 35
    assert_close("logits", model(ids).logits[..., :29], before)
    assert torch.isfinite(model(torch.full((1, 4), 34), labels=torch.full((1, 4), 34)).loss)


# The loss


def plain_loss(model, ids, labels, **kwargs):
    logits = model(ids, **kwargs).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_equals_cross_entropy_of_all_logits(variant, monkeypatch):
    """With chunks of 5 tokens, so that the last one is short; gradients of every parameter too."""
    monkeypatch.setattr("modeling_longnet.chunked_loss._MIN_TOKENS", 5)
    monkeypatch.setattr("modeling_longnet.chunked_loss._CPU_LOGITS", 1)
    model = make_model(LongNetForCausalLM, **variant).train()
    ids = random_ids()
    labels = ids.clone()
    labels[0, :11] = labels[1, 30:] = labels[1, 4] = -100
    outputs = model(ids, labels=labels)
    assert outputs.logits is None
    expected = plain_loss(model, ids, labels)
    assert_close("loss", outputs.loss, expected)
    assert_same_gradients(gradients(model, outputs.loss * 3), gradients(model, expected * 3))


@pytest.mark.parametrize(("train", "returned", "expected"), [
    (False, None, True), (False, False, False), (False, True, True), (True, None, False), (True, True, True),
])  # fmt: skip
def test_logits_with_labels(train, returned, expected):
    model = make_model(LongNetForCausalLM, pad_token_id=3).train(train)
    model.logits_with_labels = returned
    ids, labels = random_ids(), random_ids()
    labels[1, 20:] = -100
    outputs = model(ids, labels=labels)
    assert_close("loss", outputs.loss, plain_loss(model, ids, labels))
    assert (outputs.logits is not None) == expected
    if expected:
        assert_close("logits", outputs.logits, model(ids).logits, 0)
        assert_close("of a tuple", model(ids, labels=labels, return_dict=False)[1], outputs.logits, 0)
    assert_same_gradients(gradients(model, outputs.loss), gradients(model, plain_loss(model, ids, labels)))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_gradients_per_sample(train):
    """By vmap over a loss of labels, as in the documentation of torch.func."""
    model = make_model(LongNetForCausalLM).train(train)
    ids, labels = random_ids(3, 11), random_ids(3, 11)
    labels[1, :5] = -100

    def loss(parameters, ids, labels):
        inputs = {"input_ids": ids[None], "labels": labels[None], "use_cache": False}
        return functional_call(model, parameters, (), inputs).loss

    found = vmap(grad(loss), (None, 0, 0))(dict(model.named_parameters()), ids, labels)
    for i in range(3):
        expected = gradients(model, model(ids[i : i + 1], labels=labels[i : i + 1]).loss)
        assert_same_gradients({name: x[i] for name, x in found.items()}, expected)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("count", [11, torch.tensor(11)], ids=["int", "tensor"])
def test_num_items_in_batch(count, train):
    model = make_model(LongNetForCausalLM).train(train)
    ids = random_ids()
    labels = ids.clone()
    labels[:, 3:9] = -100
    targets = (labels[:, 1:] != -100).sum()
    loss = model(ids, labels=labels, num_items_in_batch=count).loss
    assert_close("loss", loss, plain_loss(model, ids, labels) * targets / 11)


def test_shift_labels():
    model = make_model(LongNetForCausalLM)
    ids = random_ids()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    expected = model(ids, labels=ids).loss
    assert_close("loss", model(ids, shift_labels=shifted).loss, expected)
    assert_close("loss", model(ids, labels=random_ids(), shift_labels=shifted).loss, expected)


def test_loss_matches_the_librarys():
    """Transformers' own loss function of a causal language model."""
    model = make_model(LongNetForCausalLM)
    ids = random_ids()
    labels = ids.clone()
    labels[0, 5:] = -100
    for extra in ({}, {"num_items_in_batch": 5}, {"shift_labels": labels}):
        expected = model.loss_function(logits=model(ids).logits, labels=labels, vocab_size=29, **extra)
        assert_close("loss", model(ids, labels=labels, **extra).loss, expected.double(), 1e-6)  # float32 there


def test_labels_without_a_target():
    """As PyTorch's mean over nothing: NaN; the sum over a batch is 0, and has gradients of 0."""
    model = make_model(LongNetForCausalLM)
    ids = random_ids()
    ignored = torch.full_like(ids, -100)
    assert model(ids, labels=ignored).loss.isnan()
    assert model(ids[:, :1], labels=ids[:, :1]).loss.isnan()
    loss = model(ids, labels=ignored, num_items_in_batch=7).loss
    assert loss == 0
    assert all((grad == 0).all() for grad in gradients(model, loss).values())


def test_a_frozen_head_and_a_frozen_body():
    model = make_model(LongNetForCausalLM)
    ids = random_ids()
    expected = gradients(model, model(ids, labels=ids).loss)
    for frozen in (model.lm_head, model.model):
        frozen.requires_grad_(False)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert_close(name, p.grad, expected[name])
            else:
                assert p.grad is None
        frozen.requires_grad_(True)


def test_a_loss_without_gradients_takes_none(monkeypatch):
    model, ids = make_model(LongNetForCausalLM), random_ids()
    expected = model(ids, labels=ids).loss.detach()
    monkeypatch.setattr(torch.autograd, "grad", None)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close("loss", model(ids, labels=ids).loss, expected)


def test_a_second_derivative_of_the_loss_is_refused():
    model, ids = make_model(LongNetForCausalLM).train(), random_ids()
    model.set_attn_implementation("eager")
    loss = model(ids, labels=ids).loss
    (grad,) = torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.square().sum().backward()


def test_func_grad_of_the_loss():
    model, ids = make_model(LongNetForCausalLM), random_ids()
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (ids,), {"labels": ids}).loss)(parameters)
    assert_same_gradients(found, gradients(model, model(ids, labels=ids).loss))


@pytest.mark.parametrize(("labels", "words"), [
    (torch.full((2, 40), 29), "allowed are 0 to 28"),
    (torch.zeros(2, 39, dtype=torch.int64), "expected (2, 40)"),
    (torch.zeros(2, 40), "whole numbers"),
])  # fmt: skip
def test_refused_labels_leave_the_cache_alone(labels, words):
    model, ids = make_model(LongNetForCausalLM), random_ids(2, 40)
    cache = LongNetCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
        with refused(words):
            model(ids, labels=labels, cache=cache)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_loss_adds_up_in_float32(dtype, monkeypatch):
    """Many chunks lose no more than all logits at once: error at most twice that one's, plus one rounding step."""
    monkeypatch.setattr("modeling_longnet.chunked_loss._MIN_TOKENS", 8)
    monkeypatch.setattr("modeling_longnet.chunked_loss._CPU_LOGITS", 1)
    model = make_model(LongNetForCausalLM, dtype)
    hidden = torch.randn(1, 1200, 24).to(dtype)
    ids = random_ids(1, 1200)
    double = copy.deepcopy(model.lm_head).double()

    def head_gradients(head, hidden, chunked):
        model.lm_head = head
        leaf = hidden.detach().requires_grad_()
        head.weight.grad = None
        if chunked:
            loss = model._loss(leaf, ids[:, 1:], None, None)
        else:
            logits = head(leaf)[:, :-1].to(torch.promote_types(hidden.dtype, torch.float32))
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach(), leaf.grad, head.weight.grad

    exact = head_gradients(double, hidden.double(), False)
    head = copy.deepcopy(double).to(dtype)
    whole, chunked = (head_gradients(head, hidden, c) for c in (False, True))
    for name, own, rival, truth in zip(("loss", "hidden", "weight"), chunked, whole, exact, strict=True):
        errors = [(x.double() - truth).norm().item() for x in (own, rival)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * truth.norm().item(), name
    assert chunked[0].dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that any operation gives, forward and backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize(("train", "returned"), [(True, None), (False, False)], ids=["training", "evaluation"])
def test_logits_of_the_whole_sequence_are_never_held(train, returned):
    length, vocab = 5000, 2003
    model = make_model(LongNetForCausalLM, torch.float32, vocab_size=vocab, num_hidden_layers=1)
    model.logits_with_labels = returned
    ids = torch.randint(0, vocab, (1, length))
    with LargestTensor() as largest:
        model.train(train)(ids, labels=ids).loss.backward()
    assert largest.numel <= 1 << 22
    assert largest.numel < length * vocab / 2
    with LargestTensor() as largest:
        model(ids)
    assert largest.numel == length * vocab  # the counter counts


def test_logits_to_keep():
    model = make_model(LongNetForCausalLM)
    ids = random_ids()
    full = model(ids).logits
    for keep, expected in ((1, full[:, -1:]), (5, full[:, -5:]), (0, full), (torch.tensor([3, 9]), full[:, [3, 9]])):
        assert_close("logits", model(ids, logits_to_keep=keep).logits, expected)
        outputs = model(ids, labels=ids, logits_to_keep=keep)
        assert_close("logits", outputs.logits, expected)
        assert_close("loss", outputs.loss, plain_loss(model, ids, ids))


# Loading, saving, precision, copies


def test_save_and_load(tmp_path):
    model = make_model(LongNetForCausalLM, torch.float32)
    model.save_pretrained(tmp_path)
    loaded, info = LongNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_ids()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training
    base = LongNetModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("position_embedding", ["xpos", "rope"])
def test_loading_in_bfloat16_keeps_positions_exact(position_embedding, tmp_path):
    """Beyond 256 tokens bfloat16 cannot count; angles are computed apart from the model's dtype."""
    fields = {"position_embedding": position_embedding, "segment_lengths": [2048], "dilation_rates": [1]}
    model = make_model(LongNetModel, torch.float32, **fields)
    model.save_pretrained(tmp_path)
    loaded = LongNetModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    ids = random_ids(1, 700)
    cast = copy.deepcopy(model).bfloat16()
    dense = copy.deepcopy(cast)
    dense.set_attn_implementation("eager")
    assert torch.equal(loaded(ids).last_hidden_state, cast(ids).last_hidden_state)
    exact = copy.deepcopy(cast).double()(ids).last_hidden_state
    own, rival = ((m(ids).last_hidden_state.double() - exact).norm() for m in (loaded, dense))
    assert own <= 2 * rival
    assert rival < 0.05 * exact.norm()


def test_autocast():
    """Parameters in float32, attention in bfloat16, the loss in float32."""
    model = make_model(LongNetForCausalLM, torch.float32)
    ids = random_ids()
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(ids, labels=ids, logits_to_keep=0)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert outputs.logits.dtype == torch.bfloat16
    assert abs(outputs.loss.item() - exact.item()) < 0.02 * exact.item()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_compiled_model():
    """Whatever torch.compile breaks the graph at, the numbers are the same."""
    torch._dynamo.reset()
    model = make_model(LongNetForCausalLM).train()
    compiled = torch.compile(model, backend="aot_eager")
    ids = random_ids()
    expected = gradients(model, model(ids, labels=ids).loss)
    assert_close("logits", compiled(ids, use_cache=False).logits, model(ids).logits, 1e-11)
    assert_same_gradients(gradients(model, compiled(ids, labels=ids, use_cache=False).loss), expected)
    with torch.no_grad():
        assert_close("logits without gradients", compiled(ids, use_cache=False).logits, model(ids).logits, 1e-11)


def test_copies_and_pickles():
    model = make_model(LongNetForCausalLM)
    ids = random_ids()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32], ids=str
)
def test_whole_numbers_of_any_type(dtype):
    model = make_model(LongNetForCausalLM)
    ids, positions = random_ids(2, 9), torch.arange(9)[None]
    expected = model(ids, labels=ids).loss
    given = model(ids.to(dtype), labels=ids.to(dtype), position_ids=positions.to(dtype)).loss
    assert torch.equal(given, expected)


DAMAGES = {
    "cut weights": ("model.safetensors", lambda content: content[:-9]),
    "nonsense for weights": ("model.safetensors", lambda content: b"nonsense" * 9),
    "an index without a map": ("model.safetensors.index.json", lambda content: b'{"metadata": {}}'),
    "an index of numbers": ("model.safetensors.index.json", lambda content: b'{"weight_map": {"a": 1}}'),
    "an index that is a list": ("model.safetensors.index.json", lambda content: b"[1]"),
    "a config that is a list": ("config.json", lambda content: b"[1]"),
    "generation settings that are a list": ("generation_config.json", lambda content: b"[1]"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_a_clear_error(name, damage, tmp_path):
    """ValueError or OSError with a file's or the folder's name, whatever Transformers and safetensors raise within."""
    is_sharded = name.endswith("index.json")
    make_model(LongNetForCausalLM).save_pretrained(tmp_path, max_shard_size="5KB" if is_sharded else "1GB")
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises((ValueError, OSError), match=r"config|test_a_damaged"):
        LongNetForCausalLM.from_pretrained(tmp_path)


# What is refused


@pytest.mark.parametrize(("kwargs", "words"), [
    pytest.param({"input_ids": torch.tensor([[1, 29]])}, ["input_ids", "29", "0 to 28"], id="id above"),
    pytest.param({"input_ids": torch.tensor([[1, -1]])}, ["input_ids", "-1", "0 to 28"], id="id below"),
    pytest.param({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, ["input_ids", "(2, 0)"], id="no tokens"),
    pytest.param({"input_ids": torch.zeros(0, 2, dtype=torch.int64)}, ["input_ids", "(0, 2)"], id="no rows"),
    pytest.param({"input_ids": torch.tensor([1, 2])}, ["input_ids", "(2,)", "(batch, length)"], id="1D"),
    pytest.param({"input_ids": torch.tensor([1]), "labels": torch.tensor([1])}, ["input_ids", "(1,)"], id="1D, labels"),
    pytest.param({}, ["input_ids", "inputs_embeds"], id="nothing"),
    pytest.param({"input_ids": torch.tensor([[1]]), "inputs_embeds": torch.zeros(1, 1, 24)}, ["one of"], id="both"),
    pytest.param({"inputs_embeds": torch.zeros(1, 3, 23)}, ["inputs_embeds", "(1, 3, 23)", "24"], id="embeds' width"),
    pytest.param({"inputs_embeds": torch.zeros(1, 0, 24)}, ["inputs_embeds", "(1, 0, 24)"], id="no embeds"),
    pytest.param({"inputs_embeds": torch.zeros(3, 24)}, ["inputs_embeds", "(3, 24)"], id="2D embeds"),
    pytest.param({"inputs_embeds": torch.zeros(1, 3, 24, dtype=torch.uint8)}, ["torch.uint8", "floating"], id="bytes"),
    pytest.param({"input_ids": torch.zeros(1, 3, dtype=torch.complex64)}, ["complex64", "whole numbers"], id="complex"),
    pytest.param({"input_ids": torch.zeros(1, 3, dtype=torch.bool)}, ["bool", "whole numbers"], id="booleans"),
    pytest.param({"input_ids": torch.zeros(1, 3, device="meta").long()}, ["device meta"], id="meta"),
])  # fmt: skip
def test_bad_inputs_are_refused(kwargs, words):
    with refused(*words):
        make_model(LongNetForCausalLM, torch.float32)(**kwargs)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize(("labels", "words"), [
    pytest.param(torch.zeros(2, 4, dtype=torch.int64), ["(2, 4)"], id="too short"),
    pytest.param(torch.zeros(2, 6, dtype=torch.int64), ["(2, 6)"], id="too long"),
    pytest.param(torch.zeros(1, 5, dtype=torch.int64), ["(1, 5)"], id="another batch"),
    pytest.param(torch.zeros(10, dtype=torch.int64), ["(10,)"], id="1D"),
    pytest.param(torch.zeros(2, 5, 1, dtype=torch.int64), ["(2, 5, 1)"], id="3D"),
    pytest.param(torch.full((2, 5), 29), ["29", "0 to 28", "-100"], id="id above"),
    pytest.param(torch.full((2, 5), -1), ["-1", "0 to 28", "-100"], id="id below"),
    pytest.param(torch.zeros(2, 5, dtype=torch.complex64), ["complex64", "whole numbers"], id="complex"),
])  # fmt: skip
def test_bad_labels_are_refused(labels, words, name):
    with refused(name, *words):
        make_model(LongNetForCausalLM, torch.float32)(random_ids(2, 5), **{name: labels})
