"""Run the tests with several versions of Python, PyTorch and Transformers, and keep what was run in docs/support.json.

    python -m tests.matrix                                   # every row below whose Python is on this machine
    python -m tests.matrix --rows "torch 2.14" --tests tests/test_model.py

Each row has an environment of its own under .matrix/. docs/support.md is the table.
"""

import argparse
import json
import re
import shutil
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "support.json"
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


def run_row(name: str, tests: list[str], workers: str) -> dict:
    """Install a row's environment, if it is not there, and run the tests in it."""
    python, packages = ROWS[name]
    if shutil.which(python) is None:
        return {"skipped": f"no {python} on this machine"}
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


def table(results: dict[str, dict]) -> str:
    """Return the Markdown table of what was run."""
    lines = ["| row | Python | PyTorch | Transformers | tests | passed | failed | skipped | date |", "| --- |" * 1]
    lines[1] = "|" + " --- |" * 9
    for name, row in results.items():
        if "skipped" in row and isinstance(row["skipped"], str):
            lines.append(f"| {name} | not run: {row['skipped']} |" + " |" * 7)
            continue
        numbers = (str(row.get(word, 0)) for word in ("passed", "failed", "skipped"))
        cells = [name, row["python"], row["torch"], row["transformers"], row["tests"], *numbers, row["date"][:10]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows asked for, and write the file and the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--tests", nargs="*", default=[], help="files or pytest options; default all tests")
    parser.add_argument("--workers", default="2")
    args = parser.parse_args()
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in args.rows:
        results[name] = run_row(name, args.tests, args.workers)
        FILE.write_text(json.dumps(results, indent=1) + "\n")
        header = "# What was run\n\n`python -m tests.matrix` writes this table.\n\n"
        FILE.with_suffix(".md").write_text(header + table(results) + "\n")
        print(table({name: results[name]}))


if __name__ == "__main__":
    main()
