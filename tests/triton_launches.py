"""What the Triton kernels are launched with, seen without a GPU: by a driver that compiles for an H100 and launches
nothing. Prints as JSON, for each case and call, the launches and the number of kernels that Triton compiled."""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TARGET = GPUTarget("cuda", 90, 32)
launches = []


class Launcher:
    """Records instead of launching."""

    def __init__(self, source, metadata):
        self.name, self.overlaps = source.fn.__name__, bool(metadata.launch_pdl)
        self.names = source.fn.arg_names

    def __call__(self, x, y, z, stream, function, *arguments):
        values = arguments[-len(self.names) :]
        launches.append(
            {
                "kernel": self.name,
                "grid": [x, y, z],
                "overlaps": self.overlaps,
                "function": function,
                "stream": stream,
                "tensors": [[str(v.dtype), v.data_ptr() % 16] for v in values if isinstance(v, torch.Tensor)],
                "numbers": {n: v for n, v in zip(self.names, values, strict=True) if not isinstance(v, torch.Tensor)},
            }
        )


class Utils:
    loaded = 0  # once per compiled kernel

    def load_binary(self, *arguments):
        self.loaded += 1
        return self.loaded, self.loaded, 0, 0, 1024  # module, function, registers, spilled bytes, most threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    launcher_cls, utils, stream = Launcher, Utils(), 0

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return TARGET


def attend(query, key, value, is_causal, branches=None, start=None):
    """Run forward and backward; return the launches and how many kernels were compiled for them.

    With a `start`, the tokens from there on have those before it as a prefix, and nothing is differentiated.
    """
    launches.clear()
    loaded = gpu.utils.loaded
    leaves = [x.detach().requires_grad_(start is None) for x in (query, key, value)]
    branches = branches or make_branches([128, 512], [1, 3], key.shape[2], "interleaved")
    chunks, prefix = whole_batch(*query.shape[:2]), None
    if start is not None:
        slots, length = prefix_lengths(branches, start), query.shape[1]
        chunks = (Chunk(0, len(query), 0, length, start, start + length),)
        prefix = HaloKV(*(x[:, :1].transpose(1, 2).repeat(1, 1, sum(slots), 1) for x in leaves[1:]), slots)
    plan = AttentionPlan(chunks, branches, is_causal, query.shape[-1] ** -0.5, "triton", False)
    out = attend_chunks(*leaves, plan, prefix)
    if start is None:
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    return {"launches": list(launches), "compiled": gpu.utils.loaded - loaded}


def shifted(x):
    """The same numbers, from an address that 16 does not divide."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


if __name__ == "__main__":
    gpu = Driver()
    driver.set_active(gpu)
    from modeling_longnet import backend_triton
    from modeling_longnet.attention_autograd import AttentionPlan, HaloKV, attend_chunks
    from modeling_longnet.branches import Chunk, prefix_lengths, whole_batch
    from modeling_longnet.pattern import Pattern, make_branches

    backend_triton._can_overlap = lambda device: True
    inputs = {
        "causal": ([torch.randn(1, 600, heads, 64).bfloat16() for heads in (4, 2, 2)], True),
        "bidirectional": ([torch.randn(2, 300, 2, 40).half() for _ in range(3)], False),
    }
    result = {}
    for name, ((q, k, v), is_causal) in inputs.items():
        result[name] = {
            "shifted": attend(q, k, shifted(v), is_causal),
            "first": attend(q, k, v, is_causal),
            "again": attend(q.clone(), k.clone(), v.clone(), is_causal),
            "longer": attend(*(torch.cat([x, x[:, :88]], 1) for x in (q, k, v)), is_causal),
        }
        gpu.stream = 7
        result[name]["on another stream"] = attend(q, k, v, is_causal)
        gpu.stream = 0
        backend_triton._INT32_ELEMENTS = 0
        backend_triton._launch.cache_clear()
        result[name]["wide"] = attend(q, k, v, is_causal)
        backend_triton._INT32_ELEMENTS = 1 << 31
        backend_triton._launch.cache_clear()
    pattern = Pattern((128, 512), (2, 4), "interleaved", 64, (1, 4), True, True, True)
    even, odd = (pattern.branches(2, 4, layer) for layer in (0, 1))
    q, k, v = inputs["causal"][0]
    result["beyond"] = {
        "first": attend(q, k, v, True, even),
        "next layer": attend(q, k, v, True, odd),
        "prefix": attend(q, k, v, True, even, start=100),
        "later": attend(q, k, v, True, odd, start=1100),
    }
    print(json.dumps(result))
