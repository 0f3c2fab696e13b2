"""Names below the public API that tests, benchmarks and two examples may import. Any release may change them."""

from .backend_strided import StridedBackend
from .backend_torch import TorchBackend, join_tokens
from .backend_triton import TritonBackend
from .backends import BACKENDS, choose_backend
from .branches import whole_batch
from .compat import CACHE
from .pattern import Pattern, count_work, make_branches
from .positions import apply_rotary
from .sharding_plan import Shard, count_received, halo_slices, shard_borders

__all__ = [
    "BACKENDS",
    "CACHE",
    "Pattern",
    "Shard",
    "StridedBackend",
    "TorchBackend",
    "TritonBackend",
    "apply_rotary",
    "choose_backend",
    "count_received",
    "count_work",
    "halo_slices",
    "join_tokens",
    "make_branches",
    "shard_borders",
    "whole_batch",
]
