"""A short run of the fuzzer, and what it does with a failure: shrink, replay, go on after a crash or a hang."""

import json
import os
import sys
import time

import pytest
import torch
from fuzz import __main__ as command
from fuzz import cases, engine

from modeling_longnet import backend_strided

# Cases of each kind: a few seconds in all.
COUNTS = {kind: 2 if kind in ("triton", "generation", "model card", "round trip") else 12 for kind in cases.CASES}


@pytest.mark.parametrize("kind", cases.CASES)
def test_a_short_run(kind):
    """The same cases in every run. `make fuzz` runs others."""
    for seed in range(COUNTS[kind]):
        outcome = engine.run_case(cases.CASES[kind], engine.Draw(seed))
        notes = "\n".join(outcome.notes)
        assert not outcome.is_failure, f"--replay '{kind}@{seed}'\n{notes}\n{outcome.trace}"


def test_every_kind_has_a_share():
    assert set(cases.WEIGHTS) == set(cases.CASES)


def test_a_wrong_merge_is_found_shrunk_and_replayed(monkeypatch, capsys):
    """With branches merged by equal weights, as the released code's gradient has them, few cases pass."""

    def merge(out, lse, other_out, other_lse):
        out.lerp_(other_out.to(out.dtype), 0.5)
        torch.logaddexp(lse, other_lse, out=lse)

    monkeypatch.setattr(backend_strided, "merge_", merge)
    found = (engine.run_case(cases.CASES["op"], engine.Draw(seed)) for seed in range(50))
    outcome = next(x for x in found if x.is_failure)
    small = engine.shrink(outcome, lambda x: engine.run_case(cases.CASES["op"], engine.Draw(choices=x)), 2)
    assert small.signature[:2] == outcome.signature[:2]
    assert (len(small.choices), small.choices) < (len(outcome.choices), outcome.choices)
    token = f"op:{'.'.join(map(str, small.choices))}"
    assert command.replay(token) == 1
    assert f"{token}: failed {small.error}" in capsys.readouterr().out
    monkeypatch.undo()
    assert command.replay(token) == 0


def needs_seven(draw):
    """Fails if any of up to 20 numbers is above 6, and another one is odd."""
    numbers = [draw.integer(0, 99) for _ in range(draw.integer(0, 20))]
    if max(numbers, default=0) > 6 and any(x % 2 for x in numbers):
        raise IndexError(f"found {numbers}")


def run_here(seed=None, choices=None):
    return engine.run_case(needs_seven, engine.Draw(seed, choices))


def test_shrinking_ends_at_the_smallest_case():
    outcome = next(x for x in (run_here(seed) for seed in range(99)) if x.is_failure)
    small = engine.shrink(outcome, lambda x: run_here(choices=x), 20)
    assert small.error == "IndexError: found [7]"
    assert small.choices == [0, 1, 7]  # PyTorch's seed, the count, the number


def test_a_draw_is_replayed_from_its_choices():
    def values(draw):
        return [draw.integer(3, 90), draw.choice("abc"), draw.flag(), draw.data(4), *draw.several("xyz", 5)]

    draw = engine.Draw(5)
    assert values(draw) == values(engine.Draw(5)) == values(engine.Draw(choices=draw.choices))
    assert values(engine.Draw(5)) != values(engine.Draw(6))
    least = values(engine.Draw(choices=[]))
    assert least[:3] + least[4:] == [3, "a", False, "x"]


@pytest.mark.parametrize(("error", "status"), [
    (ValueError("says what is wrong"), "refused"),
    (FileNotFoundError("there is no such file"), "refused"),
    (ValueError(""), "failed"),
    (KeyError("a key of some length"), "failed"),
    (RecursionError("maximum recursion depth"), "failed"),
])  # fmt: skip
def test_only_clear_errors_are_refusals(error, status):
    def case(draw):
        with engine.may_refuse():
            raise error

    assert engine.run_case(case, engine.Draw(0)).status == status


def crash(draw):
    draw.integer(0, 9)
    os.abort()


def hang(draw):
    draw.integer(0, 9)
    time.sleep(99)


def take_memory(draw):
    torch.ones(1 << 34)


def odd_cases():
    """For the worker, which finds them by name."""
    return {"crash": crash, "hang": hang, "memory": take_memory, "fine": lambda draw: draw.integer(0, 9)}


def test_a_worker_outlives_crashes_and_hangs():
    worker = engine.Worker(odd_cases, seconds=3.0)
    try:
        for kind, status in (("fine", "passed"), ("crash", "died"), ("hang", "hung"), ("fine", "passed")):
            outcome = worker.run(kind, seed=7)
            assert outcome.status == status, kind
            assert outcome.choices == engine.run_case(odd_cases()["fine"], engine.Draw(7)).choices, kind
        if sys.platform == "linux":
            assert "allocate" in worker.run("memory", seed=7).error
        worker._process.kill()  # as the system does when memory is short: the case is run again
        assert worker.run("fine", seed=7).status == "passed"
    finally:
        worker.close()


def test_the_command_counts_and_replays(tmp_path, monkeypatch, capsys):
    """A few cases: their counts as JSON, and one of them again."""
    output = tmp_path / "fuzz.json"
    given = ["--cases", "6", "--seed", "3", "--kinds", "op", "cache tensors", "--record", str(output)]
    monkeypatch.setattr(sys, "argv", ["fuzz", *given])
    assert command.main() == 0
    assert "seed 3" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert (result["cases"], result["failed"], result["failures"], result["seed"]) == (6, 0, [], 3)
    assert sum(kind["cases"] for kind in result["kinds"].values()) == 6
    for token in ("op@3", "op:0.1.2"):
        monkeypatch.setattr(sys, "argv", ["fuzz", "--replay", token])
        assert command.main() == 0
        printed = capsys.readouterr().out
        assert f"{token}: passed" in printed
        assert "layout, values: " in printed


def test_a_failure_is_reported_with_its_replay(tmp_path, monkeypatch, capsys):
    """Once for each cause, with the number of cases that ended so; the command then fails."""
    monkeypatch.setattr(command.Worker, "run", lambda self, kind, seed=None, choices=None: run_here(seed, choices))
    given = ["--cases", "20", "--seed", "0", "--kinds", "op", "--record", str(tmp_path / "fuzz.json")]
    monkeypatch.setattr(sys, "argv", ["fuzz", *given])
    assert command.main() == 1
    result = json.loads((tmp_path / "fuzz.json").read_text())
    [failure] = result["failures"]
    assert failure["replay"] == "op:0.1.7"
    assert result["failed"] == len(failure["seeds"]) == result["kinds"]["op"]["failed"] > 1
    assert "make fuzz ARGS='--replay \"op:0.1.7\"'" in capsys.readouterr().out
