"""An endless text: speed and memory of one pass through a tiny model, chunk by chunk, with a bounded cache.

The model has one layer with random weights and 4 heads. Its segments start at 2,048 tokens and grow eightfold until one
holds the text; of each, 2,048 tokens are kept. The text repeats 2^20 random tokens: neither time nor memory depend on
its content.
"""

import argparse
import math
import time

import torch

from examples.drawing import Line, Panel, draw_panels, scale_counts, scale_linear
from modeling_longnet import LongNetConfig, LongNetForCausalLM, stream

from .measure import resident_bytes

VOCABULARY, HEADS, REPEATED = 97, 4, 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--chunk-size", type=int, default=32_768, help="tokens per forward pass; 1048576 on a GPU")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which reading stops")
    parser.add_argument("--head-dim", type=int, default=16)


def pattern_for(tokens: int) -> dict[str, list[int]]:
    """Return segments that grow eightfold until one holds the whole text; each keeps 2,048 tokens."""
    count = 1
    while 2048 * 8 ** (count - 1) < tokens:
        count += 1
    return {"segment_lengths": [2048 * 8**n for n in range(count)], "dilation_rates": [8**n for n in range(count)]}


def read_along(model, text: torch.Tensor, chunk_size: int, limit: float = math.inf) -> list[tuple[int, float, int]]:
    """Return (tokens read, seconds, bytes) at every tenth of a text; bytes are the GPU's peak or resident memory.

    Reading stops after `limit` seconds.
    """
    samples, begin = [], time.perf_counter()
    for scored in stream(model, text, chunk_size=chunk_size, progress=True):
        seconds = time.perf_counter() - begin
        last = scored.stop == len(text) or seconds > limit
        if scored.stop >= len(text) * (len(samples) + 1) / 10 or last:
            memory = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else resident_bytes()
            samples.append((scored.stop, seconds, memory))
        if last:
            break
    return samples


def run(args: argparse.Namespace) -> dict:
    """Read the text once."""
    on_gpu = args.device == "cuda"
    size = HEADS * args.head_dim
    config = LongNetConfig(
        vocab_size=VOCABULARY, hidden_size=size, intermediate_size=4 * size, num_hidden_layers=1,
        num_attention_heads=HEADS, position_embedding="rope", **pattern_for(args.tokens),
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongNetForCausalLM(config).eval().to(args.device, torch.bfloat16 if on_gpu else torch.float32)
    part = torch.randint(VOCABULARY, (min(args.tokens, REPEATED),), dtype=torch.uint8)
    text = part.repeat(-(-args.tokens // len(part)))[: args.tokens]
    next(stream(model, text[: args.chunk_size + 1], chunk_size=args.chunk_size, progress=False))  # compiles, on a GPU
    samples = read_along(model, text, args.chunk_size, args.limit)
    return {"pattern": pattern_for(args.tokens), "head_dim": args.head_dim, "chunk_size": args.chunk_size,
            "device": args.device, "samples": samples}  # fmt: skip


def _sentence(result: dict) -> str:
    """Say how long it took, and how speed and memory changed."""
    samples = result["samples"]
    (first, early, _), (last, late, most) = samples[0], samples[-1]
    memory = [count / 2**20 for _, _, count in samples]
    speed = (last - samples[-2][0]) / (late - samples[-2][1]) if len(samples) > 1 else last / late
    what = "the GPU's peak" if result["device"] == "cuda" else "resident memory, the text included,"
    return (
        f"{last:,} tokens in {late:,.0f} s, {result['chunk_size']:,} at a time: {first / early:,.0f} tokens/s in the "
        f"first tenth, {speed:,.0f} at the end; {what} {memory[0]:,.0f} MiB after the first tenth, "
        f"{most / 2**20:,.0f} at the end. One layer, {HEADS} heads of {result['head_dim']}, branches "
        + ", ".join(f"{w:,}/{r:,}" for w, r in zip(*result["pattern"].values(), strict=True))
        + ": a tiny model, in which no head keeps most of the far tokens."
    )


def tables(result: dict) -> str:
    """Format how long it took, how speed and memory changed, and every tenth."""
    lines = ["| tokens | seconds | MiB |", "| ---: | ---: | ---: |"]
    lines += [
        f"| {tokens:,} | {seconds:,.1f} | {memory / 2**20:,.0f} |" for tokens, seconds, memory in result["samples"]
    ]
    return _sentence(result) + "\n\n" + "\n".join(lines)


headline = tables


def plot(result: dict, path: str) -> None:
    """Draw time and memory against tokens read."""
    tokens, seconds, memory = zip(*result["samples"], strict=True)
    panels = [
        Panel(title, [Line(tokens, values, None)], scale_linear, "tokens read", scale_counts)
        for title, values in (("Seconds since the start", seconds), ("Memory (MiB)", [x / 2**20 for x in memory]))
    ]
    draw_panels(panels, path)
