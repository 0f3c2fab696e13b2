"""Reading without end: a text of any length through a causal LongNet in constant memory, resumable."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from .cache_longnet import LongNetCache
from .chunked_loss import tokens_per_chunk
from .dilated_attention import autocast_dtype

# Tokens hashed at a time.
_HASHED = 1 << 20


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
        return torch.tensor(-self.total / self.count, dtype=torch.float64).exp().item()  # inf, where math.exp raises


class _State(NamedTuple):
    position: int
    total: float
    cache: LongNetCache
    text: Any  # hashlib.sha256 of the tokens before the position


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
            `save_seconds` seconds, whole or not at all. Where it exists, the text goes on from there; that it is the
            same text and model is checked by hashes of the tokens before and of the weights.
        progress: show tokens done and tokens per second.

    Yields:
        `Scored`, one a chunk. Token 0 has nothing before it and is not scored.

    Raises:
        ValueError: at the call: bad sizes, a model that is no causal language model or in training mode, a state file
            that cannot be written, is damaged, or belongs to another model or text. Before a chunk: ids in it that
            are not in the vocabulary.
    """
    _check_arguments(model, tokens, chunk_size)
    path, identity = None if state_file is None else Path(state_file), {}
    state = _State(0, 0.0, LongNetCache(model.config), hashlib.sha256())
    if path is not None:
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"state_file={str(path)!r} must be a file in a folder that exists.")
        identity = _identity(model)
        if path.exists():
            state = _load(path, model, tokens, identity)
    return _stream(model, tokens, chunk_size, path, save_seconds, progress, identity, state)


def _stream(model, tokens, chunk_size, path, save_seconds, progress, identity, state) -> Iterator[Scored]:
    position, total, cache, text = state
    last, saved_at, saved = len(tokens) - 1, time.monotonic(), position
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
            if path is not None:
                _hash_tokens(text, ids[:-1])
            position = stop
            if path is not None and time.monotonic() - saved_at >= save_seconds:
                _save(path, _State(position, total, cache, text), identity)
                saved_at, saved = time.monotonic(), position
    if path is not None and position != saved:
        _save(path, _State(position, total, cache, text), identity)


@torch.no_grad()
def _score(model, tokens: Tensor, cache: LongNetCache) -> Tensor:
    """(n,) float32 log-probabilities of tokens[1:], feeding tokens[:-1] (n + 1 ids) into the cache."""
    hidden = model.base_model(tokens[None, :-1], cache=cache).last_hidden_state[0]
    head = model.get_output_embeddings()
    size = tokens_per_chunk(hidden, head)
    parts = zip(hidden.split(size), tokens[1:].split(size), strict=True)
    return torch.cat(
        [-torch.nn.functional.cross_entropy(head(part).float(), target, reduction="none") for part, target in parts]
    )


def _check_arguments(model, tokens: Tensor, chunk_size: int) -> None:
    if tokens.dim() != 1 or len(tokens) < 2 or tokens.is_floating_point():
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}, {tokens.dtype}; expected (L,) integers, L >= 2.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1 token.")
    if model.get_output_embeddings() is None or not getattr(model.config, "is_causal", False):
        raise ValueError(
            f"{type(model).__name__} (is_causal={getattr(model.config, 'is_causal', None)}) gives no next-token "
            "probabilities; give a causal LongNetForCausalLM."
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


def _identity(model) -> dict[str, str]:
    """What a state file must agree with: each field of the config that a result depends on, dtype, and the weights."""
    config = model.config.to_dict()
    others = {*PreTrainedConfig().to_dict(), "auto_map", "attention_backend"}
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(name.encode())
        weights.update(_bytes(parameter))
    return {
        **{name: json.dumps(config[name]) for name in sorted(set(config) - others)},
        "dtype": str(autocast_dtype(next(model.parameters()))),
        "weights": weights.hexdigest(),
    }


def _bytes(x: Tensor):
    """The tensor's memory, for a hash."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _hash_tokens(text, tokens: Tensor) -> None:
    for part in tokens.split(_HASHED):
        text.update(_bytes(part.to(torch.int64)))


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of a whole state file."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _save(path: Path, state: _State, identity: dict[str, str]) -> None:
    """Write beside the file and put it in its place in one step: a kill leaves the old state."""
    counts = {"position": str(state.position), "total": state.total.hex(), "text": state.text.hexdigest()}
    tensors, metadata = state.cache.to_tensors(), identity | counts
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=metadata | {"sha256": _digest(tensors, metadata)})
    os.replace(partial, path)


def _load(path: Path, model, tokens: Tensor, identity: dict[str, str]) -> _State:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.pop("sha256") != _digest(tensors, metadata):
            raise ValueError("its content is not what was saved")
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
    text = hashlib.sha256()
    _hash_tokens(text, tokens[:position])
    if position >= len(tokens) or metadata["text"] != text.hexdigest():
        raise ValueError(f"state file {path} belongs to another text: the tokens before {position} differ.")
    cache = LongNetCache(model.config)
    cache.load_tensors({name: x.to(model.device) for name, x in tensors.items()})
    if (cache.lengths, cache.get_seq_length()) != ([position], position):
        raise ValueError(f"state file {path}: its cache holds {cache.lengths} tokens, its position is {position}.")
    return _State(position, total, cache, text)
