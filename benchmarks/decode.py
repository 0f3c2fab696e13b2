"""Decoding: a step's time against the context and against a dense model; prefill speed; the memory of a stream.

Weights are random; times do not depend on them. The dense model is Transformers' Llama of the same sizes with its
DynamicCache, which is copied at each token. Both also decode a batch of sequences at once. "products" is the lower
bound of a step: the products of the weights with one vector each, and one attention call per layer over as many
contiguous keys as a token sees on average. The stream is a tiny model in a process of its own.
"""

import argparse
import copy
import inspect
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from examples.drawing import Line, Panel, draw_panels, scale_linear, scale_seconds
from modeling_longnet import LongNetCache, LongNetConfig, LongNetForCausalLM
from modeling_longnet.testing import count_work

from .measure import spread, time_alternately
from .stream import read_along

PATTERN = {"segment_lengths": [512, 2048, 8192, 32768], "dilation_rates": [1, 4, 16, 64]}
SIZES = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
CHUNK = 32_768
RIVALS = ("dense", "longnet")
# Transformers 5.17 and 5.24 name this argument differently; LongNet takes both names.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000, 16_000, 1_000_000])
    parser.add_argument("--dense-contexts", type=int, nargs="+", default=[1000, 16_000])
    parser.add_argument("--batch", type=int, default=8, help="texts continued together, at the longest dense context")
    parser.add_argument("--steps", type=int, default=512, help="timed steps; 512 run through one first segment")
    parser.add_argument("--stream-tokens", type=int, default=10_000_000, help="tokens streamed; 10^8 take minutes")


def longnet_config(sizes: dict) -> LongNetConfig:
    return LongNetConfig(**sizes, **PATTERN, intermediate_size=4 * sizes["hidden_size"], position_embedding="rope")


def longnet_model(sizes: dict) -> LongNetForCausalLM:
    torch.manual_seed(0)
    return LongNetForCausalLM(longnet_config(sizes)).eval()


def dense_model(sizes: dict) -> LlamaForCausalLM:
    # A gated feed-forward of width 8/3 E has as many parameters as LongNet's of width 4 E.
    config = LlamaConfig(**sizes, intermediate_size=8 * sizes["hidden_size"] // 3, max_position_embeddings=1 << 20)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def read_tokens(model, cache, length: int, chunk: int) -> list[tuple[int, float]]:
    """Feed `length` random tokens; return (tokens so far, seconds of the chunk) for each chunk."""
    times = []
    for begin in range(0, length, chunk):
        ids = torch.randint(model.config.vocab_size, (1, min(chunk, length - begin)))
        start = time.perf_counter()
        model(ids, **{CACHE: cache}, logits_to_keep=1)
        times.append((begin + ids.shape[1], time.perf_counter() - start))
    return times


def make_step(model, cache, batch: int = 1):
    token = torch.zeros(batch, 1, dtype=torch.int64)

    @torch.no_grad()
    def step():
        return model(token, **{CACHE: cache}).logits

    return step


def _repeated(cache, batch: int):
    """Return the cache repeated for a batch that holds the same text in each row."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(batch)
    return cache


def _products(model, length: int):
    """Return a call that does the least that a step must: read each weight once, and the keys and values seen."""
    config = model.config
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    vectors = [torch.randn(1, 1, linear.in_features) for linear in linears]
    rows = round(count_work(config.segment_lengths, config.dilation_rates, length))
    query = torch.randn(1, config.num_attention_heads, 1, config.head_dim)
    held = [torch.randn(2, *query.shape[:2], rows, config.head_dim) for _ in range(config.num_hidden_layers)]

    @torch.no_grad()
    def products():
        for linear, vector in zip(linears, vectors, strict=True):
            linear(vector)
        for keys, values in held:
            torch.nn.functional.scaled_dot_product_attention(query, keys, values)

    return products


def _stream_memory(tokens: int, threads: int) -> list[tuple[int, float, int]]:
    """Return (tokens read, seconds, resident bytes) ten times along a stream."""
    torch.set_num_threads(threads)
    text = torch.randint(TINY["vocab_size"], (tokens,), dtype=torch.uint8)
    return read_along(longnet_model(TINY), text, CHUNK)


def run(args: argparse.Namespace) -> dict:
    ours, dense = longnet_model(SIZES), dense_model(SIZES)
    alone, together, fill = {}, {}, []
    for length in args.contexts:
        cache = LongNetCache(ours.config)
        print(f"reading {length:,} tokens ...", flush=True)
        fill = read_tokens(ours, cache, length, CHUNK)
        alone[f"longnet {length}"] = make_step(ours, cache)
        if length == max(args.dense_contexts):
            alone[f"products {length}"] = _products(ours, length)
            together[f"longnet {length} x {args.batch}"] = make_step(ours, _repeated(cache, args.batch), args.batch)
    for length in args.dense_contexts:
        cache = DynamicCache(config=dense.config)
        read_tokens(dense, cache, length, 1024)
        alone[f"dense {length}"] = make_step(dense, cache)
        if length == max(args.dense_contexts):
            together[f"dense {length} x {args.batch}"] = make_step(dense, _repeated(cache, args.batch), args.batch)
    samples = time_alternately(alone, seconds=0, least=args.steps, most=args.steps)
    samples |= time_alternately(together, seconds=0, least=args.steps // 16, most=args.steps // 16)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        streamed = pool.submit(_stream_memory, args.stream_tokens, args.threads).result()
    return {"sizes": SIZES, "pattern": PATTERN, "step_seconds": samples, "fill": fill, "stream": streamed}


def _ratio_line(samples: dict, slow: str, fast: str) -> str:
    ratios = spread([a / b for a, b in zip(samples[slow], samples[fast], strict=True)])
    return f"| {slow} / {fast} | {ratios.median:.2f} ({ratios.least:.2f} to {ratios.most:.2f}) |"


def headline(result: dict) -> str:
    """Format ratios of steps, speed of reading and growth of memory."""
    samples = result["step_seconds"]
    ours = [name for name in samples if name.startswith("longnet") and " x " not in name]
    dense = [name for name in samples if name.startswith("dense")]
    lines = ["| one decoding step, time | median of rounds (least to most) |", "| --- | --- |"]
    lines += [_ratio_line(samples, name, ours[0]) for name in ours[1:]]
    pairs = [(name, name.replace("dense", "longnet")) for name in dense]
    pairs += [(name.replace("products", rival), name) for name in samples if "products" in name for rival in RIVALS]
    lines += [_ratio_line(samples, *pair) for pair in pairs if pair[0] in samples and pair[1] in samples]
    full = [(tokens, seconds) for tokens, seconds in result["fill"] if tokens > max(PATTERN["segment_lengths"])]
    if len(full) >= 4:
        half = len(full) // 2
        first, second = (spread([s for _, s in part]).median for part in (full[:half], full[half:]))
        lines.append(
            f"| reading, second half of {full[-1][0]:,} tokens / first (beyond the longest segment) "
            f"| {second / first:.2f} |"
        )
    (early, _, _), (late, seconds, _) = result["stream"][0], result["stream"][-1]
    resident = [memory / 2**20 for _, _, memory in result["stream"]]
    text = (
        f"A tiny model read {late:,} tokens in {seconds:,.0f} s (at this speed 10^9 would take "
        f"{seconds / late * 1e9 / 60:,.0f} minutes, computed); from token {early:,} on its memory stayed within "
        f"{min(resident):,.0f} to {max(resident):,.0f} MiB (the text itself included)."
    )
    return "\n".join(lines) + "\n\n" + text


def tables(result: dict) -> str:
    """Format the headline and every median."""
    lines = ["| contestant, tokens of context | ms per step, median (least to most) |", "| --- | --- |"]
    for name, seconds in result["step_seconds"].items():
        s = spread([1e3 * x for x in seconds])
        lines.append(f"| {name} | {s.median:.2f} ({s.least:.2f} to {s.most:.2f}) |")
    return headline(result) + "\n\n" + "\n".join(lines)


def plot(result: dict, path: str) -> None:
    """Draw step time against context, and memory along the stream."""
    steps = []
    for who, name in (("dense", "dense"), ("longnet", "LongNet")):
        points = [
            (int(what.split()[1]), spread(seconds).median)
            for what, seconds in result["step_seconds"].items()
            if what.startswith(who) and " x " not in what
        ]
        steps.append(Line(*zip(*points, strict=True), name, who))
    tokens, _, memory = zip(*result["stream"], strict=True)
    stream = [Line(tokens, [x / 2**20 for x in memory], "LongNet")]
    panels = [Panel("Time to generate one token", steps, scale_seconds, "tokens of context")]
    panels.append(Panel("Memory of the process (MiB)", stream, scale_linear, "tokens read"))
    draw_panels(panels, path)
