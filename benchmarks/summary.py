"""The README's table of speed and memory: six rows from the newest results of `op`, `train` and `decode`."""

import re
from collections.abc import Callable, Iterable

from . import op
from .measure import spread

HEADER = ("measured", "machine", "tokens", "LongNet", "dense attention", "dense / LongNet")
Cells = tuple[str, str, str]  # LongNet's value, the dense model's, and their ratio


def tabulate_speed(results: Iterable[dict]) -> str:
    """Return the table. Each row comes from the latest result that holds it; a row that none holds is left out."""
    results = sorted(results, key=lambda result: result["date"])
    lines = ["| " + " | ".join(HEADER) + " |", "| --- | --- |" + " ---: |" * 4]
    for what, name, is_gpu, tokens, read in ROWS:
        kept = [result for result in results if result["name"] == name and bool(result.get("gpu")) == is_gpu]
        found = [(result, cells) for result in kept if (cells := read(result, tokens))]
        if found:
            result, cells = found[-1]
            lines.append("| " + " | ".join((what, _machine(result), f"{tokens:,}", *cells)) + " |")
    return "\n".join(lines)


def _machine(result: dict) -> str:
    """Return the GPU's short name, H100 for "NVIDIA H100 80GB HBM3", or the number of cores."""
    gpu = result.get("gpu")
    if not gpu:
        return f"CPU, {result['machine']['threads']} cores"
    short = re.search(r"\b[A-Z]+\d+[A-Z]*\b", gpu)
    return short[0] if short else gpu


def _attention(result: dict, tokens: int) -> Cells | None:
    """Time of `dilated_attention` with the paper's branches in bfloat16, forward and backward."""
    wanted = {"length": tokens, "mode": "forward+backward", "pattern": PAPER, "dtype": "bfloat16"}
    for row in op.summarize(result):
        if wanted.items() <= row.items() and row["speedup"]:
            return _format(row["seconds"], row["dense_seconds"], row["speedup"].median)


def _training_step(result: dict, tokens: int) -> Cells | None:
    """Time of a training step of the paper's 125M model."""
    for row in _steps(result, tokens):
        return _times(row["seconds"].get("longnet"), row["seconds"].get("dense"))


def _training_memory(result: dict, tokens: int) -> Cells | None:
    """Peak memory of the same step."""
    for row in _steps(result, tokens):
        ours, dense = (row["peak_bytes"].get(name) for name in ("longnet", "dense"))
        if ours and dense:
            return f"{ours / 2**30:.1f} GiB", f"{dense / 2**30:.1f} GiB", f"{dense / ours:.1f}"


def _steps(result: dict, tokens: int) -> list[dict]:
    is_paper = result["sizes"]["hidden_size"] == 768
    return [row for row in result["rows"] if row["length"] == tokens and is_paper]


def _decoding_step(result: dict, tokens: int) -> Cells | None:
    """Time of one generated token after `tokens` tokens."""
    samples = result["step_seconds"]
    return _times(samples.get(f"longnet {tokens}"), samples.get(f"dense {tokens}"))


def _times(ours: list[float] | None, dense: list[float] | None) -> Cells | None:
    """Return the medians, and the median of the ratios round by round."""
    if not ours or not dense:
        return None
    ratio = spread([a / b for a, b in zip(dense, ours, strict=True)]).median
    return _format(spread(ours).median, spread(dense).median, ratio)


def _format(ours: float, dense: float, ratio: float) -> Cells:
    return _duration(ours), _duration(dense), f"{ratio:.{2 if ratio < 1 else 1}f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


PAPER = "2048/1 4096/2 8192/4 16384/6 32768/12"
# Rows: title, benchmark, whether on a GPU, tokens, the function that reads it.
ROWS: list[tuple[str, str, bool, int, Callable[[dict, int], Cells | None]]] = [
    ("attention alone, forward and backward", "op", False, 32_768, _attention),
    ("attention alone, forward and backward", "op", True, 131_072, _attention),
    ("training step, 125M parameters", "train", True, 8_192, _training_step),
    ("training step, 125M parameters", "train", True, 32_768, _training_step),
    ("memory of this step", "train", True, 32_768, _training_memory),
    ("one generated token, 5M parameters", "decode", False, 16_000, _decoding_step),
]
