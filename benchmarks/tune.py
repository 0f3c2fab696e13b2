"""`python -m benchmarks.tune [options]`: block sizes and other variants of the three attention kernels, timed in place.

Each candidate computes what the kernel in use computes, over all branches of the pattern. It is compared with dense
attention in float64 at a ragged length, then timed alternately with the kernel in use. All candidates are compiled
first, in parallel, for an H100, without touching a GPU. Then each stage runs in its own process, so a candidate that
hangs or loses the GPU context costs only its stage. Stages: other block sizes and loops, tensor descriptors, rotary
positions in one kernel (`tune_rotary.py`), warp specialization. The JSON file is written after each group.

A row holds the median milliseconds of all branches, TFLOP/s of the kernel's own products, and the speedup over the
kernel in use (median, least and most of the rounds).
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from modeling_longnet import dilated_attention
from modeling_longnet.testing import BACKENDS, TritonBackend, apply_rotary

from . import tune_kernels, tune_rotary
from .measure import Call, describe_run, spread, time_alternately, write_json
from .op import PATTERNS, Case, count_flops, parse_pattern

backend_triton = sys.modules[TritonBackend.__module__]  # this script patches its table of block sizes
PRODUCTS = {"forward": 2, "dkdv": 4, "dq": 3}  # matrix products of a kernel per pair of blocks
KERNELS = {
    "forward": tune_kernels.forward_candidate,
    "dkdv": tune_kernels.dkdv_candidate,
    "dq": tune_kernels.dq_candidate,
}
STAGES = ("blocks", "descriptors", "rotary", "specialized")


class Candidate(NamedTuple):
    """A kernel's block sizes and, if `flags` are given, a variant that `tune_kernels` describes."""

    kernel: str
    sizes: tuple[int, int, int, int]  # BLOCK_M, BLOCK_N, warps, pipeline stages
    flags: tuple[tuple[str, int], ...] = ()

    @property
    def stage(self) -> str:
        flags = dict(self.flags)
        return "specialized" if flags.get("SPECIALIZED") else "descriptors" if flags.get("TMA") else "blocks"

    def __str__(self) -> str:
        flags = [f"{name.lower()}={int(value)}" for name, value in self.flags if value] or ["as in use"]
        return " ".join([self.kernel, "{}x{} warps={} stages={}".format(*self.sizes), *flags])


def forward(*sizes, tma=True, loops=1, ws=False, **options) -> Candidate:
    flags = {"TMA": tma, "LOOPS": loops, "SPECIALIZED": ws} | options
    return Candidate("forward", sizes, tuple(flags.items()))


def dkdv(*sizes, tma=True, keys_are_rows=True, ws=False, **options) -> Candidate:
    flags = {"TMA": tma, "KEYS_ARE_ROWS": keys_are_rows, "SPECIALIZED": ws} | options
    return Candidate("dkdv", sizes, tuple(flags.items()))


def dq(*sizes, tma=True, loops=1, ws=False, **options) -> Candidate:
    flags = {"TMA": tma, "LOOPS": loops, "SPECIALIZED": ws} | options
    return Candidate("dq", sizes, tuple(flags.items()))


# Candidates by the largest head dimension they are for, most promising first.
CANDIDATES = {
    128: [
        forward(64, 64, 4, 3),
        forward(64, 64, 4, 3, loops=2),
        forward(64, 64, 4, 3, tma=False),
        forward(128, 64, 8, 3),
        forward(128, 64, 8, 2, maxnreg=128),
        forward(128, 128, 8, 2),
        forward(128, 64, 8, 3, tma=False),
        forward(128, 128, 4, 2, ws=True),
        forward(128, 64, 4, 3, ws=True),
        Candidate("forward", (128, 128, 8, 2)),
        dkdv(64, 64, 4, 2, keys_are_rows=False),
        dkdv(64, 128, 8, 2),
        dkdv(64, 64, 4, 2),
        dkdv(64, 128, 8, 2, tma=False),
        dkdv(32, 128, 8, 2),
        dkdv(32, 64, 4, 2),
        dkdv(64, 128, 4, 2, ws=True),
        dkdv(32, 128, 4, 2, ws=True),
        dq(128, 64, 8, 3),
        dq(128, 64, 8, 3, loops=2),
        dq(128, 64, 8, 3, tma=False),
        dq(64, 64, 4, 2),
        Candidate("dq", (128, 128, 8, 2)),
    ],
    64: [
        forward(64, 64, 4, 3),
        forward(64, 64, 4, 3, tma=False),
        forward(128, 64, 4, 3),
        forward(128, 128, 8, 3),
        forward(128, 128, 4, 2, ws=True),
        dkdv(64, 64, 4, 3, keys_are_rows=False),
        dkdv(64, 64, 4, 3),
        dkdv(64, 128, 8, 3),
        dkdv(64, 128, 8, 3, tma=False),
        dkdv(64, 128, 4, 2, ws=True),
        dq(64, 64, 4, 3),
        dq(64, 64, 4, 3, tma=False),
        dq(128, 64, 4, 3),
    ],
}


def candidates(kernel: str, dim: int, dtype: torch.dtype, stage: str) -> list[Candidate]:
    """Return the kernel in use, then its rivals of a stage."""
    in_use = Candidate(kernel, backend_triton.block_sizes(kernel, dtype, dim))
    rivals = CANDIDATES[64 if dim <= 64 else 128]
    return [in_use, *(c for c in rivals if (c.kernel, c.stage) == (kernel, stage))]


class Recorder(TritonBackend):
    """Backend "triton" that records its calls and their tensors."""

    def __init__(self, runs: bool = True):
        self.calls = {name: [] for name in PRODUCTS}
        self.runs = runs

    def unavailable(self, query: Tensor) -> None:
        return None

    def forward_branch(self, call, query, key, value, out, lse):
        layout = backend_triton._Layout.of(query, key, value)
        self.calls["forward"].append((call, layout, (query, key, value, out, lse)))
        return super().forward_branch(call, query, key, value, out, lse) if self.runs else (out, lse)

    def prepare_backward(self, out, grad_out):
        return super().prepare_backward(out, grad_out) if self.runs else out.new_empty(out.shape[:3]).float()

    def backward_branch(self, call, grad_out, query, key, value, saved, lse, grads):
        layout = backend_triton._Layout.of(query, key, value, grads[1])
        inputs = query, key, value, grad_out, lse, saved
        self.calls["dkdv"].append((call, layout, (*inputs, *grads[1:])))
        self.calls["dq"].append((call, layout, (*inputs, grads[0])))
        return super().backward_branch(call, grad_out, *inputs[:3], saved, lse, grads) if self.runs else grads


def record(case: Case, pattern: str, runs: bool = True) -> tuple[Recorder, list[Tensor], Tensor]:
    """Return the calls of the op with its backward, the inputs, and the gradient of out."""
    recorder, shape = Recorder(runs), (1, case.length, case.heads, case.head_dim)
    inputs = [case.tensor(*shape).transpose(1, 2).requires_grad_() for _ in range(3)]
    grad_out = case.tensor(*shape).transpose(1, 2)
    with mock.patch.dict(BACKENDS, recorder=recorder):
        out = dilated_attention(*inputs, *parse_pattern(pattern), backend="recorder")
        torch.autograd.grad(out, inputs, grad_out)
    return recorder, inputs, grad_out


def launches(candidate: Candidate, calls: list[tuple]) -> list[tuple]:
    """Return the launches of a candidate for recorded calls, with their tensors."""
    launch, made = backend_triton._launch, []
    sizes = dict.fromkeys(((candidate.kernel, n) for n in (2, 4)), (candidate.sizes,) * 3)
    launch.cache_clear()
    with mock.patch.dict(backend_triton._BLOCK_SIZES, sizes):
        for call, layout, tensors in calls:
            one = launch(candidate.kernel, call, layout)
            if candidate.flags:
                arguments = one.arguments | dict(candidate.flags)
                one = one._replace(kernel=KERNELS[candidate.kernel], arguments=arguments)
            made.append((one, tensors))
    launch.cache_clear()
    return made


class Scratch:
    """Allocator for descriptors. Launches overlap, so each of the last 64 keeps its own memory."""

    def __init__(self):
        self.last = []

    def __call__(self, size: int, alignment: int, stream: int | None) -> Tensor:
        self.last = [*self.last[-63:], torch.empty(size, dtype=torch.int8, device="cuda")]
        return self.last[-1]


# --- Compiling for an H100 without one.


class _Driver:
    """Stand-in for the GPU's driver that loads and launches nothing; `usage` holds the last kernel's resources."""

    usage: list[dict]
    stream = 0

    def __init__(self):
        from triton.backends.compiler import GPUTarget

        self.target, self.usage, self.utils = GPUTarget("cuda", 90, 32), [], self

    def launcher_cls(self, source, metadata):
        self.shared = metadata.shared
        return lambda *arguments: None

    def load_binary(self, name, cubin, *others):
        self.usage.append(resources(cubin) | {"shared": self.shared})
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers and bytes of stack (spilled registers) per thread; empty if Triton comes without cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", text)}


def compile_candidate(candidate: Candidate, case: Case, pattern: str) -> dict:
    """Compile all launches of a candidate into Triton's cache; return seconds, resources and any error."""
    from triton.runtime.driver import driver

    torch.set_num_threads(1)
    gpu, begin = _Driver(), time.perf_counter()
    driver.set_active(gpu)
    triton.set_allocator(Scratch())
    backend_triton._can_overlap = lambda device: True
    recorder, _, _ = record(case._replace(length=64, device="cpu"), pattern, runs=False)
    row = {"candidate": str(candidate), "dim": case.head_dim}
    try:
        for launch, tensors in launches(candidate, recorder.calls[candidate.kernel]):
            launch.run(*tensors)
    except Exception as error:  # the compiler may raise anything: the candidate is dropped, and the report says why
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return row | {"seconds": time.perf_counter() - begin, "usage": gpu.usage}


# --- Measuring.


def outputs(kernel: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tensors that a launch writes: (out, lse), (dk, dv) or (dq,)."""
    return tensors[-1:] if kernel == "dq" else tensors[-2:]


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest ||found - exact|| / ||exact||; NaN if any is NaN."""
    pairs = zip(found, exact, strict=True)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


class Checker:
    """Compares a candidate's results at a ragged length with dense attention in float64."""

    def __init__(self, case: Case, pattern: str):
        recorder, inputs, grad_out = record(case, pattern)
        self.calls, self.exact = recorder.calls, self.dense(inputs, grad_out, pattern, torch.float64)
        rounded = self.dense(inputs, grad_out, pattern, inputs[0].dtype)
        self.lse = recorder.calls["forward"][0][2][4].double()
        self.dense_errors = {name: relative_error(rounded[name], self.exact[name]) for name in PRODUCTS}

    @staticmethod
    def dense(inputs: list[Tensor], grad_out: Tensor, pattern: str, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = dilated_attention(*inputs, *parse_pattern(pattern), backend="eager")
        dq, dk, dv = torch.autograd.grad(out, inputs, grad_out.to(dtype))
        results = {"forward": [out.detach()], "dkdv": [dk, dv], "dq": [dq]}
        return {name: [x.transpose(1, 2) for x in tensors] for name, tensors in results.items()}

    def errors(self, candidate: Candidate) -> dict[str, object]:
        """Return the error, that of dense attention in the same dtype, and whether a second run has the same bits."""
        made, runs = launches(candidate, self.calls[candidate.kernel]), []
        results = outputs(candidate.kernel, made[0][1])
        kept = [x.clone() for x in results]
        for _ in range(2):
            for x in results:
                x.fill_(float("nan"))
            for launch, tensors in made:
                launch.run(*tensors)
            runs.append([x.clone() for x in results])
        for x, before in zip(results, kept, strict=True):  # the next kernels read out and lse
            x.copy_(before)
        exact = self.exact[candidate.kernel] + ([self.lse] if candidate.kernel == "forward" else [])
        error = relative_error(runs[0], exact)
        same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        return {"error": error, "dense_error": self.dense_errors[candidate.kernel], "same_bits": same}


def compare(rows: dict[str, dict], calls: dict[str, Call], seconds: float) -> list[dict]:
    """Time the calls alternately; add seconds and speedup over the first row to their rows; fastest first."""
    for name, samples in time_alternately(calls, seconds=seconds, least=3, most=40).items():
        rows[name]["seconds"] = samples
    in_use = next(iter(rows.values())).get("seconds")
    for name in calls if in_use else ():
        rows[name]["speedup"] = spread([a / b for a, b in zip(in_use, rows[name]["seconds"], strict=True)])
    return sorted(rows.values(), key=lambda row: spread(row["seconds"]).median if "seconds" in row else float("inf"))


def group(stage: str, kernel: str, case: Case, pattern: str, checker: Checker, calls, seconds: float) -> list[dict]:
    """Check and time the candidates of one kernel, shape and stage; fastest first."""
    rows, contestants = {}, {}
    for candidate in candidates(kernel, case.head_dim, getattr(torch, case.dtype), stage):
        row = {"stage": stage, "kernel": kernel, "heads": case.heads, "dim": case.head_dim, "candidate": str(candidate)}
        rows[str(candidate)] = row
        try:
            row |= checker.errors(candidate)
            made = launches(candidate, calls[kernel])
        except Exception as error:  # compiler and driver may raise anything: the others are still worth timing
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        in_use = next(iter(rows.values())).get("error", 0.0)
        if not row["error"] <= max(2 * row["dense_error"], 1.2 * in_use):
            row["failed"] = "wrong"
            continue

        def call(made=made):
            for launch, tensors in made:
                launch.run(*tensors)

        contestants[str(candidate)] = call
    flops = count_flops(case._replace(mode="forward"), pattern) / 2 * PRODUCTS[kernel]
    ranked = compare(rows, contestants, seconds)
    for row in ranked:
        if "seconds" in row:
            row["tflops"] = flops / spread(row["seconds"]).median / 1e12
    return ranked


def rotary(case: Case, seconds: float, backward: bool) -> list[dict]:
    """Check and time rotary positions of one tensor: one kernel against PyTorch's several."""
    x, grad = (case.tensor(1, case.length, case.heads, case.head_dim) for _ in range(2))
    angles = 6 * torch.rand(1, case.length, 1, case.head_dim // 2, device=case.device, dtype=torch.float64)
    mode = "forward+backward" if backward else "forward"

    factors = torch.polar(angles / 6 + 0.5, angles)
    rounded = factors.to(torch.complex64)

    def call(apply, x=x, factors=rounded):
        if not backward:
            return [apply(x, factors)]
        x = x.detach().requires_grad_()
        out = apply(x, factors)
        return [out.detach(), *torch.autograd.grad(out, x, grad.to(x.dtype))]

    ways = {f"rotary {mode}, as in use": apply_rotary, f"rotary {mode}, one kernel": tune_rotary.apply_rotary}
    exact = call(apply_rotary, x.double(), factors)
    rows, calls = {}, {}
    for name, way in ways.items():
        rows[name] = {"stage": "rotary", "kernel": "rotary", "heads": case.heads, "dim": case.head_dim}
        found = call(way)
        rows[name] |= {"candidate": name, "error": relative_error(found, exact)}
        rows[name]["dense_error"] = next(iter(rows.values()))["error"]
        rows[name]["same_bits"] = all(map(torch.equal, found, call(way)))
        calls[name] = partial(call, way)
    return compare(rows, calls, seconds)


def measure(stage: str, args: argparse.Namespace, write) -> None:
    """Measure all groups of a stage, shape by shape; `write` receives the rows of each group."""
    for heads, dim in args.shapes:
        torch.manual_seed(0)
        case = Case(args.length, heads, dim, args.dtype, "forward+backward", 1, args.device)
        if stage == "rotary":
            write(rotary(case, args.seconds / 2, False))
            write(rotary(case, args.seconds / 2, True))
            continue
        checker = Checker(case._replace(length=args.error_length), args.pattern)
        calls = record(case, args.pattern)[0].calls
        for kernel in PRODUCTS:
            write(group(stage, kernel, case, args.pattern, checker, calls, args.seconds))


def _child(stage: str, args: argparse.Namespace, connection) -> None:
    """Wait for a message from the connection, then measure a stage and send its rows."""
    connection.recv()
    if args.device == "cuda":
        triton.set_allocator(Scratch())
    connection.send(describe_run(args.device))
    measure(stage, args, connection.send)
    connection.close()


def _start(stage: str, args: argparse.Namespace):
    """Start a stage's process, which imports and waits, and return it with the connection to it.

    On a GPU machine it is spawned: if this process has initialized CUDA, a fork of it could not use the GPU.
    """
    context = multiprocessing.get_context("spawn" if args.device == "cuda" else "fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(stage, args, theirs), daemon=True)
    process.start()
    theirs.close()
    return stage, process, ours


def line(row: dict) -> str:
    if "failed" in row:
        return f"{'':>8} {'':>6} {'':>22}  {row['candidate']} (heads of {row['dim']}): {row['failed']}"
    milliseconds, missing = spread(row["seconds"]).median * 1e3, (float("nan"),) * 3
    speedup = "{:.3f} ({:.3f} to {:.3f})".format(*row.get("speedup", missing))
    errors = f"error {row['error']:.1e} ({row['error'] / row['dense_error']:.2f} of dense)"
    bits = "" if row["same_bits"] else ", NOT THE SAME BITS"
    return f"{milliseconds:8.3f} {row.get('tflops', 0):6.0f} {speedup:>22}  {row['candidate']}, {errors}{bits}"


def run(args: argparse.Namespace) -> dict:
    """Compile, then measure each stage; print and write rows as they come."""
    begin, result = time.monotonic(), {"name": "tune", "compiled": [], "rows": []}

    def write(rows: list[dict]) -> None:
        result["rows"] += rows
        write_json(args.output, result)
        print("", *map(line, rows), sep="\n", flush=True)

    children = [] if args.compile_only else [_start(stage, args) for stage in args.stages]
    if args.device == "cuda":
        compile_all(args, result)
        print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    for stage, process, connection in children:
        end = min(begin + args.limit, time.monotonic() + args.stage_limit)
        try:
            connection.send("begin")
            while connection.poll(max(0, end - time.monotonic())):
                message = connection.recv()
                if isinstance(message, dict):
                    result |= message
                else:
                    write(message)
            print(f"stage {stage}: stopped at its time limit", flush=True)
        except (EOFError, OSError):  # the process has ended: everything is measured, or it has printed its error
            process.join(10)
            print(f"stage {stage}: ended with {process.exitcode}, {time.monotonic() - begin:.0f} s", flush=True)
        process.kill()
        process.join()
    return result


def compile_all(args: argparse.Namespace, result: dict) -> None:
    """Compile the candidates of all stages in parallel; print the resources that each needs."""
    dtype = getattr(torch, args.dtype)
    work = {
        (candidate, heads, dim): Case(64, heads, dim, args.dtype, "forward+backward", 1, "cpu")
        for heads, dim in args.shapes
        for stage in args.stages
        for kernel in PRODUCTS
        if stage != "rotary"
        for candidate in candidates(kernel, dim, dtype, stage)
    }
    # Forked: these never use the GPU.
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("fork")) as pool:
        jobs = [pool.submit(compile_candidate, key[0], case, args.pattern) for key, case in work.items()]
        for key, job in zip(work, jobs, strict=True):
            try:
                result["compiled"].append(job.result())
            except BrokenExecutor:  # a compiler crashed its process: the stages compile what is left
                result["compiled"].append({"dim": key[2], "candidate": str(key[0]), "error": "its process ended"})
    write_json(args.output, result)
    for row in result["compiled"]:
        needs = "; ".join(" ".join(f"{k} {v}" for k, v in one.items()) for one in row["usage"])
        print(f"{row['dim']:4} {row['candidate']}: {row.get('error', needs)}")


def shape(text: str) -> tuple[int, int]:
    heads, dim = map(int, text.split("x"))
    return heads, dim


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(16, 128), (8, 64)], help="heads x head dimension")
    parser.add_argument("--length", type=int, default=32768, help="tokens")
    parser.add_argument("--error-length", type=int, default=3001, help="tokens in the comparison with float64")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pattern", default=PATTERNS[2])
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--seconds", type=float, default=2, help="of timing in each group")
    parser.add_argument("--limit", type=float, default=110, help="seconds in all")
    parser.add_argument("--stage-limit", type=float, default=40, help="seconds of one stage")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="that compile")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("tune.json"))
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
