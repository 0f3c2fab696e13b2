"""Numbers at the edge: each against the float64 dense reference, or against what it must be exactly.

Letters: B batch, L tokens, H query heads, G key/value heads, D head dimension.
"""

import mpmath
import pytest
import torch
from checks import assert_close, attend, make_config, make_halo, make_model, refused
from fuzz.attention import compare, grads_of, rounding_terms

from modeling_longnet import LongNetCache, LongNetForCausalLM, LongNetModel, dilated_attention, stream
from modeling_longnet.branches import Chunk
from modeling_longnet.pattern import make_branches
from modeling_longnet.positions import make_rotary
from modeling_longnet.reference import count_branches
from modeling_longnet.testing import CACHE

NESTED = ((4, 8, 16), (1, 2, 4))
EXACT = 1e-10  # float64, through two layers
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random_inputs(batch=2, heads=3, length=21, dim=8):
    """q, k, v and the gradient of out, (B, H, L, D) float64."""
    return [torch.randn(batch, length, heads, dim, dtype=torch.float64).transpose(1, 2) for _ in range(4)]


def counts_of(branches, heads: int, length: int, is_causal: bool = True):
    positions = torch.arange(length)[None]
    return count_branches(make_branches(*branches, heads, "interleaved"), positions, positions, is_causal=is_causal)


def run(inputs, branches, backend="auto", **options):
    *leaves, grad_out = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    return grads_of(dilated_attention(*leaves, *branches, backend=backend, **options), leaves, grad_out)


def assert_equals_reference(inputs, branches=NESTED, *, is_causal: bool = True, scale: float | None = None) -> None:
    """Out and gradients equal the dense reference: in float64 to rounding, else as near as its own of that dtype."""
    query, dtype, scale = inputs[0], inputs[0].dtype, scale or inputs[0].shape[-1] ** -0.5
    counts = counts_of(branches, inputs[1].shape[1], query.shape[2], is_causal)
    high, options = [x.double() for x in inputs], {"is_causal": is_causal, "scale": scale}
    results = [run(x, branches, y, **options) for x, y in ((inputs, "auto"), (inputs, "eager"), (high, "eager"))]
    compare(dtype, *results, rounding_terms(high, counts, scale, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_scores_up_to_ten_thousand(dtype, size, is_causal):
    """One-hot rows; the log-sum-exp is of the size of the scores, and its rounding is the weights' relative error."""
    inputs = random_inputs()
    inputs[0] = inputs[0] * (size / (inputs[0] @ inputs[1].mT).abs().max() / 8**-0.5)
    assert_equals_reference([x.to(dtype) for x in inputs], is_causal=is_causal)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_keys_give_the_mean_of_their_values(dtype):
    """Each key weighs as often as branches show it; the query's gradient is zero, however the terms round."""
    inputs = random_inputs()
    inputs[1] = inputs[1][:, :, :1].expand_as(inputs[1])
    counts = counts_of(NESTED, 3, 21).double()
    expected = (counts / counts.sum(-1, keepdim=True)) @ inputs[2].to(dtype).double()
    inputs = [x.to(dtype) for x in inputs]
    found = run(inputs, NESTED)
    torch.testing.assert_close(found["out"].double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert found["dq"].abs().max() <= 16 * torch.finfo(dtype).eps * inputs[3].abs().max() * inputs[2].abs().max()
    assert_equals_reference(inputs)


def million_steps(dtype: torch.dtype) -> float:
    """Two rounding steps of the result, or what a million additions in float32 may lose."""
    return max(2 * torch.finfo(dtype).eps, 1024 * torch.finfo(torch.float32).eps)


def equal_keys(length: int, dim: int, dtype: torch.dtype):
    """Keys of zeros, so every key weighs 1 / L; values of ones, and of noise whose mean is known."""
    values = torch.ones(1, length, 1, dim, dtype=torch.float64)
    values[..., 1:] += torch.randn(1, length, 1, dim - 1, dtype=torch.float64)
    return torch.zeros(1, length, 1, dim, dtype=dtype), values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_decoding_step_sums_a_million_keys(dtype):
    """Summed in bfloat16, a million ones would stop at 256."""
    length = 1 << 20
    keys, values = equal_keys(length, 4, dtype)
    config = make_config(
        hidden_size=4, num_attention_heads=1, num_hidden_layers=1, segment_lengths=[length], dilation_rates=[1],
        position_embedding="rope",
    )  # fmt: skip
    cache = LongNetCache(config)
    with torch.no_grad():
        cache.layers[0].update(keys[:, 1:], values[:, 1:], (Chunk(0, 1, 0, length - 1, 0, length - 1),))
        (step,) = cache.steps()
        out = cache.layers[0].decode(torch.randn(1, 1, 1, 4).to(dtype), keys[:, :1], values[:, :1], step, 0.5)
    expected = values.double().mean(1, keepdim=True)
    assert out[0, 0, 0, 0] == 1
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=million_steps(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_query_behind_a_million_keys(dtype):
    """The op on one token and its prefix; the gradients of the prefix too, each of the order of a millionth."""
    length = 1 << 20
    branches = make_branches((length,), (1,), 1, "interleaved")
    keys, values = (x.transpose(1, 2) for x in equal_keys(length, 4, dtype))  # (1, 1, L, 4)
    leaves = [keys[:, :, 1:].clone().requires_grad_(), values[:, :, 1:].clone().requires_grad_()]
    query, grad_out = (torch.randn(1, 1, 1, 4).to(dtype) for _ in range(2))
    own = [x[:, :, :1].transpose(1, 2) for x in (keys, values)]
    out = attend(query, *own, branches, [[0, 1, 0, 1, length - 1, length]], make_halo(*([x] for x in leaves)))
    expected = values.double().mean(2)
    assert out[0, 0, 0, 0] == 1
    torch.testing.assert_close(out.double()[0, 0], expected[0], rtol=0, atol=million_steps(dtype))
    dk, dv = torch.autograd.grad(out, leaves, grad_out)
    assert_close("dv", dv.double() * length, grad_out.double().expand_as(dv), 2 * torch.finfo(dtype).eps)
    difference = (grad_out.double() * (values[:, :, 1:].double() - expected)).sum(-1, keepdim=True)
    assert_close("dk", dk.double() * length, difference * query.double() * 0.5, 4 * million_steps(dtype))


@pytest.mark.parametrize("start", [1 << 40, 3 * 5 * (1 << 38)])
@pytest.mark.parametrize("position_embedding", ["xpos", "rope"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_text_goes_on_after_2_to_the_40_tokens(start, position_embedding, implementation):
    """At a border of all segments nothing before is seen: the hidden states are those at the text's beginning."""
    model = make_model(LongNetModel, implementation=implementation, position_embedding=position_embedding)
    ids = torch.randint(0, 29, (2, 27))
    cache = LongNetCache(model.config)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        model(ids[:, :16], **{CACHE: cache})
        for layer in cache.layers:
            layer.lengths, layer.columns = [start, start], start
        parts = [model(part, **{CACHE: cache}).last_hidden_state for part in ids.split([1, 9, 1, 16], 1)]
    assert cache.lengths == [start + 27] * 2
    assert_close("hidden", torch.cat(parts, 1), expected, EXACT)


@pytest.mark.parametrize("lengths", [[1 << 40], [1 << 40, 3 << 39]], ids=["one period", "two"])
def test_rotary_angles_at_2_to_the_40(lengths):
    """Against the product in 200 bits: off by the rounding of one float64 product, which grows with the position."""
    config = make_config(
        segment_lengths=lengths, dilation_rates=[1] * len(lengths), position_embedding="rope", num_attention_heads=3
    )
    places = [0, 1, (1 << 40) - 1, (1 << 40) - 2, (1 << 40) - 12345]
    found = make_rotary(config, torch.tensor([places]), torch.float64).query[0, :, 0]
    theta = (config.rope_theta ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)).tolist()
    with mpmath.workprec(200):
        angles = [[mpmath.mpf(p) * mpmath.mpf(t) for t in theta] for p in places]
        expected = [[complex(mpmath.expj(angle)) for angle in row] for row in angles]
    allowed = torch.tensor(places, dtype=torch.float64)[:, None] * 2.0**-52 + 1e-15
    assert ((found - torch.tensor(expected, dtype=torch.complex128)).abs() <= allowed).all()


@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_a_log_sum_exp_of_zero_is_no_sign_of_an_empty_branch(backend):
    """Zero scores: a branch that shows one key has an lse of ln 1 = 0, which the released code takes for uncovered."""
    inputs = random_inputs(length=9)
    inputs[0] = torch.zeros_like(inputs[0])
    counts = counts_of(NESTED, 3, 9).double()
    found = run(inputs, NESTED, backend)
    assert_close("out", found["out"], (counts / counts.sum(-1, keepdim=True)) @ inputs[2])
    assert_equals_reference(inputs)
    # With segments of one token every lse is 0.
    assert torch.equal(run(inputs, ((1,), (1,)), backend)["out"], inputs[2])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("place", [0, 9, 20])
def test_a_mask_that_leaves_one_token(place, implementation):
    """It gives what the token gives alone, also from a cache; a row without any token is finite and takes no part."""
    model = make_model(LongNetModel, implementation=implementation)
    ids, mask = torch.randint(0, 29, (3, 21)), torch.zeros(3, 21, dtype=torch.int64)
    mask[0, place], mask[1] = 1, 1
    cache = LongNetCache(model.config)
    with torch.no_grad():
        alone = [model(ids[:1, place : place + 1]), model(ids[1:2])]
        hidden = model(ids, attention_mask=mask).last_hidden_state
        assert torch.isfinite(hidden).all()
        assert_close("one token", hidden[0, place], alone[0].last_hidden_state[0, 0], EXACT)
        assert_close("the other row", hidden[1], alone[1].last_hidden_state[0], EXACT)
        parts = []
        for begin, end in ((0, 8), (8, 9), (9, 10), (10, 21)):
            output = model(ids[:, begin:end], attention_mask=mask[:, :end], **{CACHE: cache})
            parts.append(output.last_hidden_state)
    assert cache.lengths == [1, 21, 0]
    hidden = torch.cat(parts, 1)
    assert_close("one token with a cache", hidden[0, place], alone[0].last_hidden_state[0, 0], EXACT)
    assert torch.isfinite(hidden).all()


@pytest.mark.parametrize("vocab_size", [1, 250_000])
@pytest.mark.parametrize("tied", [False, True])
def test_vocabularies(vocab_size, tied):
    """The loss and its gradients are those of all logits at once; a vocabulary of one word has no surprise."""
    model = make_model(
        LongNetForCausalLM, vocab_size=vocab_size, tie_word_embeddings=tied, hidden_size=6, num_attention_heads=1,
        num_hidden_layers=1,
    )  # fmt: skip
    ids = torch.randint(0, vocab_size, (1, 41))
    ids[0, 5] = vocab_size - 1
    loss = model(ids, labels=ids).loss
    grads = torch.autograd.grad(loss, list(model.parameters()))
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert_close("loss", loss, expected)
    names = [name for name, _ in model.named_parameters()]
    for name, grad, wanted in zip(names, grads, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        assert_close(name, grad, wanted, EXACT)
    last = list(stream(model, ids[0], chunk_size=7, progress=False))[-1]
    assert last.total == pytest.approx(-expected.item() * 40, rel=1e-6)
    text = model.generate(ids[:, :3], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert text.shape == (1, 7)
    if vocab_size == 1:
        assert loss == 0
        assert last.perplexity == 1
        assert not text.any()


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_logits_up_to_ten_thousand(size):
    """The chunked loss subtracts the largest logit, as PyTorch's does; in bfloat16 it still sums in float32."""
    exact = make_model(LongNetForCausalLM)
    with torch.no_grad():
        exact.lm_head.weight.mul_(size / exact(torch.arange(29)[None]).logits.abs().max())
    ids = torch.randint(0, 29, (2, 33))
    for dtype in (torch.float64, torch.bfloat16):
        model = exact.to(dtype)
        loss, logits = model(ids, labels=ids).loss, model(ids).logits.double()
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert_close(f"loss in {dtype}", loss, expected.to(loss.dtype), 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 7, 8, 15, 16, 31, 32, 33, 64, 65, 80, 96, 127, 128, 255, 256])
def test_head_dimensions(dim, dtype):
    """Of any size from 1 to 256, odd ones too."""
    inputs = random_inputs(batch=1, length=19, dim=dim)
    assert_equals_reference([x.to(dtype) for x in inputs], is_causal=dim % 2 == 0)


def test_a_batch_of_65536():
    """Beyond the 65,535 blocks that a grid of CUDA kernels has in its second dimension."""
    inputs = random_inputs(batch=65_536, heads=2, length=3, dim=2)
    branches = ((2, 3), (1, 2))
    expected, found = run(inputs, branches, "eager"), run(inputs, branches)
    for name, x in expected.items():
        assert_close(name, found[name], x)


def test_a_model_and_a_cache_of_65536_rows():
    model = make_model(
        LongNetModel, hidden_size=4, num_attention_heads=2, intermediate_size=3, num_hidden_layers=1,
        segment_lengths=[2, 4], dilation_rates=[1, 2],
    )  # fmt: skip
    ids = torch.randint(0, 29, (65_536, 3))
    cache = LongNetCache(model.config, max_length=4)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        parts = [model(part, **{CACHE: cache}).last_hidden_state for part in ids.split([2, 1], 1)]
    assert_close("hidden", torch.cat(parts, 1), expected, EXACT)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_a_batch_of_nothing_is_refused(shape):
    model = make_model(LongNetForCausalLM)
    with refused("input_ids", str(shape), "at least 1"):
        model(torch.zeros(shape, dtype=torch.int64))
    with refused("inputs_embeds", "at least 1"):
        model(inputs_embeds=torch.zeros(*shape, 24, dtype=torch.float64))
    with refused(f"({shape[0]}, 2, {shape[1]}, 8)", "at least 1"):
        dilated_attention(*(torch.zeros(shape[0], 2, shape[1], 8) for _ in range(3)), *NESTED)


def windows(batch, heads, length, dim):
    """Rows that overlap: `Tensor.unfold` over a sequence."""
    return torch.randn(batch, heads, length + dim - 1, dtype=torch.float64).unfold(-1, dim, 1)


LAYOUTS = {
    "windows": windows,
    "few windows": lambda b, h, n, d: windows(b, h, n, 3 * d)[..., :d],
    "one token for all": lambda b, h, n, d: torch.randn(b, h, 1, d, dtype=torch.float64).expand(b, h, n, d),
    "one head for all": lambda b, h, n, d: torch.randn(b, 1, n, d, dtype=torch.float64).expand(b, h, n, d),
    "one number for all": lambda b, h, n, d: torch.randn(1, dtype=torch.float64).expand(b, h, n, d),
    "every second": lambda b, h, n, d: torch.randn(2 * b, 2 * h, 2 * n, 2 * d, dtype=torch.float64)[::2, ::2, ::2, ::2],
    "heads last": lambda b, h, n, d: torch.randn(b, n, d, h, dtype=torch.float64).permute(0, 3, 1, 2),
    "batch last": lambda b, h, n, d: torch.randn(h, n, d, b, dtype=torch.float64).permute(3, 0, 1, 2),
    "an odd offset": lambda b, h, n, d: torch.randn(1 + b * h * n * d, dtype=torch.float64)[1:].view(b, h, n, d),
    "strides of one": lambda b, h, n, d: torch.randn(b + h + n + d, dtype=torch.float64).as_strided(
        (b, h, n, d), (1, 1, 1, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("sizes", [(2, 3, 20, 8), (2, 3, 21, 5), (1, 1, 500, 8), (3, 1, 4, 6), (1, 2, 1, 7)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, sizes):
    """On PyTorch's CPU kernel alone, rows that overlap with a stride of 1 give garbage, and so did the op."""
    batch, _, length, dim = sizes
    inputs = [LAYOUTS[layout](*sizes) for _ in range(4)]
    for _ in range(2):
        assert_equals_reference(inputs)
        inputs = [*inputs[:3], inputs[3].contiguous()]
    prefix = [torch.nan * torch.zeros(batch, sizes[1], 7, dim, dtype=torch.float64) for _ in range(2)]
    for x in prefix:
        x[:, :, :3] = torch.randn(batch, sizes[1], 3, dim, dtype=torch.float64)
    tokens = [x.transpose(1, 2) for x in inputs[:3]]
    branches = make_branches((length + 3,), (1,), sizes[1], "interleaved")
    chunks = [[0, batch, 0, length, 3, length + 3]]
    results = [
        attend(*x, branches, chunks, make_halo(*([y] for y in prefix))) for x in (tokens, map(torch.clone, tokens))
    ]
    assert_close("behind a prefix", *results)


def test_views_of_a_models_inputs():
    """Transposed ids, a mask that is expanded, embeddings and labels out of larger tensors."""
    model = make_model(LongNetForCausalLM)
    ids = torch.randint(0, 29, (23, 2)).T
    mask = (torch.arange(23) >= 4).expand(2, -1)
    embeds = torch.randn(23, 2, 48, dtype=torch.float64).transpose(0, 1)[..., ::2]
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embeds}):
        given = inputs | {"attention_mask": mask, "labels": ids.masked_fill(~mask, -100)}
        results = [model(**x).loss for x in (given, {k: y.contiguous() for k, y in given.items()})]
        assert_close("loss", *results)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_meta_tensors_have_the_results_shapes(dtype):
    inputs = [torch.empty(2, heads, 9, 8, dtype=dtype, device="meta", requires_grad=True) for heads in (4, 2, 2)]
    out = dilated_attention(*inputs, *NESTED)
    assert (out.shape, out.dtype, out.device.type) == ((2, 4, 9, 8), dtype, "meta")
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]
    with refused("backend='torch' cannot run", "'meta'"):
        dilated_attention(*inputs, *NESTED, backend="torch")


def test_a_model_on_meta():
    with torch.device("meta"):
        model = LongNetForCausalLM(make_config())
        ids = torch.zeros(2, 11, dtype=torch.int64)
    output = model(ids, labels=ids, logits_to_keep=3)
    assert (output.logits.shape, output.logits.device.type, output.loss.shape) == ((2, 3, 29), "meta", ())
    with refused("device meta"):
        make_model(LongNetForCausalLM)(ids)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_deterministic_mode(implementation):
    """Nothing of a training step, a padded batch or a decoding step raises in it, and results repeat to the bit."""
    model = make_model(LongNetForCausalLM, torch.float32, implementation=implementation, num_key_value_heads=3)
    ids = torch.randint(0, 29, (2, 37))
    mask = torch.stack([torch.arange(37) >= n for n in (0, 9)])
    torch.use_deterministic_algorithms(True)  # an error where PyTorch has no such kernel, not a warning
    results = []
    for _ in range(2):
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(~mask, -100)).loss
        loss.backward()
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=2, eos_token_id=None)
        results.append([loss.detach(), tokens, *(p.grad.clone() for p in model.parameters())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
