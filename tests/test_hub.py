"""A saved folder is whole: its code loads offline where this package and every optional library are missing."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checks import make_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_imports
from transformers.utils.hub import PushToHubMixin

from modeling_longnet import LongNetForCausalLM, LongNetModel, LongNetSlideConfig, LongNetSlideEncoder
from modeling_longnet.model_card import make_model_card

ROOT = Path(__file__).resolve().parent.parent

# In a process of its own: what a user's machine lacks cannot be imported there.
PRELUDE = """
import json, sys
MISSING = ("modeling_longnet", "flash_attn", "triton", "accelerate", "datasets", "evaluate", "matplotlib", "scipy")
for name in MISSING:
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
"""

LOAD = """
source, work = sys.argv[1:]
remote = {"trust_remote_code": True}
ids = load_file(work + "/expected.safetensors")["ids"]
config = AutoConfig.from_pretrained(source, **remote)
model = AutoModelForCausalLM.from_pretrained(source, **remote)
base = AutoModel.from_pretrained(source, **remote)
found = {
    "logits": model(ids).logits, "hidden": base(ids).last_hidden_state, "loss": model(ids, labels=ids).loss,
    "tokens": model.generate(ids[:1], max_new_tokens=25, do_sample=False),
}
model.set_attn_implementation("eager")
found["eager"] = model(ids, output_attentions=True).logits
model.set_attn_implementation("sdpa")
model.save_pretrained(work + "/again")
again = AutoModelForCausalLM.from_pretrained(work + "/again", **remote)
found["again"] = again(ids).logits
longer = AutoModelForCausalLM.from_pretrained(source, segment_lengths=[8, 32], dilation_rates=[1, 4], **remote)
found["longer"] = longer(ids).logits
save_file({name: x.detach().contiguous() for name, x in found.items()}, work + "/found.safetensors")
names = [type(x).__module__ for x in (config, model, base, again)]
loaded = [name for name in MISSING if sys.modules.get(name) is not None]
print(json.dumps({"names": names, "loaded": loaded}))
"""


def run_python(code, *arguments, home, **environment):
    """The last line that a fresh interpreter prints, as JSON; it works elsewhere and reads its own caches only."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_MODULES_CACHE", "TRANSFORMERS_CACHE")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)], cwd=home, env=env, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of a small language model, and what it should give."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    model = make_model(LongNetForCausalLM, torch.float32, eos_token_id=1)
    model.save_pretrained(folder)
    torch.manual_seed(0)
    ids = torch.randint(2, 29, (2, 37))
    with torch.no_grad():
        longer = make_model(LongNetForCausalLM, torch.float32, segment_lengths=[8, 32], dilation_rates=[1, 4])
        expected = {
            "ids": ids, "logits": model(ids).logits, "hidden": model.model(ids).last_hidden_state,
            "loss": model(ids, labels=ids).loss, "longer": longer(ids).logits,
            "tokens": model.generate(ids[:1], max_new_tokens=25, do_sample=False),
        }  # fmt: skip
    return folder, expected


def check_loading(source, expected, work):
    save_file(expected, work / "expected.safetensors")
    report = run_python(LOAD, source, work, home=work)
    found = load_file(work / "found.safetensors")
    for name in ("logits", "hidden", "loss", "tokens", "longer"):
        assert torch.equal(found[name], expected[name]), name
    assert torch.equal(found["again"], expected["logits"])
    torch.testing.assert_close(found["eager"], expected["logits"], rtol=1e-4, atol=1e-4)
    assert all(name.startswith("transformers_modules.") for name in report["names"]), report["names"]
    assert report["loaded"] == []


def test_a_local_folder_loads_without_the_package(saved, tmp_path):
    folder, expected = saved
    check_loading(folder, expected, tmp_path)
    again = {path.name for path in (tmp_path / "again").iterdir()}
    assert {path.name for path in folder.glob("*.py")} <= again
    assert (tmp_path / "again" / "README.md").read_text() == (folder / "README.md").read_text()


def test_a_hub_repository_loads_without_the_package(saved, tmp_path):
    """From the cache that a download leaves: there every file's imports are checked."""
    folder, expected = saved
    repository = tmp_path / "hub" / "models--me--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    check_loading("me/tiny", expected, tmp_path)


def test_a_base_models_folder_loads(tmp_path):
    model = make_model(LongNetModel, torch.float32, is_causal=False, vocab_size=None)
    model.save_pretrained(tmp_path / "base")
    embeds = torch.randn(1, 9, 24)
    with torch.no_grad():
        save_file(
            {"embeds": embeds, "hidden": model(inputs_embeds=embeds).last_hidden_state}, tmp_path / "x.safetensors"
        )
    report = run_python(
        """
model = AutoModel.from_pretrained(sys.argv[1] + "/base", trust_remote_code=True)
x = load_file(sys.argv[1] + "/x.safetensors")
print(json.dumps(torch.equal(model(inputs_embeds=x["embeds"]).last_hidden_state, x["hidden"])))
""",
        tmp_path, home=tmp_path,
    )  # fmt: skip
    assert report is True


def test_remote_code_beside_the_installed_package(saved, tmp_path):
    """Two copies of the code in one process: each works, and a cache made by one serves the other."""
    folder, _ = saved
    report = run_python(
        f"""
del sys.modules["modeling_longnet"]
sys.path.insert(0, {str(ROOT)!r})
import modeling_longnet
from transformers.dynamic_module_utils import get_class_from_dynamic_module
remote_class = get_class_from_dynamic_module("modeling_longnet.LongNetForCausalLM", sys.argv[1])
local = modeling_longnet.LongNetForCausalLM.from_pretrained(sys.argv[1])
remote = remote_class.from_pretrained(sys.argv[1])
ids = torch.arange(2, 21)[None]
with torch.no_grad():
    expected = local(ids).logits
    cache = modeling_longnet.LongNetCache(local.config)
    local(ids[:, :9], cache=cache)
    rest = remote(ids[:, 9:], cache=cache).logits
same = [torch.equal(remote(ids).logits, expected), torch.allclose(rest, expected[:, 9:], atol=1e-5)]
print(json.dumps([*same, remote_class is not modeling_longnet.LongNetForCausalLM]))
""",
        folder, home=tmp_path,
    )  # fmt: skip
    assert report == [True, True, True]


def test_what_a_folder_holds(saved):
    folder, _ = saved
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "README.md"} <= files
    assert {"modeling_longnet.py", "configuration_longnet.py", "cache_longnet.py"} <= files
    left_out = {"checkpoint_formats.py", "conversion.py", "dilate.py", "streaming.py", "testing.py", "__init__.py"}
    assert not left_out & files
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    for target in auto_map.values():
        module, name = target.split(".")
        tree = ast.parse((folder / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_every_carried_file_passes_the_import_scan(saved):
    """Transformers reads the files as text: whatever it finds must be installed wherever Transformers is."""
    folder, _ = saved
    required = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "yaml"}  # by Transformers
    allowed = required | set(sys.stdlib_module_names)
    for path in folder.glob("*.py"):
        assert set(get_imports(path)) <= allowed, path.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, path.name
                assert node.module, f"{path.name}: 'from . import' is not carried"
                assert (folder / f"{node.module}.py").exists(), f"{path.name} imports {node.module}"


def read_card(folder):
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_model_card_is_true(saved, tmp_path):
    folder, _ = saved
    model = make_model(LongNetForCausalLM, torch.float32)
    metadata, body = read_card(folder)
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["license"] == "apache-2.0"
    assert "custom_code" in metadata["tags"]
    for fact in (f"{model.num_parameters():,}", "(4, 1), (8, 2), (16, 4)", "causal decoder", "xpos", "2, 24, 6"):
        assert fact in body, fact
    assert "from transformers import AutoModelForCausalLM\n" in body
    assert "$" not in body
    make_model(LongNetModel, torch.float32, is_causal=False).save_pretrained(tmp_path)
    metadata, body = read_card(tmp_path)
    assert metadata["pipeline_tag"] == "feature-extraction"
    assert "bidirectional encoder" in body
    assert "from transformers import AutoModel\n" in body


def test_a_written_card_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    model = make_model(LongNetModel, torch.float32)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    for number, arguments in enumerate([{"is_main_process": False}, None]):
        folder = tmp_path / f"other {number}"
        model.save_pretrained(folder, **arguments) if arguments else model.save_pretrained(folder, False)
        assert not (folder / "README.md").exists()


def test_a_card_that_nobody_wrote_on_is_renewed(tmp_path):
    make_model(LongNetModel, torch.float32).save_pretrained(tmp_path)
    other = make_model(LongNetModel, torch.float32, segment_lengths=[32], dilation_rates=[1])
    other.save_pretrained(tmp_path)
    assert "(32, 1)" in read_card(tmp_path)[1]
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nTrained on my texts.\n")
    make_model(LongNetModel, torch.float32).save_pretrained(tmp_path)
    assert "(32, 1)" in read_card(tmp_path)[1]


def test_a_push_carries_the_card(tmp_path, monkeypatch):
    """Transformers writes its generic card into the folder right before the upload."""
    uploaded = []
    monkeypatch.setattr(
        PushToHubMixin,
        "_upload_modified_files",
        lambda self, folder, *args: uploaded.append(read_card(Path(folder))[1]),
    )
    generic = "---\ntags: []\n---\nThis model card has been automatically generated.\n"
    (tmp_path / "README.md").write_text(generic)
    make_model(LongNetModel, torch.float32)._upload_modified_files(tmp_path, "me/model", {})
    assert "(4, 1), (8, 2), (16, 4)" in uploaded[0]


def test_a_renewed_card_keeps_the_metadata(tmp_path):
    """Tags from `push_to_hub(tags=...)` and fields that a person added; the text is the new model's."""
    make_model(LongNetModel, torch.float32).save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    added = "license: mit\nlanguage: de\n"
    readme.write_text(readme.read_text().replace("license: apache-2.0\n", added).replace("tags:\n", "tags:\n- mine\n"))
    make_model(LongNetForCausalLM, torch.float32).save_pretrained(tmp_path)
    metadata, body = read_card(tmp_path)
    assert (metadata["license"], metadata["language"]) == ("mit", "de")
    assert {"mine", "longnet"} <= set(metadata["tags"])
    assert metadata["pipeline_tag"] == "text-generation"
    assert "AutoModelForCausalLM" in body


@pytest.mark.parametrize(
    "edit",
    [
        lambda card: card.replace("causal decoder", "causal decoder of my texts"),
        lambda card: card.replace("pipeline_tag:", "pipeline_tag: [:"),
        lambda card: card.replace("---\n", "", 1),
    ],
    ids=["a cell", "metadata that are no YAML", "no metadata"],
)
def test_an_edited_card_is_kept(tmp_path, edit):
    model = make_model(LongNetModel, torch.float32)
    model.save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(edit(readme.read_text()))
    edited = readme.read_text()
    make_model(LongNetModel, torch.float32, segment_lengths=[32], dilation_rates=[1]).save_pretrained(tmp_path)
    assert readme.read_text() == edited


@pytest.mark.parametrize("line", ["tags: 5", "self: 1", "1: 2", "ignore_metadata_errors: true", "a: " + "[" * 3000])
def test_metadata_that_are_no_model_cards_stop_no_save(line, tmp_path, caplog):
    card = f"---\n{line}\n---\nThis model card has been automatically generated.\n"
    (tmp_path / "README.md").write_text(card)
    make_model(LongNetModel, torch.float32).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    assert (tmp_path / "model.safetensors").exists()
    assert "README.md is kept" in caplog.text


def test_the_trainers_card_stays_behind_ours(tmp_path):
    """`Trainer.push_to_hub` replaces README.md right before the upload; the model's next save or push adds to it."""
    model = make_model(LongNetForCausalLM, torch.float32)
    model.save_pretrained(tmp_path)
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True))
    trainer.create_model_card(tags="mine")
    model.save_pretrained(tmp_path)
    metadata, body = read_card(tmp_path)
    assert {"mine", "generated_from_trainer", "longnet"} <= set(metadata["tags"])
    assert metadata["model-index"]
    assert body.index("trust_remote_code=True") < body.index("### Training hyperparameters")
    written = (tmp_path / "README.md").read_text()
    make_model(LongNetModel, torch.float32).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == written


def test_a_slide_encoders_card_says_that_it_diagnoses_nothing(tmp_path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    pattern = {"segment_lengths": [8], "dilation_rates": [1]}
    LongNetSlideEncoder(LongNetSlideConfig(tile_features=3, **sizes, **pattern)).save_pretrained(tmp_path)
    assert "diagnoses nothing" in read_card(tmp_path)[1]
    assert "diagnoses" not in str(make_model_card(make_model(LongNetModel, torch.float32)))
