"""Foreign checkpoint formats: one class per format, with one map of names for both directions.

To add a format, subclass `CheckpointFormat` and put an instance into `FORMATS`.
"""

import math
import re

import torch
from torch import Tensor

from .configuration_longnet import LongNetConfig
from .image_encoder import LongNetImageConfig, LongNetImageEncoder
from .modeling_longnet import LongNetModel, LongNetPreTrainedModel
from .pattern import Pattern, make_branches
from .slide_encoder import LongNetSlideConfig, LongNetSlideEncoder


def _size(state: dict[str, Tensor], name: str, dim: int, default: int | None = 1) -> int | None:
    """Return a tensor's size along `dim`, or the default if it has none; shapes are checked later."""
    shape = state[name].shape if name in state else ()
    return shape[dim] if -len(shape) <= dim < len(shape) else default


class CheckpointFormat:
    """A foreign checkpoint format: how it is recognised, its names and tensors, and what it cannot express.

    Attributes:
        key, title: the format's name in `export_checkpoint` and in messages.
        model_class: the class of its models. LongNetModel includes LongNetForCausalLM.
        defaults: fields of the config that overrides may replace.
        hints: fields that the weights do not determine -> where to find the value.
        modules: our modules and parameters -> theirs, where names differ. Several that map to one name are fused there.
        encoder: prefix of the blocks, and of the norm after them, in their names.
        marker: a name beside the encoder by which files are recognised.
        reasons: patterns of "missing NAME" or "unknown NAME" -> what a model with such names has.
    """

    model_class: type[LongNetPreTrainedModel] = LongNetModel
    defaults: dict[str, object] = {}
    encoder, marker = "", ""

    def theirs(self, ours: str) -> str:
        """Return their name of one of our parameters."""
        block, module, end = re.fullmatch(r"(?:model\.)?(layers\.\d+\.)?(.+?)(\.weight|\.bias)?", ours).groups("")
        before = self.encoder if block or module == "layer_norm" else ""
        return f"{before}{block}{self.modules.get(module, module)}{end}"

    def names(self, model: LongNetPreTrainedModel) -> dict[str, list[str]]:
        """Return the map of their names to ours, for all parameters of a model."""
        names = {}
        for ours in model.state_dict():
            names.setdefault(self.theirs(ours), []).append(ours)
        return names

    def prefix(self, state: dict[str, Tensor]) -> str | None:
        """Return the prefix of all names in a file of this format, or None if the file has another format."""
        first = self.theirs("layers.0.self_attn.q_proj.weight")
        found = [name.removesuffix(first) for name in state if name.endswith(first)]
        return found[0] if len(found) == 1 and (not self.marker or found[0] + self.marker in state) else None

    def facts(self, state: dict[str, Tensor], prefix: str) -> dict:
        """Return the config's fields that follow from shapes, names and the removed prefix."""
        inside = CheckpointFormat.prefix(self, state)
        modules = ("layers.0.self_attn.q_proj", "layers.0.ffn.fc1", "layer_norm", "embed_tokens", "lm_head")
        query, fc1, norm, table, output = (f"{inside}{self.theirs(name)}.weight" for name in modules)
        numbers = re.findall(rf"(?m)^{re.escape(inside + self.encoder)}layers\.(\d+)\.", "\n".join(state))
        layers = 1 + max(map(int, numbers))
        if layers > len(state):
            raise ValueError(f"the file names layer {layers - 1} but holds {len(state)} tensors; it may be damaged.")
        return {
            "num_hidden_layers": layers,
            "hidden_size": _size(state, query, -1),
            "intermediate_size": _size(state, fc1, 0),
            "final_layer_norm": norm in state,
            "vocab_size": _size(state, table, 0, default=None),
            "tie_word_embeddings": table in state and output in state and torch.equal(state[table], state[output]),
        }

    def missing(self, given: dict) -> dict[str, str]:
        """Return the hints of the fields that the user must still give."""
        scaled, positions = given.get("vocab_size"), given.get("position_embedding")
        used = {"embedding_scale": scaled, "xpos_scale_base": positions == "xpos", "rope_theta": positions == "rope"}
        return {name: hint for name, hint in self.hints.items() if name not in given and used.get(name, True)}

    def from_foreign(self, state: dict[str, Tensor], model: LongNetPreTrainedModel) -> dict[str, Tensor]:
        """Return the tensors under the names of `model`, copied where theirs are fused."""
        shapes, result = model.state_dict(), {}
        for theirs, ours in self.names(model).items():
            parts = state[theirs].split([len(shapes[name]) for name in ours])
            for name, part in zip(ours, parts, strict=True):
                part = part.clone() if len(parts) > 1 else part  # a view would keep the fused tensor in memory
                result[name] = self.transform(name, part, model.config, to_foreign=False)
        return result

    def to_foreign(self, model: LongNetPreTrainedModel) -> dict[str, Tensor]:
        """Return the model's parameters under their names."""
        state, result = model.state_dict(), {}
        for theirs, ours in self.names(model).items():
            parts = [self.transform(name, state[name], model.config, to_foreign=True) for name in ours]
            result[theirs] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return result

    def transform(self, ours: str, tensor: Tensor, config: LongNetConfig, to_foreign: bool) -> Tensor:
        """Return the parameter that we name `ours` in their layout (`to_foreign`) or back in ours."""
        return tensor

    def buffers(self, model: LongNetPreTrainedModel) -> dict[str, Tensor]:
        """Return tensors that follow from the config: exported, and compared by conversion."""
        return {}

    def check(self, config: LongNetConfig) -> None:
        """Raise ValueError for a config that the original code cannot have."""


class TorchScaleFormat(CheckpointFormat):
    """LongNetDecoder and LongNetEncoder of TorchScale, with sub-LN. Our names follow them."""

    key, title = "torchscale", "TorchScale's LongNet"
    defaults = {"head_offsets": "blocked"}
    hints = {
        "segment_lengths": "segment_length in TorchScale's config",
        "dilation_rates": "dilated_ratio in TorchScale's config",
        "num_attention_heads": "encoder_attention_heads or decoder_attention_heads there",
        "hidden_act": 'activation_fn there: "gelu", "relu", or "silu" for "swish"',
        "is_causal": "True for a LongNetDecoder, False for a LongNetEncoder",
        "position_embedding": '"none", or "xpos" for xpos_rel_pos=True there',
        "embedding_scale": "1.0, or sqrt(E) if no_scale_embedding=False there",
        "xpos_scale_base": "xpos_scale_base there, 512 unless it was set",
    }
    # TorchScale's "final" norm is the one before the feed-forward block.
    modules = {"ffn_layer_norm": "final_layer_norm", "lm_head": "output_projection"}
    reasons = {
        r"moe_layer|experts": "mixture of experts",
        r"encoder_attn": "cross-attention of an encoder-decoder",
        r"embed_positions": "learned position embeddings",
        r"relative_position": "a relative position bias",
        r"layernorm_embedding": "a LayerNorm of the embeddings",
        r"\.[AB]\.": "Multiway modules",
        r"missing .*(inner_attn_ln|ffn_layernorm)\.weight": "blocks without sub-LN (DeepNorm, or subln=False)",
    }

    def facts(self, state: dict[str, Tensor], prefix: str) -> dict:
        facts = super().facts(state, prefix)
        if not self.encoder and prefix.endswith(("decoder.", "encoder.")):
            facts["is_causal"] = prefix.endswith("decoder.")
        if zeta := [x.numel() for name, x in state.items() if name.endswith("layers.0.self_attn.xpos.scale")]:
            facts |= {"position_embedding": "xpos", "num_attention_heads": facts["hidden_size"] // (2 * zeta[0])}
        return facts

    def buffers(self, model: LongNetPreTrainedModel) -> dict[str, Tensor]:
        """Return zeta of xPos, once per layer."""
        dim, names = model.config.head_dim, self.names(model)
        if model.config.position_embedding != "xpos":
            return {}
        zeta = (torch.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)
        return {x.replace("q_proj.weight", "xpos.scale"): zeta.clone() for x in names if x.endswith("q_proj.weight")}

    def check(self, config: LongNetConfig) -> None:
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        lists = config.segment_lengths, config.dilation_rates, heads
        if groups != heads:
            raise ValueError(f"num_key_value_heads={groups}: {self.title} has as many as num_attention_heads={heads}.")
        if beyond := Pattern.of(config).beyond:
            given = ", ".join(f"{name}={x!r}" for name, x in beyond.items())
            raise ValueError(f"{given}: {self.title} has only the paper's pattern.")
        if make_branches(*lists, config.head_offsets) != make_branches(*lists, "blocked"):
            raise ValueError(f"head_offsets={config.head_offsets!r} keeps other tokens than TorchScale's 'blocked'.")
        if config.position_embedding == "rope":
            raise ValueError("position_embedding='rope': TorchScale has xPos or none.")
        if config.position_embedding == "xpos" and config.rope_theta != 10000:
            raise ValueError(f"rope_theta={config.rope_theta}: TorchScale's xPos has 10000.")
        if config.hidden_act not in ("gelu", "relu", "silu", "swish"):
            raise ValueError(f"hidden_act={config.hidden_act!r}: TorchScale has gelu, relu and swish (silu).")
        if (eps := (config.layer_norm_eps, getattr(config, "pooling_norm_eps", 1e-6))) != (1e-5, 1e-6):
            raise ValueError(f"(layer_norm_eps, pooling_norm_eps)={eps}: the original code has (1e-5, 1e-6).")
        if config.vocab_size and not any(math.isclose(config.embedding_scale, x) for x in (1, config.hidden_size**0.5)):
            raise ValueError(f"embedding_scale={config.embedding_scale}: TorchScale has 1 or sqrt(hidden_size).")


class ProvGigaPathFormat(TorchScaleFormat):
    """Prov-GigaPath's slide encoder, which holds a TorchScale encoder."""

    key, title = "prov_gigapath", "Prov-GigaPath's slide encoder"
    model_class = LongNetSlideEncoder
    defaults = {"head_offsets": "blocked", "is_causal": False, "position_embedding": "none"}
    modules = TorchScaleFormat.modules | {"tile_embed": "patch_embed.proj"}
    encoder, marker = "encoder.", "cls_token"

    def facts(self, state: dict[str, Tensor], prefix: str) -> dict:
        facts = super().facts(state, prefix) | {"tile_features": _size(state, "patch_embed.proj.weight", 1)}
        published = LongNetSlideConfig()
        if all(getattr(published, name) == value for name, value in facts.items()):
            facts |= {name: getattr(published, name) for name in self.hints}
        return facts


class LongViTFormat(TorchScaleFormat):
    """LongViT, which holds a TorchScale encoder. A fine-tuned file puts all but `fc_norm` and `head` under "model."."""

    key, title = "longvit", "LongViT"
    model_class = LongNetImageEncoder
    defaults = ProvGigaPathFormat.defaults
    modules = {"patch_embed": "patch_embed.proj", "position_embed": "pos_embed", "norm": "fc_norm"}
    modules |= TorchScaleFormat.modules
    encoder, marker = "encoder.", "pos_embed"
    # Segment lengths of the published models by the image's side (longvit.py in TorchScale's examples).
    segments = {
        1024: [64, 128, 256, 512, 1024],
        4096: [1024, 2048, 4096, 8192, 16384],
        8192: [1024, 4096, 8192, 16384, 65536],
        16384: [1024, 4096, 16384, 65536, 262144],
        32768: [1024, 4096, 32768, 262144, 1048576],
    }

    def names(self, model: LongNetPreTrainedModel) -> dict[str, list[str]]:
        inside, head = "model." if model.config.num_classes else "", ("fc_norm.", "head.")
        return {x if x.startswith(head) else inside + x: ours for x, ours in super().names(model).items()}

    def prefix(self, state: dict[str, Tensor]) -> str | None:
        prefix = super().prefix(state)
        outside = (prefix or "").removesuffix("model.")
        return outside if prefix and outside + "fc_norm.weight" in state else prefix

    def facts(self, state: dict[str, Tensor], prefix: str) -> dict:
        facts, inside = super().facts(state, prefix), "model." if "fc_norm.weight" in state else ""
        patches = inside + "patch_embed.proj.weight"
        patch = _size(state, patches, 3)
        side = patch * round(_size(state, inside + "pos_embed", 1) ** 0.5)
        facts |= {"image_size": side, "patch_size": patch, "num_channels": _size(state, patches, 1)}
        facts["num_classes"] = _size(state, "head.weight", 0, default=0)
        if (facts["num_hidden_layers"], facts["hidden_size"], patch) == (12, 384, 32) and side in self.segments:
            published = LongNetImageConfig(segment_lengths=self.segments[side])
            facts |= {name: getattr(published, name) for name in self.hints}
        return facts


class FusedLlamaFormat(CheckpointFormat):
    """A causal LongNet under the names of Meta's Llama, with gpt-fast's fused `attention.wqkv`.

    No LongNet has been released in this format. Each layer holds `attention_norm`, `attention.wqkv`,
    `attention.inner_norm` (sub-LN, before wo), `attention.wo`, `ffn_norm`, `feed_forward.w1`,
    `feed_forward.inner_norm` (sub-LN, before w2) and `feed_forward.w2`, all with weight and bias; there is no w3.
    Beside the layers are `tok_embeddings.weight`, `norm.weight`, `norm.bias` and `output.weight`. Norms are LayerNorms.

    The rows of wqkv are H heads of queries, G of keys, G of values, with D rows per head. With rope, the rotary pairs
    in a head of q or k are rows (i, i + D/2), as in Hugging Face's Llama (`rotate_half`); in our models, Meta's and
    gpt-fast's they are rows (2i, 2i + 1). Without position embedding the rows are in our order.
    """

    key, title = "llama_fused", "LongNet under Llama's names (fused wqkv)"
    hints = {
        "segment_lengths": "w of each branch",
        "dilation_rates": "r of each branch",
        "num_attention_heads": "n_heads in Llama's params.json",
        "num_key_value_heads": "n_kv_heads in Llama's params.json, n_heads unless it was set",
        "hidden_act": "activation between w1 and w2",
        "head_offsets": '"interleaved" (the paper) or "blocked" (TorchScale)',
        "position_embedding": '"rope" or "none"',
        "rope_theta": "rope_theta in Llama's params.json, 10000 unless it was set",
    }
    modules = {
        "self_attn_layer_norm": "attention_norm",
        **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention.wqkv"),
        "self_attn.inner_attn_ln": "attention.inner_norm",
        "self_attn.out_proj": "attention.wo",
        "ffn_layer_norm": "ffn_norm",
        "ffn.fc1": "feed_forward.w1",
        "ffn.ffn_layernorm": "feed_forward.inner_norm",
        "ffn.fc2": "feed_forward.w2",
        "layer_norm": "norm",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    reasons = {r"missing .*(inner_norm|\.bias)": "a plain Llama's blocks (RMSNorm, no biases, no sub-LN)"}

    def transform(self, ours: str, tensor: Tensor, config: LongNetConfig, to_foreign: bool) -> Tensor:
        """Reorder the rows of each head of q and k, between pairs (2i, 2i + 1) and (i, i + D/2)."""
        if config.position_embedding == "xpos":
            raise ValueError(f"position_embedding='xpos': {self.title} has rope or none.")
        if config.position_embedding == "none" or not re.search(r"\.[qk]_proj\.", ours):
            return tensor
        grid = (-1, config.head_dim // 2, 2) if to_foreign else (-1, 2, config.head_dim // 2)
        return tensor.unflatten(0, grid).transpose(1, 2).flatten(0, 2)

    def check(self, config: LongNetConfig) -> None:
        if not config.is_causal or config.embedding_scale != 1:
            given = f"is_causal={config.is_causal}, embedding_scale={config.embedding_scale}"
            raise ValueError(f"{given}: {self.title} is causal and does not scale embeddings.")


# The first to recognise a file reads it. TorchScale comes after the two formats that include its names.
FORMATS = [ProvGigaPathFormat(), LongViTFormat(), TorchScaleFormat(), FusedLlamaFormat()]
