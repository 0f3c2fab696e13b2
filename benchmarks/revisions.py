"""Time two revisions of this repository alternately: the working tree against --base.

    python -m benchmarks.run revisions --base 68edab1

Each revision runs in a process of its own. In every round both time the same case, in random order. The ratio of a
round is the working tree's time over the base's, so what slows the machine down slows both.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from examples.drawing import COLORS, make_figure, styled

from .measure import ROOT, git, spread
from .op import MODES, PATTERNS, format_ratio, parse_pattern

WORKER = Path(__file__).with_name("revision_worker.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--base", required=True, help="revision to compare with")
    parser.add_argument("--cases", nargs="+", default=["op", "decode", "train"], choices=["op", "decode", "train"])
    parser.add_argument("--length", type=int, default=32_768, help="tokens of the op")
    parser.add_argument("--rounds", type=int, default=9)


class _Revision:
    """A process that runs cases with the package in `root`."""

    def __init__(self, root: Path, threads: int):
        environment = os.environ | {"PYTHONPATH": str(root)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, WORKER, str(threads)], env=environment, cwd="/", **pipes)

    def ask(self, **request) -> float | None:
        """Send a request and return the answer.

        Raises:
            RuntimeError: the process ended; its error is above.
        """
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"the worker process ended while it ran {request}; its error is printed above.")
        return json.loads(answer)


def _cases(args: argparse.Namespace) -> list[tuple[str, list, str]]:
    """Return each case's function, arguments and title."""
    cases = []
    if "op" in args.cases:
        for pattern in PATTERNS:
            for mode in MODES:
                for dtype in ("float32", "bfloat16"):
                    arguments = [*parse_pattern(pattern), mode, dtype, args.length]
                    cases.append(("op", arguments, f"op {pattern}, {dtype}, {mode}"))
        cases.append(("op", [*parse_pattern(PATTERNS[-1]), "forward", "float32", 2048], "op, 2,048 tokens, forward"))
    if "decode" in args.cases:
        cases.append(("decode", [3000, 40], "40 decoding steps after 3,000 tokens"))
    if "train" in args.cases:
        cases += [("train", [length], f"training step, {length:,} tokens") for length in (2048, 8192)]
    return cases


def run(args: argparse.Namespace) -> dict:
    """Time all cases; raises ValueError for an unknown revision."""
    base = git("rev-parse", "--verify", f"{args.base}^{{commit}}")
    if base == "unknown":
        raise ValueError(f"--base {args.base}: git finds no such commit; give a hash, branch or tag.")
    rows, order = [], random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        archive = f"{folder}/base.tar"
        subprocess.run(["git", "archive", "-o", archive, base, "modeling_longnet"], cwd=ROOT, check=True)
        shutil.unpack_archive(archive, folder)
        workers = {"base": _Revision(Path(folder), args.threads), "this": _Revision(ROOT, args.threads)}
        try:
            for name, arguments, title in tqdm(_cases(args), mininterval=1):
                samples = {who: [] for who in workers}
                for worker in workers.values():
                    worker.ask(make=[name, arguments])
                for _ in range(args.rounds):
                    for who in order.sample(list(workers), 2):
                        samples[who].append(workers[who].ask(run=True))
                rows.append({"title": title, "seconds": samples})
        finally:
            for worker in workers.values():
                worker.process.kill()
    return {"base": base, "rows": rows}


def _ratio(row: dict):
    return spread([this / base for this, base in zip(row["seconds"]["this"], row["seconds"]["base"], strict=True)])


def tables(result: dict) -> str:
    """Return one line per case: the working tree's time over the base's."""
    lines = [f"| case | time / time of {result['base'][:10]} | seconds |", "| --- | ---: | ---: |"]
    for row in result["rows"]:
        lines.append(f"| {row['title']} | {format_ratio(_ratio(row))} | {min(row['seconds']['this']):.4g} |")
    return "\n".join(lines)


def headline(result: dict) -> str:
    """Return the range of ratios and the table."""
    ratios = [_ratio(row).median for row in result["rows"]]
    return f"Medians: {min(ratios):.3f} to {max(ratios):.3f}.\n\n{tables(result)}"


@styled
def plot(result: dict, path: str) -> None:
    """Draw each case's ratio."""
    figure = make_figure(height=1 + 0.3 * len(result["rows"]))
    axis = figure.subplots()
    axis.barh([row["title"] for row in result["rows"]], [_ratio(row).median for row in result["rows"]])
    axis.axvline(1, color=COLORS["dense"], linewidth=1.2)
    axis.invert_yaxis()
    axis.set_title(f"Time over that of {result['base'][:10]}")
    figure.savefig(path)
