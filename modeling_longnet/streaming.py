"""Reading without end: a text of any length through a causal LongNet in constant memory, resumable."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .cache_longnet import LongNetCache, cache_pattern

# Tokens whose logits are held at a time.
_LOGITS = 512


class Scored(NamedTuple):
    """Log-probabilities of tokens [start, stop), each given all tokens before it that LongNet shows it.

    log_probs: (stop - start,) float32, natural logarithm. total, count: their sum (float64) and number from the
    text's beginning, also after a resumption; perplexity so far is exp(-total / count).
    """

    start: int
    stop: int
    log_probs: Tensor
    total: float
    count: int

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / self.count)


class _State(NamedTuple):
    position: int
    total: float
    cache: LongNetCache


def stream(
    model,
    tokens: Tensor,
    *,
    chunk_size: int = 4096,
    state_file: str | os.PathLike | None = None,
    save_seconds: float = 60.0,
    progress: bool = True,
) -> Iterator[Scored]:
    """Score a text chunk by chunk; results do not depend on `chunk_size`, memory not on the text's length.

    Args:
        model: a `LongNetForCausalLM` in eval mode.
        tokens: (L,) token ids of any integer dtype, at least 2; a memory-mapped tensor is read as it is needed.
        chunk_size: tokens a forward.
        state_file: safetensors file in which cache, position and sum are saved, at the end and about every
            `save_seconds` seconds, whole or not at all. Where it exists, the text goes on from there.
        progress: show tokens done and tokens per second.

    Yields:
        `Scored`, one a chunk. Token 0 has nothing before it and is not scored.

    Raises:
        ValueError: before the first chunk: bad sizes, a model in training mode, a state file that is damaged or
            belongs to another model or text.
    """
    _check_arguments(model, tokens, chunk_size)
    path = None if state_file is None else Path(state_file)
    identity = _identity(model)
    state = _State(0, 0.0, LongNetCache(model.config))
    if path is not None and path.exists():
        state = _load(path, model, tokens, identity)
    return _stream(model, tokens, chunk_size, path, save_seconds, progress, identity, state)


def _stream(model, tokens, chunk_size, path, save_seconds, progress, identity, state) -> Iterator[Scored]:
    position, total, cache = state
    last, saved_at, saved = len(tokens) - 1, time.monotonic(), position
    with tqdm(total=last, initial=position, unit="tok", unit_scale=True, disable=not progress) as bar:
        while position < last:
            stop = min(position + chunk_size, last)
            log_probs = _score(model, tokens[position : stop + 1].to(model.device, torch.int64), cache)
            total += float(log_probs.double().sum())
            bar.update(stop - position)
            bar.set_postfix(perplexity=f"{math.exp(-total / stop):.2f}")
            yield Scored(position + 1, stop + 1, log_probs, total, stop)
            position = stop
            if path is not None and time.monotonic() - saved_at >= save_seconds:
                _save(path, _State(position, total, cache), tokens, identity)
                saved_at, saved = time.monotonic(), position
    if path is not None and position != saved:
        _save(path, _State(position, total, cache), tokens, identity)


@torch.no_grad()
def _score(model, tokens: Tensor, cache: LongNetCache) -> Tensor:
    """(n,) float32 log-probabilities of tokens[1:], feeding tokens[:-1] (n + 1 ids) into the cache."""
    hidden = model.base_model(tokens[None, :-1], cache=cache).last_hidden_state[0]
    head = model.get_output_embeddings()
    parts = zip(hidden.split(_LOGITS), tokens[1:].split(_LOGITS), strict=True)
    return torch.cat(
        [-torch.nn.functional.cross_entropy(head(part).float(), target, reduction="none") for part, target in parts]
    )


def _check_arguments(model, tokens: Tensor, chunk_size: int) -> None:
    if tokens.dim() != 1 or len(tokens) < 2 or tokens.is_floating_point():
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, {tokens.dtype}; expected (L,) integers, L >= 2.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 token.")
    if model.training:
        raise ValueError("the model is in training mode, where dropout would change the result; call model.eval().")


def _identity(model) -> dict[str, str]:
    """What a state file must agree with: the pattern, and the weights by their sum."""
    weights = sum(float(p.detach().double().sum()) for p in model.parameters())
    return {"pattern": json.dumps(cache_pattern(model.config)), "weights": repr(weights)}


def _fingerprint(tokens: Tensor, position: int) -> str:
    """Of the text just before the position, enough to notice another text."""
    part = tokens[max(0, position - 4096) : position].to(torch.int64)
    return hashlib.sha256(part.numpy().tobytes()).hexdigest()


def _save(path: Path, state: _State, tokens: Tensor, identity: dict[str, str]) -> None:
    """Write beside the file and put it in its place in one step: a kill leaves the old state."""
    text = {
        "position": str(state.position),
        "total": state.total.hex(),
        "text": _fingerprint(tokens, state.position),
    }
    tensors = {name: x.contiguous() for name, x in state.cache.to_tensors().items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=identity | text)
    os.replace(partial, path)


def _load(path: Path, model, tokens: Tensor, identity: dict[str, str]) -> _State:
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        position, total = int(metadata["position"]), float.fromhex(metadata["total"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"state file {path} is damaged or no state file ({error}); delete it to start anew."
        ) from error
    for name, value in identity.items():
        if metadata.get(name) != value:
            raise ValueError(
                f"state file {path} belongs to another model: its {name} is {metadata.get(name)}, this model's {value}."
            )
    if position >= len(tokens) or metadata.get("text") != _fingerprint(tokens, position):
        raise ValueError(f"state file {path} belongs to another text: the tokens before {position} differ.")
    cache = LongNetCache(model.config)
    cache.load_tensors(tensors)
    return _State(position, total, cache)
