"""Mutation run: change one operator or number of a module at a time, and see its tests fail.

    python -m tests.mutate branches packing          # all mutants of two modules
    python -m tests.mutate --sample 100 --seed 1     # some of all modules

Each mutant runs in a forked process in which PyTorch and pytest are already imported, first the tests that found the
last mutants, as they often find the next one. If no test fails, the mutant has survived. Known equivalent mutants are
in `mutants_equivalent.json` with the reason; any other survivor makes the run fail. Results go to --output, also those
of an interrupted run, which resumes from it.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.json")
# The tests that see each module; together they take seconds.
TARGETS = {
    "branches": ["test_branches.py", "test_patterns.py"],
    "pattern": ["test_config.py", "test_patterns.py"],
    "products": ["test_patterns.py"],
    "packing": ["test_packing.py", "test_cache.py"],
    "positions": ["test_positions.py"],
    "sharding_plan": ["test_sharding.py"],
    "attention_autograd": ["test_dilated_attention.py"],
    "backend_strided": ["test_dilated_attention.py"],
    "cache_longnet": ["test_cache.py"],
    "attention_context": ["test_packing.py", "test_cache.py"],
}
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip
KILLERS = 5  # tests that run before the others
USAGE_ERROR = 4  # pytest's exit code
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Mutant:
    """One change of a module, named by its line of code: `apply` returns the changed tree."""

    def __init__(self, tree: ast.Module, place: tuple[int, str], line: str, text: str):
        self.tree, self.place, self.name = tree, place, f"{line}: {text}"

    def apply(self) -> ast.Module:
        tree = copy.deepcopy(self.tree)
        number, change = self.place
        _change(list(ast.walk(tree))[number], change)
        return ast.fix_missing_locations(tree)


def _changes(node: ast.AST) -> list[str]:
    """Return the changes of a node that are possible."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        return ["operator"] if type(node.op) in SWAPS else []
    if isinstance(node, ast.Compare):
        return ["compare"] if type(node.ops[0]) in SWAPS else []
    if isinstance(node, ast.UnaryOp):
        return ["negation"] if isinstance(node.op, ast.USub | ast.Not) else []
    if isinstance(node, ast.Constant) and not isinstance(node.value, str):
        return ["flip"] if isinstance(node.value, bool) else ["plus one"] if isinstance(node.value, int) else []
    if isinstance(node, ast.Name):
        return ["name"] if node.id in NAMES else []
    return ["branch"] if isinstance(node, ast.IfExp) else []


def _change(node: ast.AST, change: str) -> None:
    if change == "operator":
        node.op = SWAPS[type(node.op)]()
    elif change == "compare":
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif change == "negation":
        node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
        node.operand = node.operand if isinstance(node.op, ast.UAdd) else ast.UnaryOp(ast.Not(), node.operand)
    elif change == "flip":
        node.value = not node.value
    elif change == "plus one":
        node.value += 1
    elif change == "name":
        node.id = NAMES[node.id]
    else:
        node.body, node.orelse = node.orelse, node.body


def mutants(module: str) -> Iterator[Mutant]:
    """Yield all mutants of a module; annotations, decorators and error messages stay."""
    source = (ROOT / "modeling_longnet" / f"{module}.py").read_text()
    tree, lines = ast.parse(source), source.splitlines()
    skipped = set()
    for node in ast.walk(tree):
        parts = [node] if isinstance(node, ast.Raise | ast.JoinedStr) else []
        parts += [getattr(node, name, None) for name in ("annotation", "returns")]
        parts += getattr(node, "decorator_list", [])
        parts += [node] if isinstance(node, ast.keyword) and node.arg == "strict" else []
        skipped |= {id(x) for part in parts if isinstance(part, ast.AST) for x in ast.walk(part)}
    for number, node in enumerate(ast.walk(tree)):
        for change in [] if id(node) in skipped else _changes(node):
            text = f"{ast.unparse(node)} [{change}]"
            yield Mutant(tree, (number, change), lines[node.lineno - 1].strip(), text)


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Load one module of the package from a changed tree."""

    def __init__(self, module: str, tree: ast.Module):
        self.name, self.tree = f"modeling_longnet.{module}", tree

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        file = str(ROOT / "modeling_longnet" / f"{name.split('.')[1]}.py")
        return importlib.util.spec_from_file_location(name, file, loader=self)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.tree, module.__file__, "exec"), module.__dict__)


class _FirstFailure:
    """A plugin of pytest that writes the name of the first test that fails."""

    def __init__(self, file: int):
        self.file = file

    def pytest_runtest_logreport(self, report):
        if report.failed:
            os.write(self.file, f"{report.nodeid}\n".encode())


def run(module: str, tree: ast.Module, seconds: float, first: list[str]) -> str:
    """Run the module's tests with a changed tree; return "killed", "survived" or "too slow".

    The tests `first` run before the others. A test that fails becomes the first of them.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        sys.meta_path.insert(0, _Loader(module, tree))
        import pytest

        files = [str(ROOT / "tests" / name) for name in TARGETS[module]]
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
        code = pytest.main([*options, *first, *files], plugins=[_FirstFailure(writing)])
        os._exit(int(code))
    os.close(writing)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    with os.fdopen(reading) as file:
        name = file.readline().rstrip()
    if name:
        first[:] = [name, *(x for x in first if x != name)][:KILLERS]
    if not done:
        return "too slow"
    if first and not name and os.waitstatus_to_exitcode(status) == USAGE_ERROR:  # it has no test of such a name
        return run(module, tree, seconds, first=[])
    return "survived" if status == 0 else "killed"


def main(arguments: list[str] | None = None) -> int:
    """Run, print the survivors, and return 1 if one is not known to be equivalent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TARGETS)}; default all")
    parser.add_argument("--sample", type=int, help="mutants of each module; default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=120, help="limit of one mutant's tests")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "mutation.json")
    args = parser.parse_args(arguments)
    if unknown := set(args.modules) - set(TARGETS):
        parser.error(f"unknown modules {sorted(unknown)}; allowed are {', '.join(TARGETS)}")
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    known = json.loads(EQUIVALENT.read_text())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    for name in ("pytest", "hypothesis", "torch", "transformers", "accelerate", "safetensors.torch", "torch._dynamo"):
        __import__(name)  # in this process, once
    for module in args.modules or TARGETS:
        chosen = list(mutants(module))
        if args.sample is not None and args.sample < len(chosen):
            chosen = random.Random(args.seed).sample(chosen, args.sample)
        first = []
        unchanged = run(module, chosen[0].tree, args.seconds, first)
        assert unchanged == "survived", f"the tests of {module} without a change: {unchanged}, {first}"
        for mutant in tqdm(chosen, desc=module):
            key = f"{module}: {mutant.name} #{mutant.place[0]}"
            if key not in results:
                results[key] = run(module, mutant.apply(), args.seconds, first)
                args.output.write_text(json.dumps(results, indent=1) + "\n")
    survivors = [key for key, result in results.items() if result == "survived"]
    new = [key for key in survivors if key.rsplit(" #", 1)[0] not in known]
    print("\n".join([*(f"survived: {key}" for key in new), str(dict(Counter(results.values())))]))
    return bool(new)


if __name__ == "__main__":
    sys.exit(main())
