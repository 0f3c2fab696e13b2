"""Dilated attention for the decoders of Transformers (Llama, Qwen, Mistral, Gemma), with their own weights.

A forward pre-hook of the decoder builds one context per forward pass and passes it to the layers' attention as a
keyword argument.

Letters: B batch, n new tokens, S columns seen so far including them, H query heads, G key/value heads, D head
dimension, P prefix slots.
"""

import inspect
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .attention_autograd import AttentionPlan, HaloKV, attend_chunks
from .attention_context import AttentionContext
from .backends import backend_names, choose_backend
from .branches import Branch, make_branches, prefix_lengths
from .cache_longnet import LongNetCache
from .compat import CACHE, attn_implementation
from .dilated_attention import autocast_dtype
from .packing import pack
from .reference import count_branches
from .sharding_accelerate import check_whole_sequences

IMPLEMENTATION = "dilated"
_DEFAULTS = {"segment_lengths": [], "dilation_rates": [], "head_offsets": "interleaved", "backend": "auto"}
# What else a model may request of its attention, by the keyword argument that requests it.
_UNSUPPORTED = {
    "sliding_window": "a sliding window",
    "softcap": "a soft cap of its scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias of its scores",
}


def use_dilated_attention(
    model: PreTrainedModel,
    segment_lengths: list[int] | tuple[int, ...] | None = None,
    dilation_rates: list[int] | tuple[int, ...] | None = None,
    *,
    head_offsets: str | None = None,
    backend: str | None = None,
) -> PreTrainedModel:
    """Switch a causal decoder of Transformers to dilated attention. It keeps its weights, positions and shared heads.

    Measure what this does to quality: until the model is fine-tuned, a head sees other tokens than in its training. One
    branch (w, 1) with w at least the length changes nothing. Left padding, packed documents (position ids that restart
    at 0), training and `generate` work as before; the segments of each sequence begin at its first token. The model's
    own cache still grows with the sequence, see `DilatedCache`. `model.set_attn_implementation("sdpa")` reverts it.

    A saved model loads dense again (servers such as vLLM run it dense), as Transformers does not save the
    implementation: call `use_dilated_attention(model)` after loading or, with this package imported,
    `from_pretrained(folder, attn_implementation="dilated")`. A saved LoRA adapter does not store the branches: pass
    them again. Each process needs whole sequences: Accelerate's `cp_size` and `sp_size` are refused.

    Args:
        model: changed in place. Its config stores the branches as `dilated_attention`.
        segment_lengths, dilation_rates: w and r of each branch (see `dilated_attention`).
        head_offsets, backend: as in `dilated_attention`; "interleaved" and "auto" at first. Whichever of the four is
            omitted keeps its stored value.

    Returns:
        The model.

    Raises:
        ValueError: names the part of the model, or the argument, that does not fit.

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
    setting = _DEFAULTS | (getattr(config, "dilated_attention", None) or {})
    setting |= {name: value for name, value in given.items() if value is not None}
    _check_setting(setting, _groups(config))
    config.dilated_attention = setting
    model.set_attn_implementation(IMPLEMENTATION)
    if not _is_dilated(config):
        raise ValueError(f"{type(model).__name__} does not let its attention be chosen by name.")
    _install_hook(model)
    return model


def _check_setting(setting: dict, groups: int) -> None:
    if not setting["segment_lengths"] and not setting["dilation_rates"]:
        raise ValueError("give segment_lengths and dilation_rates: the model's config notes none.")
    _branches(setting, groups)
    if setting["backend"] not in backend_names():
        raise ValueError(f"backend={setting['backend']!r}: allowed are {', '.join(map(repr, backend_names()))}.")


def _is_dilated(config) -> bool:
    return attn_implementation(config) == IMPLEMENTATION


def _groups(config) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _branches(setting: dict, groups: int) -> tuple[Branch, ...]:
    lists = tuple(setting["segment_lengths"]), tuple(setting["dilation_rates"])
    return make_branches(*lists, groups, setting["head_offsets"])


def _pattern(config) -> SimpleNamespace:
    """Return what a cache needs of a switched model, under LongNetConfig's names."""
    lists = {name: config.dilated_attention[name] for name in ("segment_lengths", "dilation_rates", "head_offsets")}
    return SimpleNamespace(**lists, num_key_value_heads=_groups(config), num_hidden_layers=config.num_hidden_layers)


def _check_model(model: PreTrainedModel) -> None:
    """Raise ValueError if the model has a part without a dilated form; the message names it."""
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


def _install_hook(model: PreTrainedModel) -> None:
    decoder = model.get_decoder()
    if not getattr(decoder, "_makes_dilated_context", False):
        decoder.register_forward_pre_hook(_add_context, with_kwargs=True)
        decoder._makes_dilated_context = True


# The context holds numbers that are read from the mask, which a compiled graph cannot.
@torch.compiler.disable
def _add_context(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of the decoder: add the context of this pass to the layers' keyword arguments."""
    config = decoder.config
    if not _is_dilated(config) or getattr(config, "dilated_attention", None) is None:
        return None
    given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    inputs = ids if embeds is None else embeds
    if inputs is None:
        return None  # the decoder refuses this itself
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = decoder.dtype if embeds is None else embeds.dtype
    sample = torch.empty(len(inputs), 0, inputs.shape[1], head_dim, dtype=dtype, device=inputs.device)
    mask, position_ids, cache = (given.get(name) for name in ("attention_mask", "position_ids", CACHE))
    past = 0 if cache is None else int(cache.get_seq_length())
    context = _make_context(config, _groups(config), sample, mask, position_ids, past, cache)
    return args, kwargs | {"dilated_context": context}


@dataclass(eq=False)
class _DilatedContext(AttentionContext):
    """The context of a switched model.

    Attributes:
        key_columns: columns of the keys that each layer passes: all seen so far, or with a DilatedCache the new ones.
        prefix_columns: (B, G, P), which of them are the prefix; None without past or with a DilatedCache.
        prefix_slots: slots of each branch in P.
    """

    key_columns: int = 0
    prefix_columns: Tensor | None = None
    prefix_slots: tuple[int, ...] = ()

    def attend_keys(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend to the model's own cache: query (B, H, n, D), key and value (B, G, S, D) -> (B, n, H, D)."""
        if self.plan.backend == "eager":
            return self._attend_dense(*(x.transpose(1, 2) for x in (query, key, value)), None)[0]
        past = key.shape[2] - query.shape[2]
        prefix = None
        if self.prefix_columns is not None:
            index = self.prefix_columns[..., None].expand(-1, -1, -1, key.shape[-1])
            prefix = HaloKV(key.gather(2, index), value.gather(2, index), self.prefix_slots)
        query, key, value = (x.transpose(1, 2) for x in (query, key[:, :, past:], value[:, :, past:]))
        return attend_chunks(query, key, value, self.plan, prefix)


def _make_context(
    config,
    groups: int,
    sample: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    past: int,
    cache: "DilatedCache | None",
) -> _DilatedContext:
    """Return the context of a forward pass.

    Args:
        sample: (B, any, n, D) in the dtype and on the device of the queries.
        mask: (B, S), nonzero for real tokens. position_ids: (B or 1, n).
        past: columns in the cache.
    """
    check_whole_sequences("a model of use_dilated_attention")
    rows, _, length, head_dim = sample.shape
    setting, is_bounded = config.dilated_attention, isinstance(cache, DilatedCache)
    _check_mask(mask, rows, past + length)
    mask = None if mask is None else mask != 0
    if is_bounded:
        cache.check(_pattern(config), rows)
    backend = choose_backend(setting["backend"], sample.to(autocast_dtype(sample)))
    if is_bounded and backend == "eager":
        raise ValueError("a DilatedCache needs a fast backend; backend='eager' works with the model's own cache.")
    starts = None
    if past:
        starts = cache.lengths if is_bounded else [past] * rows if mask is None else mask[:, :past].sum(1).tolist()
    branches, device = _branches(setting, groups), sample.device
    chunks = pack(rows, length, device, mask, position_ids, starts, past).chunks
    plan = AttentionPlan(chunks, branches, True, head_dim**-0.5, backend)
    context = _DilatedContext(plan, key_columns=length if is_bounded else past + length)
    if backend == "eager":
        _, positions, documents = pack(rows, past + length, device, mask, None if past else position_ids)
        new = None if documents is None else documents[:, past:]
        context.counts = count_branches(branches, positions[:, past:], positions, new, documents)
    elif is_bounded:
        context.cache = cache
        context.step = cache.step(config.num_attention_heads) if cache.can_step(chunks, length) else None
    elif past:
        first = torch.zeros(rows, dtype=torch.int64) if mask is None else mask.int().argmax(1).cpu()
        context.prefix_columns, context.prefix_slots = _prefix_columns(branches, starts, first, past, device)
    return context


def _check_mask(mask: Tensor | None, rows: int, columns: int) -> None:
    if mask is not None and tuple(mask.shape) != (rows, columns):
        raise ValueError(
            f"the attention mask has shape {tuple(mask.shape)}, the keys' columns make {(rows, columns)}: masks of "
            "pairs and static caches have no dilated form; give a (batch, columns) mask and a dynamic cache."
        )


def _prefix_columns(
    branches: tuple[Branch, ...], starts: list[int], first: Tensor, past: int, device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the (B, G, P) columns of the prefix among the cached keys, and the slots of each branch.

    Args:
        starts: real tokens in the cache. first: (B,), the column of the first one.
    """
    slots = tuple(max(lengths) for lengths in zip(*(prefix_lengths(branches, s) for s in starts), strict=True))
    start = torch.tensor(starts)
    columns = []
    for (w, r, offsets), count in zip(branches, slots, strict=True):
        begin = first + start // w * w  # (B,)
        columns.append(begin[:, None, None] + torch.tensor(offsets)[:, None] + torch.arange(count) * r)
    # Slots that a head lacks are never read.
    return torch.cat(columns, 2).clamp(max=past - 1).to(device), slots


def _padding_mask(*, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
    """Return the layers' mask: the model's own (B, S) padding mask instead of a mask of pairs."""
    return attention_mask


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
    dilated_context: _DilatedContext | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Transformers' attention function: query (B, H, n, D), key and value (B, G, S, D) -> (B, n, H, D), None."""
    _check_call(module, key, value, dropout, kwargs)
    context, groups = dilated_context, key.shape[1]
    query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
    if context is not None and context.cache is not None:
        context.cache.awaited = None
        _check_groups(context, groups)
    elif context is None or len(context.plan.branches[0].offsets) != groups:
        # Loaded by name without a hook, or a family that drops keyword arguments or shares heads in its own way.
        past = key.shape[2] - query.shape[2]
        context = _make_context(module.config, groups, query, attention_mask, position_ids, past, None)
    _check_columns(context, key.shape[2])
    if scaling is not None and scaling != context.plan.scale:
        context = replace(context, plan=context.plan._replace(scale=scaling))
    if context.cache is None:
        return context.attend_keys(query, key, value), None
    tokens = (x.transpose(1, 2) for x in (query, key, value))
    return context.attend(*tokens, module.layer_idx)[0], None


def _check_columns(context: _DilatedContext, columns: int) -> None:
    if columns != context.key_columns:
        raise ValueError(
            f"a layer passes keys of {columns} columns, {context.key_columns} are expected: masks of pairs and static "
            "caches have no dilated form; give a (batch, columns) mask and a dynamic cache."
        )


def _check_groups(context: _DilatedContext, groups: int) -> None:
    expected = context.cache.pattern[2]
    if groups != expected:
        raise ValueError(
            f"the model has {groups} key/value heads where its config says {expected}: it does not share them as its "
            "config says, so use its own cache."
        )


def _check_call(module: nn.Module, key: Tensor, value: Tensor, dropout: float, kwargs: dict) -> None:
    found = [what for name, what in _UNSUPPORTED.items() if kwargs.get(name) is not None]
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


class DilatedCache(LongNetCache):
    """A bounded cache for a model after `use_dilated_attention`: its memory stops growing with the sequence.

    Args:
        model: the model.
        max_length: tokens to allocate for at once; None lets memory grow with the sequence, up to its bound.

    Example:
        >>> model.generate(**inputs, past_key_values=DilatedCache(model))
    """

    def __init__(self, model: PreTrainedModel, max_length: int | None = None):
        if getattr(model.config, "dilated_attention", None) is None or not _is_dilated(model.config):
            raise ValueError("a DilatedCache is for a model after use_dilated_attention(model, ...).")
        super().__init__(_pattern(model.config), max_length)
        self.config = model.config
        self.awaited: int | None = None  # the layer whose new keys the attention has not stored yet
        _install_hook(model)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Return the new keys and values as they are: the attention finds the cache in its context and stores them.

        Raises:
            ValueError: the attention of the layer before was not dilated, so it saw nothing of the cache.
        """
        if self.awaited is not None or not _is_dilated(self.config):
            raise ValueError(
                "a DilatedCache works with dilated attention alone: this model is not, or no longer, switched by "
                "use_dilated_attention. Start again, without this cache."
            )
        self.awaited = layer_idx
        return key_states, value_states


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)

__all__ = ["DilatedCache", "use_dilated_attention"]
