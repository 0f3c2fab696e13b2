"""Every backend that runs on this device, by shape and dtype: time divided by that of the kernel alone, and error.

The kernel alone is PyTorch's fastest, on as many kept tokens, contiguous (see `op`). The error is relative to the dense
reference in float64, at `--error-length` tokens, of out and of the worst gradient; beside it stands the dense
reference's own error in that dtype. On a CPU backend "torch" also runs without each of its options. (float32 is
never gathered, so there "never gathered" is the same code and shows the noise of the measurement.)
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

from tqdm import tqdm

from examples.drawing import COLORS, make_figure, styled
from modeling_longnet.testing import BACKENDS, TorchBackend

from . import op
from .measure import DTYPES, Spread, spread, time_alternately

# Without the second call for causal attention over 384 to 512 tokens, without contiguous copies of slices, and without
# float32 for the gradients of half precision.
VARIANTS = {
    "torch, never cut": TorchBackend(split_seqlens=range(0)),
    "torch, never gathered": TorchBackend(gathered_bytes=0),
    "torch, never float32": TorchBackend(float32_size=0),
}
SHAPES = ("8x64", "12x64", "4x128", "16x48", "32x16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark; the defaults are the published run."""
    parser.add_argument("--length", type=int, default=16_384, help="tokens")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="HEADSxDIMENSION each")
    parser.add_argument("--pattern", default=op.PATTERNS[1], help="'LENGTH/RATE ...'")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"], choices=DTYPES)
    parser.add_argument("--error-length", type=int, default=3000, help="tokens of the run that measures the error")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing one case")


def run(args: argparse.Namespace) -> dict:
    """Time and error of each backend, or why it cannot run."""
    rows = []
    cases = [
        op.Case(args.length, *map(int, shape.split("x")), dtype, mode, args.threads, args.device)
        for shape in args.shapes
        for dtype in args.dtypes
        for mode in op.MODES
    ]
    if args.device == "cuda":
        with ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_compile, cases, [args.pattern] * len(cases)))  # in parallel: each takes seconds
    with mock.patch.dict(BACKENDS, VARIANTS if args.device == "cpu" else {}):
        for case in tqdm(cases, desc="backends", unit="case"):
            rows += _measure_case(case, args)
    return {"pattern": args.pattern, "error_length": args.error_length, "rows": rows}


def _compile(case: op.Case, pattern: str) -> None:
    op.ours(case, pattern)()


def _measure_case(case: op.Case, args: argparse.Namespace) -> list[dict]:
    """Time and error of each backend at one size, or why it cannot run."""
    sample = case.tensor(1, 1, 1, case.head_dim)
    reasons = {name: backend.unavailable(sample) for name, backend in BACKENDS.items()}
    calls = {name: op.ours(case, args.pattern, name) for name, reason in reasons.items() if reason is None}
    kernel = {op.KERNEL: op.prepare(op.KERNEL, case, args.pattern)}
    samples = time_alternately(calls | kernel, seconds=args.seconds, most=10)
    rows = [{**case._asdict(), "backend": name, "unavailable": reason} for name, reason in reasons.items()]
    for row in (row for row in rows if row["unavailable"] is None):
        error = op.measure_error(case._replace(length=args.error_length), args.pattern, row["backend"])
        row |= {"seconds": samples[row["backend"]], "kernel_seconds": samples[op.KERNEL], "error": error}
    return rows


def _ran(result: dict) -> list[tuple[dict, Spread]]:
    """Return the rows of what could run, each with its time divided by that of the kernel alone."""
    ran = []
    for row in (row for row in result["rows"] if row["unavailable"] is None):
        kernel = row["kernel_seconds" if "kernel_seconds" in row else "floor_seconds"]  # the latter in older files
        ran.append((row, spread([a / b for a, b in zip(row["seconds"], kernel, strict=True)])))
    return ran


def tables(result: dict) -> str:
    """Format one line for each case that ran, then what could not run and why."""
    lines = ["| heads x dimension | dtype | mode | backend | / kernel alone | error | / dense reference's |"]
    lines.append("| --- | --- | --- | --- | ---: | ---: | ---: |")
    for row, ratio in _ran(result):
        what = "grad" if row["mode"] == "forward+backward" else "out"
        error, own = row["error"]["ours"][what], row["error"]["dense reference"][what]
        lines.append(
            f"| {row['heads']} x {row['head_dim']} | {row['dtype']} | {row['mode']} | {row['backend']} "
            f"| {op.format_ratio(ratio)} | {error:.1e} | {error / own:.2f} |"
        )
    reasons = dict.fromkeys(
        f"- {row['backend']}, {row['dtype']}: {row['unavailable']}." for row in result["rows"] if row["unavailable"]
    )
    return "\n\n".join([f"Branches {result['pattern']}.", "\n".join(lines), "\n".join(reasons)])


def headline(result: dict) -> str:
    """Format the least and the most overhead of each backend and mode."""
    lines = ["| backend | mode | / kernel alone, least to most over shapes and dtypes |", "| --- | --- | ---: |"]
    groups: dict[tuple[str, str], list[float]] = {}
    for row, ratio in _ran(result):
        groups.setdefault((row["backend"], row["mode"]), []).append(ratio.median)
    for (backend, mode), ratios in groups.items():
        lines.append(f"| {backend} | {mode} | {min(ratios):.2f} to {max(ratios):.2f} |")
    return "\n".join(lines)


@styled
def plot(result: dict, path: str) -> None:
    """Draw time divided by that of the kernel alone, least to most over shapes and dtypes."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row, ratio in _ran(result):
        groups.setdefault((row["backend"], row["mode"]), []).append(ratio.median)
    figure = make_figure(height=1 + 0.32 * len(groups))
    axis = figure.subplots()
    for place, ((_, mode), ratios) in enumerate(groups.items()):
        color = COLORS["longnet" if mode == "forward" else "window"]
        axis.plot([min(ratios), max(ratios)], [place, place], color=color, linewidth=5, solid_capstyle="round")
    axis.axvline(1, color=COLORS["dense"], linewidth=1.2)
    axis.set_yticks(range(len(groups)), [f"{backend}, {mode}" for backend, mode in groups])
    axis.set(title="Time over that of the kernels alone: least to most of all cases", xlim=(0.9, None))
    axis.invert_yaxis()
    figure.savefig(path)
