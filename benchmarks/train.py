"""Training: tokens per second and peak memory of a whole model against a dense one of the same size.

One step is forward and backward of the language model loss, batch 1, float32. The dense model is Transformers' Llama
with SDPA, its loss as Transformers computes it, from the logits of the whole sequence.
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch.profiler import ProfilerActivity, profile

from .decode import PATTERN, SIZES, dense_model, longnet_model
from .measure import Call, peak_bytes, seconds_of, spread, time_alternately

MODELS = {"longnet": longnet_model, "dense": dense_model}
# What a step's time goes to: kinds of PyTorch's operators, by parts of their names; the first that fits.
KINDS = {
    "attention's kernels": ("flash_attention", "efficient_attention"),
    "matrix products": ("mm", "linear"),
    "norms": ("layer_norm",),
    "activation": ("gelu",),
    "loss": ("softmax", "nll_loss"),
    "copies, sums, merges": (
        "copy_",
        "cat",
        "add",
        "mul",
        "sub",
        "lerp",
        "sum",
        "fill",
        "zero",
        "logaddexp",
        "sigmoid",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32_768])
    parser.add_argument("--dense-most", type=int, default=8192, help="longest sequence for the dense model")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing a length")
    parser.add_argument("--rounds", type=int, default=3, help="at least")


def prepare(who: str, length: int, threads: int, device: str = "cpu") -> Call:
    """One training step of a model at a length."""
    torch.set_num_threads(threads)
    return training_step(MODELS[who](SIZES).train().to(device), length)


def training_step(model, length: int, keep_gradients: bool = False) -> Call:
    """Forward and backward of the loss of one random text, gradients freed after it, or kept in their memory."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=not keep_gradients)

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
        del calls
        rows[-1]["profile"] = profile_step(length, args.threads, args.device)
        if length > args.dense_most:
            rows[-1]["skipped"] = f"not asked for: --dense-most {args.dense_most}"
    return {"sizes": SIZES, "pattern": PATTERN, "rows": rows}


def profile_step(length: int, threads: int, device: str) -> dict[str, object]:
    """Seconds of a LongNet step by kind of operator; FLOP/s of its matrix products and of one such product alone."""
    step = prepare("longnet", length, threads, device)
    step()
    cuda = [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiled:
        step()
    seconds = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in profiled.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "rest")
        seconds[kind] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    model = longnet_model(SIZES)
    weights = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2) + model.lm_head.weight.numel()
    hidden = torch.randn(min(length, 4096), SIZES["hidden_size"], device=device)
    wide = torch.randn(SIZES["hidden_size"], 4 * SIZES["hidden_size"], device=device)
    product = min(seconds_of(lambda: hidden @ wide) for _ in range(10))
    flops = 6 * weights * length / seconds["matrix products"]
    return {"seconds": seconds, "flops": flops, "product_flops": 2 * hidden.shape[0] * wide.numel() / product}


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
    notes = f"Models: {sizes}; branches {', '.join(f'{w}/{r}' for w, r in branches)}."
    heads, most = result["sizes"]["num_attention_heads"], max(result["pattern"]["dilation_rates"])
    if most > heads:
        notes += f" With {heads} heads and rates up to {most} most far tokens are kept by no head: fast, not thorough."
    skipped = (row for row in result["rows"] if "skipped" in row)
    notes += "".join(f" No dense model at {row['length']:,} tokens: {row['skipped']}." for row in skipped)
    return "\n\n".join(["\n".join(lines), notes, *_profile_table(result["rows"])])


def _profile_table(rows: list[dict]) -> list[str]:
    """Shares of LongNet's step by kind of operator."""
    rows = [row for row in rows if "profile" in row]
    if not rows:
        return []
    kinds = list(rows[0]["profile"]["seconds"])
    lines = ["| tokens | " + " | ".join(kinds) + " | GFLOP/s of the matrix products | of one alone |"]
    lines.append("| ---: |" + " ---: |" * (len(kinds) + 2))
    for row in rows:
        found = row["profile"]
        shares = [f"{found['seconds'][kind] / sum(found['seconds'].values()):.0%}" for kind in kinds]
        speeds = [f"{found[name] / 1e9:.0f}" for name in ("flops", "product_flops")]
        lines.append(f"| {row['length']:,} | {' | '.join(shares + speeds)} |")
    return ["Where the time of LongNet's step goes:", "\n".join(lines)]


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
