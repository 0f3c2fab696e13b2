"""A text without end: speed and memory of one pass through a tiny model, chunk by chunk, with a bounded cache.

One layer with random weights, 4 heads, segments from 2,048 tokens to beyond the text, eight times as long each, with
2,048 rows each. The text is random, its first 2^20 tokens again and again: neither time nor memory depend on it.
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
    parser.add_argument("--chunk-size", type=int, default=32_768, help="tokens a forward; 1048576 on a GPU")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which it stops where it is")
    parser.add_argument("--head-dim", type=int, default=16)


def pattern_for(tokens: int) -> dict[str, list[int]]:
    """Segments that grow eightfold until one holds the whole text; 2,048 rows each."""
    count = 1
    while 2048 * 8 ** (count - 1) < tokens:
        count += 1
    return {"segment_lengths": [2048 * 8**n for n in range(count)], "dilation_rates": [8**n for n in range(count)]}


def read_along(model, text: torch.Tensor, chunk_size: int, limit: float = math.inf) -> list[tuple[int, float, int]]:
    """(tokens read, seconds, bytes) at every tenth of a text; bytes are the GPU's peak so far, or what is resident.

    It stops after `limit` seconds, where it is.
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
    """How long, how fast, and how even."""
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
        + ": a tiny model, of whose far tokens most are kept by no head."
    )


def tables(result: dict) -> str:
    """How long, how fast and how even, and every tenth."""
    lines = ["| tokens | seconds | MiB |", "| ---: | ---: | ---: |"]
    lines += [
        f"| {tokens:,} | {seconds:,.1f} | {memory / 2**20:,.0f} |" for tokens, seconds, memory in result["samples"]
    ]
    return _sentence(result) + "\n\n" + "\n".join(lines)


headline = tables


def plot(result: dict, path: str) -> None:
    """Time and memory against tokens read."""
    tokens, seconds, memory = zip(*result["samples"], strict=True)
    panels = [
        Panel(title, [Line(tokens, values, None)], scale_linear, "tokens read", scale_counts)
        for title, values in (("Seconds since the start", seconds), ("Memory (MiB)", [x / 2**20 for x in memory]))
    ]
    draw_panels(panels, path)
