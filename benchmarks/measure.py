"""How every benchmark measures: calls timed alternately, peak memory in a fresh process, the machine described."""

import ctypes
import json
import multiprocessing
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROOT = Path(__file__).resolve().parent.parent
GPU_LEAD = 20_000_000  # cycles, about 10 ms
Call = Callable[[], object]


class Spread(NamedTuple):
    """Median, smallest and largest of a list of samples."""

    median: float
    least: float
    most: float


def spread(samples: list[float]) -> Spread:
    """Return the spread of samples, or of the ratios of two contestants round by round."""
    return Spread(statistics.median(samples), min(samples), max(samples))


def seconds_of(call: Call) -> float:
    """Time one call, without freeing its result: wall-clock seconds, or the GPU's own once this process uses one.

    On a GPU the call is launched while the GPU is busy, as in a loop that is not launch-bound.
    """
    if torch.cuda.is_initialized():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(GPU_LEAD)  # the call is launched meanwhile
        begin.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result
    return end - begin


def launch_seconds(call: Call) -> float:
    """Return the seconds until a call on a GPU returns, before its work is done: the CPU time to launch it."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = call()
    end = time.perf_counter()
    torch.cuda.synchronize()
    del result
    return end - begin


def time_alternately(
    calls: dict[str, Call], *, seconds: float, least: int = 3, most: int = 20
) -> dict[str, list[float]]:
    """Time all calls once per round, in another order each round.

    Drift then cancels, and so does the effect of what the previous call left in the CPU's caches.

    Args:
        calls: the contestants. Each is called once before the clock starts.
        seconds: start no new round after so many seconds, once there were `least` rounds.
        least, most: bounds of the number of rounds.

    Returns:
        For each contestant the seconds of each round; index i is the same round for all.
    """
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    end = time.perf_counter() + seconds
    for number in range(most):
        if number >= least and time.perf_counter() > end:
            break
        for name in order.sample(list(calls), len(calls)):
            samples[name].append(seconds_of(calls[name]))
    return samples


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def resident_bytes() -> int:
    """Return this process's resident memory (Linux)."""
    return _status_bytes("VmRSS")


def highest_resident_bytes() -> int:
    """Return the peak of this process's resident memory (Linux)."""
    return _status_bytes("VmHWM")


def restart_highest_resident_bytes() -> None:
    """Reset the peak that `highest_resident_bytes` returns, if the system lets a process do so (Linux)."""
    if (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")


def _peak_here(prepare: Callable[..., Call], arguments: tuple) -> int:
    call = prepare(*arguments)
    call()  # loads the kernels and allocates their own buffers
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # give back the first call's memory, which the second would reuse uncounted
    restart_highest_resident_bytes()
    before = resident_bytes()
    result = call()
    peak = highest_resident_bytes()
    del result
    return peak - before


def peak_bytes(prepare: Callable[..., Call], *arguments: object) -> int | None:
    """Measure by how much one call raises the peak of resident (or GPU) memory; inputs are not counted.

    Args:
        prepare: a module-level function that makes the inputs, warms up, and returns the call.
        arguments: for `prepare`, picklable.

    Returns:
        Bytes; None on systems without Linux's resettable peak.
    """
    if torch.cuda.is_initialized():
        return _peak_here(prepare, arguments)  # the GPU's allocator counts bytes: no fresh process is needed
    if not Path("/proc/self/clear_refs").exists():
        return None
    # The fork server imports once and forks for each measurement, so a fresh process takes milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_longnet"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_here, prepare, arguments).result()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git(*arguments: str) -> str:
    """Return git's output in this repository, or "unknown" if it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def package_version(package: str) -> str:
    """Return the installed version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe_run(device: str = "cpu") -> dict[str, object]:
    """Return command, commit, date, versions and machine of this run, to be stored with its samples.

    The GPU's name is read only if `device` is a GPU: reading it makes this process measure the GPU's time and memory.
    """
    # Result files do not count as uncommitted changes.
    changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!examples/paper/results")
    words = sys.argv[1:]
    if "--output" in words:  # the output's place is no part of the command
        del words[words.index("--output") : words.index("--output") + 2]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "command": shlex.join(["python", "-m", "benchmarks.run", *words]),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in ("torch", "transformers", "triton", "flash-attn")},
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(memory / 2**30, 1),
            "system": platform.system(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
    }


def machine_slug(run: dict) -> str:
    """Return the machine of `describe_run` as part of a file name, such as "amd-epyc-2-cores", or the GPU if used."""
    words = (run["gpu"] or f"{run['machine']['cpu']} {run['machine']['cores']} cores").lower()
    return "-".join("".join(c if c.isalnum() else " " for c in words).split())


def write_json(path: Path, content: dict) -> None:
    """Write JSON at once, so that no reader sees half a file, not even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
