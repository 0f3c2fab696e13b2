"""LongNet as a Transformers model (arXiv 2307.02486), with Magneto's sub-LN block (arXiv 2210.06423).

Letters: B batch, L tokens, E hidden size, H query heads, G key/value heads, D head dimension, V vocabulary, N blocks.
"""

import math

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .attention_context import AttentionContext, make_context, make_sharded_context
from .backends import choose_backend
from .cache_longnet import LongNetCache
from .chunked_loss import chunked_cross_entropy, cross_entropy_of_logits
from .compat import (
    CACHE,
    attn_implementation,
    capture_outputs,
    merge_with_config_defaults,
    refusing_damage,
    transforms_are_active,
)
from .configuration_longnet import LongNetConfig
from .dilated_attention import autocast_dtype
from .model_card import ModelCardMixin
from .positions import apply_rotary
from .sharding import check_same_batch, group_loss
from .sharding_accelerate import SequenceSharded
from .sharding_plan import Shard


# Written `torch.nn.Module`: Transformers 5.24 believes that a file with `class ...Attention(nn.Module)` ignores
# set_attn_implementation.
class LongNetAttention(torch.nn.Module):
    """Projections, positions, dilated attention, and sub-LN's inner norm before the output projection."""

    def __init__(self, config: LongNetConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.inner_attn_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj.init_gain = self.out_proj.init_gain = magneto_gain(config)

    def project(self, x: Tensor, projection: nn.Linear) -> Tensor:
        """(B, L, E) -> (B, L, heads, D)."""
        return projection(x).unflatten(-1, (-1, self.head_dim))

    def forward(self, hidden_states: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor | None]:
        """Return (B, L, E), and the (B, H, L, P + L) attention weights (P cached slots) under "eager", else None."""
        query, key, value = (self.project(hidden_states, p) for p in (self.q_proj, self.k_proj, self.v_proj))
        if context.rotary is not None:
            query, key = apply_rotary(query, context.rotary.query), apply_rotary(key, context.rotary.key)
        out, weights = self.attend(query, key, value, context)
        return self.out_proj(self.inner_attn_ln(out.flatten(-2))), weights

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext):
        """Return (B, L, H, D), and the attention weights or None; override it for another attention pattern."""
        return context.attend(query, key, value, self.layer_idx)


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

    def forward(self, hidden_states: Tensor, context: AttentionContext) -> Tensor:
        # capture_outputs records the attention weights (`_can_record_outputs`).
        attended, _ = self.self_attn(self.self_attn_layer_norm(hidden_states), context)
        hidden_states = hidden_states + self._drop(attended)
        return hidden_states + self._drop(self.ffn(self.ffn_layer_norm(hidden_states)))

    def _drop(self, residual: Tensor) -> Tensor:
        """Apply dropout and, in training, drop the residual of a whole sequence (stochastic depth)."""
        residual = self.dropout(residual)
        if not self.training or self.drop_path == 0:
            return residual
        kept = residual.new_empty(len(residual), 1, 1).bernoulli_(1 - self.drop_path)
        return residual * kept / (1 - self.drop_path)


def magneto_gain(config: LongNetConfig) -> float:
    """Return sqrt(ln(2 N)), the initial gain of value, output and feed-forward layers (Magneto, section 3.2)."""
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
    # False: tools that shard sequences (Accelerate's context parallelism; use `SequenceSharding`) or replace attention
    # (the Transformers backends of vLLM and SGLang) expect dense attention.
    _supports_context_parallel = False
    _supports_attention_backend = False
    _can_record_outputs = {"hidden_states": LongNetBlock, "attentions": LongNetAttention}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in Transformers; a damaged file raises a ValueError that names the folder."""
        with refusing_damage(str(pretrained_model_name_or_path)):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def prepare_distribute_model(cls, distributed_config, *args, **kwargs):
        """Prepare `from_pretrained(distributed_config=...)`; refuse what Transformers would split wrongly.

        LayerNorms inside a block and the heads' offsets need all features of a token, so no tensor parallel plan is
        right; pipeline parallelism looks for a final norm named `norm`, and would apply ours in every stage.
        """
        given = distributed_config or {}
        given = given if isinstance(given, dict) else vars(given)
        sizes = {name: given.get(name) for name in ("tp_size", "pp_size") if (given.get(name) or 1) > 1}
        if sizes:
            raise ValueError(
                f"{sizes}: LongNet has no tensor or pipeline parallelism; shard parameters by fsdp_size, or sequences "
                "by SequenceSharding."
            )
        return super().prepare_distribute_model(distributed_config, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Magneto: Xavier normal, gain `magneto_gain` on v, out, fc1, fc2; embeddings and head N(0, 1 / E).

        A backbone's own parameters, learned positions and the CLS token, are N(0, 0.02).
        """
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            std = self.config.initializer_range
            init.normal_(module.weight, std=self.config.hidden_size**-0.5 if std is None else std)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_normal_(module.weight, gain=getattr(module, "init_gain", 1.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, LongNetBackbone):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=0.02)


class LongNetBackbone(LongNetPreTrainedModel):
    """The blocks that the text, slide and image models share, with dropout before and a norm after them."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        # Keep this order: optimizer checkpoints store parameters by position.
        if config.vocab_size is not None:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([LongNetBlock(config, i) for i in range(config.num_hidden_layers)])
        norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_norm = norm if config.final_layer_norm else nn.Identity()
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the token embeddings, or the projection of tiles or patches; None without a vocabulary."""
        return getattr(self, self._input_embed_layer, None)

    def encode(self, embeds: Tensor, context: AttentionContext) -> Tensor:
        """Return the hidden states after the final norm: (B, L, E) -> (B, L, E)."""
        hidden_states = self.dropout(embeds)
        # `generate(assistant_early_exit=n)` lowers the config's number while it drafts with the first n layers.
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, context)
        return self.layer_norm(hidden_states)

    def backend(self, embeds: Tensor, output_attentions: bool | None = None) -> str:
        """Return the backend that attn_implementation selects; "sdpa" selects config.attention_backend."""
        implementation = attn_implementation(self.config)
        backends = {"eager": "eager", "sdpa": self.config.attention_backend, "flash_attention_2": "flash_attn"}
        if implementation not in backends:
            raise ValueError(f"attn_implementation={implementation!r}: allowed are {', '.join(map(repr, backends))}.")
        if output_attentions and implementation != "eager":
            raise ValueError(
                f"attn_implementation={implementation!r} returns no attention weights; load the model with "
                'attn_implementation="eager" or call model.set_attn_implementation("eager").'
            )
        sample = torch.empty(0, self.config.head_dim, dtype=autocast_dtype(embeds), device=embeds.device)
        return choose_backend(backends[implementation], sample)


class LongNetModel(LongNetBackbone):
    """Token embeddings and the backbone: a decoder, or an encoder with `is_causal=False`."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
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
        """Compute the hidden states of sequences, or of the tokens that continue a cache.

        Args:
            input_ids: (B, L) token ids; or inputs_embeds: (B, L, E), used as they are.
            attention_mask: (B, columns so far), nonzero for real tokens, with padding on the left or the right. The
                segments and positions of a document begin at its first real token. Outputs at padding are meaningless.
            position_ids: (B or 1, L), for packed documents: each 0 begins a new one, which sees nothing before it.
            cache, past_key_values: a `LongNetCache` to continue from and extend (the names of two versions of
                Transformers); use_cache creates one.
            output_hidden_states, output_attentions: as in Transformers; attention weights need
                attn_implementation="eager".

        Returns:
            last_hidden_state (B, L, E) after the final norm, the cache, and what was requested. With sequence sharding
            (`set_sequence_group`, `SequenceSharding`) and without a cache, every rank passes the whole batch and gets
            the outputs of its shard; `gather_sequence` concatenates them.

        Raises:
            ValueError: inputs that do not fit each other, the vocabulary or the cache.
        """
        cache = cache if cache is not None else past_key_values
        shard = self.shard(input_ids if inputs_embeds is None else inputs_embeds) if cache is None else None
        if shard is not None:
            inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
            # The language model passes its labels along, to be compared in the same collective.
            labels = {name: kwargs.get(name) for name in ("labels", "shift_labels")}
            check_same_batch(shard.group, **inputs, position_ids=position_ids, **labels)
        embeds = self.embed(input_ids, inputs_embeds, shard)
        backend = self.backend(embeds, kwargs.get("output_attentions", self.config.output_attentions))
        if shard is not None:
            if self.training and self.config.drop_path_rate:
                raise ValueError(
                    f"drop_path_rate={self.config.drop_path_rate}: stochastic depth would differ between the ranks of "
                    "one sequence; train with drop_path_rate=0, or with whole sequences on each process."
                )
            context = make_sharded_context(self.config, embeds, backend, attention_mask, position_ids, shard)
        else:
            # torch.export takes no cache in or out: its lengths are Python numbers (see `ExportableDecoder`).
            if cache is None and use_cache and self.config.is_causal and not torch.compiler.is_exporting():
                cache = LongNetCache(self.config)
            if cache is not None:
                self.check_cache(cache, len(embeds))
            context = make_context(self.config, embeds, backend, attention_mask, position_ids, cache)
        return BaseModelOutputWithPast(last_hidden_state=self.encode(embeds, context), **{CACHE: cache})

    def embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None, shard: Shard | None = None
    ) -> Tensor:
        """Return the (B, L, E) embeddings of this process's part of the batch."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            check_shape("inputs_embeds", inputs_embeds, "batch", "length", self.config.hidden_size)
            if not inputs_embeds.is_floating_point():
                raise ValueError(f"inputs_embeds has dtype {inputs_embeds.dtype}; expected floating point.")
            return inputs_embeds if shard is None else shard.cut(inputs_embeds)
        if self.config.vocab_size is None:
            raise ValueError("this model has no embedding table (vocab_size is None); give inputs_embeds.")
        check_shape("input_ids", input_ids, "batch", "length")
        if input_ids.is_meta and self.device.type != "meta":
            raise ValueError("input_ids is on the device meta and the model is not: there are no ids to look up.")
        # PEFT's wrappers of the embeddings have no num_embeddings.
        _check_ids("input_ids", input_ids, getattr(self.embed_tokens, "num_embeddings", self.config.vocab_size))
        embeds = self.embed_tokens((input_ids if shard is None else shard.cut(input_ids)).long())
        return embeds if self.config.embedding_scale == 1 else embeds * self.config.embedding_scale

    def check_cache(self, cache, batch: int) -> None:
        """Raise ValueError unless the model can continue this cache with a batch of this size."""
        # Compared by name: with remote code, a second class of this name may be loaded.
        if type(cache).__name__ != "LongNetCache":
            raise ValueError(
                f"a LongNet model cannot use a {type(cache).__name__}; pass a LongNetCache(model.config), or none: "
                "generate() and use_cache=True create it."
            )
        if not self.config.is_causal:
            raise ValueError("a model with is_causal=False has no cache, as its tokens see later ones; pass none.")
        cache.check(self.config, batch)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing would add each token to the cache twice; turn it off, or train without a cache."
            )


def check_shape(name: str, x: Tensor, *expected: int | str) -> None:
    """Raise unless `x` has these sizes; a word stands for any size above 0."""
    sizes = zip(x.shape, expected, strict=False)
    if x.dim() != len(expected) or not all(n > 0 if isinstance(size, str) else n == size for n, size in sizes):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected ({', '.join(map(str, expected))}), each at least 1."
        )


def _check_ids(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    """Raise on values that are not token ids, which on a GPU would trigger a device-side assert."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {ids.dtype}; expected whole numbers, such as torch.int64.")
    if torch.compiler.is_compiling() or transforms_are_active() or ids.device.type == "meta":
        return
    ids = ids.long()  # unsigned types have no comparisons
    wrong = (ids < 0) | (ids >= vocab_size)
    if ignored is not None:
        wrong = wrong & (ids != ignored)
    if wrong.any():
        also = f", or {ignored} for ignored tokens" if ignored is not None else ""
        raise ValueError(
            f"{name} holds {int(ids[wrong][0])}; allowed are 0 to {vocab_size - 1} (vocab_size={vocab_size}){also}."
        )


class LongNetLanguageModel(LongNetPreTrainedModel):
    """A LongNet with a bias-free output projection, untied by default: what causal and masked models share.

    Attributes:
        logits_with_labels: whether `forward` with labels also returns the logits: always (True), never (False), or in
            eval mode (None), where metrics read them. With False, evaluation takes as little memory as training.
    """

    logits_with_labels: bool | None = None
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: LongNetConfig):
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError(f"{type(self).__name__} needs a vocabulary; this config has vocab_size=None.")
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
        logits_to_keep: int | Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute next-token logits, or with labels the loss, without the logits of the whole sequence.

        Args:
            labels: (B, L) token ids, shifted here: the loss at token i is that of labels[i + 1]; -100 is ignored.
            logits_to_keep: 0 for the logits of every token, n for the last n, an index tensor for those tokens. The
                default is 0, but with labels in training (see `logits_with_labels`) or on a shard of a sequence
                `logits` is None, and at most a chunk of them is in memory.
            shift_labels: (B, L) labels that are shifted already.
            num_items_in_batch: the loss is the sum divided by it, instead of the mean over the targets.
            Others: as in `LongNetModel.forward`.

        Returns:
            loss (a scalar, in at least float32), logits (B, kept, V) or None, the cache (with labels only if
            use_cache=True is passed), and what was requested. With sequence sharding, the loss is that of the whole
            sequence, logits_to_keep counts in this rank's shard, and use_cache=True computes the whole sequence on
            every rank.
        """
        cache = cache if cache is not None else past_key_values
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        shard = self.shard(inputs) if cache is None else None
        if shard is not None and kwargs.get("use_cache") and self.config.is_causal:
            cache, shard = LongNetCache(self.config), None
        targets = self._targets(labels, kwargs.get("shift_labels"), inputs)
        tensors = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        # A loss needs no cache. Accelerate may strip the decorator that takes return_dict out of kwargs.
        kwargs = ({} if targets is None or cache is not None else {"use_cache": False}) | kwargs | {"return_dict": True}
        outputs = self.model(input_ids, cache=cache, labels=labels, **tensors, **kwargs)
        hidden_states = outputs.last_hidden_state
        if logits_to_keep is None and targets is None and shard is not None:
            # Must follow the forward pass: raising earlier on one rank would deadlock the others in `check_same_batch`.
            raise ValueError(
                "a sharded sequence needs labels here: label smoothing and compute_loss_func would compare a shard's "
                "logits with the labels of the whole sequence. Turn them off, or pass logits_to_keep=0 to get this "
                "rank's logits (gather_sequence concatenates them)."
            )
        # Trainer passes skip_logits in evaluations with use_liger_kernel that need only the loss.
        returns_logits = self._returns_logits() and not kwargs.get("skip_logits")
        if logits_to_keep is None and (targets is None or (shard is None and returns_logits)):
            logits_to_keep = 0
        loss = logits = None
        if logits_to_keep is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])  # slice(0, None): of every token
        if targets is not None:
            every = logits if isinstance(logits_to_keep, int) and logits_to_keep == 0 else None
            loss = self._loss(hidden_states, targets, kwargs.get("num_items_in_batch"), shard, every)
        recorded = {name: outputs.get(name) for name in (CACHE, "hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **recorded)

    def _targets(self, labels: Tensor | None, shift_labels: Tensor | None, inputs: Tensor | None) -> Tensor | None:
        """Return the checked targets of the first L - 1 or all L tokens; None without labels or with bad inputs."""
        name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
        if given is None or inputs is None or inputs.dim() < 2:
            return None
        check_shape(name, given, *inputs.shape[:2])
        if name == "labels" and not self.config.is_causal:
            raise ValueError(
                "labels are next tokens, which a bidirectional model (is_causal=False) sees; pass the targets of "
                "masked tokens as shift_labels."
            )
        _check_ids(name, given, self.config.vocab_size, ignored=-100)
        return (given[:, 1:] if name == "labels" else given).long()

    def _returns_logits(self) -> bool:
        return not self.training if self.logits_with_labels is None else self.logits_with_labels

    def _loss(self, hidden_states: Tensor, targets: Tensor, num_items, shard, logits: Tensor | None = None) -> Tensor:
        """Return the loss from the logits of all tokens or, if they are None, from chunks of them."""
        # Shifted before the cut: a shard's last target is the next shard's first token.
        length = hidden_states.shape[1] if shard is None else shard.total
        targets = nn.functional.pad(targets, (0, length - targets.shape[1]), value=-100)
        targets = targets if shard is None else shard.cut(targets)
        targets = targets.reshape(-1).to(hidden_states.device)
        if logits is None:
            total = chunked_cross_entropy(hidden_states.flatten(0, 1), targets, self.lm_head)
        else:
            total = cross_entropy_of_logits(logits.flatten(0, 1), targets)
        count = (targets != -100).sum()
        if shard is not None:
            return group_loss(total, count, num_items, shard.group)
        count = count if num_items is None else num_items
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _padded_behind(mask: Tensor) -> int | None:
    """Return the first row of a (B, columns) mask with a 0 after another number, None if there is none."""
    wrong = ((mask[:, 1:] == 0) & (mask[:, :-1] != 0)).any(1)
    return int(wrong.nonzero()[0]) if wrong.any() else None


class LongNetForCausalLM(LongNetLanguageModel, GenerationMixin):
    """A decoder that predicts the next token and generates."""

    def generate(self, *args, **kwargs):
        """As in Transformers, but an error while drafting (`assistant_early_exit`) keeps the number of layers."""
        count = self.config.num_hidden_layers
        try:
            return super().generate(*args, **kwargs)
        finally:
            self.config.num_hidden_layers = count

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse `generate_batch` and Transformers' other entries to continuous batching, which end here."""
        raise ValueError(
            "continuous batching (generate_batch) is not supported: it keeps every key, in pages, and its masks know "
            "no branches. Use generate() on batches of prompts padded on the left, with a bounded cache."
        )

    def _prepare_attention_mask_for_generation(self, inputs_tensor: Tensor, generation_config, *args) -> Tensor:
        """Infer the mask from the prompt's pad tokens, as Transformers does; refuse those after other tokens."""
        if generation_config.is_assistant:  # the caller's mask is passed on unless it is all ones
            return inputs_tensor.new_ones(inputs_tensor.shape[:2], dtype=torch.int64)
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, *args)
        row = _padded_behind(mask)
        if row is not None:
            raise ValueError(
                f"row {row} of the prompts holds the pad token after other tokens, and without an attention_mask "
                'generate() takes it for padding. Pad on the left (tokenizer.padding_side = "left"), or pass '
                "attention_mask=torch.ones_like(input_ids) if the token belongs to the prompt."
            )
        return mask

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        """Give `generate` a bounded cache; refuse other kinds."""
        mask = model_kwargs.get("attention_mask")
        if mask is not None:
            row = _padded_behind(mask)
            if row is not None:
                raise ValueError(
                    f"attention_mask row {row} has padding after real tokens, where generate() would continue: pad "
                    'prompts on the left (tokenizer.padding_side = "left").'
                )
        name, given = generation_config.cache_implementation, model_kwargs.get(CACHE)
        if name not in (None, "offloaded") or (name and given is not None):
            raise ValueError(
                f"cache_implementation={name!r}: generate() creates LongNet's own bounded cache; leave it out, or set "
                "'offloaded' and pass no cache."
            )
        if isinstance(given, Cache):
            given._is_user_defined = True  # it outlives `generate`, which must leave no extra step in it
            return
        if generation_config.use_cache is False:
            if self.sequence_group() is not None:
                raise ValueError("generate() needs a cache under sequence sharding; leave use_cache=False out.")
            return
        if given is None:
            model_kwargs[CACHE] = LongNetCache(self.config, offloading=name == "offloaded")
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()


class LongNetForMaskedLM(LongNetLanguageModel):
    """An encoder that predicts masked tokens: `labels` are the tokens' own ids, not shifted."""

    def __init__(self, config: LongNetConfig):
        if config.is_causal:
            raise ValueError("LongNetForMaskedLM needs is_causal=False: a masked token must see what follows it.")
        super().__init__(config)

    def _targets(self, labels: Tensor | None, shift_labels: Tensor | None, inputs: Tensor | None) -> Tensor | None:
        return super()._targets(None, labels if shift_labels is None else shift_labels, inputs)


class LongNetClassifier(LongNetPreTrainedModel):
    """A LongNet with a linear head on its final hidden states, and the loss of Transformers' heads of that name."""

    accepts_loss_kwargs = False  # a mean over the batch: Trainer divides it by the accumulation steps

    def __init__(self, config: LongNetConfig, head: str = "score", outputs: int | None = None):
        super().__init__(config)
        self.model = LongNetModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.add_module(head, nn.Linear(config.hidden_size, outputs or config.num_labels))
        self.post_init()

    def _encode(self, input_ids: Tensor | None, **inputs) -> BaseModelOutputWithPast:
        if self.sequence_group() is not None:
            raise ValueError("this head needs whole sequences; turn sequence sharding off, give each process its own.")
        return self.model(input_ids, **{"use_cache": False} | inputs | {"return_dict": True})


class LongNetForSequenceClassification(LongNetClassifier):
    """Classify sequences, or score them with `num_labels=1` (reward models).

    The head reads the last real token of a decoder, and the mean over the real tokens of an encoder.
    `config.problem_type` selects the loss, as in Transformers.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Return the loss, if there are labels, and the logits (B, num_labels).

        Args:
            labels: (B,) classes or values, or (B, num_labels). Others: as in `LongNetModel.forward`. Without a mask,
                the last token of a decoder is the last one that is not `pad_token_id`.
        """
        outputs = self._encode(input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.score(self.dropout(self._pool(outputs.last_hidden_state, attention_mask, input_ids)))
        loss = labels if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)

    def _pool(self, hidden_states: Tensor, attention_mask: Tensor | None, input_ids: Tensor | None) -> Tensor:
        """(B, L, E) -> (B, E)."""
        batch, length, _ = hidden_states.shape
        columns = torch.arange(length, device=hidden_states.device)
        real = torch.ones_like(columns, dtype=torch.bool).expand(batch, -1)
        if attention_mask is not None:
            real = attention_mask[:, -length:].to(real.device) != 0
        elif self.config.is_causal and self.config.pad_token_id is not None and input_ids is not None:
            real = input_ids.to(real.device) != self.config.pad_token_id
        if self.config.is_causal:
            return hidden_states[torch.arange(batch, device=real.device), (real * columns).argmax(1)]
        hidden_states = hidden_states.masked_fill(~real[..., None], 0)  # padding may hold anything
        total = hidden_states.sum(1, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        return (total / real.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)


class LongNetForTokenClassification(LongNetClassifier):
    """Classify every token."""

    @can_return_tuple
    def forward(self, input_ids: Tensor | None = None, labels: Tensor | None = None, **kwargs) -> TokenClassifierOutput:
        """Return the loss, if there are labels (B, L; -100 is ignored), and the logits (B, L, num_labels).

        Others: as in `LongNetModel.forward`. With a decoder a token's logits see no later token.
        """
        outputs = self._encode(input_ids, **kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class LongNetForQuestionAnswering(LongNetClassifier):
    """Find the answer to a question in a text: logits of its first and last token."""

    def __init__(self, config: LongNetConfig):
        super().__init__(config, "qa_outputs", 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Return the loss, if there are positions (B,), and start_logits and end_logits (B, L).

        Others: as in `LongNetModel.forward`.
        """
        outputs = self._encode(input_ids, **kwargs)
        start, end = self.qa_outputs(self.dropout(outputs.last_hidden_state)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss, start, end, outputs.hidden_states, outputs.attentions)


LongNetConfig.register_for_auto_class()
LongNetModel.register_for_auto_class("AutoModel")
LongNetForCausalLM.register_for_auto_class("AutoModelForCausalLM")
LongNetForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
LongNetForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
LongNetForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
LongNetForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")

__all__ = [
    "LongNetForCausalLM",
    "LongNetForMaskedLM",
    "LongNetForQuestionAnswering",
    "LongNetForSequenceClassification",
    "LongNetForTokenClassification",
    "LongNetModel",
    "LongNetPreTrainedModel",
]
