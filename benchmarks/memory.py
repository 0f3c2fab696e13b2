"""Memory of a training step: bytes per token counted from the model, beside the measured peak; the paper's model at 1M.

The tensors that autograd keeps are counted (by its own hooks, in models of few blocks). From them follows

    peak / token = N E (the blocks' inputs, with gradient checkpointing) or N block (without)
                 + block (with checkpointing: the one being recomputed) + I + 2 E (gradients in flight)

in elements of the dtype, for N blocks of width E and inner width I; `block` is what one block keeps. Weights, their
gradients and the optimizer's state do not grow with the text and are left out. In the measured step the weights'
gradients are therefore allocated before it begins.
"""

import argparse
from functools import lru_cache
from pathlib import Path

import torch

from examples.drawing import Line, Panel, draw_panels, scale_log
from modeling_longnet import LongNetConfig, LongNetForCausalLM

from .decode import PATTERN, SIZES
from .measure import DTYPES, ROOT, peak_bytes
from .train import Step, load_config, prepare

PAPER = ROOT / "configuration" / "longnet-125m.json"
COUNTED_AT = 1024  # tokens; what is kept is proportional to them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark; the defaults are the published run."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072], help="tokens")
    parser.add_argument("--config", type=Path, help="JSON of another model than the small one, as in configuration/")
    parser.add_argument("--plain-most", type=int, default=32_768, help="longest without gradient checkpointing")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)


def kept_bytes(config: LongNetConfig, dtype: str) -> float:
    """Return the bytes per token that autograd keeps for the backward pass of one text, without weights."""
    torch.manual_seed(0)
    model = LongNetForCausalLM(config).to(getattr(torch, dtype)).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x  # held, so that no other tensor gets the same address
        return x

    ids = torch.randint(config.vocab_size, (1, COUNTED_AT))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(ids, labels=ids, use_cache=False)
    storages = [x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in weights]
    return sum(storages) / COUNTED_AT


@lru_cache
def count_bytes(path: Path | None, dtype: str) -> dict[bool, float]:
    """Apply the module's formula: bytes per token at a step's peak, with gradient checkpointing and without."""
    config = load_config(path)
    few = config.branch_layer_period  # the last of so many blocks has branches
    period, others, two = (
        kept_bytes(LongNetConfig(**config.to_diff_dict() | {"num_hidden_layers": n}), dtype)
        for n in (few, 2 * few - 1, 2 * few)
    )
    blocks, largest = config.num_hidden_layers * (two - period) / few, two - others
    element = getattr(torch, dtype).itemsize
    at_work = (config.intermediate_size + 2 * config.hidden_size) * element
    inputs = config.num_hidden_layers * config.hidden_size * element
    return {True: inputs + largest + at_work, False: blocks + at_work}


def run(args: argparse.Namespace) -> dict:
    rows, path = [], args.config and args.config.resolve()  # absolute like PAPER, so that PAPER is counted once
    config = load_config(path)
    for dtype in args.dtypes:
        for checkpointing, counted in count_bytes(path, dtype).items():
            for length in args.lengths if checkpointing else [n for n in args.lengths if n <= args.plain_most]:
                print(f"{length:,} tokens, {dtype}, checkpointing {checkpointing} ...", flush=True)
                step = Step("longnet", length, path, dtype, checkpointing, args.threads, args.device)
                peak = peak_bytes(prepare, step, True)
                rows.append({"length": length, "dtype": dtype, "checkpointing": checkpointing, "counted": counted})
                rows[-1]["peak_bytes"] = peak
    counted = {str(on): n for on, n in count_bytes(PAPER, "bfloat16").items()}
    sizes = {name: getattr(config, name) for name in SIZES}
    pattern = {name: getattr(config, name) for name in PATTERN}
    return {"sizes": sizes, "pattern": pattern, "rows": rows, "paper_bytes_a_token": counted}


def tables(result: dict) -> str:
    """Format counted and measured bytes per token, and the count for the paper's model."""
    lines = ["| tokens | dtype | gradient checkpointing | counted, KB per token | measured | measured / counted |"]
    lines.append("| ---: | --- | --- | ---: | ---: | ---: |")
    for row in result["rows"]:
        counted, peak = row["counted"] / 1000, row["peak_bytes"]
        measured = (
            ("", "")
            if peak is None
            else (f"{peak / row['length'] / 1000:.1f}", f"{peak / row['length'] / row['counted']:.2f}")
        )
        on = "on" if row["checkpointing"] else "off"
        lines.append(f"| {row['length']:,} | {row['dtype']} | {on} | {counted:.1f} | {' | '.join(measured)} |")
    sizes = ", ".join(f"{name} {value}" for name, value in result["sizes"].items())
    on, off = (result["paper_bytes_a_token"][key] * 2**20 / 1e9 for key in ("True", "False"))
    with torch.device("meta"):
        weights = LongNetForCausalLM(LongNetConfig.from_pretrained(PAPER)).num_parameters()
    state = weights * (2 + 2 + 4 + 4 + 4) / 1e9  # weight and gradient; weight, momentum and variance
    text = (
        f"Model: {sizes}. The paper's 125M model in bfloat16 at 2^20 tokens, counted: {on:,.0f} GB with gradient "
        f"checkpointing, {off:,.0f} GB without, beside {state:.0f} GB of weights and gradients in bfloat16, "
        "and AdamW's state and weights in float32."
    )
    return "\n".join(lines) + "\n\n" + text


headline = tables


def plot(result: dict, path: str) -> None:
    """Draw the measured peak against tokens, and the counted one in dashes, one panel for each dtype."""
    panels = []
    for dtype in dict.fromkeys(row["dtype"] for row in result["rows"]):
        lines = []
        for on, name, color in ((True, "with\ncheckpointing", "longnet"), (False, "without", "other")):
            rows = [r for r in result["rows"] if (r["dtype"], r["checkpointing"]) == (dtype, on) and r["peak_bytes"]]
            if rows:
                lengths = [row["length"] for row in rows]
                lines.append(Line(lengths, [row["peak_bytes"] / 2**30 for row in rows], name, color))
                counted = [row["counted"] * row["length"] / 2**30 for row in rows]
                lines.append(Line(lengths, counted, None, color, "forward"))
        panels.append(Panel(f"Peak memory of a step, {dtype} (GiB;\ndashes: counted)", lines, scale_log))
    draw_panels(panels, path)
