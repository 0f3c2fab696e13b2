"""Cases made of recorded choices: run one, shrink a failing one, replay it.

A case is a function of a `Draw`. The draw records every choice as its distance from the least value, so a list of small
integers is a case too. Shrinking deletes and lowers these integers while the failure stays of the same type.
"""

import faulthandler
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.utils.logging import disable_progress_bar

# What a refusal may be, in any file or argument.
CLEAR = (ValueError, OSError, StrictDataclassError)


class Draw:
    """The choices of a case: from a seed, or replayed from a list, where missing ones are the least.

    Attributes:
        choices: what was drawn so far. notes: what the case said about itself.
    """

    def __init__(self, seed: int | None = None, choices: Sequence[int] | None = None):
        self._random, self._given = random.Random(seed), choices
        self.choices: list[int] = []
        self.notes: list[str] = []

    def integer(self, low: int, high: int) -> int:
        """Return an integer in [low, high]; it shrinks to `low`."""
        if self._given is None:
            value = self._random.randint(0, high - low)
        else:
            place = len(self.choices)
            value = min(self._given[place], high - low) if place < len(self._given) else 0
        self.choices.append(value)
        return low + value

    def choice(self, options: Sequence):
        """Return one of the options; it shrinks to the first."""
        return options[self.integer(0, len(options) - 1)]

    def flag(self, chance: float = 0.5) -> bool:
        """Return True with this chance; it shrinks to False."""
        return self.integer(0, 999) >= 1000 * (1 - chance)

    def several(self, options: Sequence, most: int) -> list:
        """Return 1 to `most` of the options, with repetition."""
        return [self.choice(options) for _ in range(self.integer(1, most))]

    def data(self, count: int) -> bytes:
        """Return random bytes."""
        return random.Random(self.integer(0, 1 << 20)).randbytes(count)

    def note(self, name: str, value: object) -> None:
        """Say what the case is, for the report of a failure."""
        self.notes.append(f"{name}: {value}"[:2000])


class Refused(Exception):
    """The input was refused by a clear error."""


@contextmanager
def may_refuse(*others: type[Exception]):
    """Let the block refuse its input: by a `CLEAR` error, or one of `others`, that says something."""
    try:
        yield
    except (*CLEAR, *others) as error:
        if len(str(error)) < 8:
            raise AssertionError(f"{type(error).__name__} says nothing: {error}") from error
        raise Refused from error


class Outcome(NamedTuple):
    """The end of a case: status is "passed", "refused", "failed", "died" (the process did) or "hung"."""

    status: str
    choices: list[int]
    error: str = ""
    place: str = ""
    trace: str = ""
    notes: Sequence[str] = ()

    @property
    def is_failure(self) -> bool:
        return self.status not in ("passed", "refused")

    @property
    def signature(self) -> tuple[str, ...]:
        """What two failures of one cause have in common."""
        return self.status, self.error.split(":")[0], self.place


def run_case(case: Callable[[Draw], object], draw: Draw) -> Outcome:
    """Run a case in this process."""
    try:
        torch.manual_seed(draw.integer(0, 1 << 16))
        case(draw)
    except Refused:
        return Outcome("refused", draw.choices, notes=draw.notes)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/engine.py" not in f.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        said, trace = f"{type(error).__name__}: {error}"[:2000], "".join(traceback.format_exception(error))[-8000:]
        return Outcome("failed", draw.choices, said, place, trace, draw.notes)
    return Outcome("passed", draw.choices, notes=draw.notes)


def shrink(outcome: Outcome, run: Callable[[list[int]], Outcome], seconds: float) -> Outcome:
    """Return the failure with fewer and lower choices, as far as it gets in the given time."""
    end, best = time.monotonic() + seconds, outcome

    def improves(choices: list[int]) -> bool:
        nonlocal best
        if time.monotonic() > end or _order(choices) >= _order(best.choices):
            return False
        found = run(choices)
        if found.signature[:2] != best.signature[:2] or _order(found.choices) >= _order(best.choices):
            return False
        best = found
        return True

    before = None
    while before != best.choices and time.monotonic() < end:
        before = best.choices
        for place in range(len(before)):
            for power in (None, *reversed(range(20))):  # to 0, then by ever smaller powers of 2
                while place < len(best.choices) and best.choices[place] >= (1 if power is None else 1 << power):
                    value = 0 if power is None else best.choices[place] - (1 << power)
                    if not improves([*best.choices[:place], value, *best.choices[place + 1 :]]):
                        break
        for size in (16, 8, 4, 2, 1):
            place = 0
            while place + size <= len(best.choices):
                if not improves(best.choices[:place] + best.choices[place + size :]):
                    place += 1
        for place in range(len(best.choices)):  # a count, and one of what it counts
            for other in range(place + 1, len(best.choices)):
                if other < len(best.choices) and best.choices[place] > 0:
                    fewer = [*best.choices[:place], best.choices[place] - 1, *best.choices[place + 1 :]]
                    improves(fewer[:other] + fewer[other + 1 :])
    return best


def _order(choices: list[int]) -> tuple:
    return len(choices), choices


class Worker:
    """Runs cases in a process of its own, which a crash, a hang or the memory limit may end.

    Args:
        kinds: returns the cases by name; a function of a module, as another process calls it.
        seconds: of a case, before the process is killed.
        memory: bytes of address space that cases may take beyond what the imports took.
    """

    def __init__(self, kinds: Callable[[], dict[str, Callable]], seconds: float = 60.0, memory: int = 4 << 30):
        self.kinds, self.seconds, self.memory = kinds, seconds, memory
        self._process = None
        self._log = tempfile.NamedTemporaryFile("r", suffix=".log")

    def run(self, kind: str, seed: int | None = None, choices: list[int] | None = None) -> Outcome:
        """Run a case from its seed or its choices; twice if the process was killed from outside, as by the system."""
        outcome = self._run(kind, seed, choices)
        return self._run(kind, seed, choices) if outcome.status == "died" and not outcome.place else outcome

    def _run(self, kind: str, seed: int | None, choices: list[int] | None) -> Outcome:
        if self._process is None:
            self._start()
        try:
            self._pipe.send((kind, seed, choices))
            if self._pipe.poll(self.seconds):
                return self._pipe.recv()
            status = "hung"
        except (EOFError, ConnectionError):
            status = "died"
        self.close()
        trace = Path(self._log.name).read_text(errors="replace")[-8000:]
        reason = re.search("Fatal Python error: (.*)", trace)
        given = choices if choices is not None else _choices_of(trace)
        return Outcome(status, given, f"the process {status}", reason[1] if reason else "", trace)

    def _start(self) -> None:
        context = _process_context(self.kinds.__module__)
        self._pipe, inner = context.Pipe()
        arguments = inner, self.kinds, self.memory, self._log.name, self.seconds
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        inner.close()
        if not self._pipe.poll(300) or self._pipe.recv() != "ready":
            raise RuntimeError("the worker did not start")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _process_context(module: str) -> multiprocessing.context.BaseContext:
    """Return what starts processes: where it can, from a server that has imported the module once."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload([module])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server looks nowhere else
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


_LAST_CHOICES = "choices: "


class _WrittenDraw(Draw):
    """Writes its choices to the log, for a process that does not live to tell them."""

    log = None

    def integer(self, low: int, high: int) -> int:
        value = super().integer(low, high)
        self.log.write(f"{self.choices[-1]} ")
        self.log.flush()
        return value


def _choices_of(log: str) -> list[int]:
    words = log.rsplit(_LAST_CHOICES, 1)[-1].split("\n")[0].split()
    return [int(word) for word in words if word.isdigit()]


def _serve(pipe, kinds, memory: int, log_name: str, seconds: float) -> None:
    cases = kinds()
    prepare_process()
    _limit_memory(memory)
    with open(log_name, "w") as log:
        faulthandler.enable(log)
        _WrittenDraw.log = log
        pipe.send("ready")
        while True:
            try:
                kind, seed, choices = pipe.recv()
            except EOFError:
                return
            log.seek(0)
            log.truncate()
            log.write(_LAST_CHOICES)
            faulthandler.dump_traceback_later(max(1.0, seconds - 5), file=log)
            outcome = run_case(cases[kind], _WrittenDraw(seed, choices))
            faulthandler.cancel_dump_traceback_later()
            try:
                pipe.send(outcome)
            except ConnectionError:  # the other process was killed
                return


def prepare_process() -> None:
    """One thread, and fresh memory that starts as NaN: what reads a value that nothing wrote then fails."""
    torch.set_num_threads(1)
    disable_progress_bar()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _limit_memory(more: int) -> None:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # not on Linux
        return
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
