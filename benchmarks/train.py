"""Training: tokens per second and peak memory of a whole model against a dense one of the same size.

One step is forward and backward of the language model loss, batch 1, float32. The dense model is Transformers' Llama
with SDPA, its loss as Transformers computes it, from the logits of the whole sequence.
"""

import argparse

import torch
from matplotlib.figure import Figure

from .decode import PATTERN, SIZES, dense_model, longnet_model
from .measure import Call, peak_bytes, spread, time_alternately

MODELS = {"longnet": longnet_model, "dense": dense_model}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32_768])
    parser.add_argument("--dense-most", type=int, default=8192, help="longest sequence for the dense model")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing a length")
    parser.add_argument("--rounds", type=int, default=3, help="at least")


def prepare(who: str, length: int, threads: int, device: str = "cpu") -> Call:
    """One training step of a model at a length."""
    torch.set_num_threads(threads)
    return training_step(MODELS[who](SIZES).train().to(device), length)


def training_step(model, length: int) -> Call:
    """Forward and backward of the loss of one random text, gradients freed after it."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def run(args: argparse.Namespace) -> dict:
    rows = []
    for length in args.lengths:
        who = ["longnet", *(["dense"] if length <= args.dense_most else [])]
        calls = {name: prepare(name, length, args.threads, args.device) for name in who}
        print(f"{length:,} tokens ...", flush=True)
        seconds = time_alternately(calls, seconds=args.seconds, least=args.rounds)
        peaks = {name: peak_bytes(prepare, name, length, args.threads, args.device) for name in who}
        rows.append({"length": length, "seconds": seconds, "peak_bytes": peaks})
    return {"sizes": SIZES, "pattern": PATTERN, "rows": rows}


def _cells(row: dict) -> list[str]:
    length, seconds, peaks = row["length"], row["seconds"], row["peak_bytes"]
    ours, dense = seconds["longnet"], seconds.get("dense")
    cells = [f"{length:,}", f"{length / spread(ours).median:,.0f}"]
    if dense:
        ratio = spread([a / b for a, b in zip(dense, ours, strict=True)])
        cells += [
            f"{length / spread(dense).median:,.0f}",
            f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.most:.2f})",
        ]
    else:
        cells += ["", ""]
    return cells + ["" if peaks.get(name) is None else f"{peaks[name] / 2**20:,.0f}" for name in MODELS]


def tables(result: dict) -> str:
    """Tokens per second of both, their ratio round by round, and peak memory."""
    header = "| tokens | LongNet tok/s | dense tok/s | dense / LongNet time | LongNet peak MiB | dense peak MiB |"
    lines = [header, "| ---: | ---: | ---: | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result["rows"]]
    sizes = ", ".join(f"{name} {value}" for name, value in result["sizes"].items())
    branches = zip(*result["pattern"].values(), strict=True)
    return "\n".join(lines) + f"\n\nModels: {sizes}; branches {', '.join(f'{w}/{r}' for w, r in branches)}."


headline = tables


def plot(result: dict, path: str) -> None:
    """Tokens per second and peak memory against length."""
    figure = Figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for name in MODELS:
        rows = [row for row in result["rows"] if name in row["seconds"]]
        lengths = [row["length"] for row in rows]
        left.plot(lengths, [row["length"] / spread(row["seconds"][name]).median for row in rows], "o-", label=name)
        right.plot(lengths, [(row["peak_bytes"][name] or 0) / 2**20 for row in rows], "o-", label=name)
    left.set(xscale="log", xlabel="tokens", ylabel="tokens/s in training", ylim=(0, None))
    right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="peak MiB of a step")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
