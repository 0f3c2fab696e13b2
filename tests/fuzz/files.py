"""Damaged files: a clear error or a right result; never a crash, a hang, a half-written file or another exception."""

import io
import json
import logging
import tempfile
import warnings
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from transformers import ByT5Tokenizer

from examples.corpus import load_tokenizer
from modeling_longnet import (
    LongNetCache,
    LongNetConfig,
    LongNetForCausalLM,
    LongNetImageConfig,
    LongNetImageEncoder,
    LongNetSlideConfig,
    LongNetSlideEncoder,
    Scored,
    cache_file,
    convert_checkpoint,
    stream,
    to_torchscale,
)
from modeling_longnet.testing import CACHE

from .damage import damage, damage_json, damage_safetensors, damage_state, odd_tensors
from .engine import Draw, Refused, may_refuse

SIZES = {
    "hidden_size": 12, "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 3,
    "segment_lengths": [4, 8], "dilation_rates": [1, 2],
}  # fmt: skip
KINDS = {
    "text": lambda: LongNetForCausalLM(LongNetConfig(vocab_size=29, **SIZES)),
    "slide": lambda: LongNetSlideEncoder(LongNetSlideConfig(tile_features=5, grid_size=9, **SIZES)),
    "image": lambda: LongNetImageEncoder(LongNetImageConfig(image_size=8, patch_size=2, num_classes=2, **SIZES)),
}
TOKENS = torch.arange(90) % 29
Files = dict[str, bytes]


@lru_cache
def small_model(kind: str):
    """A model of each kind, the same in every process."""
    torch.manual_seed(0)
    return KINDS[kind]().eval()


def read_folder(folder: str) -> Files:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors")}


@lru_cache
def saved_model(kind: str, shard: str = "5GB") -> Files:
    """The files of a saved folder, without its code."""
    with tempfile.TemporaryDirectory() as folder:
        small_model(kind).save_pretrained(folder, max_shard_size=shard)
        return read_folder(folder)


@lru_cache
def saved_state() -> tuple[bytes, float]:
    """The state file of a reading that was interrupted, and the sum over the whole text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        for _ in stream(small_model("text"), TOKENS[:50], state_file=path, progress=False):
            pass
        content = path.read_bytes()
        return content, [x.total for x in stream(small_model("text"), TOKENS, progress=False)][-1]


@lru_cache
def saved_cache() -> bytes:
    """A cache as a safetensors file."""
    cache = LongNetCache(small_model("text").config)
    with torch.no_grad():
        small_model("text")(TOKENS[:42].view(2, 21), **{CACHE: cache})
    return save(cache.to_tensors())


@lru_cache
def saved_tokenizer(kind: str) -> Files:
    """The files of a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = ByT5Tokenizer() if kind == "bytes" else _train_tokenizer()
        tokenizer.save_pretrained(folder)
        return read_folder(folder)


def _train_tokenizer():
    from datasets import Dataset

    return load_tokenizer("bpe", Dataset.from_dict({"text": ["a text of few words"] * 3}), vocab_size=300)


@contextmanager
def folder_of(files: Files):
    """A folder with these files."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        yield Path(folder)


@contextmanager
def quiet():
    """No warnings and no log: a damaged file may cause any of them."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def run_model(net) -> None:
    """A forward pass of a small input is refused, or finite unless the weights are not."""
    config = net.config
    if isinstance(net, LongNetForCausalLM):
        inputs = {"input_ids": torch.zeros(1, 5, dtype=torch.int64)}
    elif isinstance(net, LongNetSlideEncoder):
        places = torch.zeros(1, 4, 2, dtype=torch.int64)
        inputs = {"tiles": torch.ones(1, 4, config.tile_features), "coordinates": places}
    else:
        inputs = {"pixel_values": torch.ones(1, config.num_channels, config.image_size, config.image_size)}
    with may_refuse(), torch.no_grad():
        output = net.eval()(**inputs)
    sizes = [config.embedding_scale, *(x.abs().max().item() for x in net.parameters() if x.numel())]
    assert torch.isfinite(output[0]).all() or not max(sizes) < 1e6, "the output is not finite"


def is_small(config) -> bool:
    """Return whether the model can be built in a moment."""
    names = "vocab hidden intermediate image patch".split()
    names = [f"{name}_size" for name in names] + ["tile_features", "num_channels", "num_classes"]
    sizes = [getattr(config, name, None) or 0 for name in names]
    return max(sizes) <= 300 and config.num_hidden_layers <= 20


def config_file(draw: Draw) -> None:
    """config.json of each kind of model."""
    kind = draw.choice(list(KINDS))
    content = damage_json(draw, saved_model(kind)["config.json"])
    draw.note("config.json", content[:1500])
    config_class = type(small_model(kind).config)
    with folder_of({"config.json": content}) as folder, quiet():
        with may_refuse():
            config = config_class.from_pretrained(folder)
        with may_refuse():
            config.save_pretrained(folder / "again")
        again = config_class.from_pretrained(folder / "again")
        ignored = {"_name_or_path", "transformers_version"}
        before, after = ({k: repr(v) for k, v in c.to_dict().items() if k not in ignored} for c in (config, again))
        assert before == after, "another config is read than was saved"
        if is_small(config):
            torch.manual_seed(0)
            with may_refuse():
                net = type(small_model(kind))(config)
            run_model(net.float())


def weights_file(draw: Draw) -> None:
    """A saved folder of a model: weights, whole or in shards, their index, and the configs."""
    kind = draw.choice(list(KINDS))
    files = dict(saved_model(kind, draw.choice(["5GB", "4KB"])))
    name = draw.choice(sorted(files))
    how = damage_safetensors if name.endswith(".safetensors") else damage_json
    files[name] = how(draw, files[name])
    draw.note("damaged", (kind, name, files[name][:1500]))
    with folder_of(files) as folder, quiet():
        # RuntimeError: Transformers' list of tensors whose shapes do not fit.
        with may_refuse(SafetensorError, RuntimeError):
            net = type(small_model(kind)).from_pretrained(folder)
        run_model(net.float())
        net.save_pretrained(folder / "again")


def state_file(draw: Draw) -> None:
    """The state file of `stream`: damaged, or rewritten with the right hash."""
    content, total = saved_state()
    is_bytes = draw.flag()
    if is_bytes:
        content = damage_safetensors(draw, content)
    else:
        with folder_of({"state": content}) as folder, safe_open(folder / "state", "pt") as file:
            metadata = file.metadata()
        tensors, metadata = _damaged_tensors(draw, content), {k: v for k, v in metadata.items() if k != "sha256"}
        name = draw.choice(sorted(metadata))
        if draw.flag(0.4):
            metadata[name] = draw.choice(["", "0", "-1", "49", "9" * 30, "nan", "0x1p+2000", "a", metadata[name] + " "])
        elif draw.flag(0.2):
            del metadata[name]
        metadata["sha256"] = cache_file._digest(tensors, metadata)
        draw.note("metadata", metadata)
        content = save(tensors, metadata)
    with folder_of({"state": content}) as folder:
        path = folder / "state"
        try:
            with may_refuse():
                Scored.from_state_file(path).perplexity  # noqa: B018
        except Refused:
            pass
        try:
            with may_refuse():
                rest = list(stream(small_model("text"), TOKENS, state_file=path, progress=False))
        except Refused:
            assert path.read_bytes() == content, "a refused file was changed"
            raise
        finally:
            assert [x.name for x in folder.iterdir()] == ["state"], "another file was left"
        assert rest[-1].stop == len(TOKENS)
        assert not is_bytes or abs(rest[-1].total - total) < 1e-3, "a damaged file was read, and gave another result"


def _damaged_tensors(draw: Draw, content: bytes) -> dict[str, torch.Tensor]:
    tensors = damage_state(draw, load(content))
    tensors = {k: x for k, x in tensors.items() if isinstance(x, torch.Tensor)} if isinstance(tensors, dict) else {}
    return {str(name): x.clone().contiguous() for name, x in tensors.items()}


def cache_tensors(draw: Draw) -> None:
    """A saved cache: damaged bytes, or other tensors. What is read goes on, or refuses to."""
    if draw.flag(0.4):
        with may_refuse(SafetensorError):
            tensors = load(damage_safetensors(draw, saved_cache()))
    else:
        tensors = _damaged_tensors(draw, saved_cache())
    draw.note("tensors", {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()})
    draw.note("numbers", {name: x.tolist() for name, x in tensors.items() if x.dtype == torch.int64 and x.numel() < 50})
    net = small_model("text")
    cache = LongNetCache(net.config)
    new = TOKENS[:8].view(2, 4)
    with torch.no_grad():
        net(new, **{CACHE: cache})
        try:
            with may_refuse():
                cache.load_tensors(tensors)
        except Refused:
            expected = net(torch.cat([new, new], 1)).logits[:, 4:]
            torch.testing.assert_close(net(new, **{CACHE: cache}).logits, expected, rtol=0, atol=1e-4)
            raise
        with may_refuse():
            ids = torch.zeros(len(cache.lengths), 3, dtype=torch.int64)
            output = net(ids, **{CACHE: cache})
            net(ids[:, :1], **{CACHE: cache})
            cache.crop(-1)
            cache.reorder_cache(torch.zeros(len(cache.lengths), dtype=torch.int64))
    held = [x for name, x in tensors.items() if name.endswith(("keys", "values"))]
    is_finite = all(torch.isfinite(x).all() and x.abs().max() < 1e6 for x in held)
    assert torch.isfinite(output.logits).all() or not is_finite


@lru_cache
def foreign(kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """A foreign state dict, and what weights cannot tell."""
    net = small_model(kind)
    config = net.config
    if kind == "text":
        net = LongNetForCausalLM(LongNetConfig(vocab_size=29, head_offsets="blocked", **SIZES))
        config = net.config
    names = ("segment_lengths", "dilation_rates", "num_attention_heads", "hidden_act")
    given = {name: getattr(config, name) for name in names}
    if kind == "text":
        given |= {"is_causal": True, "position_embedding": "xpos", "embedding_scale": 1.0, "xpos_scale_base": 512}
    if kind == "slide":
        given["grid_size"] = 9
    return to_torchscale(net), given


def conversion_source(draw: Draw) -> None:
    """What `convert_checkpoint` reads: safetensors, torch.save's two formats; damaged bytes or other content."""
    state, given = foreign(draw.choice(list(KINDS)))
    suffix = draw.choice(["safetensors", "pt", "old.pt"])
    is_bytes = draw.flag()
    if not is_bytes:
        state = damage_state(draw, state)
        if isinstance(state, dict) and suffix != "safetensors" and draw.flag(0.2):
            names = sorted(k for k, x in state.items() if isinstance(x, torch.Tensor) and isinstance(k, str))
            for name in draw.several(names, 2) if names else ():
                state[name] = odd_tensors(draw, state[name])
        if isinstance(state, dict):
            draw.note("state", {k: (getattr(x, "shape", x), getattr(x, "dtype", "")) for k, x in state.items()})
    if suffix == "safetensors":
        tensors = state if isinstance(state, dict) else {}
        tensors = {str(k): x.clone().contiguous() for k, x in tensors.items() if isinstance(x, torch.Tensor)}
        content = save(tensors)
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=suffix == "pt")
        content = buffer.getvalue()
    if is_bytes:
        content = (damage_safetensors if suffix == "safetensors" else damage)(draw, content)
    draw.note("source", (suffix, len(content), content[:300]))
    with folder_of({f"source.{suffix}": content}) as folder, quiet():
        try:
            with may_refuse():
                net = convert_checkpoint(folder / f"source.{suffix}", folder / "made", **given)
        except Refused:
            assert [x.name for x in folder.iterdir()] == [f"source.{suffix}"], "another file was left"
            raise
        loaded = type(net).from_pretrained(folder / "made")
        assert sorted(x.name for x in folder.iterdir()) == ["made", f"source.{suffix}"]
        for (name, x), y in zip(net.state_dict().items(), loaded.state_dict().values(), strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num()), name


def tokenizer_folder(draw: Draw) -> None:
    """A saved tokenizer, as the examples load it."""
    kind = draw.choice(["bytes", "bpe"])
    files = dict(saved_tokenizer(kind))
    name = draw.choice(sorted(files))
    files[name] = damage_json(draw, files[name])
    if draw.flag(0.1):
        del files[name]
    draw.note("damaged", (kind, name, files.get(name, b"")[:1500]))
    with folder_of(files) as folder, quiet():
        with may_refuse():
            tokenizer = load_tokenizer(str(folder), None, vocab_size=0)
        with may_refuse():
            ids = tokenizer("a text", add_special_tokens=False)["input_ids"]
        assert all(isinstance(x, int) for x in ids)


def model_card(draw: Draw) -> None:
    """Saving into a folder whose README.md and other files are damaged: whole afterwards, and loads."""
    net = small_model("text")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, quiet():
        target = Path(folder) / "model"
        net.save_pretrained(target)
        readme = damage(draw, (target / "README.md").read_bytes())
        draw.note("README.md", readme[:1500])
        (target / "README.md").write_bytes(readme)
        (target / "config.json").write_bytes(damage_json(draw, (target / "config.json").read_bytes()))
        with may_refuse():
            net.save_pretrained(target)
        assert not list(target.glob("*.part*")), "a half-written file was left"
        assert json.loads((target / "config.json").read_text()) == json.loads(saved_model("text")["config.json"])
        loaded = LongNetForCausalLM.from_pretrained(target)
        assert torch.equal(loaded.lm_head.weight, net.lm_head.weight)


CASES = {
    "config file": config_file, "weights file": weights_file, "state file": state_file, "cache tensors": cache_tensors,
    "conversion source": conversion_source, "tokenizer folder": tokenizer_folder, "model card": model_card,
}  # fmt: skip
