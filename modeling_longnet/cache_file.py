"""File formats: a bounded cache as tensors, and the state file from which `stream` resumes.

Tensors of a cache: "{i}.keys" and "{i}.values" (B, G, P, D) of layer i; "lengths" (B,), "columns", "capacity" and
"ends_in_padding", equal in all layers; "branches" (n, 2 + G), each w, r and the offset per key/value head (for
patterns beyond the paper the numbers of `flatten_branch`, a row for each layer, filled up with zeros).

A state file is a safetensors file of these with B = 1. Its metadata are "position", "total" (a hexadecimal float),
"text" (SHA-256 of the tokens before the position), the fields of `_model_fields`, and "sha256", the hash of all these.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from .branches import Branch, flatten_branch
from .dilated_attention import autocast_dtype
from .pattern import Pattern
from .saving import replacing, stamp

# Attributes that are equal in all layers of a cache.
_SHARED = ("lengths", "columns", "capacity", "ends_in_padding")
_TOKENS_PER_HASH = 1 << 20


@torch.inference_mode(False)  # a later call may write outside of inference mode
def cache_to_tensors(cache) -> dict[str, Tensor]:
    """Return a copy of everything that the `LongNetCache` holds."""
    first = cache.layers[0]
    if not first.is_initialized:
        raise ValueError("the cache is empty: run a forward pass with it before saving it.")
    cache.check_whole()
    tensors = {name: torch.tensor(getattr(first, name)) for name in _SHARED}
    tensors["branches"] = torch.tensor(_branch_table(cache))
    for i, layer in enumerate(cache.layers):
        tensors |= {f"{i}.keys": layer.keys.clone(), f"{i}.values": layer.values.clone()}
    return tensors


def load_cache_tensors(cache, tensors: dict[str, Tensor]) -> None:
    """Fill the `LongNetCache` with a copy of the tensors; raise ValueError and leave it as it is if they do not fit."""
    first = cache.layers[0]
    names = [f"{i}.{name}" for i in range(len(cache.layers)) for name in ("keys", "values")]
    if set(tensors) != {*names, *_SHARED, "branches"}:
        raise ValueError(f"expected a saved cache of {len(cache.layers)} layers; found {sorted(tensors)}.")
    if (branches := tensors["branches"].tolist()) != _branch_table(cache):
        raise ValueError(
            f"saved cache: its branches, each (w, r, offset of each key/value head), are {branches}; this model's are "
            f"{_branch_table(cache)}."
        )
    shared = {name: tensors[name] for name in _SHARED}
    found = [(x.dim(), x.dtype) for x in shared.values()]
    if found != [(1, torch.int64), (0, torch.int64), (0, torch.int64), (0, torch.bool)] or not len(shared["lengths"]):
        raise ValueError(
            f"saved cache: {', '.join(_SHARED)} have (dimensions, dtype) {found}; expected int64 of 1, 0 and 0 "
            "dimensions and bool of 0, and a length for at least one row."
        )
    shared = {name: x.tolist() for name, x in shared.items()}
    lengths, columns, capacity, _ = shared.values()
    needed = min(max(lengths), first.longest)
    if min(lengths) < 0 or max(lengths) > columns or capacity < needed:
        raise ValueError(f"saved cache: {lengths} tokens, {columns} columns and room for {capacity} do not agree.")
    sample, heads = tensors[names[0]], len(first.branches[0].offsets)
    for name in names:
        layer = cache.layers[int(name.partition(".")[0])]
        expected = (len(lengths), heads, sum(layer.slots(capacity)), *sample.shape[3:]), sample.dtype
        if (given := (tuple(tensors[name].shape), tensors[name].dtype)) != expected:
            raise ValueError(f"saved cache: {name} has (shape, dtype) {given}; expected {expected}.")
    for i, layer in enumerate(cache.layers):
        layer.keys, layer.values = tensors[f"{i}.keys"], tensors[f"{i}.values"]
        layer.map_slots(torch.clone)
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
        vars(layer).update(shared, lengths=list(lengths), is_initialized=True, _record=None)


def _branch_table(cache) -> list[list[int]]:
    """Return w, r and offsets of each branch; beyond the paper's pattern, `flatten_branch` of each layer's branches."""
    layers = [layer.branches for layer in cache.layers]
    plain = [Branch(b.w, b.r, b.offsets) for b in layers[0]]
    if all(list(branches) == plain for branches in layers):
        return [[b.w, b.r, *b.offsets] for b in plain]
    rows = [[n for b in branches for n in map(int, flatten_branch(b))] for branches in layers]
    width = max(map(len, rows))
    return [row + [0] * (width - len(row)) for row in rows]


class StateFile:
    """The state file of one model and one text; each method raises ValueError for input that it cannot use."""

    def __init__(self, path: str | os.PathLike, model):
        self.path = Path(path).resolve()  # the check below is about the folder that is written to
        if self.path.is_dir() or not self.path.parent.is_dir() or not os.access(self.path.parent, os.W_OK):
            raise ValueError(f"state_file={str(path)!r} must be a file in a folder that exists and can be written to.")
        self.stamp = stamp(self.path)
        self.device, self.fields, self.text = model.device, _model_fields(model), hashlib.sha256()
        # A file from an earlier version lacks newer fields of the config: they had their defaults.
        self.absent = {name: json.dumps(default) for name, default in Pattern._field_defaults.items()}

    def add_text(self, tokens: Tensor) -> None:
        """Add tokens to the hash of the text before the position."""
        for part in tokens.split(_TOKENS_PER_HASH):
            self.text.update(_bytes(part.to(torch.int64)))

    def save(self, cache, position: int, total: float) -> None:
        """Replace the file in one step: an interrupted save leaves the previous state."""
        if stamp(self.path) not in (None, self.stamp):
            raise ValueError(
                f"state file {self.path} was written by another process since this one read it, and is left as it is; "
                "give each process a file of its own, or start again to continue from this one."
            )
        counts = {"position": str(position), "total": total.hex(), "text": self.text.hexdigest()}
        tensors, metadata = cache_to_tensors(cache), self.fields | counts
        with replacing(self.path) as part:
            save_file(tensors, part, metadata=metadata | {"sha256": _digest(tensors, metadata)})
        self.stamp = stamp(self.path)

    def load(self, cache, tokens: Tensor) -> tuple[int, float]:
        """Fill the cache; return the position in the text and the sum of log-probabilities: (0, 0.0) without a file."""
        if not self.path.exists():
            return 0, 0.0
        tensors, metadata, position, total = read_state_file(self.path)
        for name, value in self.fields.items():
            if (found := metadata.get(name, self.absent.get(name))) != value:
                raise ValueError(
                    f"state file {self.path} belongs to another model: its {name} is {found}, this model's {value}; "
                    "use that model, or another state_file."
                )
        self.add_text(tokens[:position])
        if position >= len(tokens) or metadata["text"] != self.text.hexdigest():
            raise ValueError(
                f"state file {self.path} belongs to another text: the tokens before {position} differ; use that text, "
                "or another state_file."
            )
        load_cache_tensors(cache, {name: x.to(self.device) for name, x in tensors.items()})
        if (cache.lengths, cache.get_seq_length()) != ([position], position):
            raise ValueError(
                f"state file {self.path}: its cache holds {cache.lengths} tokens, its position is {position}."
            )
        return position, total


def read_state_file(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str], int, float]:
    """Return tensors, metadata, position and total; raise ValueError if the file is damaged or not a state file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.pop("sha256") != _digest(tensors, metadata):
            raise ValueError("its content is not what was saved")
        position, total = int(metadata["position"]), float.fromhex(metadata["total"])
        if position < 1 or "text" not in metadata:
            raise ValueError(f"position {position}, fields {sorted(metadata)}")
        return tensors, metadata, position, total
    except (SafetensorError, KeyError, ValueError, OverflowError, OSError) as error:
        message = f"state file {path} is damaged or not a state file ({error}); delete it to start again."
        raise ValueError(message) from error


def _model_fields(model) -> dict[str, str]:
    """Return what a model and its state file must share: the config's own fields, dtype, SHA-256 of the weights."""
    config = model.config.to_dict()
    ignored = {*PreTrainedConfig().to_dict(), "auto_map", "attention_backend", "max_position_embeddings"}
    fields = {name: json.dumps(config[name]) for name in sorted(set(config) - ignored)}
    dtype = str(autocast_dtype(next(model.parameters())))
    return fields | {"dtype": dtype, "weights": _sha256(model.named_parameters())}


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    return _sha256(sorted(tensors.items()), json.dumps(metadata, sort_keys=True))


def _sha256(tensors: Iterable[tuple[str, Tensor]], start: str = "") -> str:
    digest = hashlib.sha256(start.encode())
    for name, x in tensors:
        digest.update(name.encode())
        digest.update(_bytes(x))
    return digest.hexdigest()


def _bytes(x: Tensor):
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() if x.numel() else b""
