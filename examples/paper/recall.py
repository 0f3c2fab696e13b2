"""Measure what dilation loses: recall of a passage at a known distance, trained from scratch.

A text is filler in which passages are planted, each twice. When a passage begins again, the model must continue it
token by token. This is associative recall with many queries (Arora et al. 2023, arXiv 2312.04927). The same models are
also scored on a passkey, without training for it: a single passage in a text of filler. A passage's tokens occur
nowhere else in its text; filler tokens are random.

Training has two stages. In the first, dense attention on texts of 128 tokens, shared by all patterns, learns recall
itself. In the second, each pattern trains on long texts, where it must pass on through layers what a query cannot see.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model

from .cells import save_weights, train
from .patterns import make_model, make_pattern

KEYS = 128  # tokens of passages
FILLER = 64
VOCABULARY = KEYS + FILLER
PASSAGE = 8
SHARE = 0.7  # of a text that passages fill, if there are enough tokens for them


def make_texts(
    count: int, length: int, least: int, seed: int, passages: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Make texts with planted passages.

    Args:
        count, length: number of texts, and tokens of each.
        least: the smallest distance between the two places of a passage, in tokens; distances are log-uniform above it.
        passages: number in each text; by default as many as there are tokens for.

    Returns:
        (count, length) tokens; and (count, length) distances: how far back the passage was first, at tokens whose next
        token must be recalled, 0 elsewhere.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(KEYS, VOCABULARY, (count, length), dtype=np.int64)
    distances = np.zeros((count, length), dtype=np.int64)
    passages = passages or min(KEYS, int(SHARE * length / 2)) // PASSAGE
    for text, distance in zip(tokens, distances, strict=True):
        is_free = np.ones(length, dtype=bool)
        for passage in rng.permutation(KEYS)[: passages * PASSAGE].reshape(-1, PASSAGE):
            for _ in range(50):  # until both places are free
                apart = int(np.exp(rng.uniform(np.log(least), np.log(length - PASSAGE))))
                place = int(rng.integers(0, length - PASSAGE + 1 - apart))
                spots = [slice(at, at + PASSAGE) for at in (place, place + apart)]
                if all(is_free[spot].all() for spot in spots):
                    for spot in spots:
                        is_free[spot], text[spot] = False, passage
                    distance[place + apart : place + apart + PASSAGE - 1] = apart
                    break
    return tokens, distances


def distance_edges(least: int, length: int) -> list[int]:
    """Return the edges of the ranges of distance: each twice the one before, the last one the text's length."""
    return [*(least * 2**i for i in range(int(np.log2(length / least)))), length]


@torch.inference_mode()
def score(model, tokens: np.ndarray, distances: np.ndarray, edges: list[int], device: str = "cpu") -> dict:
    """Count the tokens asked for and those that the model predicts, by range of distance between two edges."""
    model.eval()
    right, asked = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for row, distance in zip(tokens, distances, strict=True):
        places = np.flatnonzero(distance)
        ids, kept = (torch.from_numpy(x).to(device) for x in (row[None], places))
        logits = model(ids, use_cache=False, logits_to_keep=kept).logits
        told = logits[0].argmax(-1).cpu().numpy() == row[places + 1]
        bucket = np.digitize(distance[places], edges) - 1
        np.add.at(right, bucket, told)
        np.add.at(asked, bucket, 1)
    return {"edges": edges, "right": right.tolist(), "asked": asked.tolist()}


def run_recall_cell(cell: dict, settings: dict, folder: Path) -> dict:
    """Train one stage on texts with planted passages, and score other such texts."""
    pattern = make_pattern(cell["pattern"], cell["branches"], cell["length"])
    sizes = settings["recall_sizes"] | {"vocab_size": VOCABULARY, "head_offsets": cell["head_offsets"]}
    sizes |= cell.get("sizes", {})
    model = make_model(pattern, cell["seed"], **sizes)
    if "base" in cell:
        load_model(model, folder / cell["base"])
    tokens, asked = make_texts(cell["tokens"] // cell["length"], cell["length"], cell["least"], cell["seed"] + 1)
    told = np.pad(asked, ((0, 0), (1, 0)))[:, :-1] > 0  # only these tokens are labels
    labels = np.where(told, tokens, -100)
    result = train(model, tokens, cell, f"recall, {cell['pattern']} {cell['length']:,}", labels=labels)
    if "weights" in cell:
        save_weights(model, folder / cell["weights"], cell)
    edges = distance_edges(cell["least"], cell["length"])
    seed = cell.get("held_out_seed", 10**6)
    for task, passages in (("recall", None), ("passkey", 1)):
        held_out = make_texts(settings[f"{task}_texts"], cell["length"], cell["least"], seed, passages)
        result[task] = score(model, *held_out, edges)
    return result | {"work": pattern._asdict()}
