"""xPos and rotary positions: the released numbers, the period, large positions, what low precision can hold."""

import json
import math
from itertools import combinations_with_replacement
from pathlib import Path

import mpmath
import pytest
import torch
from checks import assert_close, make_config, make_model, refused
from safetensors import safe_open

from modeling_longnet import LongNetConfig, LongNetModel, dilated_attention
from modeling_longnet.configuration_longnet import FLOAT16_SCALE, FLOAT32_SCALE
from modeling_longnet.positions import apply_rotary, make_rotary

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("xpos_*.safetensors"))


def as_pairs(x):
    """(..., D) as (..., D/2) complex numbers."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def products(query, key):
    """Every query's complex product with every key, pair by pair: (N, L, L, D/2). Their real parts sum to scores."""
    return as_pairs(query)[:, :, None] * as_pairs(key)[:, None].conj()


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_released_xpos(path):
    """Only what two tokens' factors make together shows in a score, so that is compared, pair by pair."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = {name: json.loads(text) for name, text in file.metadata().items() if text.isdigit()}
    dim, period = tensors["x"].shape[-1], int(tensors["position"].max()) + 1
    config = LongNetConfig(
        hidden_size=dim, num_attention_heads=1, segment_lengths=[period], dilation_rates=[1],
        xpos_scale_base=metadata["scale_base"],
    )  # fmt: skip
    turns = make_rotary(config, tensors["position"][None], torch.float64)
    x = tensors["x"].double()[:, :, None]
    query, key = (apply_rotary(x, factors)[:, :, 0] for factors in turns)
    ours, exact = products(query, key), products(tensors["q_exact"], tensors["k_exact"])
    assert_close("real parts", ours.real, exact.real)
    assert_close("imaginary parts", ours.imag, exact.imag)


@pytest.mark.parametrize("position_embedding", ["xpos", "rope"])
def test_factors_are_the_papers(position_embedding):
    """zeta_i ** (n / base) * exp(1j n theta_i), by exact arithmetic, up to a common centre."""
    config = make_config(position_embedding=position_embedding, xpos_scale_base=7, rope_theta=100.0)
    turns = make_rotary(config, torch.arange(16)[None], torch.float64)
    for i in range(config.head_dim // 2):
        theta = mpmath.mpf(100) ** (-mpmath.mpf(2 * i) / config.head_dim)
        zeta = (2 * i + 0.4 * config.head_dim) / (1.4 * config.head_dim) if position_embedding == "xpos" else 1
        for n, m in ((0, 0), (9, 2), (15, 15), (15, 0)):
            expected = complex(mpmath.mpf(zeta) ** (mpmath.mpf(n - m) / 7) * mpmath.expj((n - m) * theta))
            actual = (turns.query[0, n, 0, i] * turns.key[0, m, 0, i].conj()).item()
            assert abs(actual - expected) < 1e-14


@pytest.mark.parametrize("lengths", [[4, 8, 16], [6, 10], [5, 7, 11]], ids=str)
def test_positions_repeat_with_the_period(lengths):
    config = make_config(segment_lengths=lengths, dilation_rates=[1] * len(lengths))
    period = config.position_period
    assert period == math.lcm(*lengths)
    positions = torch.arange(3 * period)[None]
    for factors in make_rotary(config, positions, torch.float64):
        first, *others = factors.split(period, 1)
        for other in others:
            assert torch.equal(other, first)


@pytest.mark.parametrize("start", [0, 10**6 + 5], ids=str)
@pytest.mark.parametrize("position_embedding", ["xpos", "rope"])
def test_tokens_that_meet_see_their_true_distance(position_embedding, start):
    """Two tokens of one segment of any branch, anywhere: their factors depend on their distance alone."""
    config = make_config(position_embedding=position_embedding, segment_lengths=[6, 10], dilation_rates=[1, 2])
    positions = start + torch.arange(70)
    near, far = (make_rotary(config, p[None], torch.float64) for p in (torch.arange(10), positions))
    for w in config.segment_lengths:
        for n, m in combinations_with_replacement(range(69, -1, -1), 2):
            if positions[n] // w != positions[m] // w:
                continue
            expected = near.query[0, n - m, 0] * near.key[0, 0, 0].conj()
            actual = far.query[0, n, 0] * far.key[0, m, 0].conj()
            assert_close("factor", torch.view_as_real(actual), torch.view_as_real(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rope_at_a_billion(dtype):
    """Angles are no float32 products: at 10^9 they are as exact as the dtype's own rounding of a factor."""
    config = make_config(position_embedding="rope", segment_lengths=[1 << 30], dilation_rates=[1])
    positions = [10**9, 10**9 + 1, (1 << 30) - 1]
    factors = make_rotary(config, torch.tensor([positions]), dtype).query
    assert factors.dtype == torch.complex64
    for row, n in enumerate(positions):
        for i in range(config.head_dim // 2):
            theta = mpmath.mpf(10000) ** (-mpmath.mpf(2 * i) / config.head_dim)
            with mpmath.workdps(40):
                expected = complex(mpmath.expj(n * theta))
            # Half a rounding step of float64 at the angle, and one of float32 at the factor.
            assert abs(factors[0, row, 0, i].item() - expected) < n * 2.0**-52 + 2.0**-23


def test_rope_where_segments_do_not_nest():
    """A period of 10^13 tokens leaves the angles of the first ones exact."""
    lengths = [1024, 5792, 32768, 185363, 1048576]
    config = make_config(position_embedding="rope", segment_lengths=lengths, dilation_rates=[1, 2, 4, 8, 16])
    assert config.position_period > 10**13
    plain = make_config(position_embedding="rope", segment_lengths=[1 << 20], dilation_rates=[1])
    positions = torch.arange(0, 1 << 20, 9973)[None]
    assert torch.equal(*(make_rotary(c, positions, torch.float64).query for c in (config, plain)))


def test_a_period_beyond_64_bits():
    primes = [1048573, 2097143, 4194301, 8388593]
    config = make_config(position_embedding="rope", segment_lengths=primes, dilation_rates=[1] * 4)
    assert config.position_period > 2**63
    assert torch.isfinite(torch.view_as_real(make_rotary(config, torch.arange(5)[None], torch.float32).query)).all()


@pytest.mark.parametrize("size", [7, 20, 33])
def test_long_sequences_are_turned_in_slices(size, monkeypatch):
    config = make_config()
    positions = torch.arange(33)[None]
    whole = make_rotary(config, positions, torch.float64)
    monkeypatch.setattr("modeling_longnet.positions._POSITIONS_PER_STEP", size)
    for actual, expected in zip(make_rotary(config, positions, torch.float64), whole, strict=True):
        assert torch.equal(actual, expected)


def test_the_real_factors_of_a_compiled_graph_turn_as_the_complex_ones(monkeypatch):
    config, x = make_config(), torch.randn(2, 9, 3, 4, dtype=torch.float64)
    turns = make_rotary(config, torch.arange(9)[None], torch.float64)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    for factors, real in zip(turns, make_rotary(config, torch.arange(9)[None], torch.float64), strict=True):
        assert not real.is_complex()
        assert_close("turned", apply_rotary(x, real), apply_rotary(x, factors))


def test_no_positions():
    assert make_rotary(make_config(position_embedding="none"), torch.arange(5)[None], torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_turning_computes_in_float32(dtype):
    """One rounding to the dtype at the end, none between."""
    config = make_config()
    x = torch.randn(2, 16, 6, 4).to(dtype)
    factors = make_rotary(config, torch.arange(16)[None], dtype).query
    exact = apply_rotary(x.double(), make_rotary(config, torch.arange(16)[None], torch.float64).query)
    turned = apply_rotary(x, factors)
    assert turned.dtype == dtype
    assert ((turned.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all()


def attend_with_positions(config, dtype, inputs):
    """out, dq, dk, dv of one branch over the whole period, computed in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    turns = make_rotary(config, torch.arange(inputs[0].shape[1])[None], dtype)
    query, key = apply_rotary(leaves[0], turns.query), apply_rotary(leaves[1], turns.key)
    out = dilated_attention(*(x.transpose(1, 2) for x in (query, key, leaves[2])), [config.position_period], [1])
    return out, *torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_smallest_base_that_fits_is_as_exact_as_rope(dtype):
    """At the base that the errors recommend no scale overflows, nor does the precision of small ones go."""
    period = 1130  # at the base that just avoids an infinite scale, a value above 1.3 would overflow
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "segment_lengths": [period], "dilation_rates": [1]}
    largest = FLOAT16_SCALE if dtype == torch.float16 else FLOAT32_SCALE
    xpos = make_config(xpos_scale_base=make_config(**sizes).smallest_xpos_scale_base(largest), **sizes)
    rope = make_config(position_embedding="rope", **sizes)
    inputs = [torch.randn(1, period, 2, 16).to(dtype).double() for _ in range(3)]
    errors = {}
    for name, config in (("xpos", xpos), ("rope", rope)):
        pairs = zip(*(attend_with_positions(config, d, inputs) for d in (dtype, torch.float64)), strict=True)
        errors[name] = [((low.double() - exact).norm() / exact.norm()).item() for low, exact in pairs]
    for own, rival in zip(errors["xpos"], errors["rope"], strict=True):
        assert own <= 2 * rival


@pytest.mark.parametrize("lengths", [[64, 4096], [2048, 32768], [6000, 10000]], ids=str)
def test_the_error_names_the_smallest_base(lengths):
    branches = {"segment_lengths": lengths, "dilation_rates": [1, 2]}
    smallest = make_config(**branches, xpos_scale_base=10**6).smallest_xpos_scale_base()
    make_config(**branches, xpos_scale_base=smallest)
    advice = f"xpos_scale_base={smallest} or more", 'position_embedding="rope"'
    with refused("xpos_scale_base", str(smallest - 1), str(lengths), *advice):
        make_config(**branches, xpos_scale_base=smallest - 1)


def test_float16_that_does_not_fit_names_bfloat16():
    config = make_config(segment_lengths=[32768], dilation_rates=[1], xpos_scale_base=512)
    smallest = config.smallest_xpos_scale_base(FLOAT16_SCALE)
    with refused("float16", "32768", "xpos_scale_base=512", "bfloat16", f"fits is {smallest}"):
        make_rotary(config, torch.arange(5)[None], torch.float16)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert make_rotary(config, torch.arange(5)[None], dtype) is not None


def test_a_float16_forward_is_refused_too():
    model = make_model(LongNetModel, torch.float32, segment_lengths=[32768], dilation_rates=[1]).half()
    ids = torch.randint(0, 29, (1, 5))
    with refused("float16", "bfloat16"):
        model(ids)
    with refused("float16", "bfloat16"), torch.autocast("cpu", torch.float16):
        model.float()(ids)
    assert torch.isfinite(model.bfloat16()(ids).last_hidden_state).all()


def test_odd_heads_are_refused():
    with refused("hidden_size=18", "num_attention_heads=6", "3 dimensions", "even"):
        make_config(hidden_size=18)
    make_config(hidden_size=18, position_embedding="none")
