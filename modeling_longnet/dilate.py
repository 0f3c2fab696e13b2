"""Dilated attention for the decoders that Transformers brings (Llama, Qwen, Mistral, Gemma), with their own weights.

Letters: B batch, n new tokens, S columns seen so far with them, H query heads, G key/value heads, D head dimension.
"""

import weakref
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .attend import BACKEND_NAMES, choose_backend
from .branches import Branch, make_branches, prefix_lengths
from .cache_longnet import LongNetCache, Step
from .dilated_attention import Outside, attend_chunks, autocast_dtype
from .packing import pack
from .reference import count_branches, dense_attention

IMPLEMENTATION = "dilated"
_AT_FIRST = {"segment_lengths": [], "dilation_rates": [], "head_offsets": "interleaved", "backend": "auto"}
# What else a model may ask of its attention, by the name under which it passes it on.
_UNFIT = {
    "sliding_window": "a sliding window",
    "softcap": "a soft cap of its scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias of its scores",
}


class _Batch(NamedTuple):
    """What every layer's attention needs to know of the batch, made by the first one."""

    chunks: Tensor  # (N, 6), see packing.Packing
    before: tuple[Tensor, ...] | None  # a (B, G, P) tensor a branch: columns of the rows before the chunks
    counts: Tensor | None  # (B, G, n, S), for the dense reference: how often each key is seen
    step: Step | None  # a decoding step with a DilatedCache


# The mask is a fresh tensor in every forward pass, so it tells to which one the batch belongs.
_latest: tuple[weakref.ref, _Batch] | None = None


def use_dilated_attention(
    model: PreTrainedModel,
    segment_lengths: list[int] | tuple[int, ...] | None = None,
    dilation_rates: list[int] | tuple[int, ...] | None = None,
    *,
    head_offsets: str | None = None,
    backend: str | None = None,
) -> PreTrainedModel:
    """Let a causal decoder of Transformers attend dilated. Its weights, positions and shared heads stay its own.

    What it does to the quality has to be measured: a head sees other tokens than it was trained with, until the
    model is fine-tuned. One branch (w, 1) with w at least the length changes nothing. Left padding, packed
    documents (position ids that start again at 0), training and `generate` work as before; each text's segments
    begin at its first token. The model's own cache still grows with the text, see `DilatedCache`.
    `model.set_attn_implementation("sdpa")` takes it back.

    A saved model loads dense again, as Transformers saves no attention's name: call `use_dilated_attention(model)`
    once it is loaded, or, with this package imported, `from_pretrained(folder, attn_implementation="dilated")`. A
    saved LoRA adapter does not even note the branches: load it and give them again.

    Args:
        model: changed in place. Its config notes the branches as `dilated_attention`, which is saved with it.
        segment_lengths, dilation_rates: w and r of each branch (see `dilated_attention`).
        head_offsets, backend: as in `dilated_attention`, "interleaved" and "auto" at first. Of these four, what is
            left out stays as the config notes it.

    Returns:
        The model.

    Raises:
        ValueError: says what of the model does not fit, or which argument.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(folder)
        >>> use_dilated_attention(model, [2048, 8192], [1, 4])
    """
    config = model.config
    _check_model(model)
    given = {
        "segment_lengths": None if segment_lengths is None else list(segment_lengths),
        "dilation_rates": None if dilation_rates is None else list(dilation_rates),
        "head_offsets": head_offsets,
        "backend": backend,
    }
    setting = _AT_FIRST | (getattr(config, "dilated_attention", None) or {})
    setting |= {name: value for name, value in given.items() if value is not None}
    if not setting["segment_lengths"] and not setting["dilation_rates"]:
        raise ValueError("give segment_lengths and dilation_rates: the model's config notes none.")
    _branches(setting, _groups(config))
    if setting["backend"] not in BACKEND_NAMES:
        raise ValueError(f"backend={setting['backend']!r}: allowed are {', '.join(map(repr, BACKEND_NAMES))}.")
    config.dilated_attention = setting
    model.set_attn_implementation(IMPLEMENTATION)
    if not _is_switched(config):
        raise ValueError(f"{type(model).__name__} does not let its attention be chosen by name.")
    return model


def _is_switched(config) -> bool:
    return config._attn_implementation == IMPLEMENTATION


def _groups(config) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _branches(setting: dict, groups: int) -> tuple[Branch, ...]:
    lists = tuple(setting["segment_lengths"]), tuple(setting["dilation_rates"])
    return make_branches(*lists, groups, setting["head_offsets"])


def _pattern(config) -> SimpleNamespace:
    """What a cache has to know of a switched model, under LongNetConfig's names."""
    lists = {name: config.dilated_attention[name] for name in ("segment_lengths", "dilation_rates", "head_offsets")}
    return SimpleNamespace(**lists, num_key_value_heads=_groups(config), num_hidden_layers=config.num_hidden_layers)


def _check_model(model: PreTrainedModel) -> None:
    """Raise ValueError, naming what of the model has no dilated form."""
    config = model.config
    name = type(model).__name__
    if config.get_text_config() is not config or config.is_encoder_decoder:
        raise ValueError(f"{name} is made of several models; give its text decoder alone.")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not let its attention be chosen by name.")
    found = []
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        found += sorted({f"layers of the type {kind!r}" for kind in layer_types if kind != "full_attention"})
    elif getattr(config, "sliding_window", None) is not None:
        found.append(f"a sliding window (sliding_window={config.sliding_window})")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        found.append(f"a soft cap of its scores (attn_logit_softcapping={config.attn_logit_softcapping})")
    if getattr(config, "is_causal", True) is False:
        found.append("bidirectional attention (is_causal=False)")
    if any(parameter.endswith("sinks") for parameter, _ in model.named_parameters()):
        found.append("attention sinks")
    if found:
        raise ValueError(
            f"{name} has {', '.join(found)}, which has no dilated form. Take a model without, or where it was trained "
            "without, load it with that field of its config set to None."
        )


def _padding_mask(
    *, attention_mask: Tensor | None = None, batch_size: int, q_length: int, kv_length: int, device=None, **kwargs
) -> Tensor:
    """What the attention gets as its mask: (B, S) bool, a fresh tensor, where there is no padding too."""
    if attention_mask is not None:
        return attention_mask.clone()
    # A static cache has more columns than were seen; the attention then finds this mask shorter than its keys.
    seen = int(kwargs["q_offset"]) + q_length if "q_offset" in kwargs else kv_length
    return torch.ones(batch_size, seen, dtype=torch.bool, device=device)


# The layout is made of numbers read from the mask, which a compiled graph cannot hold.
@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Transformers' attention function: query (B, H, n, D), key and value (B, G, S, D) -> (B, n, H, D), None."""
    held = getattr(key, "_held_by", None)  # (cache, layer number), see DilatedCache.update
    if held is not None:
        held[0].awaited = None
    _check_call(module, key, value, dropout, kwargs)
    setting = module.config.dilated_attention
    branches = _branches(setting, key.shape[1])
    query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
    backend = choose_backend(setting["backend"], query)
    batch = _batch(module.config, attention_mask, query, key, position_ids, branches, backend, held)
    if batch.counts is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return dense_attention(query, key, value, batch.counts, scale)[0].transpose(1, 2), None
    past = key.shape[2] - query.shape[2]
    before = None
    if batch.before is not None:
        before = Outside(*(tuple(_gather(x, columns) for columns in batch.before) for x in (key, value)))
    query, key, value = (x.transpose(1, 2) for x in (query, key[:, :, past:], value[:, :, past:]))
    if held is None:
        out = attend_chunks(
            query, key, value, branches, chunks=batch.chunks, before=before, scale=scaling, backend=backend
        )
    else:
        cache, number = held
        out = cache.attend(number, query, key, value, batch.chunks, batch.step, scaling, backend)
    return out, None


def _check_call(module: nn.Module, key: Tensor, value: Tensor, dropout: float, kwargs: dict) -> None:
    found = [what for name, what in _UNFIT.items() if kwargs.get(name) is not None]
    found += ["attention dropout (load it with attention_dropout=0)"] if dropout else []
    found += ["keys and values of different size"] if key.shape[-1] != value.shape[-1] else []
    causal = [getattr(module, "is_causal", True), getattr(module.config, "is_causal", True), kwargs.get("is_causal")]
    found += ["bidirectional attention (is_causal=False)"] if False in causal else []
    if found:
        raise ValueError(f"{type(module).__name__} has {', '.join(found)}, which has no dilated form.")
    if getattr(module.config, "dilated_attention", None) is None:
        raise ValueError(
            f"attn_implementation={IMPLEMENTATION!r} needs branches: call use_dilated_attention(model, ...)."
        )


def _batch(config, mask, query, key, position_ids, branches, backend, held) -> _Batch:
    """The batch's layout, from the layer before where it is the same forward pass."""
    global _latest
    latest = _latest
    if latest is not None and mask is not None and latest[0]() is mask:
        return latest[1]
    if held is not None:
        held[0].check(_pattern(config), query.shape[0])
    batch = _lay_out(mask, query, key, position_ids, branches, backend, held)
    if mask is not None:
        _latest = weakref.ref(mask), batch
    return batch


def _lay_out(mask, query, key, position_ids, branches, backend, held) -> _Batch:
    rows, length, device = query.shape[0], query.shape[2], query.device
    past = key.shape[2] - length if held is None else held[0].get_seq_length()
    if mask is not None and tuple(mask.shape) != (rows, past + length):
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}, the keys' columns make {(rows, past + length)}: masks "
            "of pairs and static caches have no dilated form; give a (batch, columns) mask and a dynamic cache."
        )
    starts = None
    if past:
        seen = [past] * rows if mask is None else mask[:, :past].sum(1).tolist()
        starts = seen if held is None else held[0].lengths
        _check_positions(position_ids, mask, starts, past, rows, length)
        position_ids = None
    if backend == "eager":
        if held is not None:
            raise ValueError("a DilatedCache needs a fast backend; backend='eager' works with the model's own cache.")
        packing = pack(rows, past + length, device, mask, position_ids)
        positions, documents = packing.positions, packing.documents
        new = None if documents is None else documents[:, past:]
        counts = count_branches(branches, positions[:, past:], positions, new, documents)
        return _Batch(packing.chunks, None, counts, None)
    packing = pack(rows, length, device, mask, position_ids, starts, past)
    before = step = None
    if held is not None:
        cache = held[0]
        step = cache.step(query.shape[1]) if cache.can_step(packing.chunks, length) else None
    elif past:
        first = torch.zeros(rows, dtype=torch.int64) if mask is None else mask.int().argmax(1).cpu()
        before = tuple(x.to(device) for x in _prefix_columns(branches, starts, first, past))
    return _Batch(packing.chunks, before, None, step)


def _check_positions(position_ids, mask, starts, past: int, rows: int, length: int) -> None:
    """New tokens after a cache must go on with the text that it holds; packed documents cannot."""
    if position_ids is None:
        return
    if position_ids.dim() != 2:
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; expected (batch or 1, new tokens).")
    ids = position_ids.expand(rows, length).cpu()
    real = torch.ones(rows, length, dtype=torch.bool) if mask is None else mask[:, past:].cpu()
    for row, start in enumerate(starts):
        new = ids[row, real[row]].tolist()
        if new and new not in (list(range(b, b + len(new))) for b in {start, past}):
            raise ValueError(
                f"position_ids row {row} go on at {new[0]} after {start} tokens in the cache: packed documents, and "
                "positions with gaps, cannot go on from a cache."
            )


def _prefix_columns(branches, starts: list[int], first: Tensor, past: int) -> list[Tensor]:
    """Where the rows before the next tokens stand among the keys: (B, G, P) for each branch."""
    start = torch.tensor(starts)
    result = []
    for index, (w, r, offsets) in enumerate(branches):
        slots = max(prefix_lengths(branches, s)[index] for s in starts)
        begin = first + start // w * w  # (B,)
        columns = begin[:, None, None] + torch.tensor(offsets)[:, None] + torch.arange(slots) * r
        # A head's slots beyond its rows are never read.
        result.append(columns.clamp(max=past - 1))
    return result


def _gather(x: Tensor, columns: Tensor) -> Tensor:
    """(B, G, S, D), (B, G, P) -> (B, G, P, D)."""
    return x.gather(2, columns[..., None].expand(-1, -1, -1, x.shape[-1]))


class DilatedCache(LongNetCache):
    """A bounded cache for a model after `use_dilated_attention`: memory stops growing with the text.

    Args:
        model: the model.
        max_length: tokens to make room for at once; None lets the memory grow with the text, up to its bound.

    Example:
        >>> model.generate(**inputs, past_key_values=DilatedCache(model))
    """

    def __init__(self, model: PreTrainedModel, max_length: int | None = None):
        if getattr(model.config, "dilated_attention", None) is None or not _is_switched(model.config):
            raise ValueError("a DilatedCache is for a model after use_dilated_attention(model, ...).")
        super().__init__(_pattern(model.config), max_length)
        self.config = model.config
        self.awaited: int | None = None  # the layer whose keys were handed on and have not come back yet

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Hand the new keys on, marked, so that the attention finds this cache and then takes them in itself.

        Raises:
            ValueError: the attention of the layer before was not dilated, so it saw none of what is held here.
        """
        if self.awaited is not None or not _is_switched(self.config):
            raise ValueError(
                "a DilatedCache works with dilated attention alone: this model is not, or no longer, switched by "
                "use_dilated_attention. Start again, without this cache."
            )
        self.awaited = layer_idx
        key_states._held_by = (self, layer_idx)
        return key_states, value_states

    def attend(self, number: int, query, key, value, chunks, step: Step | None, scale: float | None, backend: str):
        """Attention of (B, n, heads, D) new tokens to what layer `number` holds and to themselves, which it keeps."""
        layer = self.layers[number]
        if key.shape[2] != self.pattern[2]:
            raise ValueError(
                f"the model has {key.shape[2]} key/value heads where its config says {self.pattern[2]}: it does not "
                "share them as its config says, so use its own cache."
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if step is not None:
            return layer.step(query, key, value, step, scale)
        out = attend_chunks(
            query, key, value, layer.branches, chunks=chunks, before=layer.before(key), scale=scale, backend=backend
        )
        layer.update(key, value, chunks)
        return out


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)

__all__ = ["DilatedCache", "use_dilated_attention"]
