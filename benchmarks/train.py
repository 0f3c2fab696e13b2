"""Training: tokens per second and peak memory of a whole model against a dense one of the same size.

One step is forward and backward of the language model loss, batch 1. The dense model is Transformers' Llama with SDPA,
its loss as Transformers computes it, from the logits of the whole sequence.
"""

import argparse
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from examples.drawing import Line, Panel, draw_panels, scale_linear, scale_log
from modeling_longnet import LongNetConfig, LongNetForCausalLM

from .decode import PATTERN, SIZES, dense_model, longnet_config
from .measure import DTYPES, Call, peak_bytes, seconds_of, spread, time_alternately

MODELS = ("longnet", "dense")
# Kinds of operators in a step, by parts of their names in PyTorch; the first that fits counts.
KINDS = {
    # On a GPU the names are those of kernels: Triton's are ours, "gammabeta" is LayerNorm's backward.
    "attention's kernels": (
        "flash_",
        "efficient_attention",
        "fmha",
        "forward_kernel",
        "backward_dkdv_kernel",
        "backward_dq_kernel",
        "delta_kernel",
    ),
    "norms": ("layer_norm", "gammabeta"),
    "matrix products": ("mm", "linear", "nvjet", "cutlass"),
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
    parser.add_argument("--seconds", type=float, default=8.0, help="time each length for at least so long")
    parser.add_argument("--rounds", type=int, default=3, help="least number of rounds")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--config", type=Path, help="JSON of another model than the small one, as in configuration/")
    parser.add_argument("--no-profile", dest="profile", action="store_false", help="skip the two profiled steps")
    parser.add_argument("--checkpoint-from", type=int, help="gradient checkpointing from this length on, both models")


class Step(NamedTuple):
    """A training step to measure: model, length and settings."""

    who: str
    length: int
    config: Path | None = None
    dtype: str = "float32"
    checkpointing: bool = False
    threads: int = 1
    device: str = "cpu"


@lru_cache
def load_config(path: Path | None) -> LongNetConfig:
    """Return the configuration of a file, or the small model's if there is none."""
    return LongNetConfig.from_pretrained(path) if path else longnet_config(SIZES)


def sizes_of(config: LongNetConfig) -> dict[str, int]:
    """Return the sizes that a dense model must share with LongNet."""
    return {name: getattr(config, name) for name in SIZES}


def make_model(who: str, path: Path | None):
    """Return LongNet, or a dense model of the same sizes."""
    torch.manual_seed(0)
    config = load_config(path)
    return LongNetForCausalLM(config) if who == "longnet" else dense_model(sizes_of(config))


def prepare(step: Step, keep_gradients: bool = False) -> Call:
    """Return a training step of a new model; it frees the gradients afterwards, or keeps their memory."""
    torch.set_num_threads(step.threads)
    with torch.device(step.device):
        model = make_model(step.who, step.config).to(getattr(torch, step.dtype)).train()
    if step.checkpointing:
        model.gradient_checkpointing_enable()
    return training_step(model, step.length, keep_gradients)


def training_step(model, length: int, keep_gradients: bool = False) -> Call:
    """Return forward and backward of one random text's loss; it then frees the gradients, or keeps their memory."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=model.device)

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=not keep_gradients)

    return step


def run(args: argparse.Namespace) -> dict:
    rows, config = [], load_config(args.config)
    for length in args.lengths:
        who = ["longnet", *(["dense"] if length <= args.dense_most else [])]
        checkpointing = args.checkpoint_from is not None and length >= args.checkpoint_from
        shared = (length, args.config, args.dtype, checkpointing, args.threads, args.device)
        steps = {name: Step(name, *shared) for name in who}
        print(f"{length:,} tokens ...", flush=True)
        calls, too_large = {}, []
        for name, step in steps.items():
            try:
                calls[name] = prepare(step)
                calls[name]()
            except torch.OutOfMemoryError:  # only raised on a GPU
                calls.pop(name, None)
                too_large.append(name)
        seconds = time_alternately(calls, seconds=args.seconds, least=args.rounds)
        del calls
        if "longnet" in too_large:
            raise torch.OutOfMemoryError(f"LongNet itself does not fit at {length:,} tokens.")
        peaks = {name: peak_bytes(prepare, steps[name]) for name in seconds}
        rows.append({"length": length, "checkpointing": checkpointing, "seconds": seconds, "peak_bytes": peaks})
        if args.profile:
            rows[-1]["profile"] = profile_step(steps["longnet"])
        if "dense" not in seconds:
            rows[-1]["skipped"] = "out of memory" if too_large else f"skipped by --dense-most {args.dense_most}"
    pattern = {name: getattr(config, name) for name in PATTERN}
    return {"sizes": sizes_of(config), "pattern": pattern, "dtype": args.dtype, "rows": rows}


def profile_step(step: Step) -> dict[str, object]:
    """Measure a LongNet step by kind of operator; FLOP/s of its matrix products, and of one such product alone."""
    call = prepare(step)
    call()
    on_gpu = step.device != "cpu"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    seconds = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in profiled.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key.lower() for part in parts)), "rest")
        seconds[kind] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    config = load_config(step.config)
    with torch.device("meta"):
        model = LongNetForCausalLM(config)
    blocks, head = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2), model.lm_head.weight.numel()
    size, options = config.hidden_size, {"dtype": getattr(torch, step.dtype), "device": step.device}
    hidden, wide = torch.randn(min(step.length, 4096), size, **options), torch.randn(size, 4 * size, **options)
    product = min(seconds_of(lambda: hidden @ wide) for _ in range(10))
    flops = ((8 if step.checkpointing else 6) * blocks + 6 * head) * step.length / seconds["matrix products"]
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
    """Format tokens per second of both, their ratio round by round, and peak memory."""
    header = "| tokens | LongNet tok/s | dense tok/s | dense / LongNet time | LongNet peak MiB | dense peak MiB |"
    lines = [header, "| ---: | ---: | ---: | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in result["rows"]]
    sizes = ", ".join(f"{name} {value}" for name, value in result["sizes"].items())
    branches = zip(*result["pattern"].values(), strict=True)
    notes = f"Models: {sizes}; branches {', '.join(f'{w}/{r}' for w, r in branches)}; {result.get('dtype', 'float32')}."
    checkpointed = [f"{row['length']:,}" for row in result["rows"] if row.get("checkpointing")]
    notes += f" With gradient checkpointing: {', '.join(checkpointed)} tokens." if checkpointed else ""
    heads, most = result["sizes"]["num_attention_heads"], max(result["pattern"]["dilation_rates"])
    if most > heads:
        notes += f" With {heads} heads and rates up to {most} no head keeps most of the far tokens: fast, not thorough."
    skipped = (row for row in result["rows"] if "skipped" in row)
    notes += "".join(f" No dense model at {row['length']:,} tokens: {row['skipped']}." for row in skipped)
    return "\n\n".join(["\n".join(lines), notes, *_profile_table(result["rows"])])


def _profile_table(rows: list[dict]) -> list[str]:
    """Format the shares of LongNet's step by kind of operator."""
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
    """Draw tokens per second and peak memory against length."""
    speed, memory = [], []
    for who in MODELS:
        rows = [row for row in result["rows"] if who in row["seconds"]]
        points = [(row["length"], row["length"] / spread(row["seconds"][who]).median) for row in rows]
        peaks = [(row["length"], row["peak_bytes"][who] / 2**30) for row in rows if row["peak_bytes"].get(who)]
        name = {"longnet": "LongNet"}.get(who, who)
        for lines, data in ((speed, points), (memory, peaks)):
            lines += [Line(*zip(*data, strict=True), name, who)] if data else []
    panels = [Panel("Tokens trained on per second", speed, scale_linear)]
    draw_panels([*panels, Panel("Peak memory of a step (GiB)", memory, scale_log)], path)
