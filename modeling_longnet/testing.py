"""Names below the public API that tests, benchmarks and `examples/paper` may import. Any release may change them."""

import sys
from unittest import mock

from .attend import BACKENDS, Backend
from .attend_torch import backward as torch_backward
from .attend_torch import forward as torch_forward
from .attend_torch import join_rows as join_tokens
from .attend_torch import unavailable as torch_unavailable
from .attend_triton import unavailable as triton_unavailable
from .branches import Chunk, count_work, make_branches
from .sharding import Shard, count_received, outside_rows, shard_borders

__all__ = [
    "BACKENDS",
    "Shard",
    "TorchBackend",
    "count_received",
    "count_work",
    "join_tokens",
    "make_branches",
    "outside_rows",
    "shard_borders",
    "whole_batch",
]


def whole_batch(batch, length):
    return (Chunk(0, batch, 0, length, 0, length),)


class TorchBackend:
    """Stands for the new core's class until that is merged: all of this file is imports then."""

    def __init__(self, split_seqlens=range(384, 513), gathered_bytes=4 << 20):
        self.changed = {"_CUT_ROWS": split_seqlens, "_GATHERED_BYTES": gathered_bytes}
        self.unavailable = torch_unavailable

    def forward(self, *arguments):
        with mock.patch.multiple("modeling_longnet.attend_torch", **self.changed):
            return torch_forward(*arguments)

    def backward(self, *arguments):
        with mock.patch.multiple("modeling_longnet.attend_torch", **self.changed):
            return torch_backward(*arguments)


class _Names:
    def __contains__(self, name):
        return name in BACKENDS or name in ("auto", "eager")

    def __iter__(self):
        return iter(("auto", "eager", *BACKENDS))


BACKENDS["triton"] = Backend(None, None, triton_unavailable)
sys.modules["modeling_longnet.attend"].BACKEND_NAMES = _Names()
