"""One cell of the comparison: train one model of one pattern, length and seed, and score it.

A cell is a dictionary of settings and gives a dictionary of results; `run.py` lists the cells and stores the results.

Training has two stages, because a small budget of tokens allows too few steps of long sequences. The first stage takes
many steps on sequences of `base_length`, shorter than any window or block here, where dense, window and sparse compute
the same function (and share the weights). The second trains each pattern at the length of the cell.
"""

import hashlib
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from benchmarks.measure import highest_resident_bytes, resident_bytes, restart_highest_resident_bytes

from ..corpus import TextArguments, join_documents, load_text, load_tokenizer, tokenize
from ..evaluate_perplexity import evaluate_contexts
from ..optimizer import MuonAndAdamW
from .patterns import Pattern, count_keys, make_model, make_pattern

BUCKETS = 16  # equal parts of a held-out sequence whose loss is averaged


class Text(NamedTuple):
    """Token ids of each document by part, their tokenizer, and a digest of all tokens."""

    documents: dict[str, dict[str, np.ndarray]]
    tokenizer: PreTrainedTokenizerBase
    digest: str


def load_documents(settings: dict) -> Text:
    """Load the text of all cells, the code of the installed packages; other packages give another digest."""
    text = load_text(TextArguments(text=settings["text"], split_seed=7))
    tokenizer = load_tokenizer("bpe", text["train"], vocab_size=settings["sizes"]["vocab_size"])
    documents = {part: join_documents(tokenize(text[part], tokenizer)) for part in ("train", "evaluation")}
    digest = hashlib.sha256()
    for part in documents.values():
        for name, ids in part.items():
            digest.update(f"{name} {len(ids)} ".encode() + ids.tobytes())
    return Text(documents, tokenizer, digest.hexdigest()[:16])


def cut(documents: dict[str, np.ndarray], length: int, seed: int) -> np.ndarray:
    """Return (N, length) sequences, each of one document, in an order that depends on the seed."""
    rows = [x[: len(x) // length * length].reshape(-1, length) for x in documents.values()]
    return np.random.default_rng(seed).permutation(np.concatenate(rows))


def count_flops(model: torch.nn.Module, pattern: Pattern, length: int) -> float:
    """Return training FLOPs per token: 6 per weight, and in each layer 12 per feature and key that a query sees."""
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # the tied embedding once, as output layer
    config = model.config
    return 6 * weights + 12 * count_keys(pattern, length) * config.hidden_size * config.num_hidden_layers


def train(model, sequences: np.ndarray, cell: dict, name: str, *, labels: np.ndarray | None = None) -> dict:
    """Take steps of `cell["batch"]` sequences (default 1) until `tokens` are used up; the learning rate falls to 0.

    Seconds are CPU time of this process: waiting for other processes does not count, though their use of shared caches
    and memory does (about 15 % between equal cells).
    """
    optimizer = MuonAndAdamW(model, learning_rate=cell["rate"], muon_learning_rate=10 * cell["rate"])
    first = [group["lr"] for group in optimizer.param_groups]
    tokens, batch, spent, losses = cell["tokens"], cell.get("batch", 1), 0.0, []
    length = batch * sequences.shape[1]  # tokens of a step
    restart_highest_resident_bytes()
    before = resident_bytes()
    model.train()
    with tqdm(desc=name, unit="token", unit_scale=True, total=tokens) as progress:
        for step in range(math.ceil(tokens / length)):
            began = time.process_time()
            share = (step + 1) * length / tokens
            warm = min(1.0, (step + 1 if cell["warmup"] >= 1 else share) / cell["warmup"])
            for group, rate in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = rate * warm * (0.5 + 0.5 * math.cos(math.pi * step * length / tokens))
            rows = np.arange(step * batch, (step + 1) * batch) % len(sequences)
            ids, wanted = (
                torch.from_numpy(x[rows].astype(np.int64)) for x in (sequences, sequences if labels is None else labels)
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=cell["bfloat16"]):
                loss = model(ids, labels=wanted, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            spent += time.process_time() - began
            progress.update(length)
    peak = highest_resident_bytes() - before
    return {"tokens": len(losses) * length, "seconds": spent, "losses": losses, "peak_bytes": peak}


def save_weights(model: torch.nn.Module, file: Path, cell: dict) -> None:
    """Write the weights at once, with the digest of the text they were trained on."""
    part = file.with_suffix(".part")
    save_model(model, part, metadata={"digest": cell.get("digest", "")})
    part.replace(file)


def weights_fit(file: Path, cell: dict) -> bool:
    """Return whether the weights of this cell's first stage exist and were trained on its text."""
    if not file.exists():
        return False
    with safe_open(file, "pt") as weights:
        return (weights.metadata() or {}).get("digest", "") == cell.get("digest", "")


@torch.inference_mode()
def loss_by_position(model, sequences: np.ndarray) -> list[float]:
    """Return the mean loss in nats per token in each of `BUCKETS` equal parts of the held-out sequences."""
    model.eval()
    sums = 0
    for row in sequences:
        ids = torch.from_numpy(row[None].astype(np.int64))
        logits = model(ids, use_cache=False).logits[:, :-1].transpose(1, 2).float()
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")[0]
        sums = sums + torch.stack([part.mean() for part in losses.tensor_split(min(BUCKETS, len(losses)))])
    return (sums / len(sequences)).tolist()


def sweep_score(result: dict) -> float:
    """Return the score by which a learning rate is chosen; lower is better.

    It is the perplexity of a first stage or under the longest context scored, or the missed share of a recall task.
    """
    if "recall" in result:
        return 1 - sum(result["recall"]["right"]) / sum(result["recall"]["asked"])
    return math.exp(result["loss"]) if "loss" in result else result["scores"]["perplexity"][-1]


def run_base_cell(cell: dict, settings: dict, folder: Path, text: Text) -> dict:
    """Run a first stage: train on short sequences, save the weights and score held-out sequences of that length."""
    model, _ = make_text_model(cell, settings, text.tokenizer)
    name = f"base {cell['pattern']} seed {cell['seed']}"
    result = train(model, cut(text.documents["train"], cell["length"], cell["seed"]), cell, name)
    with torch.autocast("cpu", torch.bfloat16, enabled=cell["bfloat16"]):
        losses = loss_by_position(
            model, cut(text.documents["evaluation"], cell["length"], 0)[: settings["base_held_out"]]
        )
    if cell.get("weights"):
        save_weights(model, folder / cell["weights"], cell)
    return result | {"loss": float(np.mean(losses))}


def make_text_model(cell: dict, settings: dict, tokenizer) -> tuple[torch.nn.Module, Pattern]:
    """Return a new model with the cell's pattern, and the pattern."""
    pattern = make_pattern(cell["pattern"], settings["branches"], cell["length"])
    return make_model(pattern, cell["seed"], **settings["sizes"] | {"vocab_size": len(tokenizer)}), pattern


def run_text_cell(cell: dict, settings: dict, folder: Path, text: Text) -> dict:
    """Run a second stage, and score the same held-out targets under growing contexts."""
    model, pattern = make_text_model(cell, settings, text.tokenizer)
    if pattern.size and pattern.size < settings["base_length"]:
        raise ValueError(f"{pattern.name} sees {pattern.size} tokens, less than the first stage's sequences.")
    load_model(model, folder / cell["base"])
    flops = count_flops(model, pattern, cell["length"])
    name = f"{cell['pattern']} {cell['length']:,} seed {cell['seed']}"
    result = train(model, cut(text.documents["train"], cell["length"], cell["seed"]), cell, name)
    result |= {"flops_a_token": flops, "parameters": model.num_parameters(), "work": pattern._asdict()}
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=cell["bfloat16"]):
        scores = evaluate_contexts(
            model,
            text.tokenizer,
            text.documents["evaluation"],
            contexts=cell["contexts"],
            targets=settings["targets"],
            blocks=settings["blocks"],
        )
        if cell.get("by_position"):
            held_out = cut(text.documents["evaluation"], cell["length"], 0)[: settings["held_out"]]
            result["loss_by_position"] = loss_by_position(model, held_out)
    return result | {"scores": scores, "evaluation_seconds": time.process_time() - began}
