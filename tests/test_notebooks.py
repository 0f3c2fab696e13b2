"""The notebooks: they run from top to bottom at toy size, and keep the outputs of a whole run."""

import ast
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.stem for path in (ROOT / "examples" / "notebooks").glob("*.ipynb"))
# What each shows in the end, at any size.
SHOWN = {
    "llama_with_lora": ["logits differ by at most", "the cache holds"],
    "own_data": ["eval_loss"],
    "push_to_hub": ["loads, with the same logits", "not pushed"],
    "read_a_book": ["perplexity", "[...]"],
    "slide": ["slide embedding: (1, 96)"],
    "two_processes": ["the same to 12 digits"],
}
STARTS_PROCESSES = {"push_to_hub", "two_processes"}
CASES = [pytest.param(x, marks=pytest.mark.notebooks if x in STARTS_PROCESSES else ()) for x in NOTEBOOKS]


def read(name: str) -> dict:
    return json.loads((ROOT / "examples" / "notebooks" / f"{name}.ipynb").read_text("utf-8"))


def code_cells(name: str) -> list[dict]:
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_runs(name, tmp_path, monkeypatch, capsys):
    """Cell by cell, with the sizes that its metadata name for a toy run."""
    for needed in {"llama_with_lora": ["peft"], "slide": ["h5py"]}.get(name, []):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    names, toy = {"__name__": "__main__"}, read(name)["metadata"]["toy"]
    for number, cell in enumerate(code_cells(name)):
        exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert not toy.keys() - names.keys()
            names.update(toy)
    shown = capsys.readouterr().out
    assert all(words in shown for words in SHOWN[name]), shown


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_keeps_the_outputs_of_one_whole_run(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [x for cell in cells for x in cell["outputs"] if x["output_type"] == "error"]
    shown = "".join("".join(x.get("text", "")) for cell in cells for x in cell["outputs"])
    assert all(words in shown for words in SHOWN[name])
    for cell in cells:
        assert bool(cell["outputs"]) == _shows("".join(cell["source"])), cell["source"]


def _shows(source: str) -> bool:
    """Return whether a cell prints, draws or shows a bar when it runs."""
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    return bool(called & {"print", "plt.show"})
