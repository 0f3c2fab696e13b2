"""The wheel and the sdist, and the files that state versions, the citation and the workflow."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import matrix
import pytest
import yaml

import modeling_longnet

ROOT = Path(__file__).resolve().parent.parent
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
PACKAGE = {f"modeling_longnet/{path.name}" for path in (ROOT / "modeling_longnet").glob("*.py")}
PACKAGE.add("modeling_longnet/py.typed")
IMPORT = """
import sys
sys.path.insert(0, sys.argv[1])
from importlib.metadata import version
import modeling_longnet
print(modeling_longnet.__file__, modeling_longnet.__version__, version("longnet-transformers"))
modeling_longnet.LongNetForCausalLM(modeling_longnet.LongNetConfig(
    vocab_size=7, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
    segment_lengths=[4], dilation_rates=[1]))
"""


def run(*command, folder: Path) -> str:
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """Build the sdist from a copy of the sources, then the wheel from the unpacked sdist: (sdist, wheel)."""
    folder = tmp_path_factory.mktemp("distributions")
    kept_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "output*", "runs", "results")
    shutil.copytree(ROOT, folder / "source", ignore=kept_out)
    run("-c", "from setuptools import build_meta; build_meta.build_sdist('..')", folder=folder / "source")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    pip = ("-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    run(*pip, "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(unpacked), folder=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_wheel_holds_the_package_and_its_license(distributions):
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    information = {name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert names - information == PACKAGE
    assert any(name.endswith("/LICENSE") for name in information)


def test_wheel_metadata(distributions):
    archive = zipfile.ZipFile(distributions[1])
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    for line in (f"Version: {VERSION}", "License-Expression: Apache-2.0", "License-File: LICENSE"):
        assert line in metadata.splitlines()


def test_sdist_holds_what_a_build_needs_and_no_tests(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "SECURITY.md"} | PACKAGE
    assert not wanted - names
    assert not [name for name in names if name.split("/")[0] in ("tests", "benchmarks", "examples")]


def test_wheel_installs_and_imports(distributions, tmp_path):
    """In a process whose first path is the installed copy, so that no checkout is imported instead."""
    site = tmp_path / "site"
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", str(site), str(distributions[1]), folder=tmp_path)
    path, version, metadata = run("-I", "-c", IMPORT, str(site), folder=tmp_path).split()
    assert Path(path) == site / "modeling_longnet" / "__init__.py"
    assert version == metadata == VERSION


def test_one_version_everywhere():
    newest = re.search(r"^## (\d\S*) - (\d{4}-\d{2}-\d{2})$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert modeling_longnet.__version__ == newest[1] == citation["version"] == VERSION
    assert citation["date-released"] == newest[2]


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format requires
    (paper,) = citation["references"]
    card = (ROOT / "modeling_longnet" / "model_card.py").read_text()
    assert paper["title"] in card.replace("{{", "").replace("}}", "")
    names = re.search(r"author  = \{\{(.*?)\}\}", card, re.DOTALL)[1]
    cited = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert cited == [name.strip() for name in " ".join(names.split()).split(" and ")]


def test_workflow_runs_commands_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = [step.split()[1] for step in steps if step.startswith("make ")]
    assert called
    assert set(called) <= targets


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_form_is_well_formed(name):
    """GitHub ignores a form without these fields, or with two fields of one id."""
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [element for element in form["body"] if element["type"] != "markdown"]
    assert all(element["type"] in ("input", "textarea", "dropdown", "checkboxes") for element in fields)
    assert all(element["attributes"]["label"] for element in fields)
    assert len({element["id"] for element in fields}) == len(fields)


def test_support_page_is_current():
    results = json.loads(matrix.FILE.read_text()) if matrix.FILE.exists() else {}
    page = matrix.PAGE.read_text()
    assert matrix.render(page, results, matrix.REPORTS) == page, "run `python -m tests.matrix --page`"


def test_support_table_counts_errors_as_failures():
    row = {"python": "3.10.1", "torch": "2.11.0", "transformers": "5.17.0", "tests": "all", "date": "2026-11-28T01:02",
           "passed": 7, "failed": 2, "error": 1, "skipped": 5}  # fmt: skip
    (line,) = [line for line in matrix.tabulate_rows({"Python 3.10": row}).splitlines() if "3.10.1" in line]
    assert [cell.strip() for cell in line.split("|")[5:8]] == ["7", "3", "5"]


def test_matrix_skips_a_python_that_does_not_start(tmp_path, monkeypatch):
    """A version manager's shim is on the path and fails."""
    (tmp_path / "python3.10").write_text("#!/bin/sh\nexit 127\n")
    (tmp_path / "python3.10").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert "not_run" in matrix.run_row("Python 3.10", [], "1")
