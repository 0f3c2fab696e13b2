"""The registry of attention backends and the choice of one."""

import logging
from functools import lru_cache

import torch
from torch import Tensor

from .backend import Backend
from .backend_flash import FlashAttentionBackend
from .backend_torch import TorchBackend
from .backend_triton import TritonBackend

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Backend] = {
    "torch": TorchBackend(),
    "flash_attn": FlashAttentionBackend(),
    "triton": TritonBackend(),
}
# What "auto" tries, by device; the dense reference comes last. Which one is faster: benchmarks/README.md.
_PREFERRED = {"cuda": ("triton", "torch")}


def backend_names() -> tuple[str, ...]:
    """Return the allowed names. "eager" is the dense reference: no backend, as it computes all branches at once."""
    return ("auto", "eager", *BACKENDS)


@lru_cache
def _log_choice(name: str, device: str, dtype: torch.dtype, reasons: str) -> None:
    logger.info("dilated attention on %s, %s: backend 'auto' is %r (%s)", device, dtype, name, reasons or "preferred")


def choose_backend(name: str, query: Tensor) -> str:
    """Return the name of the backend that serves a query of this dtype, device and head dimension.

    Only "auto" chooses, and logs its choice once per device and dtype.

    Raises:
        ValueError: an unknown name, or a named backend that cannot run; the message gives the reason.
    """
    if name not in backend_names():
        raise ValueError(f"backend={name!r}: allowed are {', '.join(map(repr, backend_names()))}.")
    if name != "auto":
        if name != "eager" and (reason := BACKENDS[name].unavailable(query)):
            raise ValueError(f"backend={name!r} cannot run: {reason}.")
        return name
    preferred = _PREFERRED.get(query.device.type, ("torch",))
    reasons = {other: BACKENDS[other].unavailable(query) for other in preferred}
    name = next((other for other in preferred if reasons[other] is None), "eager")
    if not torch.compiler.is_compiling():  # a compiled graph cannot log
        skipped = "; ".join(f"not {other!r}: {reason}" for other, reason in reasons.items() if reason)
        _log_choice(name, query.device.type, query.dtype, skipped)
    return name
