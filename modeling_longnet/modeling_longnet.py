"""LongNet as a Transformers model (arXiv 2307.02486), with Magneto's sub-LN block (arXiv 2210.06423).

Letters: B batch, L tokens, E hidden size, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

import math
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attend import choose_backend
from .branches import make_branches
from .cache_longnet import LongNetCache, Step, cache_pattern
from .chunked_loss import chunked_cross_entropy
from .configuration_longnet import LongNetConfig
from .dilated_attention import Plan, attend_chunks, autocast_dtype
from .model_card import ModelCardMixin
from .packing import pack
from .positions import Turns, make_turns, turn
from .reference import count_branches, count_zero_padding, dense_attention
from .sharding import SequenceSharded, Shard, ShardInputs, attend_sharded, check_same_batch, group_loss, shard_inputs

# Transformers 5.18 or so renamed the cache: outputs and generate's keyword arguments use each version's own name.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class AttentionInputs(NamedTuple):
    """What every layer's attention needs to know of the batch, made once in a forward pass."""

    chunks: Tensor  # (N, 6), see packing.Packing
    backend: str
    turns: Turns | None
    cache: LongNetCache | None
    step: Step | None  # a decoding step of one token
    counts: Tensor | None  # (B, G, L, P + L), for the dense reference: how often each key is seen
    zero_padding: Tensor | None  # (B, G, L), likewise: zero keys
    sharded: ShardInputs | None = None  # where other processes hold parts of the same sequences


class LongNetAttention(torch.nn.Module):
    """Projections, positions, dilated attention, and sub-LN's inner norm before the output projection."""

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__()
        # Read once: Transformers' configuration looks up an attribute in microseconds, at each layer of each step.
        self.head_dim, self.is_causal = config.head_dim, config.is_causal
        self.attend_zero_padding = config.attend_zero_padding
        self.layer_idx = layer_idx
        self.branches = make_branches(*cache_pattern(config))
        self.scale = config.head_dim**-0.5
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, shared)
        self.v_proj = nn.Linear(config.hidden_size, shared)
        self.inner_attn_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj.init_gain = self.out_proj.init_gain = magneto_gain(config)

    def forward(self, hidden_states: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor | None]:
        """(B, L, E) -> (B, L, E), and the (B, H, L, P + L) attention weights under the dense reference."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if inputs.turns is not None:
            query, key = turn(query, inputs.turns.query), turn(key, inputs.turns.key)
        out, weights = self._attend(query, key, value, inputs)
        return self.out_proj(self.inner_attn_ln(out.flatten(-2))), weights

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs):
        layer = inputs.cache.layers[self.layer_idx] if inputs.cache is not None else None
        if inputs.step is not None:
            return layer.step(query, key, value, inputs.step, self.scale), None
        if inputs.sharded is not None:
            return attend_sharded(query, key, value, inputs.sharded), None
        before = layer.before(key) if layer is not None else None
        if inputs.backend == "eager":
            out, weights = self._attend_dense(query, key, value, before, inputs)
        else:
            weights = None
            out = attend_chunks(
                query, key, value, self.branches, chunks=inputs.chunks, before=before, scale=self.scale,
                is_causal=self.is_causal, backend=inputs.backend, zero_padding=self.attend_zero_padding,
            )  # fmt: skip
        if layer is not None:
            layer.update(key, value, inputs.chunks)
        return out, weights

    def _attend_dense(self, query: Tensor, key: Tensor, value: Tensor, before, inputs: AttentionInputs):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if before is not None:
            key = torch.cat([*before.keys, key], 2)
            value = torch.cat([*before.values, value], 2)
        out, weights, _ = dense_attention(query, key, value, inputs.counts, self.scale, inputs.zero_padding)
        return out.transpose(1, 2), weights


class LongNetFeedForward(nn.Module):
    """fc2(LN(act(fc1(x)))), with sub-LN's norm inside."""

    def __init__(self, config: LongNetConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.activation_dropout)
        self.ffn_layernorm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.fc1.init_gain = self.fc2.init_gain = magneto_gain(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.ffn_layernorm(self.dropout(self.act(self.fc1(hidden_states)))))


class LongNetBlock(GradientCheckpointingLayer):
    """h += out_proj(LN(attn(LN(h)))); h += fc2(LN(act(fc1(LN(h))))) (Magneto, section 3)."""

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = LongNetAttention(config, layer_idx)
        self.ffn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = LongNetFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = config.drop_path_rate * layer_idx / max(1, config.num_hidden_layers - 1)

    def forward(self, hidden_states: Tensor, inputs: AttentionInputs) -> Tensor:
        attended, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), inputs)
        hidden_states = hidden_states + self._drop(attended)
        return hidden_states + self._drop(self.ffn(self.ffn_layer_norm(hidden_states)))

    def _drop(self, branch: Tensor) -> Tensor:
        """Dropout; and in training a text loses the whole branch now and then, the others' grow accordingly."""
        branch = self.dropout(branch)
        if not self.training or self.drop_path == 0:
            return branch
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.drop_path)
        return branch * kept / (1 - self.drop_path)


def magneto_gain(config: LongNetConfig) -> float:
    """sqrt(ln(2 N)), by which values, output and feed-forward start larger (Magneto, section 3.2)."""
    return math.sqrt(math.log(2 * config.num_hidden_layers))


class LongNetPreTrainedModel(SequenceSharded, ModelCardMixin, PreTrainedModel):
    """Loading, saving and initialisation of the LongNet models."""

    config: LongNetConfig
    config_class = LongNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LongNetBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_record_outputs = {"hidden_states": LongNetBlock, "attentions": LongNetAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Magneto: Xavier normal, gain `magneto_gain` on v, out, fc1, fc2; embeddings and head N(0, 1 / E)."""
        std = self.config.initializer_range
        std = self.config.hidden_size**-0.5 if std is None else std
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Linear):
            init.xavier_normal_(module.weight, gain=getattr(module, "init_gain", 1.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class LongNetModel(LongNetPreTrainedModel):
    """Embeddings, blocks and a final norm: a decoder, or an encoder with `is_causal=False`."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        if config.vocab_size is not None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([LongNetBlock(config, i) for i in range(config.num_hidden_layers)])
        size, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm = nn.LayerNorm(size, eps=eps) if config.final_layer_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LongNetCache | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch of texts, or of the next part of them.

        Args:
            input_ids: (B, L) token ids; or inputs_embeds: (B, L, E), taken as they are.
            attention_mask: (B, columns so far), nonzero for real tokens, padding on the left or the right; a
                document's segments and positions begin at its first real token. Padding gets meaningless outputs.
            position_ids: (B or 1, L). Where they start again at 0 another packed document begins, which sees
                nothing of those before it; otherwise they are not needed.
            cache, past_key_values: a `LongNetCache` to go on from and to extend (two names of two versions of
                Transformers); use_cache makes one.
            output_hidden_states, output_attentions: as in Transformers; maps need attn_implementation="eager".

        Returns:
            last_hidden_state (B, L, E) after the final norm, the cache, and what was asked for. Where processes
            share each sequence (`set_sequence_group`, `SequenceSharding`) and no cache is given, all take the whole
            batch and get their part of the outputs, without a cache; `gather_sequence` joins them.

        Raises:
            ValueError: inputs that do not fit each other, the vocabulary or the cache.
        """
        cache = cache if cache is not None else past_key_values
        shard = self.shard(input_ids if inputs_embeds is None else inputs_embeds) if cache is None else None
        if shard is not None:
            check_same_batch(
                shard.group, input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                position_ids=position_ids, labels=kwargs.get("labels"), shift_labels=kwargs.get("shift_labels"),
            )  # fmt: skip
        embeds = self._embed(input_ids, inputs_embeds, shard)
        backend = self._backend(embeds, kwargs)
        if cache is None and use_cache and self.config.is_causal and shard is None:
            cache = LongNetCache(self.config)
        if shard is None:
            inputs = self._attention_inputs(embeds, attention_mask, position_ids, cache, backend)
        else:
            inputs = self._sharded_inputs(embeds, attention_mask, position_ids, shard, backend)
        hidden_states = self.dropout(embeds)
        for layer in self.layers:
            hidden_states = layer(hidden_states, inputs)
        return BaseModelOutputWithPast(last_hidden_state=self.layer_norm(hidden_states), **{CACHE: cache})

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, shard: Shard | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            if inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; expected (batch, length, "
                    f"{self.config.hidden_size})."
                )
            _check_not_empty("inputs_embeds", inputs_embeds)
            return inputs_embeds if shard is None else shard.cut(inputs_embeds)
        if self.config.vocab_size is None:
            raise ValueError("this model has no embedding table (vocab_size is None); give inputs_embeds.")
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected (batch, length).")
        if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(f"input_ids has dtype {input_ids.dtype}; expected whole numbers, such as torch.int64.")
        _check_not_empty("input_ids", input_ids)
        _check_ids("input_ids", input_ids, self.get_input_embeddings().num_embeddings)
        embeds = self.embed_tokens(input_ids if shard is None else shard.cut(input_ids))
        return embeds if self.config.embedding_scale == 1 else embeds * self.config.embedding_scale

    def _backend(self, embeds: Tensor, kwargs: dict) -> str:
        """The dense reference under "eager", the flash-attn package under "flash_attention_2", else the config's."""
        implementation = self.config._attn_implementation
        if implementation == "eager":
            return "eager"
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise ValueError(
                f"attn_implementation={implementation!r} has no attention weights to give; load the model with "
                'attn_implementation="eager" or call model.set_attn_implementation("eager").'
            )
        if implementation not in ("sdpa", "flash_attention_2"):
            raise ValueError(
                f"attn_implementation={implementation!r}: allowed are 'eager', 'sdpa', 'flash_attention_2'."
            )
        name = "flash_attn" if implementation == "flash_attention_2" else self.config.attention_backend
        sample = torch.empty(0, self.config.head_dim, dtype=autocast_dtype(embeds), device=embeds.device)
        return choose_backend(name, sample)

    def _attention_inputs(self, embeds, attention_mask, position_ids, cache, backend) -> AttentionInputs:
        batch, length, _ = embeds.shape
        starts, columns = None, 0
        if cache is not None:
            self._check_cache(cache, batch)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                raise ValueError(
                    "gradient checkpointing computes each block twice, and would take its tokens into the cache twice: "
                    "turn it off, or train without a cache."
                )
            starts, columns = cache.lengths or None, cache.get_seq_length()
        packing = pack(batch, length, embeds.device, attention_mask, position_ids, starts, columns)
        turns = make_turns(self.config, packing.positions, autocast_dtype(embeds))
        counts = zero_padding = step = None
        if backend == "eager":
            counts = self._count_keys(packing, cache)
            zero_padding = self._count_padding(packing, embeds) if self.config.attend_zero_padding else None
        elif cache is not None and cache.can_step(packing.chunks, length):
            step = cache.step(self.config.num_attention_heads)
        return AttentionInputs(packing.chunks, backend, turns, cache, step, counts, zero_padding)

    def _sharded_inputs(self, embeds, attention_mask, position_ids, shard: Shard, backend: str) -> AttentionInputs:
        attention, config = self.layers[0].self_attn, self.config
        if self.training and config.drop_path_rate:
            raise ValueError(
                f"drop_path_rate={config.drop_path_rate}: each process would draw for itself which texts skip a block, "
                "of a text they share; train it with drop_path_rate=0, or with whole sequences on each process."
            )
        plan = Plan((), attention.branches, config.is_causal, attention.scale, backend, config.attend_zero_padding)
        packing, sharded = shard_inputs(shard, embeds, attention_mask, position_ids, plan)
        turns = make_turns(config, packing.positions, autocast_dtype(embeds))
        return AttentionInputs(packing.chunks, backend, turns, None, None, None, None, sharded)

    def _check_cache(self, cache, batch: int) -> None:
        # By name: beside remote code there may be a second class of that name, of the same making.
        if type(cache).__name__ != "LongNetCache":
            raise ValueError(
                f"a LongNet model cannot use a {type(cache).__name__}: it keeps each branch's current segment only. "
                "Pass a LongNetCache(model.config), or none: generate() and use_cache=True make it."
            )
        if not self.config.is_causal:
            raise ValueError("a bidirectional model (is_causal=False) has no cache: earlier tokens see later ones.")
        cache.check(self.config, batch)

    def _count_keys(self, packing, cache) -> Tensor:
        """(B or 1, G, L, P + L): how often each cached slot and each token at hand counts for a query."""
        branches = self.layers[0].self_attn.branches
        positions, documents = packing.positions, packing.documents
        counts = count_branches(branches, positions, positions, documents, documents, is_causal=self.config.is_causal)
        if cache is None or not any(cache.lengths):
            return counts
        seen = cache.seen_slots(positions.expand(len(cache.lengths), -1))
        if documents is not None:
            seen = seen & (documents >= 0)[:, None, :, None]
        return torch.cat([seen, counts.expand(len(seen), -1, -1, -1)], -1)

    def _count_padding(self, packing, embeds: Tensor) -> Tensor:
        branches = self.layers[0].self_attn.branches
        result = torch.zeros(len(embeds), len(branches[0].offsets), embeds.shape[1], dtype=torch.int64)
        for first, last, begin, end, *_ in packing.chunks.tolist():
            result[first:last, :, begin:end] = count_zero_padding(branches, end - begin)
        return result.to(embeds.device)


def _check_not_empty(name: str, x: Tensor) -> None:
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; batch and length must be at least 1.")


def _check_ids(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """Raise on ids outside the vocabulary, which on a GPU would otherwise end the process."""
    if torch.compiler.is_compiling() or ids.device.type == "meta":
        return
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignored is not None:
        wrong = wrong & (ids != ignored)
    if wrong.any():
        also = f", or {ignored} for ignored tokens" if ignored is not None else ""
        raise ValueError(
            f"{name} holds {int(ids[wrong][0])}; allowed are 0 to {vocab_size - 1} (vocab_size={vocab_size}){also}."
        )


class LongNetForCausalLM(LongNetPreTrainedModel, GenerationMixin):
    """A LongNet decoder with a bias-free output projection, untied by default."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("LongNetForCausalLM needs a vocabulary; this config has vocab_size=None.")
        self.model = LongNetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LongNetCache | None = None,
        past_key_values: LongNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits, or with labels the loss, which is computed without the logits of the whole sequence.

        Args:
            labels: (B, L) token ids, shifted here: the loss at token i is that of labels[i + 1]; -100 is ignored.
            logits_to_keep: 0 for the logits of every token, n for the last n, an index tensor for those tokens.
                Left out, it is 0 without labels; with labels `logits` is then None, and neither forward nor
                backward holds more than a chunk of them.
            shift_labels (keyword): (B, L) labels that are shifted already.
            num_items_in_batch (keyword): the loss is the sum divided by it, instead of the mean over the targets.
            Others: as `LongNetModel.forward`.

        Returns:
            loss (a scalar, in at least float32), logits (B, kept, V) or None, the cache, and what was asked for.
            Where processes share each sequence, the loss is that of all of it, and logits_to_keep counts in this
            process's part; use_cache=True, asked for here, reads the whole sequence on every process.
        """
        cache = cache if cache is not None else past_key_values
        shard = self.shard(input_ids if inputs_embeds is None else inputs_embeds) if cache is None else None
        if shard is not None and use_cache:
            cache, shard = LongNetCache(self.config), None
        shift_labels = kwargs.get("shift_labels")
        name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and inputs is not None:
            self._check_labels(name, given, inputs.shape[:2])
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, labels=labels,
            **kwargs,
        )  # fmt: skip
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None or shift_labels is not None:
            loss = self._loss(hidden_states, labels, shift_labels, kwargs.get("num_items_in_batch"), shard)
        # Not before: where only one rank has labels, the others would wait for it in the comparison of the batches.
        if shard is not None and loss is None and logits_to_keep is None:
            raise ValueError(
                "a shared sequence needs labels here: label smoothing and compute_loss_func, in training and in "
                "evaluation, would compare this process's logits with the whole sequence's labels. Turn them off; or, "
                "to get this process's part of the logits, pass logits_to_keep=0 (gather_sequence joins the parts)."
            )
        if logits_to_keep is not None or loss is None:
            keep = 0 if logits_to_keep is None else logits_to_keep
            kept = (
                slice(-keep, None) if isinstance(keep, int) and keep else slice(None) if isinstance(keep, int) else keep
            )
            logits = self.lm_head(hidden_states[:, kept])
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
        )  # fmt: skip

    def _check_labels(self, name: str, labels: Tensor, shape: tuple[int, int]) -> None:
        if labels.shape != shape:
            raise ValueError(f"{name} has shape {tuple(labels.shape)}; expected {tuple(shape)} as the input.")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"{name} has dtype {labels.dtype}; expected whole numbers, such as torch.int64.")
        if name == "labels" and not self.config.is_causal:
            raise ValueError(
                "labels are next tokens, which a bidirectional model (is_causal=False) sees; give the targets of "
                "masked tokens as shift_labels, which stay where they are."
            )
        _check_ids(name, labels, self.config.vocab_size, ignored=-100)

    def _loss(self, hidden_states: Tensor, labels, shift_labels, num_items, shard: Shard | None) -> Tensor:
        length = hidden_states.shape[1] if shard is None else shard.total
        targets = labels[:, 1:] if shift_labels is None else shift_labels
        if shard is None:
            hidden_states = hidden_states[:, : targets.shape[1]]
        else:
            # Shifted before they are cut: a shard's last target is the next shard's first token.
            targets = shard.cut(nn.functional.pad(targets, (0, length - targets.shape[1]), value=-100))
        targets = targets.reshape(-1).to(hidden_states.device, torch.int64)
        total = chunked_cross_entropy(hidden_states.flatten(0, 1), targets, self.lm_head)
        count = (targets != -100).sum()
        if shard is not None:
            return group_loss(total, count, num_items, shard.group)
        if num_items is None:
            return total / count
        return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        """`generate` gets a bounded cache; caches of other makes are refused."""
        name = generation_config.cache_implementation
        if name not in (None, "offloaded") or (name and model_kwargs.get(CACHE) is not None):
            raise ValueError(
                f"cache_implementation={name!r}: LongNet has its own bounded cache, which generate() makes by itself; "
                "leave it out, or set 'offloaded' and give no cache."
            )
        if generation_config.use_cache is False:
            if self.sequence_group() is not None:
                raise ValueError("generate() runs with a cache where sequences are shared; leave use_cache=False out.")
            return
        if model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = LongNetCache(self.config, offloading=name == "offloaded")
        if generation_config.is_assistant:
            model_kwargs[CACHE].activate_past_recording()


LongNetConfig.register_for_auto_class()
LongNetModel.register_for_auto_class("AutoModel")
LongNetForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["LongNetForCausalLM", "LongNetModel", "LongNetPreTrainedModel"]
