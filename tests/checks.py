"""What several test files need: one comparison that raises, and small models."""

from contextlib import contextmanager

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from modeling_longnet import LongNetConfig
from modeling_longnet.attention_autograd import AttentionPlan, HaloKV, attend_chunks
from modeling_longnet.branches import Branch, Chunk, whole_batch

ROUNDING = 1e-12  # float64, a few hundred additions


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    """Raise unless max|actual - expected| <= tolerance * max(1, max|expected|); NaN never passes.

    Inputs are of the order of one, so where large terms cancel the rounding of those terms counts.
    """
    assert actual is not None, f"{name} is None"
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(expected).all(), f"{name}: the expected values are not finite"
    if actual.numel() == 0:
        return
    scale = max(1.0, expected.abs().max().item())
    error = (actual.to(expected.dtype) - expected).abs().max().item() / scale
    assert error <= tolerance, f"{name}: deviation {error:.3g} of the largest value, allowed {tolerance:.3g}"


def assert_low_precision(name: str, actual: Tensor, rival: Tensor, exact: Tensor) -> None:
    """Root mean square error at most twice the rival's own, plus one rounding step of each number.

    The largest error is not used: among thousands it depends on chance, and PyTorch's own kernel exceeds four times
    the dense reference's on some of these inputs.
    """
    own, error = ((x.double() - exact).norm().item() for x in (rival, actual))
    step = torch.finfo(actual.dtype).eps * exact.norm().item()
    assert error <= 2 * own + step, f"{name}: error {error:.3g}, its rival's {own:.3g}"


def make_halo(keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> HaloKV:
    """The halo of each branch's (B, G, P, D) keys and values."""
    return HaloKV(torch.cat(keys, 2), torch.cat(values, 2), tuple(x.shape[2] for x in keys))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: tuple[Branch, ...],
    chunks: list | None = None,
    prefix: HaloKV | None = None,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    backend: str = "torch",
    zero_padding: bool = False,
) -> Tensor:
    """`attend_chunks` of (B, L, heads, D) tensors; chunks are lists of a `Chunk`'s fields, the whole batch if None."""
    chunks = whole_batch(*query.shape[:2]) if chunks is None else tuple(Chunk(*chunk) for chunk in chunks)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    plan = AttentionPlan(chunks, branches, is_causal, scale, backend, zero_padding)
    return attend_chunks(query, key, value, plan, prefix)


def make_config(**overrides) -> LongNetConfig:
    """A small causal model whose segments end often; sizes are pairwise different."""
    sizes = {
        "vocab_size": 29, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 6, "segment_lengths": [4, 8, 16], "dilation_rates": [1, 2, 4],
    }  # fmt: skip
    return LongNetConfig(**(sizes | overrides))


def make_model(model_class, dtype: torch.dtype = torch.float64, *, implementation: str = "sdpa", seed: int = 0, **over):
    """A model in eval mode, every weight random and of a size that makes attention matter."""
    torch.manual_seed(seed)
    config = make_config(**over)
    config._attn_implementation = implementation
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "_ln" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(2)
    return model


@contextmanager
def refused(*words: str):
    """The block must raise a ValueError, or Transformers' own strict error, that says all these words."""
    with pytest.raises((ValueError, StrictDataclassError)) as caught:
        yield
    said = str(caught.value)
    missing = [word for word in words if word not in said]
    assert not missing, f"the error does not say {missing}: {said}"
