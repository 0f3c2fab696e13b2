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
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_autograd import AttentionPlan, HaloKV, attend_chunks
from .attention_context import AttentionContext, plan_branches
from .backends import backend_names, choose_backend
from .branches import Branch, prefix_lengths
from .cache_longnet import LongNetCache
from .compat import CACHE, attn_implementation
from .dilated_attention import autocast_dtype
from .packing import pack, real_tokens
from .pattern import Pattern
from .reference import count_branches
from .sharding_accelerate import check_whole_sequences

IMPLEMENTATION = "dilated"
_DEFAULTS = {"segment_lengths": [], "dilation_rates": []} | Pattern._field_defaults | {"backend": "auto"}
# Types of layers: the first is dilated, the second left as it is.
_DILATED, _LEFT = "full_attention", "sliding_attention"
# What else a model may request of its attention, by the keyword argument that requests it.
_UNSUPPORTED = {
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
    **beyond,
) -> PreTrainedModel:
    """Switch a causal decoder of Transformers to dilated attention and return it; weights and positions stay.

    Layers with a sliding window (Gemma 3, OLMo 3, Cohere 2) stay as they are; those with full attention are dilated.

    Measure what this does to quality: until the model is fine-tuned, a head sees other tokens than in its training. One
    branch (w, 1) with w at least the length changes nothing. Left padding, packed documents (position ids that restart
    at 0), training and `generate` work as before; the segments of each sequence begin at its first token. The model's
    own cache still grows with the sequence, see `DilatedCache`. `model.set_attn_implementation("sdpa")` switches back.

    A saved model loads dense again (servers such as vLLM run it dense), as Transformers does not save the
    implementation: call this function after loading or, with this package imported,
    `from_pretrained(folder, attn_implementation="dilated")`. A saved LoRA adapter does not store the branches: pass
    them again. Each process needs whole sequences: Accelerate's `cp_size` and `sp_size` are refused.

    Args:
        model: changed in place. Its config stores the branches as `dilated_attention`.
        segment_lengths, dilation_rates: w and r of each branch (see `dilated_attention`).
        head_offsets, backend: as in `dilated_attention`; "interleaved" and "auto" by default.
        beyond: window_size, query_rates, rotate_offsets, stagger_segments, keys_once and branch_layer_period, as in
            `LongNetConfig`. With a window and keys_once, texts of up to window_size tokens get exactly the model's
            dense attention.

    Whatever is omitted keeps its stored value; window_size=None and query_rates=None remove them.

    Raises:
        ValueError: names the part of the model, or the argument, that does not fit.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(folder)
        >>> use_dilated_attention(model, [2048, 8192], [1, 4])
    """
    config = model.config
    _check_model(model)
    setting = _DEFAULTS | (getattr(config, "dilated_attention", None) or {})
    if unknown := sorted(set(beyond) - set(_DEFAULTS)):
        raise TypeError(f"use_dilated_attention has no argument {unknown[0]!r}; it takes {', '.join(_DEFAULTS)}.")
    given = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates, "head_offsets": head_offsets}
    given = {name: x for name, x in (given | {"backend": backend}).items() if x is not None} | beyond
    setting |= {name: list(x) if isinstance(x, list | tuple) else x for name, x in given.items()}
    _check_setting(config.num_hidden_layers, setting)
    if setting["branch_layer_period"] > 1 and _has_windows(config):
        raise ValueError("branch_layer_period must be 1 in a model some of whose layers have a sliding window already.")
    config.dilated_attention = setting
    model.set_attn_implementation(IMPLEMENTATION)
    if not _is_dilated(config):
        raise ValueError(f"{type(model).__name__} does not support attn_implementation functions.")
    _install_hook(model)
    return model


def _check_setting(num_layers: int, setting: dict) -> None:
    if unknown := sorted(set(setting) - set(_DEFAULTS)):
        raise ValueError(f"the config's dilated_attention has unknown entries: {', '.join(unknown)}.")
    if not setting["segment_lengths"] and not setting["dilation_rates"] and setting["window_size"] is None:
        raise ValueError("give segment_lengths and dilation_rates: the model's config stores none.")
    Pattern(*(setting[name] for name in Pattern._fields)).check(num_layers=num_layers)
    if (backend := setting["backend"]) not in backend_names():
        raise ValueError(f"backend={backend!r}: allowed are {', '.join(map(repr, backend_names()))}.")


def _is_dilated(config) -> bool:
    return attn_implementation(config) == IMPLEMENTATION and getattr(config, "dilated_attention", None) is not None


def _pattern(config, groups: int | None = None) -> SimpleNamespace:
    """Return the setting and sizes of a switched model under LongNetConfig's names; `groups` are key/value heads."""
    groups = groups or getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    setting = _DEFAULTS | config.dilated_attention  # it may come from a file
    _check_setting(config.num_hidden_layers, setting)
    sizes = {name: getattr(config, name) for name in ("num_attention_heads", "num_hidden_layers")}
    return SimpleNamespace(**setting, **sizes, num_key_value_heads=groups)


def _check_model(model: PreTrainedModel) -> None:
    """Raise ValueError if the model has a part without a dilated form; the message names it."""
    config, name = model.config, type(model).__name__
    if config.get_text_config() is not config or config.is_encoder_decoder:
        raise ValueError(f"{name} is made of several models; pass only its text decoder.")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not support attn_implementation functions.")
    found = _parts_without_dilated_form(model)
    if found:
        raise ValueError(
            f"{name} has {', '.join(found)}, which has no dilated form. Loaded with the fields in brackets it is "
            "another model, which needs fine-tuning; if none are given, use another model."
        )


def _parts_without_dilated_form(model: PreTrainedModel) -> list[str]:
    """Return the parts, each with the field that loads the model without it, if there is one."""
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or ())
    window, softcap = (getattr(config, field, None) for field in ("sliding_window", "attn_logit_softcapping"))
    if getattr(config, "is_heterogeneous", False):
        return ["layers of different sizes"]
    value_dim, key_dim = (getattr(config, field, None) for field in ("v_head_dim", "qk_head_dim"))
    dense = 'layer_types=["full_attention"] * num_hidden_layers'
    found = [f"layers of the type {kind!r} ({dense})" for kind in sorted(layer_types - {_DILATED, _LEFT})]
    if layer_types == {_LEFT}:
        found.append(f"only sliding windows ({dense})")
    if window is not None and not layer_types:
        found.append(f"a sliding window in every layer, of {window} tokens (sliding_window=None)")
    if softcap is not None:
        found.append(f"a soft cap of its scores, at {softcap} (attn_logit_softcapping=None)")
    if getattr(config, "is_causal", True) is False:
        found.append("bidirectional attention")
    if any(parameter.endswith("sinks") for parameter, _ in model.named_parameters()):
        found.append("attention sinks")
    if None not in (value_dim, key_dim) and value_dim != key_dim:
        found.append(f"keys of {key_dim} and values of {value_dim} features")
    return found


def _has_windows(config) -> bool:
    return _LEFT in (getattr(config, "layer_types", None) or ())


def _install_hook(model: PreTrainedModel) -> None:
    decoder = model.get_decoder()
    # ModernBERT's decoder calls its output projection `decoder`.
    decoder = decoder if isinstance(decoder, PreTrainedModel) else model.base_model
    if not getattr(decoder, "_makes_dilated_context", False):
        decoder.register_forward_pre_hook(_add_context, with_kwargs=True)
        decoder._makes_dilated_context = True


# The context holds numbers that are read from the mask, which a compiled graph cannot.
@torch.compiler.disable
def _add_context(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of the decoder: add the context of this pass to the layers' keyword arguments."""
    config = decoder.config
    if not _is_dilated(config):
        return None
    given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})  # what the decoder takes as **kwargs
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    inputs = ids if embeds is None else embeds
    if inputs is None:
        return None  # the decoder refuses this itself
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = decoder.dtype if embeds is None else embeds.dtype
    sample = torch.empty(len(inputs), 0, inputs.shape[1], head_dim, dtype=dtype, device=inputs.device)
    mask, position_ids, cache = (given.get(name) for name in ("attention_mask", "position_ids", CACHE))
    past = 0 if cache is None else int(cache.get_seq_length())
    context = _make_context(_pattern(config), sample, mask, position_ids, past, cache)
    return args, kwargs | {"dilated_context": context}


@dataclass(eq=False)
class _DilatedContext(AttentionContext):
    """The context of a model with dilated attention.

    With the model's own cache `attend` gathers the prefix from all keys; with a DilatedCache it reads its slots.

    Attributes:
        key_columns: columns of the keys that each layer passes: all seen so far, or with a DilatedCache the new ones.
        prefixes: one per plan, the (B, G, P) columns of the prefix among them and the slots of each branch; empty if
            the layers pass no past keys.
    """

    key_columns: int = 0
    prefixes: tuple[tuple[Tensor, tuple[int, ...]], ...] = ()

    def attend(self, query, key, value, layer_idx):
        """Attend as a LongNet does; key and value (B, S, G, D) may begin with the past in the model's own cache."""
        if not self.prefixes:
            return super().attend(query, key, value, layer_idx)
        columns, slots = self.of_layer(self.prefixes, layer_idx)
        past, index = key.shape[1] - query.shape[1], columns[..., None].expand(-1, -1, -1, key.shape[-1])
        prefix = HaloKV(*(x.transpose(1, 2).gather(2, index) for x in (key, value)), slots)
        plan = self.of_layer(self.plans, layer_idx)
        return attend_chunks(query, key[:, past:], value[:, past:], plan, prefix), None


def _make_context(
    pattern: SimpleNamespace, sample: Tensor, mask: Tensor | None, position_ids: Tensor | None, past: int, cache=None
) -> _DilatedContext:
    """Return the context of a forward pass.

    Args:
        sample: (B, any, n, D) in the dtype and on the device of the queries.
        mask: (B, S), nonzero for real tokens. position_ids: (B or 1, n).
        past: columns in the cache, the model's own or a DilatedCache.
    """
    check_whole_sequences("a model of use_dilated_attention")
    rows, _, length, head_dim = sample.shape
    device, layers, is_bounded = sample.device, plan_branches(pattern), isinstance(cache, DilatedCache)
    if mask is not None:
        _check_columns("the attention mask", getattr(mask, "shape", ()), (rows, past + length))
        mask = real_tokens(mask)
    backend = choose_backend(pattern.backend, sample.to(autocast_dtype(sample)))
    starts = None
    if is_bounded:
        cache.check(pattern, rows)
        if backend == "eager":
            raise ValueError("a DilatedCache needs a fast backend; backend='eager' works with the model's own cache.")
        starts = cache.lengths
    elif past:
        starts = [past] * rows if mask is None else mask[:, :past].sum(1).tolist()
    chunks = pack(rows, length, device, mask, position_ids, starts, past).chunks
    plans = tuple(AttentionPlan(chunks, branches, True, head_dim**-0.5, backend) for branches in layers)
    context = _DilatedContext(plans, key_columns=length if is_bounded else past + length)
    if is_bounded:
        cache.pending_layer = None  # an interrupted forward may have left one
        context.cache = cache
        context.steps = cache.steps() if cache.can_step(chunks, length) else ()
    elif backend == "eager":
        _, positions, documents = pack(rows, past + length, device, mask, None if past else position_ids)
        new = None if documents is None else documents[:, past:]
        given = positions[:, past:], positions, new, documents
        context.counts = tuple(count_branches(branches, *given) for branches in layers)
    elif past:
        first = torch.zeros(rows, dtype=torch.int64) if mask is None else mask.int().argmax(1).cpu()
        context.prefixes = tuple(_prefix_columns(branches, starts, first, past, device) for branches in layers)
    return context


def _check_columns(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if given != expected:
        raise ValueError(
            f"{name} has (batch, columns) = {tuple(given)}, expected {expected}: masks of pairs and static caches have "
            "no dilated form; give a (batch, columns) mask and a dynamic cache."
        )


def _prefix_columns(
    branches: tuple[Branch, ...], starts: list[int], first: Tensor, past: int, device: torch.device
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the (B, G, P) columns of the prefix among the cached keys, and the slots of each branch.

    Args:
        starts: real tokens in the cache. first: (B,), the column of the first one.
    """
    slots, start, columns = prefix_lengths(branches, *starts), torch.tensor(starts), []
    for branch, count in zip(branches, slots, strict=True):
        w, r, offsets = branch[:3]
        offset = torch.tensor(offsets)[:, None]
        if branch.is_window:
            begin = (start - w + 1).clamp(min=0)[:, None, None] + 0 * offset
        else:
            segment = start - (start + branch.phase) % w
            ghosts = -((offset - (-segment).clamp(min=0)[:, None, None]) // r)  # kept places before the first token
            begin = segment[:, None, None] + offset + ghosts.clamp(min=0) * r
        columns.append(first[:, None, None] + begin + torch.arange(count) * r)
    # Slots that a head lacks are never read.
    return torch.cat(columns, 2).clamp(max=past - 1).to(device), slots


def _padding_mask(
    *args, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs
) -> Tensor | None:
    """Return the layers' mask: the (B, S) padding mask, or for layers with a window Transformers' mask for "sdpa"."""
    if local_size is None:
        return attention_mask
    mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    return mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)


@torch.compiler.disable
def _attend(
    layer, query, key, value, attention_mask, scaling=None, dropout=0.0, position_ids=None, dilated_context=None, **rest
) -> tuple[Tensor, None]:
    """Transformers' attention function: query (B, H, n, D), key and value (B, G, S, D) -> (B, n, H, D), None.

    A layer with a sliding window attends as before.
    """
    if rest.get("sliding_window") is not None and _has_windows(layer.config):
        options = {"dropout": dropout, "scaling": scaling, "position_ids": position_ids}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, attention_mask, **options, **rest)
    _check_call(layer, key, value, dropout, rest)
    query, key, value = (x.to(autocast_dtype(x)) for x in (query, key, value))
    context, (rows, groups, columns, _) = dilated_context, key.shape
    fits = context is not None and len(context.plans[0].branches[0].offsets) == groups
    if context is not None and context.cache is not None:
        context.cache.pending_layer = None
        if not fits:
            expected = context.cache.pattern[1]
            raise ValueError(f"the model has {groups} key/value heads, its config says {expected}; use its own cache.")
    elif not fits:
        # A model loaded by name, without a hook, or one that drops keyword arguments or repeats key/value heads itself.
        pattern, past = _pattern(layer.config, groups), columns - query.shape[2]
        context = _make_context(pattern, query, attention_mask, position_ids, past, None)
    _check_columns("a layer's key", (rows, columns), (rows, context.key_columns))
    if scaling is not None and scaling != context.plans[0].scale:
        context = replace(context, plans=tuple(plan._replace(scale=scaling) for plan in context.plans))
    tokens = (x.transpose(1, 2) for x in (query, key, value))
    return context.attend(*tokens, getattr(layer, "layer_idx", None))[0], None


def _check_call(layer: nn.Module, key: Tensor, value: Tensor, dropout: float, others: dict) -> None:
    found = [what for name, what in _UNSUPPORTED.items() if others.get(name) is not None]
    found += ["attention dropout (load it with attention_dropout=0)"] if dropout else []
    found += ["keys and values of different size"] if key.shape[-1] != value.shape[-1] else []
    causal = [getattr(layer, "is_causal", True), getattr(layer.config, "is_causal", True), others.get("is_causal")]
    found += ["bidirectional attention (is_causal=False)"] if False in causal else []
    if found:
        raise ValueError(f"{type(layer).__name__} has {', '.join(found)}, which has no dilated form.")
    if getattr(layer.config, "dilated_attention", None) is None:
        raise ValueError(f"attn_implementation={IMPLEMENTATION!r} needs branches: call use_dilated_attention(model).")


class DilatedCache(LongNetCache):
    """A bounded cache for a model after `use_dilated_attention`: its memory stops growing with the sequence.

    `max_length` tokens are allocated for at once; with None memory grows with the sequence, up to its bound.

    Example:
        >>> model.generate(**inputs, past_key_values=DilatedCache(model))
    """

    def __init__(self, model: PreTrainedModel, max_length: int | None = None):
        if not _is_dilated(model.config):
            raise ValueError("call use_dilated_attention(model, ...) before DilatedCache(model).")
        if _has_windows(model.config):
            raise ValueError(
                "a DilatedCache is for models whose layers are all dilated; this one has layers with a sliding window, "
                "which its own cache bounds: leave the cache out."
            )
        super().__init__(_pattern(model.config), max_length)
        self.config = model.config
        # The layer whose `update` ran, but whose attention has not stored the keys yet.
        self.pending_layer: int | None = None
        _install_hook(model)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Return the new keys and values unchanged: attention finds this cache in its context and stores them there."""
        # Set by the layer before: its attention was not dilated, so it saw nothing of the cache.
        if self.pending_layer is not None or not _is_dilated(self.config):
            raise ValueError(
                "a DilatedCache works only with dilated attention: this model is not, or no longer, switched by "
                "use_dilated_attention. Start again, without this cache."
            )
        self.pending_layer = layer_idx
        return key_states, value_states


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)

__all__ = ["DilatedCache", "use_dilated_attention"]
