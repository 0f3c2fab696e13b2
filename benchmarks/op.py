"""The op against dense attention and against the kernel alone: time, peak memory, error.

- `ours`: `dilated_attention` on (B, L, H, D) storage.
- `sdpa`: PyTorch's `scaled_dot_product_attention`, causal, over the whole sequence.
- `kernel alone`: PyTorch's kernel for the device, on as many kept tokens, contiguous. It reads no strided slice and
  merges nothing, so the remaining time of `ours` is the op's own.
- `strided kernel alone`: the same kernel on the strided slices, in the calls that backend "torch" makes. Nothing is
  merged. (On a GPU `ours` takes one launch per branch instead.)
- `memory writes`: the tensors that any implementation returns, written once. Their pages are fresh, so the system
  clears them first. `kernel alone` does not include this: its results fit in reused memory.

Letters: L tokens, H heads, D head dimension; batch 1.
"""

import argparse
import math
from collections import Counter
from functools import lru_cache, partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from examples.drawing import Line, Panel, draw_panels, name_pattern, scale_seconds
from modeling_longnet import dilated_attention
from modeling_longnet.testing import BACKENDS, TorchBackend

from .measure import DTYPES, Call, Spread, launch_seconds, peak_bytes, seconds_of, spread, time_alternately

PATTERNS = (
    "512/1 2048/4 8192/16 32768/64",
    "2048/1 8192/4 32768/16",
    "2048/1 4096/2 8192/4 16384/6 32768/12",
)
LENGTHS = (2048, 8192, 32768)
MODES = ("forward", "forward+backward")
# Goals for SDPA / ours at 32,768 tokens, 8 heads of 64, on a CPU: forward, forward+backward.
AIMS = dict(zip(PATTERNS, ((22, 18), (10, 9), (6, 5.5)), strict=True))
AIMED_AT = (32_768, 8, 64, "cpu")
OVERHEAD_AIM = 1.1  # goal for ours / kernel alone in the same case
# Goals on an H100: 80 % of 7.7 forward, 75 % backward (5 of 7 products), against the fastest dense kernel there.
GPU_AIMS = {PATTERNS[2]: (6.2, 5.9)}
# Dense attention's time for one long call is estimated from a call of at most so many tokens.
ESTIMATE_LENGTH = 4096
# Larger kernel results come from fresh pages, which the system must clear each time.
KERNEL_BYTES_PER_CALL = 8 << 20
KERNEL, STRIDED, WRITES = "kernel alone", "strided kernel alone", "memory writes"
# Names of these three in older result files.
RENAMED = {"floor": KERNEL, "rows": STRIDED, "result": WRITES}


class Case(NamedTuple):
    """A size at which every contestant is timed."""

    length: int
    heads: int
    head_dim: int
    dtype: str
    mode: str
    threads: int
    device: str = "cpu"

    @property
    def backward(self) -> bool:
        return self.mode == "forward+backward"

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=getattr(torch, self.dtype), device=self.device)


def parse_pattern(text: str) -> tuple[list[int], list[int]]:
    """Parse segment lengths and dilation rates of a pattern written "512/1 2048/4"."""
    try:
        pairs = [tuple(map(int, pair.split("/"))) for pair in text.split()]
        segment_lengths, dilation_rates = zip(*pairs, strict=True)
    except ValueError:
        raise ValueError(f"pattern {text!r}: write pairs LENGTH/RATE, such as '512/1 2048/4'.") from None
    return list(segment_lengths), list(dilation_rates)


def count_kept(length: int, heads: int, pattern: str) -> list[Counter[int]]:
    """Count for each branch how many (segment, head) pairs keep how many tokens: {tokens: pairs}."""
    return [
        Counter(
            len(range(head % r, min(w, length - begin), r)) for begin in range(0, length, w) for head in range(heads)
        )
        for w, r in zip(*parse_pattern(pattern), strict=True)
    ]


def count_flops(case: Case, pattern: str | None) -> int:
    """Count multiplications and additions of the causal products: 2 products forward, 5 backward.

    `pattern` None is dense attention. Exponentials and merges are not counted.
    """
    pattern = pattern or f"{case.length}/1"
    branches = count_kept(case.length, case.heads, pattern)
    pairs = sum(count * n * (n + 1) // 2 for branch in branches for n, count in branch.items())
    return pairs * 2 * case.head_dim * (7 if case.backward else 2)


def result_bytes(case: Case) -> int:
    """Count the bytes that any implementation must return: out, and with the backward pass dq, dk, dv."""
    element = getattr(torch, case.dtype).itemsize
    return case.length * case.heads * case.head_dim * element * (4 if case.backward else 1)


def input_bytes(case: Case) -> int:
    """Count the bytes of q, k and v, and with the backward pass of the gradient of out."""
    return result_bytes(case._replace(mode="forward")) * (4 if case.backward else 3)


def prepare(who: str, case: Case, pattern: str | None) -> Call:
    """Make the inputs of a contestant, warm up with a small call, and return the call to measure."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    make = {"ours": ours, "sdpa": _sdpa, KERNEL: _kernel, STRIDED: _strided_kernel, WRITES: _writes}[who]
    make(case._replace(length=min(case.length, 256)), pattern)()
    return make(case, pattern)


def differentiated(case: Case, attend, inputs: list[Tensor]) -> Call:
    """Return a call of `attend(*inputs)`, with its gradients if the case includes the backward pass."""
    if not case.backward:
        return torch.no_grad()(lambda: attend(*inputs))
    grad_out = torch.randn_like(inputs[0])
    inputs = [x.requires_grad_() for x in inputs]

    def call():
        out = attend(*inputs)
        return out, torch.autograd.grad(out, inputs, grad_out)

    return call


def ours(case: Case, pattern: str, backend: str = "auto", head_offsets: str = "interleaved") -> Call:
    """Return a call of the op with a backend, on (1, L, H, D) storage."""
    attend = partial(dilated_attention, backend=backend, head_offsets=head_offsets)
    branches = parse_pattern(pattern)
    shape = (1, case.length, case.heads, case.head_dim)
    inputs = [case.tensor(*shape).transpose(1, 2) for _ in range(3)]
    return differentiated(case, lambda q, k, v: attend(q, k, v, *branches), inputs)


def _sdpa(case: Case, pattern: None) -> Call:
    inputs = [case.tensor(1, case.heads, case.length, case.head_dim) for _ in range(3)]
    kernel = dense_kernel(case._replace(length=ESTIMATE_LENGTH))
    return differentiated(case, partial(_attend_dense, kernel), inputs)


def _attend_dense(kernel: str | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if kernel is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True)
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        return scaled_dot_product_attention(query, key, value, is_causal=True)


@lru_cache
def dense_kernel(case: Case) -> str | None:
    """Return the SDPBackend name of PyTorch's fastest dense kernel on a GPU.

    None on a CPU, which has a single one, and for float64, which has none.
    """
    if case.device == "cpu":
        return None
    seconds = {}
    for kernel in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        inputs = [case.tensor(1, case.heads, case.length, case.head_dim) for _ in range(3)]
        call = differentiated(case, partial(_attend_dense, kernel), inputs)
        try:
            call()
        except RuntimeError:  # the kernel does not support this dtype or head dimension
            continue
        seconds[kernel] = min(seconds_of(call) for _ in range(3))
    return min(seconds, key=seconds.get, default=None)


class _Cudnn:
    """cuDNN's kernel behind the two methods of `TorchBackend` that are timed."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, ...]:
        return torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, is_causal, scale=scale
        )

    @staticmethod
    def backward(grad_out, query, key, value, out, lse, is_causal: bool, scale: float) -> tuple[Tensor, ...]:
        seed = torch.empty((), dtype=torch.int64, device=query.device)  # only read with dropout
        lse, lengths = lse.contiguous()[..., None], (query.shape[2], key.shape[2])
        unused = seed, seed, None, None, None
        return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, query, key, value, out, lse, *unused, *lengths, 0.0, is_causal, scale=scale
        )


def kernel_of(case: Case) -> _Cudnn | TorchBackend:
    """Return PyTorch's fastest kernel for kept tokens: cuDNN's on a GPU in half precision, else backend "torch"."""
    is_half = getattr(torch, case.dtype).itemsize == 2
    if case.device == "cuda" and is_half and case.head_dim % 8 == 0 and case.head_dim <= 128:
        return _Cudnn()
    return TorchBackend()


def _kernel(case: Case, pattern: str) -> Call:
    # The kernel's time does not depend on the values, so all calls read from the same buffers.
    buffers = [case.tensor(case.length * case.heads * case.head_dim) for _ in range(5)]
    lse = case.tensor(case.length * case.heads).float()
    inputs = []
    for branch in count_kept(case.length, case.heads, pattern):
        for seqlen, count in branch.items():
            size = seqlen * case.head_dim
            inputs += [
                [
                    *(x[: n * size].view(n, 1, seqlen, case.head_dim) for x in buffers),
                    lse[: n * seqlen].view(n, 1, seqlen),
                ]
                for n in _call_sizes(count, size * buffers[0].element_size(), case.device)
            ]

    kernel, scale = kernel_of(case), case.head_dim**-0.5

    @torch.no_grad()
    def call():
        for q, k, v, grad_out, out, lse in inputs:
            kernel.forward(q, k, v, True, scale)
            if case.backward:
                kernel.backward(grad_out, q, k, v, out, lse, True, scale)

    return call


class Recorder(TorchBackend):
    """Backend "torch" that records the arguments of its kernel calls."""

    def __init__(self):
        super().__init__()
        self.forward_calls: list[tuple] = []
        self.backward_calls: list[tuple] = []

    def forward(self, *arguments):
        self.forward_calls.append(arguments)
        return super().forward(*arguments)

    def backward(self, *arguments):
        self.backward_calls.append(arguments)
        return super().backward(*arguments)


def record_calls(case: Case, pattern: str) -> Recorder:
    """Return the kernel calls of the case, their tensors strided slices as the op passes them."""
    recorder = Recorder()
    with mock.patch.dict(BACKENDS, recorder=recorder):
        ours(case, pattern, "recorder")()
    return recorder


def _strided_kernel(case: Case, pattern: str) -> Call:
    recorded, kernel = record_calls(case, pattern), kernel_of(case)

    @torch.no_grad()
    def call():
        for arguments in recorded.forward_calls:
            kernel.forward(*arguments)
        for arguments in recorded.backward_calls:
            kernel.backward(*arguments)

    return call


def _writes(case: Case, pattern: None) -> Call:
    shape = (4 if case.backward else 1, case.length, case.heads, case.head_dim)
    return lambda: [
        torch.ones(shape[1:], dtype=getattr(torch, case.dtype), device=case.device) for _ in range(shape[0])
    ]


def _call_sizes(count: int, unit: int, device: str) -> list[int]:
    """Split `count` attentions with results of `unit` bytes into calls; return the attentions in each call.

    On a CPU the results of a call take at most KERNEL_BYTES_PER_CALL; on a GPU there are fewer calls.
    """
    most = max(1, KERNEL_BYTES_PER_CALL // max(1, unit)) if device == "cpu" else 32768
    return [min(most, count - begin) for begin in range(0, count, most)]


def measure_error(case: Case, pattern: str, backend: str = "auto") -> dict[str, dict[str, float]]:
    """Measure ||x - exact|| / ||exact|| of out and of the worst gradient, for ours and the dense reference.

    The exact numbers come from the dense reference in float64, on the same (rounded) inputs.
    """
    torch.manual_seed(0)
    shape = (1, case.heads, case.length, case.head_dim)
    query, key, value, grad_out = (case.tensor(*shape) for _ in range(4))

    def results(dtype: torch.dtype, backend: str) -> list[Tensor]:
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]
        out = dilated_attention(*inputs, *parse_pattern(pattern), backend=backend)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(dtype))]

    exact = results(torch.float64, "eager")

    def errors(backend: str) -> dict[str, float]:
        pairs = zip(results(query.dtype, backend), exact, strict=True)
        out, *grads = (((x.double() - y).norm() / y.norm()).item() for x, y in pairs)
        return {"out": out, "grad": max(grads)}

    return {"ours": errors(backend), "dense reference": errors("eager")}


def dense_estimate(case: Case) -> float:
    """Estimate the seconds of one dense call: those of a short call times the ratio of their work."""
    short = case._replace(length=min(case.length, ESTIMATE_LENGTH))
    growth = count_flops(case, None) / count_flops(short, None)
    return seconds_of(prepare("sdpa", short, None)) * growth


def _measure_case(case: Case, args: argparse.Namespace) -> list[dict]:
    contestants = [(who, pattern) for pattern in args.patterns for who in ("ours", KERNEL, STRIDED)]
    contestants += [(WRITES, None)]
    rows = []
    estimate = dense_estimate(case)
    kernel = dense_kernel(case._replace(length=ESTIMATE_LENGTH))
    if estimate <= args.dense_limit:
        contestants.insert(0, ("sdpa", None))
    else:
        reason = f"estimated {estimate:.0f} s per call, over --dense-limit {args.dense_limit:g}"
        rows.append({**case._asdict(), "who": "sdpa", "pattern": None, "skipped": reason})
    calls = {f"{who} {pattern}": prepare(who, case, pattern) for who, pattern in contestants}
    samples = time_alternately(calls, seconds=args.seconds, least=args.rounds)
    on_gpu = case.device != "cpu"
    launches = {n: min(launch_seconds(call) for _ in range(5)) for n, call in calls.items() if on_gpu}
    calls.clear()
    for who, pattern in contestants:
        row = {**case._asdict(), "who": who, "pattern": pattern}
        row["seconds"] = samples[f"{who} {pattern}"]
        row["flops"] = 0 if who == WRITES else count_flops(case, pattern)
        row |= {"queueing_seconds": launches[f"{who} {pattern}"]} if on_gpu else {}
        row |= {"kernel": kernel} if who == "sdpa" and on_gpu else {}
        if args.memory and who in ("ours", "sdpa"):
            row["peak_bytes"] = peak_bytes(prepare, who, case, pattern)
        rows.append(row)
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark; the defaults are the published run."""
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="'LENGTH/RATE ...' each")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="least number of rounds")
    parser.add_argument("--seconds", type=float, default=4, help="start no new round after so many seconds")
    parser.add_argument("--dense-limit", type=float, default=40, help="longest dense call, seconds")
    parser.add_argument("--error-length", type=int, default=2048, help="tokens of the run that measures the error")
    parser.add_argument("--no-memory", dest="memory", action="store_false")


def run(args: argparse.Namespace) -> dict:
    """Measure every case; return the raw rows and errors for the JSON file."""
    cases = [
        Case(length, args.heads, args.head_dim, dtype, mode, args.threads, args.device)
        for dtype in args.dtypes
        for mode in args.modes
        for length in args.lengths
    ]
    rows: list[dict] = []
    for case in (bar := tqdm(cases, desc="op", unit="case")):
        bar.set_postfix_str(f"{case.dtype} {case.mode} {case.length}")
        rows += _measure_case(case, args)
    errors = [
        {"dtype": dtype, "pattern": pattern, "length": args.error_length}
        | measure_error(cases[0]._replace(length=args.error_length, dtype=dtype), pattern)
        for dtype in args.dtypes
        for pattern in args.patterns
    ]
    return {"rows": rows, "errors": errors}


HEADER = (
    "tokens", "ours ms", "SDPA / ours", f"SDPA / {KERNEL}", "at equal FLOP/s", f"ours / {KERNEL}",
    f"{STRIDED} / {KERNEL}", f"{WRITES} / {KERNEL}", "ours GFLOP/s", "peak MiB", "/ result", "all / tensors",
    "SDPA MiB", "error", "/ dense reference's",
)  # fmt: skip


def format_ratio(value: Spread) -> str:
    return f"{value.median:.2f} ({value.least:.2f} to {value.most:.2f})"


def _find(rows: list[dict], like: dict, who: str, pattern: str | None) -> dict:
    keys = ("length", "dtype", "mode")
    found = (
        row
        for row in rows
        if all(row[key] == like[key] for key in keys) and (row["who"], row["pattern"]) == (who, pattern)
    )
    return next(found, {})


def summarize(result: dict) -> list[dict]:
    """Return the numbers of tables and plots: one dictionary for each row of ours, None for what was skipped."""
    summary = []
    rows = [row | {"who": RENAMED.get(row["who"], row["who"])} for row in result["rows"]]
    for row in (row for row in rows if row["who"] == "ours"):
        case = Case(*(row[field] for field in Case._fields if field in row))
        kernel = _find(rows, row, KERNEL, row["pattern"])
        dense = _find(rows, row, "sdpa", None)
        errors = _error_of(result, row)
        summary.append(
            {field: row[field] for field in ("length", "dtype", "mode", "pattern")}
            | {
                "seconds": spread(row["seconds"]).median,
                "kernel_seconds": spread(kernel["seconds"]).median,
                "dense_seconds": spread(dense["seconds"]).median if "seconds" in dense else None,
                "speedup": _ratios(dense, row),
                "kernel_speedup": _ratios(dense, kernel),
                "ideal_speedup": count_flops(case, None) / row["flops"],
                "overhead": _ratios(row, kernel),
                "strided": _ratios(_find(rows, row, STRIDED, row["pattern"]), kernel),
                "writes": _ratios(_find(rows, row, WRITES, None), kernel),
                "gflops": row["flops"] / spread(row["seconds"]).median / 1e9,
                "peak_bytes": row.get("peak_bytes"),
                "result_bytes": result_bytes(case),
                "input_bytes": input_bytes(case),
                "aim": _aim(case, row["pattern"]),
                "overhead_aim": OVERHEAD_AIM if (*case[:3], case.device) == AIMED_AT else None,
                "dense_peak_bytes": dense.get("peak_bytes"),
                "error": errors["ours"],
                "reference_error": errors["dense reference"],
            }
        )
    return summary


def _aim(case: Case, pattern: str) -> float | None:
    if (*case[:3], case.device) == AIMED_AT:
        return AIMS.get(pattern, (None, None))[case.backward]
    if case.device == "cuda" and case.length == AIMED_AT[0] and case.dtype == "bfloat16":
        return GPU_AIMS.get(pattern, (None, None))[case.backward]
    return None


def _ratios(over: dict, under: dict) -> Spread | None:
    """Return the spread of the ratios of two contestants' times, round by round; None if one was not timed."""
    if "seconds" not in over or "seconds" not in under:
        return None
    return spread([a / b for a, b in zip(over["seconds"], under["seconds"], strict=True)])


def _error_of(result: dict, row: dict) -> dict[str, float]:
    found = next(e for e in result["errors"] if all(e[k] == row[k] for k in ("dtype", "pattern")))
    what = "grad" if row["mode"] == "forward+backward" else "out"
    return {who: found[who][what] for who in ("ours", "dense reference")}


def _mib(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:.0f}"


def _beside_aim(ratio: Spread, aim: float | None) -> str:
    return format_ratio(ratio) + (f", aim {aim}" if aim else "")


def _cells(s: dict) -> list[str]:
    peak = s["peak_bytes"]
    return [
        f"{s['length']:,}",
        f"{s['seconds'] * 1e3:.1f}",
        _beside_aim(s["speedup"], s["aim"]) if s["speedup"] else "skipped",
        f"{s['kernel_speedup'].median:.2f}" if s["kernel_speedup"] else "",
        f"{s['ideal_speedup']:.2f}",
        _beside_aim(s["overhead"], s["overhead_aim"]),
        *(f"{s[part].median:.2f}" if s[part] else "" for part in ("strided", "writes")),
        f"{s['gflops']:.0f}",
        _mib(peak),
        "" if peak is None else f"{peak / s['result_bytes']:.1f}",
        "" if peak is None else f"{(s['input_bytes'] + peak) / (s['input_bytes'] + s['result_bytes']):.2f}",
        _mib(s["dense_peak_bytes"]),
        f"{s['error']:.1e}",
        f"{s['error'] / s['reference_error']:.2f}",
    ]


def _markdown(header: tuple[str, ...], lines: list[list[str]]) -> str:
    rule = ["---:"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def tables(result: dict) -> str:
    """Format all numbers of a run as Markdown, one table for each dtype, mode and pattern."""
    summary = summarize(result)
    groups = list(dict.fromkeys((s["dtype"], s["mode"], s["pattern"]) for s in summary))
    parts = [
        "Ratios are medians over the rounds (least to most), each of two calls of one round. "
        "*At equal FLOP/s* is what SDPA / ours would be if both computed equally fast. "
        "*Peak* is the most that one call adds to the process's memory; */ result* divides it by "
        "the bytes of the tensors returned; *all / tensors* is inputs and peak over inputs and results. "
        f"*Error*: relative to float64, at {result['errors'][0]['length']:,} tokens; for "
        "forward+backward that of the worst gradient.",
    ]
    for group in groups:
        chosen = [s for s in summary if (s["dtype"], s["mode"], s["pattern"]) == group]
        parts += ["#### {}, {}, {}".format(*group), _markdown(HEADER, [_cells(s) for s in chosen])]
    parts += _about_the_gpu(result)
    skipped = [row for row in result["rows"] if "skipped" in row]
    parts += [
        f"Dense SDPA was skipped at {row['length']:,} tokens, {row['dtype']}, {row['mode']}: {row['skipped']}."
        for row in skipped
    ]
    return "\n\n".join(parts)


def _about_the_gpu(result: dict) -> list[str]:
    """Say which dense kernel was the rival on a GPU, and the CPU time to launch a call."""
    rows = [row for row in result["rows"] if "queueing_seconds" in row]
    if not rows:
        return []
    kernels = {f"{row['kernel']} ({row['dtype']}, {row['mode']})" for row in rows if row.get("kernel")}
    launching: dict[str, float] = {}
    for row in (row for row in rows if row["who"] in ("ours", "sdpa")):
        name = f"{row['pattern'] or 'SDPA'}, {row['mode']}"
        launching[name] = min(launching.get(name, math.inf), row["queueing_seconds"] * 1e3)
    return [
        "Times are the GPU's, of calls launched while it is busy with something else; peak memory is its allocator's. "
        f"SDPA is PyTorch's dense kernel that is fastest at {ESTIMATE_LENGTH:,} tokens: "
        f"{', '.join(sorted(kernels))}. Least CPU time to launch a call (ms): "
        + "; ".join(f"{name} {ms:.2f}" for name, ms in launching.items()) + "."
    ]  # fmt: skip


def headline(result: dict) -> str:
    """Format the rows for the pages: for each dtype and mode the longest length at which dense attention was timed."""
    compared = [s for s in summarize(result) if s["speedup"]]
    if not compared:
        return "No length was timed against dense attention."
    longest: dict[tuple[str, str], int] = {}
    for s in compared:
        longest[s["dtype"], s["mode"]] = max(s["length"], longest.get((s["dtype"], s["mode"]), 0))
    lines = []
    for s in (s for s in compared if s["length"] == longest[s["dtype"], s["mode"]]):
        cells = _cells(s)
        lines.append([s["pattern"], s["dtype"], s["mode"], *cells[:8], *cells[9:]])
    table = _markdown(("branches w/r", "dtype", "mode", *HEADER[:8], *HEADER[9:]), lines)
    return "\n\n".join([table, *_about_the_gpu(result)])


def plot(result: dict, path: str) -> None:
    """Draw seconds against tokens: dense attention and each pattern, one panel for each dtype and mode."""
    summary, panels = summarize(result), []
    for dtype, mode in dict.fromkeys((s["dtype"], s["mode"]) for s in summary):
        chosen = [s for s in summary if (s["dtype"], s["mode"]) == (dtype, mode)]
        dense = sorted({s["length"]: s["dense_seconds"] for s in chosen if s["speedup"]}.items())
        lines = [Line(*zip(*dense, strict=True), "dense", "dense")] if dense else []
        for number, pattern in enumerate(dict.fromkeys(s["pattern"] for s in chosen)):
            points = [(s["length"], s["seconds"]) for s in chosen if s["pattern"] == pattern]
            lines.append(Line(*zip(*points, strict=True), name_pattern(pattern), f"C{number}"))
        panels.append(Panel(f"{mode}, {dtype}", lines, scale_seconds))
    draw_panels(panels, path)
