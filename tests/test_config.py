"""Every bad field is refused where the config is made, saved or read; good ones survive the round trip."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from checks import make_config, make_model, refused
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_longnet import LongNetConfig, LongNetForCausalLM, parse_pattern
from modeling_longnet.pattern import Pattern, count_work

IS_OLDEST = transformers.__version__.startswith("5.17.")  # which checks the kinds of fields itself
CONFIGURATIONS = sorted((Path(__file__).parent.parent / "configuration").glob("longnet-*.json"))

BAD = [
    ({"segment_lengths": [4, 8], "dilation_rates": [1]}, ["[4, 8]", "[1]", "one dilation rate for each"]),
    ({"segment_lengths": [], "dilation_rates": []}, ["segment_lengths=[]", "at least one"]),
    ({"segment_lengths": [0, 8], "dilation_rates": [1, 1]}, ["segment_lengths=[0, 8]", "at least 1"]),
    ({"segment_lengths": [4, 8], "dilation_rates": [1, 0]}, ["dilation_rates=[1, 0]", "at least 1"]),
    ({"segment_lengths": [8, 4], "dilation_rates": [1, 1]}, ["segment_lengths=[8, 4]", "must grow"]),
    ({"segment_lengths": [4, 8], "dilation_rates": [1, 9]}, ["rate 9", "segment length 8"]),
    ({"segment_lengths": 16, "dilation_rates": 1}, ["segment_lengths"]),
    ({"segment_lengths": [4.0], "dilation_rates": [1]}, ["segment_lengths"]),
    ({"segment_lengths": [4, 1 << 63], "dilation_rates": [1, 1]}, ["9223372036854775808", "2^62"]),
    ({"hidden_size": 25}, ["hidden_size=25", "num_attention_heads=6"]),
    ({"num_key_value_heads": 4}, ["num_key_value_heads=4", "num_attention_heads=6"]),
    ({"num_key_value_heads": 0}, ["num_key_value_heads=0"]),
    ({"num_attention_heads": 0}, ["num_attention_heads=0", "at least 1"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
    ({"num_hidden_layers": 1 << 31}, ["num_hidden_layers=2147483648", "at most 10000"]),
    ({"vocab_size": 0}, ["vocab_size=0", "at least 1"]),
    ({"xpos_scale_base": 10**30}, ["xpos_scale_base=1000000", "the largest int64"]),
    ({"branch_layer_period": 0}, ["branch_layer_period=0", "from 1"]),
    ({"branch_layer_period": 2}, ["branch_layer_period=2", "window_size"]),
    (parse_pattern("w4") | {"branch_layer_period": 2}, ["branch_layer_period=2", "needs branches"]),
    ({"branch_layer_period": 9, "window_size": 4}, ["branch_layer_period=9", "number of layers (2)"]),
    ({"num_labels": 1 << 63}, ["num_labels=9223372036854775808", "at most 1048576"]),
    ({"intermediate_size": -1}, ["intermediate_size=-1", "at least 1"]),
    ({"hidden_size": "24"}, ["hidden_size"]),
    ({"is_causal": 1}, ["is_causal"]),
    ({"head_offsets": "diagonal"}, ["head_offsets='diagonal'", "'interleaved'", "'blocked'"]),
    ({"position_embedding": "alibi"}, ["position_embedding='alibi'", "'xpos'", "'rope'", "'none'"]),
    ({"attention_backend": "cudnn"}, ["attention_backend='cudnn'", "'torch'", "'auto'"]),
    ({"hidden_act": "gelluu"}, ["hidden_act='gelluu'", "'gelu'"]),
    ({"xpos_scale_base": 1, "segment_lengths": [4096], "dilation_rates": [1]}, ["xpos_scale_base=1", "or more"]),
    ({"xpos_scale_base": 0}, ["xpos_scale_base=0", "above 0"]),
    ({"xpos_scale_base": float("inf")}, ["xpos_scale_base=inf", "finite"]),
    ({"embedding_scale": float("inf")}, ["embedding_scale=inf", "finite"]),
    ({"rope_theta": -1.0}, ["rope_theta=-1.0", "above 0"]),
    ({"layer_norm_eps": 0.0}, ["layer_norm_eps=0.0", "above 0"]),
    ({"embedding_scale": float("nan")}, ["embedding_scale=nan", "above 0"]),
    ({"dropout": 1.0}, ["dropout=1.0", "0 <= p < 1"]),
    ({"dropout": -0.1}, ["dropout=-0.1"]),
    ({"activation_dropout": 2}, ["activation_dropout=2"]),
    ({"drop_path_rate": 1.5}, ["drop_path_rate=1.5"]),
    ({"attention_dropout": 0.1}, ["attention_dropout=0.1", "must be 0"]),
    ({"initializer_range": -0.02}, ["initializer_range=-0.02"]),
    ({"attend_zero_padding": True}, ["attend_zero_padding=True", "is_causal=False"]),
    ({"pad_token_id": 29}, ["pad_token_id=29", "vocab_size=29"]),
    ({"max_position_embeddings": "long"}, ["max_position_embeddings='long'", "at least 1"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), BAD, ids=str)
def test_bad_fields_are_refused(fields, words):
    with refused(*words):
        make_config(**fields)


@pytest.mark.parametrize(("fields", "words"), BAD, ids=str)
def test_bad_overrides_are_refused(fields, words, tmp_path):
    """Fields passed to from_pretrained, which Transformers alone would set without a check."""
    make_config().save_pretrained(tmp_path)
    with refused(*words):
        LongNetConfig.from_pretrained(tmp_path, **fields)


@pytest.mark.parametrize("fields", [
    {"dtype": "nn"}, {"dtype": ""}, {"dtype": 3}, {"dtype": [1]}, {"id2label": 1.0}, {"id2label": {"a": 1}},
], ids=str)  # fmt: skip
def test_bad_fields_of_transformers_are_refused(fields):
    with refused("d"):
        make_config(**fields)


DAMAGED = {
    "no object": "[1, 2]", "a string": '"abc"', "null": "null", "deep": "[" * 100_000, "deep inside": '{"a":' * 20_000,
    "not JSON": "{'a': 1}", "no text": "\0\0", "empty": "",
    "a number of 5,000 digits": '{"hidden_size": ' + "9" * 5000 + "}",
    "an odd dtype": '{"dtype": {"a": 1}}', "odd labels": '{"id2label": [1]}', "odd layers": '{"layer_types": 3}',
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_a_clear_error(content, tmp_path):
    """The error is one that callers expect of a bad file, whatever the JSON reader and Transformers raise inside."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError, StrictDataclassError)) as caught:
        LongNetConfig.from_pretrained(tmp_path)
    assert len(str(caught.value)) > 20


def test_a_field_that_was_spoilt_later_is_not_saved(tmp_path):
    config = make_config()
    config.segment_lengths = [16, 8, 4]
    with refused("[16, 8, 4]"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(("keyword", "meant"), [
    ("segment_length", "segment_lengths"),
    ("segments_lengths", "segment_lengths"),
    ("sliding_window", "window_size"),
    ("window", "window_size"),
    ("pattern", "**parse_pattern(...)"),
    ("once", "keys_once"),
    ("rope_parameters", "rope_theta"),
    ("head_dim", "num_attention_heads"),
    ("dilation_rate", "dilation_rates"),
    ("dilated_ratio", "dilation_rates"),
    ("xpos_rel_pos", "position_embedding"),
    ("num_hidden_layer", "num_hidden_layers"),
    ("num_attention_head", "num_attention_heads"),
    ("decoder_embed_dim", "hidden_size"),
    ("activation_fn", "hidden_act"),
    ("vocab_sizes", "vocab_size"),
    ("causal", "is_causal"),
])  # fmt: skip
def test_near_misses_are_refused(keyword, meant):
    with refused(keyword, f"did you mean '{meant}'"):
        make_config(**{keyword: 1})


@pytest.mark.parametrize("read", [LongNetConfig.from_pretrained, AutoConfig.from_pretrained])
@pytest.mark.parametrize("keyword", ["segment_length", "num_heads", "head_dim", "vocab_sizes"])
def test_near_misses_beside_a_good_folder_are_refused(keyword, read, tmp_path):
    make_config().save_pretrained(tmp_path)
    with refused(keyword, "did you mean"):
        read(tmp_path, **{keyword: 8})


def test_a_near_miss_in_a_file_that_a_person_wrote_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "longnet", "segment_length": [8]}))
    with refused("segment_length", "did you mean 'segment_lengths'"):
        LongNetConfig.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:`rope_scaling`:FutureWarning")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("segment_length", 8),
        ("sliding_window", None),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
        ("d_model", 24),
        ("bos_token", "<s>"),
    ],
)
def test_what_a_tool_set_does_not_make_a_file_unreadable(name, value, tmp_path, caplog):
    config = make_config()
    setattr(config, name, value)
    make_model(LongNetForCausalLM).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    for loaded in (LongNetConfig.from_pretrained(tmp_path), LongNetForCausalLM.from_pretrained(tmp_path).config):
        assert getattr(loaded, name) == value
        assert loaded.segment_lengths == config.segment_lengths
    saved_as = "rope_parameters" if name == "rope_scaling" else name
    assert f"LongNetConfig has no field '{saved_as}'" in caplog.text


READ_ONLY = {"head_dim": 4, "position_period": 3, "base_model_fsdp_plan": {"layers.*": "free_full_weight"}}


@pytest.mark.parametrize("read", [LongNetConfig.from_pretrained, AutoConfig.from_pretrained])
@pytest.mark.parametrize("name", READ_ONLY)
def test_what_follows_from_other_fields_is_not_read(name, read, tmp_path, caplog):
    """A tool may have written it; a user who sets it is told."""
    config = make_config()
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {name: READ_ONLY[name]}))
    assert read(tmp_path).to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert f"no field '{name}'" in caplog.text
    assert "not used" in caplog.text
    with refused(f"no field '{name}'"):
        make_config(**{name: READ_ONLY[name]})
    with refused(f"no field '{name}'"):
        read(tmp_path, **{name: READ_ONLY[name]})


def test_a_saved_head_dim_that_contradicts_the_sizes_is_refused(tmp_path):
    make_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"head_dim": 8}))
    with refused("head_dim=8 contradicts hidden_size=24", "num_attention_heads=6"):
        LongNetConfig.from_pretrained(tmp_path)


def test_a_callers_mistake_is_not_blamed_on_the_files(tmp_path):
    make_model(LongNetForCausalLM).save_pretrained(tmp_path)
    for read in (LongNetForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(TypeError, match=rf"{re.escape(str(tmp_path))}: .*keyword argument 'foo'"):
            read(tmp_path, foo=1)
    with refused(*(["id2label"] if IS_OLDEST else ["LongNetConfig has a value of the wrong kind", "'list'"])):
        make_config(id2label=[1])


@pytest.mark.parametrize("read", [
    LongNetConfig.from_pretrained, AutoConfig.from_pretrained, LongNetForCausalLM.from_pretrained,
])  # fmt: skip
def test_the_error_of_a_damaged_config_names_its_folder(read, tmp_path):
    make_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"id2label": [1]}))
    with refused(*(["id2label"] if IS_OLDEST else [f"the config of {tmp_path} cannot be read", "'list'"])):
        read(tmp_path)


def test_max_position_embeddings_is_the_longest_segment_unless_it_is_set(tmp_path):
    config = make_config()
    assert config.max_position_embeddings == 16
    config.save_pretrained(tmp_path)
    longer = LongNetConfig.from_pretrained(tmp_path, segment_lengths=[8, 32], dilation_rates=[1, 4])
    assert longer.max_position_embeddings == 32
    config.max_position_embeddings = 4096
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 4096
    assert LongNetConfig.from_pretrained(tmp_path).max_position_embeddings == 4096
    assert LongNetConfig.from_pretrained(tmp_path, max_position_embeddings=64).max_position_embeddings == 64
    assert make_config(max_position_embeddings=128).max_position_embeddings == 128
    assert make_config(max_position_embeddings=None).max_position_embeddings == 16
    config.max_position_embeddings = 0
    with refused("max_position_embeddings=0", "at least 1"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("length", [1, 100, 4096, 1_000_000])
@pytest.mark.parametrize("heads", [1, 6, 16])
@pytest.mark.parametrize("effort", [256, 4096, 1_000_000])
def test_for_context_of_the_papers_kind_keeps_to_its_effort(length, heads, effort, capsys):
    ask = {
        "paper": True,
        "effort": effort,
        "num_attention_heads": heads,
        "hidden_size": 8 * heads,
        "position_embedding": "rope",
    }
    try:
        config = LongNetConfig.for_context(length, **ask)
    except ValueError as error:
        least = int(str(error).split("the least is ")[1].split(".")[0])
        assert least > effort
        config = LongNetConfig.for_context(length, **(ask | {"effort": least}))
        effort = least
    pattern = config.segment_lengths, config.dilation_rates
    assert count_work(*pattern, length) <= effort
    assert config.position_period == config.segment_lengths[-1] >= length
    assert config.dilation_rates[0] == 1
    assert max(config.dilation_rates) <= heads
    if effort >= length:
        assert config.dilation_rates == [1]
    assert f"({config.segment_lengths[0]}, 1)" in capsys.readouterr().out


@pytest.mark.parametrize("length", [1, 100, 2048, 4096, 100_000, 1_000_000, 10**9])
@pytest.mark.parametrize("effort", [16, 192, 1024, 4096])
@pytest.mark.parametrize("is_causal", [True, False])
def test_for_context_keeps_to_its_effort(length, effort, is_causal, capsys):
    try:
        config = LongNetConfig.for_context(length, effort=effort, is_causal=is_causal)
    except ValueError as error:
        least = int(str(error).split("the least is ")[1].split(".")[0])
        assert least > effort
        config = LongNetConfig.for_context(length, effort=least, is_causal=is_causal)
        effort = least
    pattern = Pattern.of(config)
    both = 1 if is_causal else 2  # sides that a query sees
    assert pattern.count_work(length) * both <= effort
    assert config.segment_lengths[-1] >= length
    if effort >= length / 2 * both:  # dense attention
        assert (config.window_size, config.dilation_rates) == (None, [1])
        assert "Dense attention" in capsys.readouterr().out
        return
    assert (config.query_rates, config.keys_once) == ([1] * len(config.segment_lengths), is_causal)
    assert config.branch_layer_period == 2
    # What lies between two tokens that a branch shows has been read by the branch, or the window, before it.
    reach = [config.window_size, *config.segment_lengths]
    assert all(r <= w for r, w in zip(config.dilation_rates, reach, strict=False))
    assert all(longer <= 16 * w for w, longer in pairwise(reach))
    near = f"the last {config.window_size} tokens" if is_causal else f"{config.window_size - 1} on either side"
    assert near in capsys.readouterr().out


@pytest.mark.parametrize(("length", "effort"), [(2.5, 64), (100, 64.0), ("100", 64), (0, 64), (100, 0)])
def test_for_context_takes_whole_numbers(length, effort):
    with refused(f"length={length!r}", f"effort={effort!r}", "whole numbers"):
        LongNetConfig.for_context(length, effort=effort)


@pytest.mark.parametrize(("name", "meant"), [("efort", "effort"), ("efforts", "effort"), ("papers", "paper")])
def test_for_context_refuses_a_misspelt_argument(name, meant):
    with pytest.raises(TypeError, match=f"no argument '{name}'; did you mean '{meant}'"):
        LongNetConfig.for_context(8192, **{name: 256})


def test_for_context_refuses_what_it_chooses():
    for name, value in {"window_size": 32, "keys_once": False, "segment_lengths": [64]}.items():
        with pytest.raises(TypeError, match=f"for_context chooses {name}"):
            LongNetConfig.for_context(8192, effort=256, **{name: value})


def test_a_windows_reach_grows_with_the_layers():
    config = LongNetConfig(segment_lengths=[], dilation_rates=[], window_size=192, position_embedding="rope")
    assert config.max_position_embeddings == 192 * config.num_hidden_layers


def test_for_context_gives_a_single_layer_branches():
    assert LongNetConfig.for_context(2048, effort=192, num_hidden_layers=1).branch_layer_period == 1
    assert LongNetConfig.for_context(2048, effort=192, branch_layer_period=1).dilation_rates == [16]


def test_for_context_counts_the_layers_there_are(capsys):
    """In one layer of three, not in one of two."""
    config = LongNetConfig.for_context(32_768, num_hidden_layers=3)
    assert 1010 < Pattern.of(config).count_work(32_768, 3) <= 1024
    config = LongNetConfig.for_context(4096, effort=1800, branch_layer_period=4)
    assert config.dilation_rates == [1]


@pytest.mark.parametrize("fields", [
    {"num_hidden_layers": 0}, {"num_hidden_layers": "3"}, {"num_hidden_layers": None}, {"branch_layer_period": 0},
    {"branch_layer_period": 99}, {"branch_layer_period": "2"}, {"branch_layer_period": 1.5},
    {"paper": True, "branch_layer_period": 2},
], ids=str)  # fmt: skip
def test_for_context_refuses_layers_that_do_not_fit(fields):
    with refused("branch_layer_period"):
        LongNetConfig.for_context(8192, **fields)


def test_for_context_prints_the_line_that_parse_pattern_reads(capsys):
    config = LongNetConfig.for_context(2048, effort=192)
    words = capsys.readouterr().out.split("'")[1]
    assert words == "w136 2048/8:1 once every2"
    assert Pattern.parse(words) == Pattern.of(config)


@pytest.mark.parametrize("words", ["w4 w8", "64/1 every2 every3", "64/1 every", "64/1 everyone"])
def test_words_that_are_no_pattern_are_refused(words):
    with refused("pattern", "must be"):
        Pattern.parse(words)


@pytest.mark.parametrize("words", [
    "512/1 2048/4", "w64", "w16 64/4:2 256/8:8 rotate stagger", "64/1 256/4:1 once", "w8 64/4:1 once every3",
])  # fmt: skip
def test_a_written_pattern_reads_back(words):
    pattern = Pattern.parse(words)
    assert Pattern.parse(pattern.write()) == pattern


def test_keywords_of_others_pass():
    """Transformers' own keywords, and unlike ones that a user's tools may keep in a config."""
    config = make_config(
        output_hidden_states=True, id2label={0: "a"}, name_or_path="me/x", my_note="hello", dtype="float32"
    )
    assert config.my_note == "hello"


def test_round_trip(tmp_path):
    config = make_config(num_key_value_heads=3, position_embedding="rope", dropout=0, segment_lengths=(4, 8, 16))
    config.save_pretrained(tmp_path)
    for loaded in (LongNetConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LongNetConfig
        before, after = (c.to_dict() for c in (config, loaded))
        unequal = {"transformers_version", "_name_or_path"}
        assert {k: v for k, v in after.items() if k not in unequal} == {
            k: v for k, v in before.items() if k not in unequal
        }
    assert config.segment_lengths == [4, 8, 16]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == LongNetConfig.auto_classes


def test_two_configs_share_no_list():
    first, second = make_config(), make_config()
    first.segment_lengths.append(32)
    assert second.segment_lengths == [4, 8, 16]
    assert LongNetConfig().segment_lengths is not LongNetConfig().segment_lengths


def test_the_defaults_are_the_papers_smallest_model():
    config = LongNetConfig()
    assert (config.segment_lengths, config.dilation_rates) == ([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.head_dim) == (
        768,
        12,
        12,
        64,
    )
    assert (config.position_embedding, config.position_period) == ("xpos", 32768)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_load(path):
    config = LongNetConfig.from_pretrained(path)
    given = json.loads(path.read_text())
    assert {name: getattr(config, name) for name in given} == given
    with torch.device("meta"):
        model = LongNetForCausalLM(config)
    assert model(torch.zeros(1, 3, dtype=torch.int64, device="meta")).logits.shape == (1, 3, config.vocab_size)


@pytest.mark.parametrize(("name", "millions"), [("125m", 85), ("350m", 303), ("760m", 680), ("2.7b", 2518)])
def test_the_papers_models_have_their_sizes(name, millions):
    """Millions in the blocks; with tied embeddings of GPT's vocabulary these are the sizes in the names."""
    (path,) = (p for p in CONFIGURATIONS if p.stem == f"longnet-{name}")
    config = LongNetConfig.from_pretrained(path)
    with torch.device("meta"):
        model = LongNetForCausalLM(config)
    assert round(sum(p.numel() for p in model.model.layers.parameters()) / 1e6) == millions


def test_from_pretrained_reads_the_same_weights_longer(tmp_path):
    """segment_lengths and dilation_rates given beside the folder: other branches, same weights."""
    make_model(LongNetForCausalLM).save_pretrained(tmp_path)
    longer = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}
    model = LongNetForCausalLM.from_pretrained(tmp_path, **longer)
    assert (model.config.segment_lengths, model.config.dilation_rates) == ([8, 32], [1, 4])
    expected = make_model(LongNetForCausalLM, **longer)
    ids = torch.randint(0, 29, (2, 41))
    assert torch.equal(model(ids).logits, expected(ids).logits)
    with refused("[4, 8]"):
        LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[4, 8])
    with refused("xpos_scale_base=512", "or more"):
        LongNetForCausalLM.from_pretrained(tmp_path, segment_lengths=[1 << 24], dilation_rates=[1])
