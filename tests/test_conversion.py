"""Converted weights give the released outputs; names go both ways; what does not fit is refused, with its reason."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import assert_close, make_model, refused
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_longnet import LongNetConfig, LongNetForCausalLM, LongNetModel
from modeling_longnet.conversion import (
    convert,
    convert_checkpoint,
    export_checkpoint,
    main,
    read_state,
    to_torchscale,
)
from modeling_longnet.image_encoder import LongNetImageConfig, LongNetImageEncoder
from modeling_longnet.slide_encoder import LongNetSlideConfig, LongNetSlideEncoder

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = (
    "decoder_plain", "decoder_xpos", "decoder_xpos_base16", "encoder_plain", "encoder_xpos", "longvit", "slide",
)  # fmt: skip
FLOAT32 = 1e-6


def read_fixture(name: str):
    """The description, the foreign state dict, and the inputs' tensors of a fixture."""
    notes = json.loads((FIXTURES / f"model_{name}.json").read_text())
    tensors = load_file(FIXTURES / f"model_{name}.safetensors")
    weights = {key.removeprefix("param."): x for key, x in tensors.items() if key.startswith("param.")}
    return notes, weights, {key: x for key, x in tensors.items() if not key.startswith("param.")}


def overrides_of(notes: dict, case: str) -> dict:
    """Return what a user must give with such a checkpoint."""
    config = notes["config"]
    config = config.get("encoder", config)
    note = notes["notes"][case]
    side = "decoder" if "decoder_layers" in config else "encoder"
    given = {
        "segment_lengths": note.get("segment_length") or config["segment_length"],
        "dilation_rates": config["dilated_ratio"],
        "num_attention_heads": config[f"{side}_attention_heads"],
        "hidden_act": {"gelu": "gelu", "swish": "silu"}[config["activation_fn"]],
    }
    if notes["config"]["architecture"] in ("LongNetDecoder", "LongNetEncoder"):
        given["is_causal"] = side == "decoder"
        given["position_embedding"] = "xpos" if config["xpos_rel_pos"] else "none"
        given["embedding_scale"] = 1.0 if config["no_scale_embedding"] else config[f"{side}_embed_dim"] ** 0.5
    if config["xpos_rel_pos"]:
        given["xpos_scale_base"] = config["xpos_scale_base"]
    if "slide_ngrids" in notes["config"]:
        given |= {"grid_size": notes["config"]["slide_ngrids"], "pooling": "mean" if note["global_pool"] else "cls"}
    return given


def run(model, tensors: dict, case: str) -> dict:
    """The model's outputs under the fixture's names."""
    with torch.no_grad():
        if isinstance(model, LongNetSlideEncoder):
            out = model(tensors[f"{case}.patches"], tensors[f"{case}.coords"])
            return {
                "output": out.pooler_output,
                "encoder_out": out.last_hidden_state,
                "all_layer_output": out.layer_embeddings,
            }
        if isinstance(model, LongNetImageEncoder):
            return {"output": model(tensors[f"{case}.image"]).last_hidden_state}
        out = model(tensors[f"{case}.tokens"], output_hidden_states=True)
    *states, features = out.hidden_states
    return {"logits": out.logits, "hidden": torch.stack(states), "features": features}


CASES = [(name, case) for name in MODELS for case in read_fixture(name)[0]["notes"]]


def test_every_fixture_has_its_turn():
    assert sorted(path.stem.removeprefix("model_") for path in FIXTURES.glob("model_*.json")) == list(MODELS)
    assert len(CASES) == 18
    assert len(PADDED) == 4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "case"), CASES, ids=["-".join(c) for c in CASES])
def test_converted_weights_give_the_released_outputs(name, case, dtype, implementation):
    """Every output is the released code's; where one of its bugs acts, that of the same weights by the exact rule."""
    notes, weights, tensors = read_fixture(name)
    model = convert(weights, **overrides_of(notes, case)).to(dtype)
    model.set_attn_implementation(implementation)
    exact = notes["notes"][case]["exact"]
    found = run(model, tensors, case)
    checked = 0
    for key, value in found.items():
        wanted = tensors.get(f"{case}.{key}_exact_rule", tensors[f"{case}.{key}"] if exact else None)
        if wanted is None:
            continue
        # The last layer's output stands in `hidden` of the fixture alone: here the tuple ends with the final norm.
        wanted = wanted[: len(value)] if key == "hidden" else wanted
        assert_close(key, value, wanted, FLOAT32 if dtype == torch.float32 else 1e-12)
        checked += 1
    assert checked == (len(found) if exact else 1)


PADDED = [(n, c) for n, c in CASES if read_fixture(n)[0]["notes"][c]["bugs"] == [1]]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "case"), PADDED, ids=["-".join(c) for c in PADDED])
def test_attend_zero_padding_gives_the_released_outputs_where_that_bug_acts(name, case, implementation):
    notes, weights, tensors = read_fixture(name)
    model = convert(weights, attend_zero_padding=True, **overrides_of(notes, case)).double()
    model.set_attn_implementation(implementation)
    for key, value in run(model, tensors, case).items():
        wanted = tensors[f"{case}.{key}"]
        assert_close(key, value, wanted[: len(value)] if key == "hidden" else wanted)


@pytest.mark.parametrize("progress", [True, False])
def test_conversion_shows_the_bytes_it_reads(progress, tmp_path, capsys):
    notes, weights, _ = read_fixture(MODELS[0])
    save_file(weights, tmp_path / "source.safetensors")
    given = overrides_of(notes, "a")
    convert_checkpoint(tmp_path / "source.safetensors", tmp_path / "folder", progress=progress, **given)
    shown = capsys.readouterr().err
    assert ("Reading weights: 100%" in shown) == progress


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_go_both_ways(name, tmp_path):
    """Converted, saved, loaded and written back, every tensor is there again, bit by bit."""
    notes, weights, _ = read_fixture(name)
    save_file(weights, tmp_path / "source.safetensors")
    made = convert_checkpoint(tmp_path / "source.safetensors", tmp_path / "folder", **overrides_of(notes, "a"))
    assert made.config.head_offsets == "blocked"
    assert made.config.converted_from.endswith("source.safetensors")
    loaded = type(made).from_pretrained(tmp_path / "folder")
    assert loaded.config.converted_from == made.config.converted_from
    to_torchscale(loaded, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert sorted(back) == sorted(notes["parameters"])
    for key, x in weights.items():
        torch.testing.assert_close(back[key], x, rtol=0, atol=1e-7 if key.endswith("xpos.scale") else 0)


@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [
        (lambda state: state, ".safetensors"),
        (lambda state: state, ".pth"),
        (lambda state: {"model": state}, ".pt"),
        (lambda state: {"model": {f"encoder.{k}": x for k, x in state.items()}}, ".bin"),
    ],
    ids=["safetensors", "torch", "under-model", "with-prefix"],
)
def test_files_and_wrappings(wrap, suffix, tmp_path):
    notes, weights, _ = read_fixture("encoder_plain")
    file = tmp_path / f"source{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(wrap(weights), file)
    given = overrides_of(notes, "a")
    if suffix == ".bin":
        del given["is_causal"]  # the prefix says it
    model = convert_checkpoint(file, tmp_path / "folder", **given)
    assert isinstance(model, LongNetForCausalLM)
    assert not model.config.is_causal
    torch.testing.assert_close(model.model.embed_tokens.weight, weights["embed_tokens.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_fine_tuned_longvit_keeps_its_head(prefix):
    """mean over the patches, fc_norm, head (modeling_finetune.py in TorchScale's examples/longvit)."""
    notes, weights, tensors = read_fixture("longvit")
    tuned = {f"model.{key}": x for key, x in weights.items()}
    tuned |= {
        "fc_norm.weight": torch.randn(32),
        "fc_norm.bias": torch.randn(32),
        "head.weight": torch.randn(3, 32),
        "head.bias": torch.randn(3),
    }
    model = convert({f"{prefix}{key}": x for key, x in tuned.items()}, **overrides_of(notes, "a")).double()
    with torch.no_grad():
        logits = model(tensors["a.image"]).logits
    double = {key: x.double() for key, x in tuned.items()}
    mean = tensors["a.output"].mean(1)
    normed = torch.nn.functional.layer_norm(mean, (32,), double["fc_norm.weight"], double["fc_norm.bias"], 1e-5)
    assert_close("logits", logits, normed @ double["head.weight"].T + double["head.bias"])
    back = to_torchscale(model)
    assert {key: tuple(x.shape) for key, x in back.items()} == {key: tuple(x.shape) for key, x in tuned.items()}


def test_an_encoder_without_a_vocabulary_takes_embeddings():
    notes, weights, _ = read_fixture("encoder_plain")
    bare = {k: x for k, x in weights.items() if k not in ("embed_tokens.weight", "output_projection.weight")}
    given = overrides_of(notes, "a")
    whole = convert(weights, **given).double()
    del given["embedding_scale"]  # nothing to scale
    model = convert(bare, **given).double()
    assert type(model) is LongNetModel
    assert model.config.vocab_size is None
    embeds = torch.randn(2, 13, 32, dtype=torch.float64)
    with torch.no_grad():
        assert_close("hidden", model(inputs_embeds=embeds)[0], whole.model(inputs_embeds=embeds)[0])


def test_published_models_need_no_words():
    """Their segments, rates, heads and activation are known by their sizes."""
    for encoder, config in (
        (LongNetSlideEncoder, LongNetSlideConfig()),
        (LongNetImageEncoder, LongNetImageConfig(image_size=4096, segment_lengths=[1024 << i for i in range(5)])),
    ):
        with torch.device("meta"):
            model = encoder(config)
        read = convert(to_torchscale(model)).config.to_dict()
        assert {k: x for k, x in read.items() if k != "dtype"} == {
            k: x for k, x in config.to_dict().items() if k != "dtype"
        }


def with_changes(weights: dict, **changes) -> dict:
    weights = {name: x for name, x in weights.items()}
    for name, x in changes.items():
        if x is None:
            weights = {key: value for key, value in weights.items() if name not in key}
        else:
            weights[name.replace("__", ".")] = x
    return weights


BAD_STATES = {
    "deepnorm": ({"inner_attn_ln": None, "ffn_layernorm": None}, ["sub-LN", "DeepNorm", "inner_attn_ln.weight"]),
    "experts": ({"layers__1__moe_layer__gate__wg__weight": torch.zeros(2)}, ["mixture of experts", "moe_layer"]),
    "encoder-decoder": ({"layers__0__encoder_attn__q_proj__weight": torch.zeros(2)}, ["cross-attention"]),
    "learned-positions": ({"embed_positions__weight": torch.zeros(2)}, ["learned position"]),
    "shape": ({"layers__1__ffn__fc2__bias": torch.zeros(7)}, ["wrong shape", "layers.1.ffn.fc2.bias (7,)", "(32,)"]),
    "missing": ({"layers.1.ffn.fc1.bias": None}, ["missing tensors", "layers.1.ffn.fc1.bias"]),
    "integers": ({"layers__1__ffn__fc2__bias": torch.zeros(32, dtype=torch.int64)}, ["fc2.bias", "torch.int64"]),
    "complex": ({"layers__1__ffn__fc2__bias": torch.zeros(32, dtype=torch.complex64)}, ["fc2.bias", "complex64"]),
    "float8": ({"embed_tokens__weight": torch.zeros(64, 32).to(torch.float8_e4m3fn)}, ["embed_tokens", "float8"]),
    "sparse": ({"embed_tokens__weight": torch.zeros(64, 32).to_sparse()}, ["embed_tokens.weight", "sparse"]),
    "nan": ({"layers__1__ffn__fc2__bias": torch.full((32,), torch.nan)}, ["NaN", "layers.1.ffn.fc2.bias"]),
    "one-nan": ({"layers__1__ffn__fc2__bias": torch.ones(32).log().index_fill(0, torch.tensor(7), torch.nan)}, ["NaN"]),
    "one-infinite": ({"layers__1__ffn__fc2__bias": torch.arange(32.0).log()}, ["infinite", "layers.1.ffn.fc2.bias"]),
    "no-values": ({"layers__1__ffn__fc2__bias": torch.zeros(0)}, ["no values", "layers.1.ffn.fc2.bias"]),
    "unknown": ({"something__else": torch.zeros(2)}, ["unknown tensors", "something.else"]),
    "absurd-size": ({"embed_tokens__weight": torch.zeros(1).expand(1 << 40, 32)}, ["embed_tokens", "1099511627776"]),
    "absurd-layer": ({"layers__99999999__ffn__fc1__bias": torch.zeros(2)}, ["layer 99999999", "tensors"]),
    "meta": ({"embed_tokens__weight": torch.zeros(64, 32, device="meta")}, ["embed_tokens.weight", "device meta"]),
}


@pytest.mark.parametrize(("changes", "words"), BAD_STATES.values(), ids=BAD_STATES)
def test_weights_of_other_models_are_refused_with_the_list(changes, words, tmp_path):
    notes, weights, _ = read_fixture("decoder_plain")
    torch.save(with_changes(weights, **changes), tmp_path / "source.pt")
    with refused(*words):
        convert_checkpoint(tmp_path / "source.pt", tmp_path / "folder", **overrides_of(notes, "a"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pt"]


def test_names_with_and_without_the_prefix_are_refused():
    notes, weights, _ = read_fixture("encoder_plain")
    twice = {f"encoder.{name}": x for name, x in weights.items()} | {"layer_norm.bias": weights["layer_norm.bias"] * 7}
    with refused("with and without the prefix 'encoder.'", "layer_norm.bias"):
        convert(twice, **overrides_of(notes, "a"))


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("this-must-not-be-made",)


def test_damaged_and_dangerous_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notes, weights, _ = read_fixture("decoder_plain")
    given = overrides_of(notes, "a")
    save_file(weights, "whole.safetensors")
    torch.save(weights, "whole.pt")
    for suffix in ("safetensors", "pt"):
        content = Path(f"whole.{suffix}").read_bytes()
        Path(f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    for protocol in (2, 4):
        state = {"layers.0.self_attn.q_proj.weight": _RunsCode()}
        Path(f"code-{protocol}.pt").write_bytes(pickle.dumps(state, protocol))
    torch.save({"model": _RunsCode()}, "code-in-zip.pt")
    torch.save({"model": weights, "state_dict": weights}, "two.pt")
    torch.save([torch.zeros(1)], "list.pt")
    torch.save(weights | {3: torch.zeros(1)}, "number.pt")
    torch.save({"a": torch.zeros(1)}, "other.pt")
    circle = {}
    circle["model"] = circle
    torch.save(circle, "circle.pt")
    before = sorted(Path().iterdir())
    for file, *words in (
        ("cut.safetensors", "cut short"),
        ("cut.pt", "cut short"),
        ("code-2.pt", "could run code", "mkdir"),
        ("code-4.pt", "not a file of plain tensors", "operand"),
        ("code-in-zip.pt", "could run code", "mkdir"),
        ("two.pt", "no state dict"),
        ("list.pt", "no state dict"),
        ("number.pt", "no state dict"),
        ("other.pt", "not recognised", "Prov-GigaPath"),
        ("circle.pt", "no state dict"),
    ):
        with refused(*words):
            convert_checkpoint(file, "folder", **given)
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_checkpoint("absent.pt", "folder", **given)
    assert sorted(Path().iterdir()) == before


def test_no_damage_to_an_old_file_escapes(tmp_path):
    """torch.save's format before zip: cut at any place it is refused, whatever its reader raises there."""
    torch.save({"a": torch.zeros(3), "b": torch.zeros(2)}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "w.pt").read_bytes()
    said = set()
    for cut in range(len(content)):
        (tmp_path / "cut.pt").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"(damaged|could run code).*\(.+\)\.") as caught:
            read_state(tmp_path / "cut.pt")
        said.add(type(caught.value.__cause__).__name__)
    assert {"EOFError", "IndexError", "error", "UnpicklingError", "RuntimeError"} <= said


def test_a_damaged_length_beyond_the_memory_is_refused(tmp_path, monkeypatch):
    """The unpickler asks for what the file says; on a large machine it would get the memory, so it is made to fail."""

    def load(*args, **kwargs):
        raise MemoryError

    (tmp_path / "w.pt").write_bytes(b"")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError, match="more memory than is free"):
        read_state(tmp_path / "w.pt")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    notes, weights, _ = read_fixture("decoder_plain")
    torch.save(weights, tmp_path / "source.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("kept")
    with refused("not an empty folder"):
        convert_checkpoint(tmp_path / "source.pt", tmp_path / "folder", **overrides_of(notes, "a"))
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine"]


def test_where_a_folder_can_be_made(tmp_path, monkeypatch, capsys):
    notes, weights, _ = read_fixture("encoder_plain")
    given = overrides_of(notes, "a")
    source = tmp_path / "source.pt"
    torch.save(weights, source)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with refused("current folder"):
        convert_checkpoint(source, ".", **given)
    with refused("cannot be made", "source.pt is not a folder"):
        convert_checkpoint(source, source / "under", **given)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    convert_checkpoint(source, tmp_path / "link", **given)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("modeling_longnet.conversion.convert_checkpoint", lambda *_, **__: full())
    with pytest.raises(SystemExit):
        main(["source.pt", "out"])
    assert "no space left" in capsys.readouterr().err


def test_what_weights_cannot_tell_is_asked_for():
    _, weights, _ = read_fixture("decoder_xpos")
    with refused("segment_lengths", "dilation_rates", "hidden_act", "is_causal", "embedding_scale", "xpos_scale_base"):
        convert(weights)
    notes, weights, _ = read_fixture("decoder_xpos")
    stripped = {name: x for name, x in weights.items() if "xpos" not in name}
    given = overrides_of(notes, "a")
    for name in ("position_embedding", "embedding_scale"):
        with refused("not determine", name):
            convert(stripped, **{key: value for key, value in given.items() if key != name})
    whole, model = convert(weights, **given), convert(stripped, **given)
    assert whole.config.to_dict() == model.config.to_dict()
    _, weights, _ = read_fixture("slide")
    with refused("Prov-GigaPath", "segment_lengths", "dilation_rates", "num_attention_heads", "hidden_act"):
        convert(weights)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"hidden_size": 64}, ["hidden_size=64 contradicts", "32"]),
        ({"num_attention_heads": 8}, ["num_attention_heads=8 contradicts", "4"]),
        ({"position_embedding": "none"}, ["contradicts", "xpos"]),
        ({"segment_lenghts": [4]}, ["segment_lenghts", "no field"]),
        ({"segment_lengths": [16, 8, 4]}, ["must grow"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_overrides_that_do_not_fit_are_refused(override, words):
    notes, weights, _ = read_fixture("decoder_xpos")
    with refused(*words):
        convert(weights, **(overrides_of(notes, "a") | override))


SCALE = "layers.1.self_attn.xpos.scale"


@pytest.mark.parametrize("values", [[0.123] * 4, [0.2857], 0.2857], ids=["value", "shape", "no-dimension"])
def test_other_scales_of_xpos_are_refused(values):
    """Our scales follow from the head dimension, so that weights trained with others give wrong outputs."""
    notes, weights, _ = read_fixture("decoder_xpos")
    given, other = overrides_of(notes, "a"), weights | {SCALE: torch.tensor(values)}
    with refused(SCALE, "0.2857", "`ignore`"):
        convert(other, **given)
    assert convert(other, ignore=[SCALE], **given).config.position_embedding == "xpos"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scales_of_xpos_are_compared_to_rounding(dtype):
    notes, weights, _ = read_fixture("decoder_xpos")
    model = convert({name: x.to(dtype) for name, x in weights.items()}, **overrides_of(notes, "a"))
    assert model.dtype == dtype


def test_ignored_tensors_are_left_out():
    notes, weights, _ = read_fixture("slide")
    more = weights | {"decoder_blocks.0.weight": torch.zeros(3)}
    with refused("unknown tensors", "decoder_blocks.0.weight"):
        convert(more, **overrides_of(notes, "a"))
    model = convert(more, ignore=["decoder_*"], **overrides_of(notes, "a"))
    assert sorted(to_torchscale(model)) == sorted(weights)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_offsets": "interleaved"}, ["head_offsets", "blocked"]),
        ({"head_offsets": "blocked", "num_key_value_heads": 2}, ["num_key_value_heads=2"]),
        ({"head_offsets": "blocked", "position_embedding": "rope"}, ["rope"]),
        ({"head_offsets": "blocked", "hidden_act": "gelu_new"}, ["gelu_new", "swish"]),
        ({"head_offsets": "blocked", "layer_norm_eps": 1e-3}, ["1e-5"]),
        ({"head_offsets": "blocked", "embedding_scale": 2.0}, ["embedding_scale=2.0", "sqrt"]),
        ({"head_offsets": "blocked", "rope_theta": 500.0}, ["rope_theta=500.0", "10000"]),
    ],
    ids=["offsets", "shared-heads", "rope", "activation", "eps", "embedding-scale", "theta"],
)
def test_what_torchscale_cannot_be_is_not_written(changes, words):
    config = LongNetConfig(
        vocab_size=11, hidden_size=24, intermediate_size=12, num_hidden_layers=1, num_attention_heads=6,
        segment_lengths=[4, 8], dilation_rates=[1, 2], **changes,
    )  # fmt: skip
    with refused(*words):
        to_torchscale(LongNetModel(config))


def test_a_longvit_with_xpos_goes_both_ways():
    """Its buffers are inside the encoder."""
    config = LongNetImageConfig(
        image_size=24, patch_size=6, hidden_size=32, num_hidden_layers=2, position_embedding="xpos", num_classes=3
    )
    state = to_torchscale(LongNetImageEncoder(config))
    assert state["model.encoder.layers.1.self_attn.xpos.scale"].shape == (1,)
    given = {name: getattr(config, name) for name in ("segment_lengths", "dilation_rates", "hidden_act")}
    model = convert(state, xpos_scale_base=512, num_attention_heads=16, **given)
    assert model.config.position_embedding == "xpos"
    assert sorted(to_torchscale(model)) == sorted(state)


# Heads of 6 dimensions, because the permutation of 4 rows is its own inverse.
LLAMA = {"segment_lengths": [4, 8, 16], "dilation_rates": [1, 2, 4], "head_offsets": "interleaved"}


def make_llama(**overrides):
    """A model that the fused Llama format can hold, and what a user has to give with its weights."""
    rope = {"position_embedding": "rope", "rope_theta": 50.0}
    model = make_model(LongNetForCausalLM, **(LLAMA | {"hidden_size": 36} | rope | overrides))
    asked = (*LLAMA, "num_attention_heads", "num_key_value_heads", "hidden_act", "position_embedding", "rope_theta")
    return model, {name: getattr(model.config, name) for name in asked}


def run_llama(state: dict, tokens: torch.Tensor, heads: int, groups: int, theta: float | None):
    """Logits and attention weights of a dense decoder, from tensors in the fused format alone.

    Rotary embedding as Hugging Face's Llama applies it: x * cos + rotate_half(x) * sin. theta None: no positions.
    """
    length, size = tokens.shape[1], state["norm.weight"].shape[0]
    dim, layers, maps = size // heads, 1 + max(int(n.split(".")[1]) for n in state if n.startswith("layers.")), []

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        weight = state[f"{name}.weight"]
        return torch.nn.functional.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], 1e-5)

    def rotate(x):
        if theta is None:
            return x
        angle = torch.arange(length).double()[:, None] / theta ** (torch.arange(0, dim, 2).double() / dim)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        return x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin

    hidden = state["tok_embeddings.weight"][tokens]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for n in range(layers):
        layer = f"layers.{n}."
        fused = linear(f"{layer}attention.wqkv", norm(f"{layer}attention_norm", hidden))
        query, key, value = fused.unflatten(-1, (-1, dim)).transpose(1, 2).split([heads, groups, groups], 1)
        key, value = (x.repeat_interleave(heads // groups, 1) for x in (rotate(key), value))
        scores = rotate(query) @ key.mT * dim**-0.5
        maps.append(scores.masked_fill(~mask, -torch.inf).softmax(-1))
        out = (maps[-1] @ value).transpose(1, 2).flatten(2)
        hidden = hidden + linear(f"{layer}attention.wo", norm(f"{layer}attention.inner_norm", out))
        inner = torch.nn.functional.gelu(linear(f"{layer}feed_forward.w1", norm(f"{layer}ffn_norm", hidden)))
        hidden = hidden + linear(f"{layer}feed_forward.w2", norm(f"{layer}feed_forward.inner_norm", inner))
    return norm("norm", hidden) @ state["output.weight"].T, maps


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("theta", [50.0, None], ids=["rope", "none"])
def test_the_fused_llama_format_rotates_halves(theta, groups):
    """A dense Llama-like decoder on the exported tensors has our attention weights and logits."""
    positions = {"position_embedding": "rope", "rope_theta": theta} if theta else {"position_embedding": "none"}
    dense = {"segment_lengths": [16], "dilation_rates": [1], "num_key_value_heads": groups, **positions}
    model, _ = make_llama(implementation="eager", **dense)
    tokens = torch.randint(29, (2, 13))
    with torch.no_grad():
        ours = model(tokens, output_attentions=True)
        logits, maps = run_llama(export_checkpoint(model, "llama_fused"), tokens, 6, groups, theta)
    for found, wanted in zip(ours.attentions, maps, strict=True):
        assert_close("attentions", found, wanted)
    assert_close("logits", ours.logits, logits)


@pytest.mark.parametrize("groups", [6, 3, 1])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_embedding": "none"},
        {"position_embedding": "none", "hidden_size": 30},
        {"tie_word_embeddings": True},
        {"head_offsets": "blocked"},
    ],
    ids=["rope", "none", "none-odd", "tied", "blocked"],
)
def test_the_fused_llama_format_goes_both_ways(changes, groups, tmp_path):
    model, given = make_llama(num_key_value_heads=groups, **changes)
    export_checkpoint(model, "llama_fused", tmp_path / "source.safetensors")
    made = convert_checkpoint(tmp_path / "source.safetensors", tmp_path / "folder", **given)
    assert made.config.converted_from == "LongNet under Llama's names (fused wqkv), source.safetensors"
    assert made.config.tie_word_embeddings == model.config.tie_word_embeddings
    tokens = torch.randint(29, (2, 21))
    with torch.no_grad():
        assert_close("logits", made(tokens).logits, model(tokens).logits)
    loaded = LongNetForCausalLM.from_pretrained(tmp_path / "folder").state_dict()
    for name, x in model.state_dict().items():
        torch.testing.assert_close(loaded[name], x, rtol=0, atol=0)
    value = made.model.layers[0].self_attn.v_proj.weight
    assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), "a view of the fused tensor"
    headless = convert({f"module.{k}": x for k, x in export_checkpoint(model.model, "llama_fused").items()}, **given)
    assert type(headless) is LongNetModel


def test_names_and_shapes_of_the_fused_llama_format():
    state = export_checkpoint(make_llama(num_key_value_heads=2, num_hidden_layers=1)[0], "llama_fused")
    layer = {
        "attention_norm": (36,), "attention.wqkv": (60, 36), "attention.inner_norm": (36,), "attention.wo": (36, 36),
        "ffn_norm": (36,), "feed_forward.w1": (40, 36), "feed_forward.inner_norm": (40,), "feed_forward.w2": (36, 40),
    }  # fmt: skip
    expected = {f"layers.0.{name}.weight": shape for name, shape in layer.items()}
    expected |= {f"layers.0.{name}.bias": shape[:1] for name, shape in layer.items()}
    expected |= {"norm.weight": (36,), "norm.bias": (36,), "tok_embeddings.weight": (29, 36), "output.weight": (29, 36)}
    assert {name: tuple(x.shape) for name, x in state.items()} == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers__1__attention__wqkv__weight": torch.zeros(60, 20)}, ["wqkv.weight (60, 20), expected (60, 36)"]),
        ({"layers__0__attention__wqkv__bias": torch.zeros(48)}, ["layers.0.attention.wqkv.bias (48,)", "(60,)"]),
        ({"layers.1.attention.wqkv.weight": None}, ["missing tensors: layers.1.attention.wqkv.weight."]),
        ({"inner_norm": None}, ["layers.0.attention.inner_norm.bias", "no sub-LN"]),
        ({".bias": None, "inner_norm": None}, ["missing tensors", "layers.0.attention.wqkv.bias", "a plain Llama"]),
        ({"layers__0__feed_forward__w3__weight": torch.zeros(2)}, ["unknown tensors: layers.0.feed_forward.w3.weight"]),
    ],
    ids=["shape", "bias-shape", "fused-missing", "no-sub-ln", "llama", "gated"],
)
def test_other_tensors_in_the_fused_llama_format_are_refused_by_name(changes, words):
    model, given = make_llama(num_key_value_heads=2)
    with refused(*words):
        convert(with_changes(export_checkpoint(model, "llama_fused"), **changes), **given)


def test_what_the_fused_llama_format_needs_and_cannot_be():
    model, given = make_llama(num_key_value_heads=2)
    state = export_checkpoint(model, "llama_fused")
    for name in given:
        with refused("not determine", name, "(fused wqkv)"):
            convert(state, **{key: value for key, value in given.items() if key != name})
    with refused("layers.0.attention.wqkv.weight (60, 36), expected (72, 36)"):
        convert(state, **(given | {"num_key_value_heads": 3}))
    with refused("xpos", "rope or none"):
        convert(state, **(given | {"position_embedding": "xpos"}))
    for change, words in (
        ({"position_embedding": "xpos"}, ["xpos", "rope or none"]),
        ({"is_causal": False}, ["is_causal=False"]),
        ({"embedding_scale": 2.0}, ["embedding_scale=2.0"]),
    ):
        with refused(*words):
            export_checkpoint(make_llama(**change)[0], "llama_fused")
    with refused("format_name='llama'", "torchscale or llama_fused"):
        export_checkpoint(model, "llama")
    with refused("LongNetImageEncoder", "longvit"):
        export_checkpoint(LongNetImageEncoder(LongNetImageConfig(num_hidden_layers=1)), "llama_fused")


def test_command_line(tmp_path, capsys):
    _, weights, tensors = read_fixture("decoder_xpos_base16")
    torch.save(weights, tmp_path / "source.pt")
    command = [
        str(tmp_path / "source.pt"), str(tmp_path / "folder"), "--segment-lengths", "8", "16", "32",
        "--dilation-rates", "1", "2", "4", "--is-causal", "--hidden-act", "silu",
        "--embedding-scale", str(24**0.5), "--set", "pad_token_id=1", "--set", "attention_backend=torch",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(command)
    assert "xpos_scale_base" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--set", "pooling"])
    assert "--set: expected FIELD=VALUE, not 'pooling'" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
    main([*command, "--xpos-scale-base", "16"])
    assert "blocked" in capsys.readouterr().out
    model = LongNetForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float64)
    assert model.config.tie_word_embeddings
    assert model.config.pad_token_id == 1
    assert model.config.attention_backend == "torch"
    with torch.no_grad():
        assert_close("logits", model(tensors["a.tokens"]).logits, tensors["a.logits"])


REMOTE = """
import json, sys, torch
sys.modules["modeling_longnet"] = None  # an installed one cannot be imported either
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
for folder in sorted(Path().glob("folder-*")):
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    auto = AutoModelForCausalLM if name.endswith("LM") else AutoModel
    model = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    with torch.no_grad():
        out = model(**load_file(folder / "inputs.safetensors"))
    out = out.logits if auto is AutoModelForCausalLM else out.last_hidden_state
    save_file({"out": out}, folder / "out.safetensors")
"""


def test_converted_folders_load_as_remote_code(tmp_path):
    """Each in turn, in a process that cannot import this package."""
    names = {"tokens": "input_ids", "patches": "tiles", "coords": "coordinates", "image": "pixel_values"}
    expected = {}
    for name in MODELS:
        notes, weights, tensors = read_fixture(name)
        folder = tmp_path / f"folder-{name}"
        save_file(weights, tmp_path / "source.safetensors")
        model = convert_checkpoint(tmp_path / "source.safetensors", folder, **overrides_of(notes, "a"))
        auto = AutoModelForCausalLM if hasattr(model, "lm_head") else AutoModel
        assert AutoConfig.from_pretrained(folder).model_type == model.config.model_type
        assert type(auto.from_pretrained(folder)) is type(model)
        inputs = {names[k[2:]]: x for k, x in tensors.items() if k.startswith("a.") and k[2:] in names}
        save_file(inputs, folder / "inputs.safetensors")
        expected[folder] = next(tensors[k] for k in ("a.logits", "a.encoder_out", "a.output") if k in tensors)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", REMOTE], cwd=tmp_path, env=environment, check=True)
    for folder, wanted in expected.items():
        assert_close(folder.name, load_file(folder / "out.safetensors")["out"], wanted)
