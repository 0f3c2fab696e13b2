"""`python -m examples.paper.search` at toy size: recall; without a file of tokens the other cells are left out."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def search(*options: str, seconds: float) -> str:
    command = [sys.executable, "-m", "examples.paper.search", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_cells_left_over_do_not_keep_it_from_ending(tmp_path):
    """More of them than a pipe holds."""
    plan = json.dumps([["recall", 300, [1e-3], ["16/1 64/4", "w8 64/4:1 once"]]])
    assert "600 of 600 cells" in search("--output", str(tmp_path), "--minutes", "0", "--plan", plan, seconds=120)


def test_recall_at_toy_size_runs_once(tmp_path):
    options = "--quick", "--output", str(tmp_path)
    assert "3 of 6 cells" in search(*options, seconds=300)
    assert len(list(tmp_path.glob("recall-*.json"))) == 3
    assert "0 of 6 cells" in search(*options, seconds=120)
