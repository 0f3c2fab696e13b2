"""Project rules that a machine can check: imports, configurations, the file tree, hosts."""

import ast
import importlib
import json
import re
import statistics
import subprocess
from pathlib import Path

import pytest

from modeling_longnet import LongNetConfig

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "modeling_longnet"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
CONFIGURATIONS = sorted(path.name for path in (ROOT / "configuration").glob("*.json"))
MOST_LINES = 8129
# In two halves, so that this file does not hold what it looks for.
REGISTRY_HOSTS = (
    "py" + "pi.org",
    "python" + "hosted.org",
    "registry.npm" + "js.org",
    "npm" + "js.com",
    "crates" + ".io",
    "deb.debian" + ".org",
    "proxy.golang" + ".org",
    "download.py" + "torch.org",
)


def read_tree() -> list[str]:
    """Paths of the file tree in docs/design.md, in its order; folders end in a slash."""
    block = re.search(r"## Files.*?```text\n(.*?)```", (ROOT / "docs" / "design.md").read_text(), re.DOTALL)
    paths, folders = [], []
    for line in block[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name]
        paths.append("".join(folders))
    return paths


def tracked_files() -> list[str]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for path in listed.stdout.split("\0") if path and (ROOT / path).exists()]


def package_imports(module: str) -> list[tuple[int, str | None]]:
    """Every relative import of a module, wherever it stands: (level, module name)."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    return [(node.level, node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward(module):
    order = [Path(path).stem for path in read_tree() if path.startswith("modeling_longnet/") and path.endswith(".py")]
    assert module in order, f"{module}.py has no line in the file tree of docs/design.md"
    imported = {str(name) for _, name in package_imports(module)}
    wrong = sorted(imported - set(order[: order.index(module)]))
    assert not wrong, f"{module}.py stands above {wrong} in the tree of docs/design.md and imports from them"


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_carried_to_a_saved_folder(module):
    """Transformers copies what `from .name import thing` names, and nothing else."""
    for level, name in package_imports(module):
        assert level == 1, f"{module}.py imports from outside the flat package"
        assert name is not None, f"{module}.py: `from . import x` is not carried"
        assert "." not in name, f"{module}.py: sub-package {name} is not carried"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_import_public_names(path):
    """Of the package they import what its `__init__` or `testing.py` lists, and they leave `sys.path` alone."""
    text = path.read_text()
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom | ast.Import)]
    for node in imports:
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            assert not any(name.startswith("modeling_longnet.") for name in names), names
        elif not node.level and node.module.startswith("modeling_longnet"):
            assert node.module in ("modeling_longnet", "modeling_longnet.testing"), node.module
            assert set(names) <= set(importlib.import_module(node.module).__all__), names
    # The benchmark against TorchScale imports a clone.
    assert "sys.path" not in text or path.name == "peers.py"


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration_loads_and_says_what_the_file_says(name):
    path = ROOT / "configuration" / name
    loaded = LongNetConfig.from_pretrained(path).to_dict()
    written = json.loads(path.read_text())
    assert {key: loaded[key] for key in written} == written


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("longnet-125m.json", 125),
        ("longnet-350m.json", 350),
        ("longnet-760m.json", 760),
        ("longnet-2.7b.json", 2700),
    ],
)
def test_configuration_has_the_papers_size(name, millions):
    """Without the vocabulary's share, which depends on the tokenizer and on tying."""
    config = LongNetConfig.from_pretrained(ROOT / "configuration" / name)
    block = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    blocks = config.num_hidden_layers * block / 1e6
    assert 0.65 * millions < blocks < millions


def functions(module: str) -> list[ast.FunctionDef]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    """Outside kernels: at most 60 lines, docstring included, and 10 parameters."""
    for node in functions(module) if module != "triton_kernels" else ():
        assert node.end_lineno - node.lineno < 60, f"{module}.{node.name} has over 60 lines"
        names = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        count = len([name for name in names if name is not None and name.arg != "self"])
        assert count <= 10, f"{module}.{node.name} has {count} parameters"


def test_the_package_is_small():
    """Small enough to read in an evening."""
    lengths = [node.end_lineno - node.lineno + 1 for module in MODULES for node in functions(module)]
    assert statistics.median(lengths) <= 10
    assert sum(len((PACKAGE / f"{module}.py").read_text().splitlines()) for module in MODULES) <= MOST_LINES


@pytest.mark.parametrize("module", [module for module in MODULES if module != "triton_kernels"])
def test_the_formatter_is_obeyed_outside_kernels(module):
    assert "fmt:" not in (PACKAGE / f"{module}.py").read_text()


def test_tree_names_what_is_there():
    missing = [path for path in read_tree() if not (ROOT / path).exists()]
    assert not missing


def test_tree_names_all_that_is_there():
    tree = read_tree()
    opened = {path.rsplit("/", 1)[0] + "/" for path in tree if not path.endswith("/")}
    unnamed = []
    for path in tracked_files():
        folder, _, name = path.rpartition("/")
        if not folder or name in ("__init__.py", "README.md"):
            continue
        if not any(p.endswith("/") and p not in opened and path.startswith(p) for p in tree):
            unnamed += [path] if path not in tree else []
    assert not unnamed


def test_no_registry_host_is_named():
    found = []
    for path in tracked_files():
        content = (ROOT / path).read_bytes()
        found += [f"{path}: {host}" for host in REGISTRY_HOSTS if host.encode() in content]
    assert not found
