"""Run the tests with several versions of Python, PyTorch and Transformers, and keep what was run in docs/support.json.

    python -m tests.matrix                                   # every row below whose Python is on this machine
    python -m tests.matrix --rows "torch 2.14" --tests tests/test_model.py
    python -m tests.matrix --page                            # run nothing, only rewrite the tables

Each row has an environment of its own under .matrix/. The tables are in docs/support.md: the versions that
pyproject.toml allows, the rows that were run, the machines of the result files, and what `make fuzz` and
`python -m tests.mutate` recorded in docs/.
"""

import argparse
import json
import re
import shutil
import subprocess
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "support.json"
PAGE = ROOT / "docs" / "support.md"
FUZZ, MUTATION = ROOT / "docs" / "fuzz.json", ROOT / "docs" / "mutation.json"
REPORTS = [ROOT / "benchmarks" / "results", ROOT / "examples" / "paper" / "results"]
# Python, and what is installed before the package. A CUDA build of PyTorch runs on a machine without a GPU too.
ROWS = {
    "newest": ("python3.11", ["torch==2.13.0"]),
    "Transformers 5.17": ("python3.11", ["torch==2.13.0", "transformers==5.17.*"]),
    "torch 2.14": ("python3.11", ["torch==2.14.1"]),
    "torch 2.11": ("python3.11", ["torch==2.11.*"]),
    "Python 3.10": ("python3.10", ["torch==2.13.0"]),
    "Python 3.12": ("python3.12", ["torch==2.13.0"]),
    "Python 3.13": ("python3.13", ["torch==2.13.0"]),
}
VERSIONS = "import platform, torch, transformers; print(platform.python_version(), torch.__version__, {}, sep='\\n')"


def python_runs(python: str) -> bool:
    """Return whether the command starts. A version manager may hold a name on the path that runs nothing."""
    return shutil.which(python) is not None and not subprocess.run([python, "-V"], capture_output=True).returncode


def run_row(name: str, tests: list[str], workers: str) -> dict:
    """Install a row's environment, if it is not there, and run the tests in it."""
    python, packages = ROWS[name]
    if not python_runs(python):
        return {"not_run": f"not run: no {python} on that machine"}
    folder = ROOT / ".matrix" / name.replace(" ", "-")
    if not (folder / ".ready").exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [folder / "bin" / "pip", "install", "--quiet"]
        subprocess.run([*pip, *packages, "--editable", ".[examples,dev]"], cwd=ROOT, check=True)
        (folder / ".ready").touch()
    begin = time.monotonic()
    command = [folder / "bin" / "python", "-m", "pytest", "-q", "-n", workers, *tests]
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode not in (0, 1):  # no tests failed: pytest itself did
        raise SystemExit(
            f"row {name!r}: pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout[-400:])}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    script = VERSIONS.format("transformers.__version__")
    versions = subprocess.run([folder / "bin" / "python", "-c", script], capture_output=True, text=True, check=True)
    python_version, torch, transformers = versions.stdout.split()
    return {
        "python": python_version, "torch": torch, "transformers": transformers, **counts, "failures": failures,
        "tests": " ".join(tests) or "all", "minutes": round((time.monotonic() - begin) / 60, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }  # fmt: skip


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tabulate_bounds() -> str:
    """Return the table of versions that pyproject.toml allows."""
    text = (ROOT / "pyproject.toml").read_text()
    rows = [["Python", re.search(r'^requires-python = ">=(.+)"', text, re.MULTILINE)[1], "always"]]
    for name, needed in (("torch", "always"), ("transformers", "always"), ("accelerate", "always"),
                         ("triton", 'backend "triton"'), ("flash-attn", 'backend "flash_attn"')):  # fmt: skip
        rows.append([name, re.search(rf'"{name}>=([\d.]+)', text)[1], needed])
    return markdown(["", "oldest", "needed"], rows)


def tabulate_rows(results: dict[str, dict]) -> str:
    """Return the table of the rows of `ROWS`: what was run, and what was not."""
    rows = []
    for name, (python, packages) in ROWS.items():
        row = results.get(name, {"not_run": "no record"})
        if "not_run" in row:
            rows.append([name, python.removeprefix("python"), " ".join(packages), row["not_run"], *" " * 4])
            continue
        failed = sum(row.get(word, 0) for word in ("failed", "error", "errors"))
        counts = [str(number) for number in (row.get("passed", 0), failed, row.get("skipped", 0))]
        versions = f"torch {row['torch']}, transformers {row['transformers']}"
        rows.append([name, row["python"], versions, row["tests"], *counts, row["date"][:10]])
    return markdown(["row", "Python", "packages", "tests", "passed", "failed", "skipped", "date"], rows)


def tabulate_reports(folders: list[Path]) -> str:
    """Return the table of the devices and versions with which result files were measured."""
    groups = {}
    for path in sorted(path for folder in folders for path in folder.rglob("*.json")):
        report = json.loads(path.read_text())
        if "versions" not in report:
            continue
        machine, versions = report["machine"], report["versions"]
        device = report.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
        key = (device, report["python"], versions["torch"], versions["transformers"])
        groups.setdefault(key, []).append((report["date"][:10], report.get("name", "paper")))
    rows = []
    for key, found in sorted(groups.items()):
        dates, names = sorted({date for date, _ in found}), sorted({name for _, name in found})
        rows.append([*key, ", ".join(f"`{name}`" for name in names), " to ".join(dict.fromkeys((dates[0], dates[-1])))])
    return markdown(["device", "Python", "PyTorch", "Transformers", "benchmarks", "date"], rows)


def tabulate_fuzz() -> str:
    """Return what `make fuzz ARGS='--record docs/fuzz.json'` counted."""
    if not FUZZ.exists():
        return "No record."
    record = json.loads(FUZZ.read_text())
    words = "passed", "refused", "failed"
    rows = [[kind, *(f"{x.get(word, 0):,}" for word in ("cases", *words))] for kind, x in record["kinds"].items()]
    total = [f"{sum(x.get(word, 0) for x in record['kinds'].values()):,}" for word in words]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    said = f"`{record['command']}` at commit {record['commit']}, {record['date']}: {versions}, seed {record['seed']}."
    return f"{said}\n\n" + markdown(["kind", "cases", *words], [*rows, ["all", f"{record['cases']:,}", *total]])


def tabulate_mutants() -> str:
    """Return what `python -m tests.mutate --output docs/mutation.json` found, by module."""
    if not MUTATION.exists():
        return "No record."
    counts = {}
    for key, result in json.loads(MUTATION.read_text()).items():
        counts.setdefault(key.partition(":")[0], Counter())[result] += 1
    words = sorted({word for found in counts.values() for word in found})
    return markdown(
        ["module", "mutants", *words],
        [[f"`{name}`", str(sum(x.values())), *(str(x[word]) for word in words)] for name, x in sorted(counts.items())],
    )


def render(page: str, results: dict[str, dict], folders: list[Path]) -> str:
    """Return the page with its tables replaced."""
    tables = {"bounds": tabulate_bounds(), "rows": tabulate_rows(results), "reports": tabulate_reports(folders)}
    tables |= {"fuzz": tabulate_fuzz(), "mutants": tabulate_mutants()}
    for name, content in tables.items():
        begin, end = f"<!-- matrix:{name} -->\n", f"\n<!-- end:{name} -->"
        before, found, rest = page.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"{PAGE.name} has no markers {begin.strip()} and {end.strip()}.")
        page = before + begin + content + rest[rest.index(end) :]
    return page


def main() -> None:
    """Run the rows asked for, and write the file and the page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--tests", nargs="*", default=[], help="files or pytest options; default all tests")
    parser.add_argument("--workers", default="2")
    parser.add_argument("--page", action="store_true", help="run nothing, only rewrite the tables of docs/support.md")
    args = parser.parse_args()
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in () if args.page else args.rows:
        results[name] = run_row(name, args.tests, args.workers)
        FILE.write_text(json.dumps(results, indent=1) + "\n")
        print(name, results[name])
        PAGE.write_text(render(PAGE.read_text(), results, REPORTS))
    if args.page:
        PAGE.write_text(render(PAGE.read_text(), results, REPORTS))


if __name__ == "__main__":
    main()
