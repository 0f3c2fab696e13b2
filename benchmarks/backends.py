"""Every backend that runs on this device over the floor, by shape and dtype: time, and error beside it.

The floor is PyTorch's fastest kernel on as many rows laid out contiguously (see `op`). The error is that against the
dense reference in float64, at `--error-length` tokens, of out and of the worst gradient; beside it the dense
reference's own in that dtype. On a CPU each thing that the backend does beside calling the kernel is switched off once
(in float32 no rows are gathered, so there "never gathered" is the same code, and shows how sure the numbers are).
"""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from unittest import mock

from matplotlib.figure import Figure
from tqdm import tqdm

from modeling_longnet import attend_torch
from modeling_longnet.attend import BACKEND_NAMES, unavailable

from . import op
from .measure import DTYPES, Spread, spread, time_alternately

# Without calls in two for causal attention on up to 512 rows, and without rows laid next to each other.
WITHOUT = {"torch, never cut": ("_CUT_ROWS", range(0)), "torch, never gathered": ("_GATHERED_BYTES", 0)}
SHAPES = ("8x64", "12x64", "4x128", "16x48", "32x16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark; the defaults are the published run."""
    parser.add_argument("--length", type=int, default=16_384, help="tokens")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="HEADSxDIMENSION each")
    parser.add_argument("--pattern", default=op.PATTERNS[1], help="'LENGTH/RATE ...'")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"], choices=DTYPES)
    parser.add_argument("--error-length", type=int, default=3000, help="tokens of the error's run")
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
            list(pool.map(_compile, cases, [args.pattern] * len(cases)))  # side by side: that takes seconds each
    for case in tqdm(cases, desc="backends", unit="case"):
        sample = case.tensor(1, 1, 1, case.head_dim)
        reasons = {name: unavailable(name, sample) for name in BACKEND_NAMES if name not in ("auto", "eager")}
        if case.device == "cpu":
            reasons |= dict.fromkeys(WITHOUT)
        usable = [name for name, reason in reasons.items() if reason is None]
        calls = {name: _as(name, op.ours(case, args.pattern, name.split(",")[0])) for name in usable}
        samples = time_alternately(
            calls | {"floor": op.prepare("floor", case, args.pattern)}, seconds=args.seconds, most=10
        )
        short = case._replace(length=args.error_length)
        for name, reason in reasons.items():
            row = {**case._asdict(), "backend": name, "unavailable": reason}
            if reason is None:
                error = _as(name, op.measure_error)(short, args.pattern, name.split(",")[0])
                row |= {"seconds": samples[name], "floor_seconds": samples["floor"], "error": error}
            rows.append(row)
    return {"pattern": args.pattern, "error_length": args.error_length, "rows": rows}


def _compile(case: op.Case, pattern: str) -> None:
    op.ours(case, pattern)()


def _as(name: str, call):
    """The call with what the name says switched off."""

    def switched(*arguments):
        with mock.patch.object(attend_torch, *WITHOUT[name]) if name in WITHOUT else nullcontext():
            return call(*arguments)

    return switched


def _ran(result: dict) -> list[tuple[dict, Spread]]:
    """The rows of what could run, each with its time over the floor."""
    return [
        (row, spread([a / b for a, b in zip(row["seconds"], row["floor_seconds"], strict=True)]))
        for row in result["rows"]
        if row["unavailable"] is None
    ]


def tables(result: dict) -> str:
    """One line for each case that ran, then what could not run."""
    lines = ["| heads x dimension | dtype | mode | backend | / floor | error | / dense reference's |"]
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
    """The least and the most overhead of each backend and mode."""
    lines = ["| backend | mode | / floor, least to most over shapes and dtypes |", "| --- | --- | ---: |"]
    groups: dict[tuple[str, str], list[float]] = {}
    for row, ratio in _ran(result):
        groups.setdefault((row["backend"], row["mode"]), []).append(ratio.median)
    for (backend, mode), ratios in groups.items():
        lines.append(f"| {backend} | {mode} | {min(ratios):.2f} to {max(ratios):.2f} |")
    return "\n".join(lines)


def plot(result: dict, path: str) -> None:
    """Each case's time over the floor."""
    ran = _ran(result)
    names = [f"{row['backend']} {row['heads']}x{row['head_dim']} {row['dtype']} {row['mode']}" for row, _ in ran]
    figure = Figure(figsize=(8, 1 + 0.25 * len(ran)), layout="constrained")
    axis = figure.subplots()
    axis.barh(names, [ratio.median for _, ratio in ran])
    axis.axvline(1, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.set(xlabel="time over the floor")
    axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=120)
