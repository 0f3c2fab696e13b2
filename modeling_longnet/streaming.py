"""Score a text of any length with a causal LongNet in constant memory; an interrupted run resumes from a file."""

import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from .cache_file import StateFile, read_state_file
from .cache_longnet import LongNetCache
from .chunked_loss import tokens_per_chunk


class Scored(NamedTuple):
    """Log-probabilities of tokens [start, stop), each given the earlier tokens that LongNet attends to.

    log_probs: (stop - start,) float32, natural logarithm. total, count: their sum (float64) and number since the
    beginning of the text, also after a resumption; perplexity so far is exp(-total / count).
    """

    start: int
    stop: int
    log_probs: Tensor
    total: float
    count: int

    @property
    def perplexity(self) -> float:
        return torch.tensor(-self.total / self.count, dtype=torch.float64).exp().item()  # inf, where math.exp raises

    @classmethod
    def from_state_file(cls, path: str | os.PathLike) -> "Scored":
        """Return total and count from a state file of `stream`, with no log_probs; ValueError if it is damaged."""
        _, _, position, total = read_state_file(path)
        return cls(position + 1, position + 1, torch.empty(0), total, position)


def stream(
    model,
    tokens: Tensor,
    *,
    chunk_size: int = 4096,
    state_file: str | os.PathLike | None = None,
    save_seconds: float = 60.0,
    progress: bool = True,
    cache: LongNetCache | None = None,
) -> Iterator[Scored]:
    """Score a text chunk by chunk. The chunk size does not affect the result, the length does not affect memory.

    Args:
        model: a `LongNetForCausalLM` in eval mode.
        tokens: (L,) token ids of any integer dtype, at least 2; a memory-mapped tensor is read as it is needed.
        chunk_size: tokens per forward pass.
        state_file: safetensors file for cache, position and sum, replaced in one step at the end and about every
            `save_seconds` seconds. If it exists, scoring resumes from it; hashes ensure the same model and text.
        progress: show tokens done and tokens per second.
        cache: an empty `LongNetCache(model.config)` to read into. At the end of the text it holds all tokens but the
            last, and `model.generate(tokens[None], past_key_values=cache)` continues the text.

    Yields:
        `Scored`, one per chunk; none if the state file is at the end of the text (`Scored.from_state_file` returns
        its sum). Token 0 has no earlier token and is not scored.

    Raises:
        ValueError: at the call: bad sizes, a model that is not causal or is in training mode, a state file
            that cannot be written, is damaged, or belongs to another model or text. Before a chunk: ids in it that
            are not in the vocabulary. When the state is saved: another process has written the state file.
    """
    _check_arguments(model, tokens, chunk_size)
    if cache is None:
        cache = LongNetCache(model.config)
    elif cache.get_seq_length():
        raise ValueError(f"cache holds {cache.get_seq_length()} tokens; pass an empty LongNetCache(model.config).")
    state = StateFile(state_file, model) if state_file is not None else None
    position, total = state.load(cache, tokens) if state is not None else (0, 0.0)
    chunks = _score_chunks(model, tokens, chunk_size, cache, position, total, progress)
    return chunks if state is None else _save_state(chunks, state, tokens, cache, save_seconds)


def _score_chunks(model, tokens, chunk_size: int, cache, position: int, total: float, progress) -> Iterator[Scored]:
    last = len(tokens) - 1
    with tqdm(total=last, initial=position, unit="tok", unit_scale=True, disable=not progress) as bar:
        while position < last:
            stop = min(position + chunk_size, last)
            ids = tokens[position : stop + 1].to(torch.int64)
            _check_ids(ids, position, model.config.vocab_size)
            log_probs = _score(model, ids.to(model.device), cache)
            total += float(log_probs.double().sum())
            scored = Scored(position + 1, stop + 1, log_probs, total, stop)
            bar.update(stop - position)
            bar.set_postfix(perplexity=f"{scored.perplexity:.2f}")
            yield scored
            position = stop


def _save_state(chunks: Iterator[Scored], state: StateFile, tokens: Tensor, cache, seconds: float) -> Iterator[Scored]:
    saved_at = time.monotonic()
    for scored in chunks:
        yield scored
        state.add_text(tokens[scored.start - 1 : scored.stop - 1])
        if scored.stop == len(tokens) or time.monotonic() - saved_at >= seconds:
            state.save(cache, scored.count, scored.total)
            saved_at = time.monotonic()


@torch.no_grad()
def _score(model, tokens: Tensor, cache: LongNetCache) -> Tensor:
    """Feed tokens[:-1] (n of n + 1 ids) into the cache; return the (n,) float32 log-probabilities of tokens[1:]."""
    hidden = model.base_model(tokens[None, :-1], cache=cache).last_hidden_state[0]
    head = model.get_output_embeddings()
    size = tokens_per_chunk(hidden, head)
    parts = zip(hidden.split(size), tokens[1:].split(size), strict=True)
    return torch.cat([-cross_entropy(head(x).float(), target, reduction="none") for x, target in parts])


def _check_arguments(model, tokens: Tensor, chunk_size: int) -> None:
    is_whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if tokens.dim() != 1 or len(tokens) < 2 or not is_whole:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, {tokens.dtype}; expected (L,) integers, L >= 2.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 token.")
    is_causal = getattr(model.config, "is_causal", None)
    if model.get_output_embeddings() is None or not is_causal:
        raise ValueError(
            f"{type(model).__name__} (is_causal={is_causal}) has no next-token probabilities; pass a causal "
            "LongNetForCausalLM."
        )
    if model.training:
        raise ValueError("the model is in training mode, where dropout would change the result; call model.eval().")


def _check_ids(ids: Tensor, position: int, vocab_size: int) -> None:
    wrong = ((ids < 0) | (ids >= vocab_size)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"tokens[{position + wrong[0]}] is {int(ids[wrong[0]])}; allowed are 0 to {vocab_size - 1} "
            f"(vocab_size={vocab_size}). Nothing from token {position} on was read."
        )
