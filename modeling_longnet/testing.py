"""Names below the public API that tests, benchmarks and two examples may import. Any release may change them."""

from .backend_strided import StridedBackend
from .backend_torch import TorchBackend, join_tokens
from .backend_triton import TritonBackend
from .backends import BACKENDS, choose_backend
from .branches import Branch, Chunk, whole_batch
from .compat import CACHE
from .pattern import Pattern, count_work, make_branches
from .positions import apply_rotary
from .products import branch_products
from .reference import count_branches
from .sharding_plan import Shard, count_received, halo_slices, plan_exchange, shard_borders

__all__ = [
    "BACKENDS",
    "CACHE",
    "Branch",
    "Chunk",
    "Pattern",
    "Shard",
    "StridedBackend",
    "TorchBackend",
    "TritonBackend",
    "apply_rotary",
    "branch_products",
    "choose_backend",
    "count_branches",
    "count_received",
    "count_work",
    "halo_slices",
    "join_tokens",
    "make_branches",
    "plan_exchange",
    "shard_borders",
    "whole_batch",
]
