"""Convert checkpoints of TorchScale's LongNet, Prov-GigaPath, LongViT or with Llama's names to a folder, and back.

`python -m modeling_longnet.conversion SOURCE OUTPUT_DIR [options]`.
"""

import argparse
import json
import pickle
import re
import struct
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
from tqdm.auto import tqdm

from .checkpoint_formats import FORMATS, CheckpointFormat
from .configuration_longnet import LongNetConfig
from .modeling_longnet import LongNetForCausalLM, LongNetModel, LongNetPreTrainedModel
from .saving import replacing

# Raised for a damaged file by PyTorch, its unpickler and safetensors.
DAMAGED = (RuntimeError, EOFError, OSError, LookupError, AttributeError, AssertionError, TypeError, ValueError)
DAMAGED += (pickle.UnpicklingError, struct.error, SafetensorError)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FIELDS = sorted({name for x in FORMATS for name in x.hints})  # options of the command line


def read_state(source: Path) -> dict[str, Tensor]:
    """Return the named tensors of a safetensors file, or of a file that torch.load reads with weights_only.

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
    except MemoryError as error:
        raise ValueError(f"{source} asks for more memory than is free: it is damaged, or too large.") from error
    except DAMAGED as error:
        # PyTorch's text begins and ends with advice to load the file without the check. Keep only its reason.
        text = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
        found = re.findall(r"(?i)unsupported .*?(?=\. Please|$)", text, re.MULTILINE) or text.splitlines()
        reason = found[0] if found else type(error).__name__
        if re.match("(?i)unsupported (global|class)", reason):
            raise ValueError(
                f"{source} is not a file of plain tensors, and reading it as a pickle could run code, so it is refused "
                f"({reason}). Save only the state dict: torch.save(model.state_dict(), path)."
            ) from error
        raise ValueError(f"{source} is damaged, cut short, or not a file of plain tensors ({reason}).") from error
    for _ in range(4):  # not for ever: a dict may contain itself
        found = [k for k in ("model", "state_dict", "module") if isinstance(state, dict) and k in state]
        state = state[found[0]] if len(found) == 1 else state
    items = state.items() if isinstance(state, dict) else ()
    if not items or not all(isinstance(name, str) and isinstance(x, Tensor) for name, x in items):
        raise ValueError(f"{source} holds no state dict: expected tensors by name, alone or under 'model'.")
    if absent := [name for name, x in items if x.is_meta]:
        raise ValueError(f"{source} holds no values of {', '.join(absent)}: they were on device meta when saved.")
    return state


def recognise(state: dict[str, Tensor]) -> tuple[CheckpointFormat, dict[str, Tensor], str]:
    """Return the format of a state dict, the tensors without the prefix of all names, and that prefix."""
    found = ((x, prefix) for x in FORMATS if (prefix := x.prefix(state)) is not None)
    format, prefix = next(found, (None, ""))
    if format is None:
        first = tuple({x.theirs("layers.0.self_attn.q_proj.weight").removeprefix(x.encoder): x for x in FORMATS})
        raise ValueError(
            f"format not recognised: {sum(name.endswith(first) for name in state)} parameters end in "
            f"{' or '.join(map(repr, first))} instead of one. Known formats are {', '.join(x.title for x in FORMATS)}. "
            f"The file begins with {', '.join(sorted(state)[:5])}."
        )
    if twice := [name for name in state if prefix and prefix + name in state]:
        raise ValueError(f"the file holds tensors both with and without the prefix {prefix!r}: {', '.join(twice)}.")
    return format, {name.removeprefix(prefix): x for name, x in state.items()}, prefix


def _is_plain(x: Tensor) -> bool:
    """Return False for other layouts and dtypes, and for strides of 0, by which a small file claims any size."""
    is_dense = x.layout == torch.strided and x.dtype in DTYPES
    return is_dense and (x.is_meta or x.nbytes <= x.untyped_storage().nbytes())


def _check_weights(state: dict[str, Tensor], progress: bool) -> None:
    """Raise ValueError for weights that are not plain dense numbers. Reads all values of the files."""
    if wrong := {name: x for name, x in state.items() if not _is_plain(x)}:
        found = "; ".join(f"{name} ({tuple(x.shape)}, {x.layout}, {x.dtype})" for name, x in wrong.items())
        allowed = ", ".join(map(str, DTYPES))
        raise ValueError(
            f"weights must be dense, stored in full, and of {allowed}; found {found}. Convert them, or list them in "
            "`ignore`."
        )
    if empty := [name for name, x in state.items() if not x.numel()]:
        raise ValueError(f"no values at all in {', '.join(empty)}: the file is damaged, or its training was sharded.")
    wrong, size = [], sum(x.nbytes for x in state.values())
    with tqdm(desc="Reading weights", total=size, unit="B", unit_scale=True, disable=not progress) as bar:
        for name, x in state.items():
            if not x.is_meta and not x.isfinite().all():
                wrong.append(name)
            bar.update(x.nbytes)
    if wrong:
        raise ValueError(f"NaN or infinite values in {', '.join(wrong)}: the training failed, or the file is damaged.")


def _make_config(format: CheckpointFormat, facts: dict, overrides: dict) -> LongNetConfig:
    config_class = format.model_class.config_class
    if unknown := sorted(set(overrides) - {field.name for field in fields(config_class)}):
        raise ValueError(f"{config_class.__name__} has no field {', '.join(unknown)}.")
    # Published branches may be replaced on purpose.
    for name in sorted(set(overrides) & set(facts) - {"segment_lengths", "dilation_rates"}):
        if overrides[name] != facts[name]:
            raise ValueError(f"{name}={overrides[name]!r} contradicts the weights, which have {facts[name]!r}.")
    given = format.defaults | facts | overrides
    if missing := [f"{name} ({hint})" for name, hint in format.missing(given).items()]:
        raise ValueError(f"{format.title}: the weights do not determine all fields; give {'; '.join(missing)}.")
    try:
        return config_class(**given)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def _check_fit(format: CheckpointFormat, state: dict, model: LongNetPreTrainedModel, ignored: set) -> None:
    """Raise if tensors are missing, unknown or of another shape; list them, with the likely reason."""
    expected = format.to_foreign(model)
    unknown = set(state) - set(expected) - set(format.buffers(model)) - ignored
    found = {"missing": sorted(set(expected) - set(state)), "unknown": sorted(unknown)}
    if any(found.values()):
        parts = [f"{kind} tensors: {', '.join(names)}" for kind, names in found.items() if names]
        lines = "\n".join(f"{kind} {name}" for kind, names in found.items() for name in names)
        reasons = sorted(reason for pattern, reason in format.reasons.items() if re.search(pattern, lines))
        because = f" This looks like {' and '.join(reasons)}, which this model does not have." if reasons else ""
        raise ValueError(f"the weights do not fit: {'; '.join(parts)}.{because}")
    shapes = {name: (tuple(state[name].shape), tuple(x.shape)) for name, x in expected.items()}
    if wrong := [f"{name} {found}, expected {shape}" for name, (found, shape) in shapes.items() if found != shape]:
        raise ValueError(f"tensors of the wrong shape: {'; '.join(wrong)}.")
    for name, x in format.buffers(model).items():
        given = x if name in ignored else state.get(name, x)
        step = 2 * max(torch.finfo(x.dtype).eps, torch.finfo(given.dtype).eps)
        if not given.is_meta and (given.shape != x.shape or (given.double() - x).abs().max() > step):
            found, wanted = (y.double().round(decimals=4).tolist() for y in (given, x))
            raise ValueError(f"{name} holds {found}, the config implies {wanted}; `ignore` it to use the latter.")


def convert(
    state: dict[str, Tensor], ignore: Iterable[str] = (), progress: bool = False, **overrides
) -> LongNetPreTrainedModel:
    """Return the model of a foreign state dict; see `convert_checkpoint`."""
    format, state, prefix = recognise(state)
    ignored = {name for name in state if any(fnmatchcase(name, pattern) for pattern in ignore)}
    _check_weights({name: x for name, x in state.items() if name not in ignored}, progress)
    config = _make_config(format, format.facts(state, prefix), overrides)
    has_head = format.model_class is LongNetModel and format.theirs("lm_head.weight") in state
    with torch.device("meta"):
        model = (LongNetForCausalLM if has_head else format.model_class)(config)
    _check_fit(format, state, model, ignored)
    ours = format.from_foreign(state, model)
    config.dtype = reduce(torch.promote_types, (x.dtype for x in ours.values()))
    model.load_state_dict({name: x.to(config.dtype) for name, x in ours.items()}, assign=True)
    model.tie_weights()
    return model.eval()


def convert_checkpoint(
    source: str | Path, output_dir: str | Path, *, ignore: Iterable[str] = (), progress: bool = True, **overrides
) -> LongNetPreTrainedModel:
    """Write a foreign checkpoint as a folder that `from_pretrained` reads, and return the model in eval mode.

    The formats are TorchScale's LongNetDecoder and LongNetEncoder (with sub-LN), Prov-GigaPath's slide encoder, LongViT
    with or without its classification head, and `FusedLlamaFormat` (see `checkpoint_formats.py`). The first three get
    TorchScale's `head_offsets="blocked"`. The config's `converted_from` names the format and the file.

    Args:
        source: a safetensors file, or one that `torch.load(weights_only=True)` reads.
        output_dir: the folder to make, not the current one. It must be new or empty, and stays so on any error.
        ignore: patterns ("decoder*") of foreign tensors to leave out.
        progress: show the bytes of weights read. Transformers shows the files written.
        overrides: fields of the config. Those that the weights do not determine are required; an error lists them.
            Published models need none. `attend_zero_padding=True` follows the released kernels' padding.

    Raises:
        FileNotFoundError, ValueError: names what is wrong with the file, the overrides or the folder.
    """
    source, output_dir = Path(source), Path(output_dir).resolve()
    _check_output(output_dir)
    state = read_state(source)
    model = convert(state, ignore, progress, **overrides)
    model.config.converted_from = f"{recognise(state)[0].title}, {source.name}"
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output_dir) as whole:
        model.save_pretrained(whole)
        _check_output(output_dir)  # another process may have been faster
    return model


def _check_output(output_dir: Path) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is not an empty folder; name another one, or remove it first.")
    if output_dir == Path.cwd():
        raise ValueError(f"{output_dir} is the current folder, which cannot be replaced by another; name a new one.")
    if files := [str(parent) for parent in output_dir.parents if parent.exists() and not parent.is_dir()]:
        raise ValueError(f"{output_dir} cannot be made: {files[0]} is not a folder.")


def export_checkpoint(model: LongNetPreTrainedModel, format_name: str, file: str | Path | None = None):
    """Return the model's state dict in a foreign format. It holds no settings; those are in `model.config`.

    Args:
        model: LongNetForCausalLM, LongNetModel, LongNetSlideEncoder or LongNetImageEncoder.
        format_name: "torchscale", "prov_gigapath", "longvit" or "llama_fused".
        file: where to write it too: safetensors by that suffix, else `torch.save` of {"model": state dict}.

    Raises:
        ValueError: the format is unknown or cannot express the model.
    """
    formats = {x.key: x for x in FORMATS if x.model_class.config_class.model_type == model.config.model_type}
    if (format := formats.get(format_name)) is None:
        raise ValueError(f"format_name={format_name!r}: for a {type(model).__name__} give {' or '.join(formats)}.")
    format.check(model.config)
    state = format.to_foreign(model) | format.buffers(model)
    if file is None:
        return state
    with replacing(file) as part:
        if part.suffix == ".safetensors":  # which cannot hold tied tensors that share memory
            save_file({name: x.clone().contiguous() for name, x in state.items()}, part)
            return state
        try:
            torch.save({"model": state}, part)
        except RuntimeError as error:
            raise OSError(f"{error}; is the disk full?") from error
    return state


def to_torchscale(model: LongNetPreTrainedModel, file: str | Path | None = None) -> dict[str, Tensor]:
    """Return the state dict that the original code loads: `export_checkpoint` in the format of the model's class.

    Give the original code the settings of `model.config`: segment_length and dilated_ratio, heads, activation_fn,
    subln=True; for TorchScale also no_scale_embedding (False for an embedding_scale of sqrt(E)), xpos_rel_pos with
    xpos_scale_base, and normalize_output for final_layer_norm.
    """
    names = {"longnet_slide": "prov_gigapath", "longnet_image": "longvit"}
    return export_checkpoint(model, names.get(model.config.model_type, "torchscale"), file)


def _value(text: str) -> object:
    """Parse JSON; other text is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _field(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, not {text!r}")
    return name, _value(value)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; print errors without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m modeling_longnet.conversion", description=__doc__)
    parser.add_argument("source", type=Path, help="safetensors file, or one of torch.save with tensors only")
    parser.add_argument("output_dir", type=Path, help="folder to make")
    kinds = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"type": _value, "nargs": "+"}}
    for name in FIELDS:
        hint = "; ".join(dict.fromkeys(x.hints[name] for x in FORMATS if name in x.hints))
        kind = kinds.get(type(getattr(LongNetConfig, name)), {"type": _value})
        parser.add_argument(f"--{name.replace('_', '-')}", help=hint, **kind)
    parser.add_argument("--attend-zero-padding", action="store_true", default=None, help="as in the released kernels")
    parser.add_argument("--set", type=_field, action="append", default=[], metavar="FIELD=VALUE", help="JSON or text")
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="tensors to leave out")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    source, output_dir, ignore = given.pop("source"), given.pop("output_dir"), given.pop("ignore")
    given |= dict(given.pop("set"))
    try:
        model = convert_checkpoint(source, output_dir, ignore=ignore, **given)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    config = model.config
    print(f"{config.converted_from} -> {output_dir}: {type(model).__name__}, {model.num_parameters():,} parameters")
    for name in [*FIELDS, "attend_zero_padding"]:
        print(f"  {name}: {getattr(config, name)}")


if __name__ == "__main__":
    main()
