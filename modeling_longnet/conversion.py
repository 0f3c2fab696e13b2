"""Foreign weights become a Transformers folder, and back: TorchScale's LongNet, Prov-GigaPath, LongViT.

`python -m modeling_longnet.conversion SOURCE OUTPUT_DIR [options]`. Each source has one map of names, read both ways.
"""

import argparse
import json
import math
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .branches import make_branches
from .configuration_longnet import LongNetConfig
from .image_encoder import LongNetImageConfig, LongNetImageEncoder
from .modeling_longnet import LongNetForCausalLM, LongNetModel, LongNetPreTrainedModel
from .slide_encoder import LongNetSlideConfig, LongNetSlideEncoder

# Modules of a block, there and here, each with weight and bias.
BLOCK = {
    **{name: name for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "self_attn.inner_attn_ln",
        "self_attn_layer_norm", "ffn.fc1", "ffn.ffn_layernorm", "ffn.fc2",
    )},
    # TorchScale's "final" norm is the one before the feed-forward.
    "final_layer_norm": "ffn_layer_norm",
}  # fmt: skip
XPOS = "self_attn.xpos.scale"

# Parameters outside the blocks, there and here.
SLIDE = {
    "cls_token": "cls_token",
    "patch_embed.proj.weight": "tile_embed.weight",
    "patch_embed.proj.bias": "tile_embed.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
IMAGE = {
    "pos_embed": "position_embed",
    "patch_embed.proj.weight": "patch_embed.weight",
    "patch_embed.proj.bias": "patch_embed.bias",
}
IMAGE_HEAD = {
    "fc_norm.weight": "norm.weight",
    "fc_norm.bias": "norm.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}

NAMES = {
    "longnet": "TorchScale's LongNet",
    "longnet_slide": "Prov-GigaPath's slide encoder",
    "longnet_image": "LongViT",
}
CONFIGS = {"longnet": LongNetConfig, "longnet_slide": LongNetSlideConfig, "longnet_image": LongNetImageConfig}

# What weights cannot tell, and what it was there.
ASKED = {
    "segment_lengths": "segment_length in TorchScale's config",
    "dilation_rates": "dilated_ratio in TorchScale's config",
    "num_attention_heads": "encoder_attention_heads or decoder_attention_heads there",
    "hidden_act": 'activation_fn there: "gelu", "relu", or "silu" for "swish"',
}
ASKED_OF_TORCHSCALE = {
    "is_causal": "True for a LongNetDecoder, False for a LongNetEncoder",
    "position_embedding": '"none", or "xpos" for xpos_rel_pos=True there',
}
ASKED_OF_EMBEDDINGS = {"embedding_scale": "1.0, or sqrt(E) if no_scale_embedding=False there"}
ASKED_OF_XPOS = {"xpos_scale_base": "xpos_scale_base there, 512 unless it was set"}

# What a damaged file makes PyTorch and safetensors raise, besides UnpicklingError.
DAMAGED = (
    SafetensorError, RuntimeError, EOFError, OSError, LookupError, AttributeError, AssertionError, TypeError,
    ValueError, struct.error,
)  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# LongViT's segments follow from the image's side (longvit.py in TorchScale's examples).
LONGVIT_SEGMENTS = {
    1024: [64, 128, 256, 512, 1024],
    4096: [1024, 2048, 4096, 8192, 16384],
    8192: [1024, 4096, 8192, 16384, 65536],
    16384: [1024, 4096, 16384, 65536, 262144],
    32768: [1024, 4096, 32768, 262144, 1048576],
}

# Why parameters of other architectures cannot be converted.
FOREIGN = {
    r"moe_layer|experts": "mixture of experts",
    r"encoder_attn": "cross-attention of an encoder-decoder",
    r"embed_positions": "learned position embeddings",
    r"relative_position": "a relative position bias",
    r"layernorm_embedding": "a LayerNorm of the embeddings",
    r"\.[AB]\.": "Multiway modules",
}


def name_map(config: LongNetConfig, has_head: bool) -> dict[str, str]:
    """Every parameter's name there -> here, for a model of this config; `has_head`: a LongNetForCausalLM."""
    kind = config.model_type
    theirs = "" if kind == "longnet" else "encoder."
    ours = "model." if has_head else ""
    result = {
        f"{theirs}layers.{n}.{there}.{end}": f"{ours}layers.{n}.{here}.{end}"
        for n in range(config.num_hidden_layers) for there, here in BLOCK.items() for end in ("weight", "bias")
    }  # fmt: skip
    if config.final_layer_norm:
        result |= {f"{theirs}layer_norm.{end}": f"{ours}layer_norm.{end}" for end in ("weight", "bias")}
    if config.vocab_size is not None:
        result["embed_tokens.weight"] = f"{ours}embed_tokens.weight"
    if has_head:
        result["output_projection.weight"] = "lm_head.weight"
    if kind == "longnet_slide":
        result |= SLIDE
    if kind == "longnet_image":
        result |= IMAGE
        if config.num_classes:
            result = {f"model.{name}": here for name, here in result.items()} | IMAGE_HEAD
    return result


def xpos_names(config: LongNetConfig) -> list[str]:
    """Names of the buffers of TorchScale's xPos, which hold zeta and are no weights."""
    return [f"layers.{n}.{XPOS}" for n in range(config.num_hidden_layers)]


def read_state(source: Path) -> dict[str, Tensor]:
    """The named tensors of a safetensors file, or of a file that torch.load reads with weights_only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything else than tensors by name, a damaged file, a pickle that would run code.
    """
    if not source.is_file():
        raise FileNotFoundError(f"{source}: there is no such file.")
    try:
        if source.suffix == ".safetensors":
            return load_file(source)
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except pickle.UnpicklingError as error:
        # PyTorch's text begins and ends with advice to load it without the check: only its reason is shown.
        text = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
        reason = (
            re.findall(r"(?i)unsupported .*?(?=\. Please|$)", text, re.MULTILINE)
            or text.splitlines()
            or [type(error).__name__]
        )[0]
        if not re.match("(?i)unsupported (global|class)", reason):
            raise ValueError(f"{source} is damaged, or not a file of plain tensors ({reason}).") from error
        raise ValueError(
            f"{source} is no file of plain tensors, and reading it as a pickle could run code, so it is refused "
            f"({reason}). Save the state dict alone: torch.save(model.state_dict(), path)."
        ) from error
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{source} cannot be read; it may be damaged or cut short ({reason}).") from error
    while isinstance(state, dict) and len(found := [k for k in ("model", "state_dict", "module") if k in state]) == 1:
        state = state[found[0]]
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{source} holds no state dict: expected tensors by name, alone or under 'model'.")
    return state


def recognise(state: dict[str, Tensor]) -> tuple[str, str]:
    """The model_type of a state dict and the prefix that all its names have and ours have not.

    Raises:
        ValueError: no source that is known here.
    """
    first = "layers.0.self_attn.q_proj.weight"
    found = [name for name in state if name.endswith(first)]
    if len(found) != 1:
        some = ", ".join(sorted(state)[:5])
        raise ValueError(
            f"not recognised: {len(found)} parameters end in {first!r} instead of one. Known are "
            f"{', '.join(NAMES.values())}. The file begins with {some}."
        )
    prefix = found[0].removesuffix(first)
    inside = prefix.removesuffix("encoder.")
    if inside + "cls_token" in state:
        return "longnet_slide", inside
    if inside + "pos_embed" in state:
        # Fine-tuned, the encoder lies under "model." beside the head, and the map knows it so.
        outside = inside.removesuffix("model.")
        return "longnet_image", outside if outside + "fc_norm.weight" in state else inside
    return "longnet", prefix


def read_facts(kind: str, prefix: str, state: dict[str, Tensor]) -> dict:
    """The config's fields that shapes and names tell, and those of published models. `state` has no prefix."""
    blocks = {"longnet": "", "longnet_slide": "encoder."}.get(kind, "encoder.")
    if kind == "longnet_image" and "fc_norm.weight" in state:
        blocks = "model.encoder."
    shapes = {name: tuple(x.shape) for name, x in state.items()}
    numbers = [int(match[1]) for name in state if (match := re.match(re.escape(blocks) + r"layers\.(\d+)\.", name))]
    facts = {
        "num_hidden_layers": 1 + max(numbers),
        "hidden_size": shapes[f"{blocks}layers.0.self_attn.q_proj.weight"][0],
        "intermediate_size": shapes.get(f"{blocks}layers.0.ffn.fc1.weight", (1,))[0],
        "final_layer_norm": f"{blocks}layer_norm.weight" in state,
    }
    read = {"longnet": _torchscale_facts, "longnet_slide": _slide_facts, "longnet_image": _image_facts}[kind]
    return facts | read(state, shapes, facts, prefix)


def _torchscale_facts(state, shapes, facts: dict, prefix: str) -> dict:
    table, head = state.get("embed_tokens.weight"), state.get("output_projection.weight")
    facts = {
        "vocab_size": None if table is None else len(table),
        "tie_word_embeddings": head is not None and table is not None and torch.equal(head, table),
    }
    if f"layers.0.{XPOS}" in state:
        heads = shapes["layers.0.self_attn.q_proj.weight"][0] // (2 * shapes[f"layers.0.{XPOS}"][0])
        facts |= {"position_embedding": "xpos", "num_attention_heads": heads}
    for name, is_causal in (("decoder.", True), ("encoder.", False)):
        if prefix.endswith(name):
            facts["is_causal"] = is_causal
    return facts


def _slide_facts(state, shapes, facts: dict, prefix: str) -> dict:
    features = shapes["patch_embed.proj.weight"][1] if "patch_embed.proj.weight" in shapes else 1
    facts = facts | {"tile_features": features}
    default = LongNetSlideConfig()
    if any(getattr(default, name) != value for name, value in facts.items()):
        return facts
    return facts | {name: getattr(default, name) for name in ASKED}


def _image_facts(state, shapes, facts: dict, prefix: str) -> dict:
    inside = "model." if "fc_norm.weight" in state else ""
    patch = shapes.get(inside + "patch_embed.proj.weight", (1, 1, 1, 1))
    side = patch[-1] * round(shapes[inside + "pos_embed"][1] ** 0.5)
    sizes = {
        "image_size": side,
        "patch_size": patch[-1],
        "num_channels": patch[1],
        "num_classes": shapes.get("head.weight", (0,))[0],
    }
    if (facts["num_hidden_layers"], facts["hidden_size"], patch[-1]) == (12, 384, 32) and side in LONGVIT_SEGMENTS:
        default = LongNetImageConfig()
        sizes |= {name: getattr(default, name) for name in ASKED} | {"segment_lengths": LONGVIT_SEGMENTS[side]}
    return sizes


def make_config(kind: str, facts: dict, overrides: dict) -> LongNetConfig:
    """The config from what was read and what was given.

    Raises:
        ValueError: something is missing, unknown, or contradicts the weights.
    """
    known = {field.name for field in fields(CONFIGS[kind])}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"{', '.join(unknown)}: no field of {CONFIGS[kind].__name__}.")
    # Published branches may be replaced on purpose.
    for name in sorted(set(overrides) & set(facts) - {"segment_lengths", "dilation_rates"}):
        if overrides[name] != facts[name]:
            raise ValueError(f"{name}={overrides[name]!r} contradicts the weights, which say {facts[name]!r}.")
    given = facts | overrides
    asked = ASKED | (ASKED_OF_TORCHSCALE if kind == "longnet" else {})
    asked |= ASKED_OF_EMBEDDINGS if given.get("vocab_size") else {}
    asked |= ASKED_OF_XPOS if given.get("position_embedding") == "xpos" else {}
    if missing := [f"{name} ({hint})" for name, hint in asked.items() if name not in given]:
        raise ValueError(f"{NAMES[kind]}: the weights do not tell, so please give {'; '.join(missing)}.")
    try:
        return CONFIGS[kind](**{"head_offsets": "blocked"} | given)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def rename(state: dict[str, Tensor], names: dict[str, str], ignored: set[str]) -> dict[str, Tensor]:
    """The tensors under our names.

    Raises:
        ValueError: lists what is missing and what is unknown, with the reason where there is one.
    """
    missing = sorted(set(names) - set(state))
    unknown = sorted(set(state) - set(names) - ignored)
    if not missing and not unknown:
        return {here: state[there] for there, here in names.items()}
    reasons = {reason for pattern, reason in FOREIGN.items() if any(re.search(pattern, name) for name in unknown)}
    if any(name.endswith(("inner_attn_ln.weight", "ffn_layernorm.weight")) for name in missing):
        reasons.add("blocks without sub-LN (DeepNorm, or subln=False)")
    parts = [f"missing tensors: {', '.join(missing)}"] if missing else []
    parts += [f"unknown tensors: {', '.join(unknown)}"] if unknown else []
    because = f" This looks like {' and '.join(sorted(reasons))}, which this model does not have." if reasons else ""
    raise ValueError(f"the weights do not fit: {'; '.join(parts)}.{because}")


def build(config: LongNetConfig, state: dict[str, Tensor], has_head: bool) -> LongNetPreTrainedModel:
    """A model that holds these tensors themselves.

    Raises:
        ValueError: lists the tensors of another shape than the config's.
    """
    classes = {"longnet_slide": LongNetSlideEncoder, "longnet_image": LongNetImageEncoder}
    model_class = classes.get(config.model_type, LongNetForCausalLM if has_head else LongNetModel)
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    wrong = [
        f"{name} {tuple(x.shape)}, expected {shapes[name]}" for name, x in state.items() if x.shape != shapes[name]
    ]
    if wrong:
        raise ValueError(f"tensors of the wrong shape: {'; '.join(wrong)}.")
    dtype = reduce(torch.promote_types, (x.dtype for x in state.values()))
    model.load_state_dict({name: x.to(dtype) for name, x in state.items()}, assign=True)
    model.tie_weights()
    config.dtype = dtype
    return model.eval()


def _check_weights(state: dict[str, Tensor]) -> None:
    wrong = [n for n, x in state.items() if x.layout != torch.strided or x.dtype not in DTYPES]
    if wrong:
        found = "; ".join(f"{name} ({state[name].layout}, {state[name].dtype})" for name in wrong)
        raise ValueError(
            f"weights must be dense, of {', '.join(map(str, DTYPES))}; found {found}. Convert them, or leave out by "
            "`ignore` what is no weight."
        )
    if empty := [name for name, x in state.items() if not x.is_meta and x.isnan().all()]:
        raise ValueError(f"nothing but NaN stands in {', '.join(empty)}: the file is of a training that failed.")


def _strip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors without the prefix that (nearly) all names have."""
    twice = [name for name in state if prefix and prefix + name in state]
    if twice:
        raise ValueError(f"the file holds tensors both with and without the prefix {prefix!r}: {', '.join(twice)}.")
    return {name.removeprefix(prefix): x for name, x in state.items()}


def convert(state: dict[str, Tensor], ignore: Iterable[str] = (), **overrides) -> LongNetPreTrainedModel:
    """The model of a foreign state dict; see `convert_checkpoint`."""
    kind, prefix = recognise(state)
    state = _strip(state, prefix)
    ignored = {name for name in state if any(fnmatchcase(name, pattern) for pattern in ignore)}
    _check_weights({name: x for name, x in state.items() if name not in ignored})
    facts = read_facts(kind, prefix, state)
    config = make_config(kind, facts, overrides)
    has_head = kind == "longnet" and "output_projection.weight" in state
    if facts.get("position_embedding") == "xpos":
        ignored |= set(xpos_names(config))
    return build(config, rename(state, name_map(config, has_head), ignored), has_head)


def convert_checkpoint(
    source: str | Path, output_dir: str | Path, *, ignore: Iterable[str] = (), **overrides
) -> LongNetPreTrainedModel:
    """Write a foreign checkpoint as a folder that `from_pretrained` reads.

    Known are TorchScale's LongNetDecoder and LongNetEncoder (with sub-LN; DeepNorm, experts and the like are
    refused), Prov-GigaPath's slide encoder, and LongViT with or without its classification head. The config says
    `head_offsets="blocked"`, as all of them keep tokens, and in `converted_from` what it was made of.

    Args:
        source: a safetensors file, or one that `torch.load(weights_only=True)` reads.
        output_dir: the folder to make, not the current one; it must not exist or be empty, and stays untouched on
            any error.
        ignore: patterns ("decoder*") of foreign tensors to leave out.
        overrides: fields of the config. What weights cannot tell must be given, unless the model is a published
            one: segment_lengths, dilation_rates, num_attention_heads, hidden_act; for TorchScale is_causal,
            position_embedding (unless the file has xPos's buffers), embedding_scale where there are token
            embeddings, and xpos_scale_base with xPos. `attend_zero_padding=True` follows the released kernels' padding.

    Returns:
        The converted model, in eval mode.

    Raises:
        FileNotFoundError, ValueError: says what is wrong with the file, the overrides or the folder.
    """
    source, output_dir = Path(source), Path(output_dir).resolve()
    _check_output(output_dir)
    model = convert(read_state(source), ignore, **overrides)
    model.config.converted_from = f"{NAMES[model.config.model_type]}, {source.name}"
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as scratch:
        whole = Path(scratch) / output_dir.name
        model.save_pretrained(whole)
        whole.replace(output_dir)
    return model


def _check_output(output_dir: Path) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is no empty folder; name another one, or remove it first.")
    if output_dir == Path.cwd():
        raise ValueError(f"{output_dir} is the current folder, which cannot be replaced by another; name a new one.")
    if files := [str(parent) for parent in output_dir.parents if parent.exists() and not parent.is_dir()]:
        raise ValueError(f"{output_dir} cannot be made: {files[0]} is no folder.")


def to_torchscale(model: LongNetPreTrainedModel, file: str | Path | None = None) -> dict[str, Tensor]:
    """The state dict that the original code loads: the same map of names, read backwards.

    Its settings are not in a state dict. Give the original code those of `model.config`: segment_length and
    dilated_ratio, heads, activation_fn, subln=True; for TorchScale also no_scale_embedding (False for an
    embedding_scale of sqrt(E)), xpos_rel_pos with xpos_scale_base, and normalize_output for final_layer_norm.

    Args:
        model: LongNetForCausalLM, LongNetModel, LongNetSlideEncoder or LongNetImageEncoder.
        file: where to write it too: safetensors by that suffix, else `torch.save` of {"model": state dict}.

    Raises:
        ValueError: the model is one that the original code cannot be.
    """
    config = model.config
    _check_expressible(config)
    names = name_map(config, hasattr(model, "lm_head"))
    own = model.state_dict()
    state = {there: own[here].detach() for there, here in names.items()}
    if config.position_embedding == "xpos":
        i = torch.arange(0, config.head_dim, 2)
        zeta = (i + 0.4 * config.head_dim) / (1.4 * config.head_dim)
        state |= {name: zeta.clone() for name in xpos_names(config)}
    if file is not None:
        _write_state(state, Path(file))
    return state


def _check_expressible(config: LongNetConfig) -> None:
    lists = tuple(config.segment_lengths), tuple(config.dilation_rates), config.num_attention_heads
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads={config.num_key_value_heads} of {config.num_attention_heads}: TorchScale's LongNet "
            "has no shared key/value heads."
        )
    if make_branches(*lists, config.head_offsets) != make_branches(*lists, "blocked"):
        raise ValueError(
            f"head_offsets={config.head_offsets!r} keeps other tokens than TorchScale with {lists[2]} heads and rates "
            f"{list(lists[1])}: only 'blocked' can be written."
        )
    if config.position_embedding == "rope":
        raise ValueError("position_embedding='rope': TorchScale has xPos or none.")
    if config.hidden_act not in ("gelu", "relu", "silu", "swish"):
        raise ValueError(f"hidden_act={config.hidden_act!r}: TorchScale has gelu, relu and swish (silu).")
    if config.layer_norm_eps != 1e-5 or getattr(config, "pooling_norm_eps", 1e-6) != 1e-6:
        raise ValueError("the original code's LayerNorms have eps 1e-5, and the pooled one of slides 1e-6.")
    scales = 1.0, config.hidden_size**0.5
    if config.vocab_size and not any(math.isclose(config.embedding_scale, scale) for scale in scales):
        raise ValueError(f"embedding_scale={config.embedding_scale}: TorchScale has 1 or sqrt(hidden_size).")


def _write_state(state: dict[str, Tensor], file: Path) -> None:
    """Write a file that is never seen half-written."""
    part = file.with_name(file.name + ".part")
    if file.suffix == ".safetensors":
        # Tied tensors share memory, which safetensors does not write.
        save_file({name: x.clone().contiguous() for name, x in state.items()}, part)
    else:
        torch.save({"model": state}, part)
    part.replace(file)


def _field(text: str) -> tuple[str, object]:
    """FIELD=VALUE; a value that is no JSON is a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_longnet.conversion",
        description="Convert weights of TorchScale's LongNet, Prov-GigaPath's slide encoder or LongViT.",
    )
    parser.add_argument("source", type=Path, help="safetensors file, or one of torch.save with tensors only")
    parser.add_argument("output_dir", type=Path, help="folder to make")
    parser.add_argument("--segment-lengths", type=int, nargs="+", help=ASKED["segment_lengths"])
    parser.add_argument("--dilation-rates", type=int, nargs="+", help=ASKED["dilation_rates"])
    parser.add_argument("--num-attention-heads", type=int, help=ASKED["num_attention_heads"])
    parser.add_argument("--hidden-act", help=ASKED["hidden_act"])
    parser.add_argument("--is-causal", action=argparse.BooleanOptionalAction, help=ASKED_OF_TORCHSCALE["is_causal"])
    parser.add_argument("--xpos-scale-base", type=float, help=ASKED_OF_XPOS["xpos_scale_base"])
    parser.add_argument("--position-embedding", help=ASKED_OF_TORCHSCALE["position_embedding"])
    parser.add_argument("--embedding-scale", type=float, help=ASKED_OF_EMBEDDINGS["embedding_scale"])
    parser.add_argument(
        "--attend-zero-padding", action="store_true", default=None, help="as the released kernels did (encoders)"
    )
    parser.add_argument(
        "--set", type=_field, action="append", default=[], metavar="FIELD=VALUE",
        help="any other field of the config; JSON, or a plain string",
    )  # fmt: skip
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="tensors to leave out")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """The command line; errors are printed without a traceback."""
    parser = _parser()
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    source, output_dir, ignore = given.pop("source"), given.pop("output_dir"), given.pop("ignore")
    given |= dict(given.pop("set"))
    try:
        model = convert_checkpoint(source, output_dir, ignore=ignore, **given)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    config = model.config
    print(f"{config.converted_from} -> {output_dir}: {type(model).__name__}, {model.num_parameters():,} parameters")
    for name in sorted({*ASKED, *ASKED_OF_TORCHSCALE, *ASKED_OF_EMBEDDINGS, "head_offsets", "attend_zero_padding"}):
        print(f"  {name}: {getattr(config, name)}")


if __name__ == "__main__":
    main()
