"""The two pieces everything is built from: attention on the rows of one branch, and the merge of two results."""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .attend_flash import backward as flash_backward
from .attend_flash import forward as flash_forward
from .attend_flash import unavailable as flash_unavailable
from .attend_torch import backward as torch_backward
from .attend_torch import forward as torch_forward
from .attend_torch import unavailable as torch_unavailable
from .attend_triton import unavailable as triton_unavailable

logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """Attention on (B, H, L, D) views of one branch's rows.

    `forward(q, k, v, is_causal, scale) -> [(queries, out, lse)]`, a part of the result for each slice of the queries;
    `backward(grad_out, q, k, v, out, lse, is_causal, scale) -> (dq, dk, dv)`, exact for these keys' part of a softmax
    over more keys when out and lse are merged ones;
    `unavailable(q)` says why it cannot run.
    """

    forward: Callable
    backward: Callable
    unavailable: Callable


BACKENDS = {
    "torch": Backend(torch_forward, torch_backward, torch_unavailable),
    "flash_attn": Backend(flash_forward, flash_backward, flash_unavailable),
}
# Triton's kernels take a whole branch at once: `dilated_attention` calls `attend_triton` itself.
BACKEND_NAMES = ("auto", "eager", *BACKENDS, "triton")


@lru_cache
def _say_choice(name: str, device: str, dtype: torch.dtype, reasons: str) -> None:
    logger.info(
        "dilated attention on %s, %s: backend 'auto' is %r (%s)",
        device,
        dtype,
        name,
        reasons or "preferred",
    )


def unavailable(name: str, query: Tensor) -> str | None:
    """Why a fast backend cannot serve `query`, None if it can."""
    return triton_unavailable(query) if name == "triton" else BACKENDS[name].unavailable(query)


def choose_backend(name: str, query: Tensor) -> str:
    """The backend that serves `query`; a named one that cannot run raises ValueError with its reason.

    Only "auto" may choose (and logs it once): Triton's kernels on a GPU, else PyTorch's where they exist, else the
    dense reference. Which wins where: benchmarks/README.md.
    """
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend={name!r}: allowed are {', '.join(map(repr, BACKEND_NAMES))}.")
    if name == "eager":
        return name
    if name != "auto":
        if reason := unavailable(name, query):
            raise ValueError(f"backend={name!r} cannot run: {reason}.")
        return name
    order = ("triton", "torch") if query.device.type == "cuda" else ("torch",)
    reasons = {other: unavailable(other, query) for other in order}
    name = next((other for other in order if reasons[other] is None), "eager")
    if not torch.compiler.is_compiling():  # a compiled graph cannot log
        said = "; ".join(f"not {other!r}: {reason}" for other, reason in reasons.items() if reason)
        _say_choice(name, query.device.type, query.dtype, said)
    return name


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Put the softmax over a union of two multisets of keys into `out`, `lse`, from the softmax over each (Eq. 9-10).

    Args:
        out: (..., D) accumulator, 0 where lse is -inf. lse: (...), -inf where no key was seen yet.
        other_out, other_lse: the same for the other keys, each query having seen at least one.
    """
    weight = torch.sigmoid(other_lse - lse)  # other's share of both denominators
    other = other_out.to(weight.dtype)
    if out.dtype == weight.dtype:
        out.lerp_(other, weight[..., None])
    else:  # in half precision, with one temporary in float32
        out.add_(other.sub_(out).mul_(weight[..., None]))
    torch.logaddexp(lse, other_lse, out=lse)
