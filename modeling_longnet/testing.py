# ruff: noqa: F401
"""Names from inside the package that tests, benchmarks and the paper's code may import. They may change in any release."""

from .backend_strided import StridedBackend
from .backend_torch import TorchBackend, join_tokens
from .backends import BACKENDS, choose_backend
from .branches import count_work, make_branches, whole_batch
from .compat import CACHE
from .sharding_plan import Shard, count_received, halo_slices, shard_borders
