"""What the Triton kernels are launched with, seen without a GPU: by a driver that compiles for an H100 and launches
nothing. Prints as JSON, for each case and call, what was launched and how many launches Triton prepared."""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
launches, prepared = [], []


class Launcher:
    """Writes down instead of launching."""

    def __init__(self, source, metadata):
        self.name, self.overlaps = source.fn.__name__, bool(metadata.launch_pdl)
        self.names = source.fn.arg_names

    def __call__(self, x, y, z, stream, function, *arguments):
        values = arguments[-len(self.names) :]
        tensors = [[str(v.dtype), v.data_ptr() % 16] for v in values if isinstance(v, torch.Tensor)]
        numbers = {n: v for n, v in zip(self.names, values, strict=True) if not isinstance(v, torch.Tensor)}
        launches.append([self.name, [x, y, z], self.overlaps, function, tensors, numbers, stream])


class Utils:
    loaded = 0

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


def attend(query, key, value, is_causal):
    """Forward and backward: what was launched, and how many times Triton looked for the compiled kernel."""
    launches.clear()
    prepared.clear()
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    branches = make_branches([128, 512], [1, 3], key.shape[2], "interleaved")
    chunks = whole_batch(*query.shape[:2])
    out = attend_chunks(*leaves, branches, chunks=chunks, is_causal=is_causal, backend="triton")
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return {"launches": list(launches), "prepared": len(prepared)}


def shifted(x):
    """The same numbers, from an address that 16 does not divide."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def prepare(kernel, *arguments, run=JITFunction.run, **options):
    prepared.append(kernel)
    return run(kernel, *arguments, **options)


if __name__ == "__main__":
    gpu = Driver()
    driver.set_active(gpu)
    JITFunction.run = prepare
    from modeling_longnet import attend_triton
    from modeling_longnet.branches import make_branches
    from modeling_longnet.dilated_attention import attend_chunks, whole_batch

    attend_triton._can_overlap = lambda device: True
    inputs = {
        "causal": ([torch.randn(1, 600, heads, 64).bfloat16() for heads in (4, 2, 2)], True),
        "both ways": ([torch.randn(2, 300, 2, 40).half() for _ in range(3)], False),
    }
    result = {}
    for name, ((q, k, v), is_causal) in inputs.items():
        result[name] = {
            "shifted": attend(q, k, shifted(v), is_causal),
            "first": attend(q, k, v, is_causal),
            "again": attend(q.clone(), k.clone(), v.clone(), is_causal),
            "longer": attend(*(torch.cat([x, x[:, :93]], 1) for x in (q, k, v)), is_causal),
        }
        gpu.stream = 7
        result[name]["on another stream"] = attend(q, k, v, is_causal)
        gpu.stream = 0
    print(json.dumps(result))
