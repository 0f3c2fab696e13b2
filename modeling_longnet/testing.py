# ruff: noqa: F401
"""Names from inside the package that its tests, benchmarks and the paper's code may import. No other code should.

They may change in any release.
"""

from .attention_autograd import AttentionPlan, HaloKV, attend_chunks
from .attention_context import config_branches
from .backend import BranchCall
from .backend_strided import Part, StridedBackend, branch_views
from .backend_torch import TorchBackend, join_tokens
from .backends import BACKENDS, backend_names, choose_backend
from .branches import Branch, Chunk, chunk_slices, count_work, make_branches, whole_batch
from .compat import CACHE
from .reference import count_branches, dense_attention
from .sharding import GroupExchange, attend_sharded
from .sharding_plan import Shard, count_received, halo_slices, plan_exchange, shard_borders
