"""What SECURITY.md says of the code that a saved folder carries: no network, no processes, no writes elsewhere."""

import ast
import json
import re
import shutil

import pytest
import torch
from checks import make_model
from test_hub import ROOT, run_python
from transformers import AutoConfig

from modeling_longnet import (
    LongNetForCausalLM,
    LongNetImageConfig,
    LongNetImageEncoder,
    LongNetSlideConfig,
    LongNetSlideEncoder,
)

# The hook is set after `import transformers`; a folder's code runs later. Two caches belong to others: Transformers
# copies the code to HF_HOME/modules, and PyTorch's compiler makes its folder when it is imported, and leaves it empty.
WATCH = """
import os, sys
sys.dont_write_bytecode = True
source, work = sys.argv[1:3]
caches = os.environ["HF_HOME"] + "/modules", os.environ["TORCHINDUCTOR_CACHE_DIR"]
allowed = [os.path.realpath(path) for path in (work, *caches)]
seen = []

def is_inside(path, folder=-1):
    if folder >= 0:  # shutil.rmtree names a file by its folder's descriptor
        path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
    path = os.path.realpath(os.fsdecode(path))
    return any(path == folder or path.startswith(folder + os.sep) for folder in allowed)

def hook(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.", "subprocess.", "pty.")) or event in (
        "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill",
    ):
        seen.append(event)
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        mode, flags = arguments[1:]
        writes = any(x in mode for x in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and os.fsdecode(arguments[0]) != os.devnull and not is_inside(arguments[0]):
            seen.append(f"open {os.fsdecode(arguments[0])}")
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"):
        folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1
        if isinstance(arguments[0], (str, bytes, os.PathLike)) and not is_inside(arguments[0], folder):
            seen.append(f"{event} {arguments[0]}")
    elif event in ("os.rename", "os.link", "os.symlink"):
        if not is_inside(arguments[1]) or (event == "os.rename" and not is_inside(arguments[0])):
            seen.append(f"{event} {arguments[0]} {arguments[1]}")

sys.addaudithook(hook)
remote = {"trust_remote_code": True}
"""

USE = """
model = AutoModelForCausalLM.from_pretrained(source + "/text", **remote)
ids = torch.arange(2, 28)[None]
AutoConfig.from_pretrained(source + "/text", **remote)
AutoModel.from_pretrained(source + "/text", **remote)(ids)
model(ids, labels=ids).loss.backward()
model.generate(ids, max_new_tokens=5)
model.set_attn_implementation("eager")
model(ids, output_attentions=True)
model.save_pretrained(work + "/again", max_shard_size="20KB")
AutoModelForCausalLM.from_pretrained(work + "/again", **remote)
slide = AutoModel.from_pretrained(source + "/slide", **remote)
slide(torch.randn(1, 7, 10), torch.zeros(1, 7, 2), attention_queries=[0])
slide.save_pretrained(work + "/slide")
image = AutoModel.from_pretrained(source + "/image", **remote)
image(torch.randn(1, 3, 32, 32))
image.save_pretrained(work + "/image")
print(json.dumps(seen))
"""

# What a folder's code might do, and what the hook then sees; FILE lies outside of the folders given.
HARM = {
    "__import__('socket').socket().close()": "socket.__new__",
    "__import__('subprocess').run(['true'])": "subprocess.Popen",
    "__import__('os').system('true')": "os.system",
    "open(FILE, 'w').close()": "open FILE",
    "__import__('os').close(__import__('os').open(FILE, 64))": "open FILE",
    "__import__('os').mkdir(FILE + '.d')": "os.mkdir FILE.d",
    "__import__('os').rename(FILE, FILE + '.new')": "os.rename FILE FILE.new",
    "__import__('os').remove(FILE + '.new')": "os.remove FILE.new",
    "__import__('os').symlink(__file__, FILE)": "os.symlink CODE FILE",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved folder of each kind of model."""
    source = tmp_path_factory.mktemp("source")
    branches = {"segment_lengths": [4, 16], "dilation_rates": [1, 2]}
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6} | branches
    make_model(LongNetForCausalLM, torch.float32, eos_token_id=1).save_pretrained(source / "text")
    LongNetSlideEncoder(LongNetSlideConfig(**sizes, tile_features=10)).save_pretrained(source / "slide")
    LongNetImageEncoder(LongNetImageConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(source / "image")
    return source


def test_carried_code_opens_no_socket_starts_nothing_and_writes_nowhere_else(folders, tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    settings = {"home": home, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiler")}
    assert run_python(WATCH + USE, folders, work, **settings) == []
    assert {path.name for path in home.iterdir()} == {"modules"}
    assert list(tmp_path.glob("compiler/*")) == []
    # The watch itself: the same folder, with lines that do harm.
    bad, outside = shutil.copytree(folders / "text", tmp_path / "bad"), tmp_path / "outside"
    lines = "\n".join(["", f"FILE = {str(outside)!r}", *HARM])
    (bad / "branches.py").write_text((bad / "branches.py").read_text() + lines)
    load = "AutoConfig.from_pretrained(sys.argv[3], **remote)\nprint(json.dumps(seen))"
    seen = run_python(WATCH + load, folders, work, bad, **settings)
    for line, expected in HARM.items():
        pattern = re.escape(expected).replace("FILE", re.escape(str(outside))).replace("CODE", ".*")
        assert any(re.fullmatch(pattern, event) for event in seen), f"{line} is not seen among {seen}"


FOREIGN = {
    "auto_map": {"AutoModel": "evil/repo--e.M", "AutoTokenizer": ["evil/repo--t.T", None], "AutoProcessor": "p.P"},
    "custom_pipelines": {"text-generation": {"impl": "evil/repo--p.P", "pt": ["AutoModel"]}},
}


def test_code_that_an_untrusted_config_names_is_not_carried_on(folders, tmp_path):
    bad = shutil.copytree(folders / "text", tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | FOREIGN))
    LongNetForCausalLM.from_pretrained(bad).save_pretrained(tmp_path / "model")
    AutoConfig.from_pretrained(bad).save_pretrained(tmp_path / "config")
    for folder in ("model", "config"):
        text = (tmp_path / folder / "config.json").read_text()
        assert "evil" not in text
        assert json.loads(text)["auto_map"] == config["auto_map"]


def test_code_of_a_trusted_folder_is_carried_on_without_that_of_others(folders, tmp_path):
    """Entries of a user's own class in the folder stay; the folder gets the code that `OWNER/NAME--` stood for."""
    trusted = shutil.copytree(folders / "text", tmp_path / "trusted")
    config = json.loads((trusted / "config.json").read_text())
    entries = {"AutoModelForPreTraining": "modeling_longnet.LongNetForMaskedLM", "AutoModel": "you/code--modeling.M"}
    (trusted / "config.json").write_text(json.dumps(config | {"auto_map": config["auto_map"] | entries}))
    load = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/trusted", trust_remote_code=True)
model.save_pretrained(sys.argv[1] + "/again")
print(json.dumps([type(model.config).__module__, json.load(open(sys.argv[1] + "/again/config.json"))["auto_map"]]))
"""
    module, auto_map = run_python(load, tmp_path, home=tmp_path)
    assert module.startswith("transformers_modules.")
    assert auto_map == config["auto_map"] | {"AutoModelForPreTraining": "modeling_longnet.LongNetForMaskedLM"}


def test_the_package_imports_nothing_of_the_network_and_runs_no_text():
    """Read from the code, so also where no test goes."""
    network = {"asyncio", "ftplib", "http", "httpx", "requests", "smtplib", "socket", "socketserver", "ssl", "urllib"}
    hub = {"ModelCard", "ModelCardData", "strict", "StrictDataclassError"}  # a file's text, a decorator, an error
    for path in (ROOT / "modeling_longnet").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names]
                roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
                roots = {root.split(".")[0] for root in roots}
                assert not roots & (network | {"subprocess", "multiprocessing", "webbrowser"}), path.name
                assert "huggingface_hub" not in roots or set(names) <= hub, path.name
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "os.system", "pickle.load"), path.name
                if called == "torch.load":
                    assert {k.arg: ast.unparse(k.value) for k in node.keywords}["weights_only"] == "True", path.name
