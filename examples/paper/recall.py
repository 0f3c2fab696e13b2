"""What dilation loses: recall of one of many keys, at a known distance, trained from nothing.

A text is filler in which pairs (key, value) are planted; later a key comes again, and the model must say its value
(multi-query associative recall, Arora et al. 2023, arXiv 2312.04927; with one pair it is the passkey test). Filler
tokens are random, keys are not told apart from filler by their place, and a key has another value in every text.
"""

from pathlib import Path

import numpy as np
import torch
from cells import train
from patterns import make_model, make_pattern

KEYS = VALUES = 64
FILLER = 32
VOCABULARY = KEYS + VALUES + FILLER


def make_texts(count: int, length: int, pairs: int, least: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts with planted pairs and queries.

    Args:
        count, length: texts and their tokens.
        pairs: of different keys in a text, each asked for once.
        least: the smallest distance between a key and its query, in tokens; distances are log-uniform from there.

    Returns:
        (count, length) tokens, and for each of them the distance of the pair asked for there, 0 where none is: the
        token at a place with a distance is the query's key, the next one is the value to be told.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(KEYS + VALUES, VOCABULARY, (count, length), dtype=np.int64)
    distances = np.zeros((count, length), dtype=np.int64)
    for text, distance in zip(tokens, distances, strict=True):
        taken = np.zeros(length, dtype=bool)
        for key, value in zip(rng.permutation(KEYS)[:pairs], rng.integers(KEYS, KEYS + VALUES, pairs), strict=True):
            for _ in range(100):  # until both places are free
                apart = int(np.exp(rng.uniform(np.log(least), np.log(length - 2))))
                place = int(rng.integers(0, length - 1 - apart))
                spots = [place, place + 1, place + apart, place + apart + 1]
                if not taken[spots].any():
                    taken[spots] = True
                    text[[place, place + apart]] = key
                    text[[place + 1, place + apart + 1]] = value
                    distance[place + apart] = apart
                    break
    return tokens, distances


@torch.inference_mode()
def score(model, tokens: np.ndarray, distances: np.ndarray, edges: list[int]) -> dict:
    """Share of queries whose value the model names, by distance: from each edge to the next."""
    model.eval()
    right, asked = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
    for row, distance in zip(tokens, distances, strict=True):
        places = np.flatnonzero(distance)
        logits = model(torch.from_numpy(row[None]), use_cache=False, logits_to_keep=torch.from_numpy(places)).logits
        told = logits[0].argmax(-1).numpy() == row[places + 1]
        bucket = np.digitize(distance[places], edges) - 1
        np.add.at(right, bucket, told)
        np.add.at(asked, bucket, 1)
    return {"edges": edges, "right": right.tolist(), "asked": asked.tolist()}


def run_recall_cell(cell: dict, settings: dict, folder: Path) -> dict:
    """Train on such texts and score others."""
    torch.set_num_threads(settings["threads"])
    branches = cell.get("branches") or settings["recall_branches"]
    pattern = make_pattern(cell["pattern"], branches, cell["length"])
    sizes = settings["recall_sizes"] | {
        "vocab_size": VOCABULARY,
        "head_offsets": cell.get("head_offsets", "interleaved"),
    }
    model = make_model(pattern, cell["seed"], **sizes)
    texts = cell["tokens"] // cell["length"]
    sequences, asked = make_texts(texts, cell["length"], cell["pairs"], cell["least"], cell["seed"] + 1)
    told = np.pad(asked, ((0, 0), (1, 0)))[:, :-1] > 0  # the places of the values: the only ones to be learned
    labels = np.where(told, sequences, -100)
    result = train(model, sequences, cell, f"recall, {cell['pattern']} {cell['length']:,}", labels=labels)
    held_out = make_texts(settings["recall_texts"], cell["length"], cell["pairs"], cell["least"], 10**6)
    steps = int(np.log2(cell["length"] / cell["least"]))
    edges = [cell["least"] * 2**i for i in range(steps)] + [cell["length"]]
    return result | {"work": pattern._asdict(), "recall": score(model, *held_out, edges)}
