"""Kills, full and read-only disks, too little memory, NaN, cut files, clocks and second writers: nothing is lost.

Tests marked `faults` take minutes: `make test-faults`. A child process is forked, so that it need not import PyTorch.
"""

import ast
import errno
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checks import make_model
from sharding_worker import TIMEOUT, launch, start
from test_streaming import make_model as make_reader
from test_streaming import make_tokens
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed

from examples import finetune
from modeling_longnet import (
    LongNetConfig,
    LongNetForCausalLM,
    Scored,
    convert_checkpoint,
    dilated_attention,
    export_checkpoint,
    stream,
    streaming,
    to_torchscale,
)
from modeling_longnet.backends import BACKENDS
from modeling_longnet.saving import merging

ROOT = Path(__file__).parent.parent
forks = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="needs os.fork, which CUDA does not survive"
)
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")
WEIGHTS = {"model.safetensors", "model.safetensors.index.json"}  # without one of them no weights load


@pytest.fixture(autouse=True, scope="module")
def _progress_bars_share_no_lock():
    """Between forked processes they do, and one that is killed while it holds the lock would stop the others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqdm, "_lock", threading.RLock(), raising=False)
        patch.setattr(tqdm, "monitor_interval", 0)
        yield


def fork(function, *arguments) -> int:
    """Start a function in a child process that ends with 0, or with 1 if it raises; return the process id."""
    child = os.fork()
    if child:
        return child
    try:
        function(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def wait(child: int, seconds: float = 60) -> int:
    """Return the child's exit code, or minus the signal that killed it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"a child process still ran after {seconds} seconds")


def count_down(changes: int) -> None:
    """Kill this process before its n-th change of a file or folder; the copies of the package's code do not count."""

    def hook(event: str, arguments: tuple) -> None:
        nonlocal changes
        is_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_write or event in CHANGES) and not str(arguments[0]).endswith((".py", ".pyc")):
            changes -= 1
            if changes == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_at(change: int, function, *arguments) -> bool:
    """Run a function in a child that is killed before its n-th change on disk; return False if it ended earlier."""
    code = wait(fork(lambda: (count_down(change), function(*arguments))))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def kill_after(seconds: float, function, *arguments) -> bool:
    """Run a function in a child that is killed after so many seconds; return False if it ended earlier."""
    child = fork(function, *arguments)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    code = wait(child)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def read(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, but for what a killed process may leave."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def logits_of(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return LongNetForCausalLM.from_pretrained(folder).eval()(torch.arange(2, 25)[None]).logits


class Saves(NamedTuple):
    """A folder that holds a former and a later save of two models, and a function that saves the later one."""

    folder: Path
    save: Callable[[Path], None]
    is_one_rename: bool

    def check(self, target: Path) -> bool:
        """Raise unless each file is whole and the model is the former or the later one; False if none loads."""
        folders = [self.folder / "former", self.folder / "later"]
        files, whole = read(target), [read(path) for path in folders]
        if files in whole:
            return True
        for name, content in files.items():
            assert content in [other.get(name) for other in whole], f"{name} is neither the former nor the later"
        if not WEIGHTS & files.keys():
            self.check_killed(target)
            return False
        found = logits_of(target)
        assert any(torch.equal(found, logits_of(path)) for path in folders)
        return True

    def check_killed(self, target: Path) -> None:
        """Raise unless the error names the folder that a kill left, whose files finish or undo the save."""
        with pytest.raises(OSError, match=r"no file named model\.safetensors") as raised:
            logits_of(target)
        [left] = leftovers(target)
        for name, model in (("new", "later"), ("former", "former")):
            assert str(target / left / name) in str(raised.value)
            mended = shutil.copytree(target, self.folder / "mended")
            for path in (mended / left / name).iterdir():
                path.replace(mended / path.name)
            assert torch.equal(logits_of(mended), logits_of(self.folder / model))
            shutil.rmtree(mended)


def small_model(seed: int, **fields) -> LongNetForCausalLM:
    return make_model(LongNetForCausalLM, torch.float32, seed=seed, **fields)


OTHER_BRANCHES = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}
SAVES = {  # fields of the later model, and the largest shard of the former and the later save
    "same config": ({}, "50GB", "50GB"),
    "other branches": (OTHER_BRANCHES, "50GB", "50GB"),
    "shards after one file": ({}, "50GB", "20KB"),
    "one file after shards": ({}, "20KB", "50GB"),
    "shards after shards": ({}, "20KB", "20KB"),
}


SLOW = ("one file after shards", "shards after shards")


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.faults) if name in SLOW else name for name in SAVES])
def saves(request, tmp_path) -> Saves:
    fields, before, after = SAVES[request.param]
    small_model(0).save_pretrained(tmp_path / "former", max_shard_size=before)
    later = small_model(1, **fields)
    later.save_pretrained(tmp_path / "later", max_shard_size=after)
    is_one_rename = request.param == "same config"
    return Saves(tmp_path, lambda folder: later.save_pretrained(folder, max_shard_size=after), is_one_rename)


@forks
def test_a_kill_in_save_pretrained_leaves_the_former_or_the_new_model(saves):
    """At every change on disk; Transformers itself would load the former weights of one file beside new shards."""
    change, refused = 1, []
    while True:
        target = shutil.copytree(saves.folder / "former", saves.folder / str(change))
        was_killed = kill_at(change, saves.save, target)
        if not saves.check(target):
            refused.append(target)
        if not was_killed:
            break
        change += 1
    assert change > 8
    assert (refused == []) == saves.is_one_rename
    assert read(target) == read(saves.folder / "later")
    assert leftovers(target) == []
    for target in refused:  # the left folder holds the only weights until others are saved
        LongNetConfig.from_pretrained(target).save_pretrained(target)
        saves.check_killed(target)
    for target in [saves.folder / "1", *(saves.folder / str(change // n) for n in (2, 3)), *refused]:
        saves.save(target)
        assert read(target) == read(saves.folder / "later")
        assert leftovers(target) == []


def save_with_errors(saves: Saves, target: Path, error: type, calls: range, after: bool = False) -> bool:
    """Save while these calls of os.replace raise, before or after the rename; return whether the save raised."""
    replace, number = os.replace, itertools.count(1)

    def fail(*paths):
        is_due = next(number) in calls
        if after or not is_due:
            replace(*paths)
        if is_due:
            raise error(errno.EIO, "on purpose")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", fail)
        try:
            saves.save(target)
        except error as caught:
            return "on purpose" in str(caught)
    return False


@pytest.mark.parametrize(("error", "after"), [(OSError, False), (KeyboardInterrupt, False), (KeyboardInterrupt, True)])
def test_an_error_in_any_rename_leaves_all_of_one_model(error, after, saves):
    whole = [read(saves.folder / name) for name in ("former", "later")]
    for call in range(1, 100):
        target = shutil.copytree(saves.folder / "former", saves.folder / str(call))
        if not save_with_errors(saves, target, error, range(call, call + 1), after):
            break
        assert read(target) in whole
        assert leftovers(target) == []
    assert call > 4
    assert read(target) == whole[1]


def test_an_error_in_undoing_too_leaves_the_weights_in_the_folder_that_loading_names(saves):
    refused = 0
    for call in range(1, 100):
        target = shutil.copytree(saves.folder / "former", saves.folder / str(call))
        if not save_with_errors(saves, target, OSError, range(call, 100)):
            break
        refused += not saves.check(target)
    assert call > 4
    assert (refused == 0) == saves.is_one_rename


@pytest.mark.parametrize("name", ["README.md", "config.json", "generation_config.json", "model.safetensors"])
def test_a_folder_in_the_way_of_a_file_is_refused_and_left(name, saves):
    target = shutil.copytree(saves.folder / "former", saves.folder / "target")
    (target / name).unlink(missing_ok=True)
    (target / name).mkdir()
    (target / name / "mine").write_text("mine")
    before = read(target)
    if name in read(saves.folder / "later"):
        with pytest.raises(OSError, match=f"could not save .*target.*{re.escape(name)}"):
            saves.save(target)
        assert read(target) == before
    assert (target / name / "mine").read_text() == "mine"
    assert leftovers(target) == []


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint of TorchScale's names, and what to tell about it."""
    model = small_model(0, head_offsets="blocked")
    to_torchscale(model, tmp_path / "foreign.safetensors")
    names = "num_attention_heads segment_lengths dilation_rates position_embedding is_causal hidden_act"
    names = [*names.split(), "embedding_scale", "xpos_scale_base"]
    return tmp_path / "foreign.safetensors", {name: getattr(model.config, name) for name in names}


@forks
def test_a_kill_in_a_conversion_leaves_no_folder_or_a_whole_one(foreign, tmp_path):
    source, fields = foreign
    convert_checkpoint(source, tmp_path / "whole", **fields)
    change, output = 1, tmp_path / "output"
    while kill_at(change, lambda: convert_checkpoint(source, output, **fields)):
        if output.exists():
            assert read(output) == read(tmp_path / "whole")
            shutil.rmtree(output)
        change += 1
    assert change > 8
    assert read(output) == read(tmp_path / "whole")


def open_text(path: Path, chunk_size: int = 50, save_seconds: float = 0):
    """A stream of 306 scores that saves its state after each chunk."""
    settings = {"state_file": path, "save_seconds": save_seconds, "progress": False}
    return stream(make_reader(), make_tokens(), chunk_size=chunk_size, **settings)


def read_text(path: Path, chunk_size: int = 100) -> None:
    for _ in open_text(path, chunk_size):
        pass


@forks
def test_a_kill_in_a_stream_leaves_a_state_that_resumes_to_the_same_bits(tmp_path):
    read_text(tmp_path / "whole")
    total = Scored.from_state_file(tmp_path / "whole").total
    change = 1
    while kill_at(change, read_text, tmp_path / str(change)):
        read_text(tmp_path / str(change))
        assert Scored.from_state_file(tmp_path / str(change)).total == total
        change += 1
    assert change > 8


def train(folder: Path) -> None:
    """Six steps by the stock Trainer, resumed from the last whole checkpoint; the weights go to `folder`/final."""
    set_seed(0)
    model = small_model(0).train()
    rows = [{"input_ids": x, "labels": x} for x in torch.randint(0, 29, (48, 31))]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=1, save_total_limit=3, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, learning_rate=1e-2, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    arguments.resume_from_checkpoint = "last"
    try:
        checkpoint = finetune.find_checkpoint(arguments)
    except ValueError:
        checkpoint = None
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    model.save_pretrained(folder / "final")


def check_checkpoints(folder: Path) -> None:
    """Every checkpoint that was written to its end loads, and so does its Trainer state."""
    for path in folder.glob("checkpoint-*"):
        if (path / "trainer_state.json").exists() and json.loads((path / "trainer_state.json").read_text() or "null"):
            LongNetForCausalLM.from_pretrained(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert wait(fork(train, folder)) == 0
    return read(folder / "final")["model.safetensors"]


@forks
@pytest.mark.parametrize("change", [60, 75])
def test_a_killed_training_resumes_to_the_same_bits(change, trained, tmp_path):
    assert kill_at(change, train, tmp_path)
    check_checkpoints(tmp_path)
    assert wait(fork(train, tmp_path)) == 0
    assert read(tmp_path / "final")["model.safetensors"] == trained


def seconds_of(function, *arguments) -> float:
    begin = time.perf_counter()
    assert wait(fork(function, *arguments)) == 0
    return time.perf_counter() - begin


@forks
@pytest.mark.faults
def test_random_kills_of_saves(saves):
    limit = seconds_of(saves.save, saves.folder / "timed")
    rng, killed, target = random.Random(0), 0, saves.folder / "target"
    for _ in range(40):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(saves.folder / "former", target)
        killed += kill_after(rng.uniform(0, limit), saves.save, target)
        saves.check(target)
    assert killed > 5


@forks
@pytest.mark.faults
def test_random_kills_of_conversions(foreign, tmp_path):
    source, fields = foreign
    convert_checkpoint(source, tmp_path / "whole", **fields)
    limit = seconds_of(lambda: convert_checkpoint(source, tmp_path / "timed", **fields))
    rng, killed, output = random.Random(0), 0, tmp_path / "output"
    for _ in range(60):
        shutil.rmtree(output, ignore_errors=True)
        killed += kill_after(rng.uniform(0, limit), lambda: convert_checkpoint(source, output, **fields))
        assert not output.exists() or read(output) == read(tmp_path / "whole")
    assert killed > 5


@forks
@pytest.mark.faults
def test_random_kills_of_a_stream(tmp_path):
    limit = seconds_of(read_text, tmp_path / "whole", 10)
    total = Scored.from_state_file(tmp_path / "whole").total
    rng, killed = random.Random(0), 0
    for number in range(20):
        state = tmp_path / str(number)
        while kill_after(rng.uniform(0, limit), read_text, state, 10):
            killed += 1
        assert Scored.from_state_file(state).total == total
    assert killed > 5


@forks
@pytest.mark.faults
def test_random_kills_of_a_training(trained, tmp_path):
    limit = seconds_of(train, tmp_path / "timed")
    rng, killed = random.Random(0), 0
    for number in range(10):
        folder = tmp_path / str(number)
        while kill_after(rng.uniform(0.3, 1) * limit, train, folder):
            killed += 1
            check_checkpoints(folder)
        assert read(folder / "final")["model.safetensors"] == trained
    assert killed > 5


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The final weights of a training on two gloo processes that nobody kills, and its seconds."""
    folder = tmp_path_factory.mktemp("sharded")
    begin = time.monotonic()
    launch("trainer", 2, folder, 6, processes=2)
    return torch.load(folder / "result.pt")["weights"], time.monotonic() - begin


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_rank_ends_the_other_with_an_error(rank, seed, sharded, tmp_path):
    """No launcher here that would end the survivor: it must find out by itself, whatever it does at that moment."""
    expected, _ = sharded
    jobs = start(["trainer", "2", str(tmp_path), "6"], 2, str(tmp_path))
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "checkpoint-2" / "trainer_state.json").exists():
            assert time.monotonic() < end, (tmp_path / "0.log").read_text()
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 0.3))
        assert jobs[rank].poll() is None, "the training ended before the kill"
        jobs[rank].kill()
        assert jobs[1 - rank].wait(timeout=TIMEOUT + 15) > 0
    finally:
        for job in jobs:
            job.kill()
    assert "Error" in (tmp_path / f"{1 - rank}.log").read_text()
    last = finetune.find_checkpoint(TrainingArguments(str(tmp_path), resume_from_checkpoint="last", use_cpu=True))
    launch("trainer", 2, tmp_path, 6, last, processes=2)
    resumed = torch.load(tmp_path / "result.pt")["weights"]
    assert all(torch.equal(resumed[name], x) for name, x in expected.items())


@pytest.fixture
def disk(tmp_path):
    """A disk of one megabyte, and a function that leaves it so many bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")

    def leave(free: int) -> None:
        (folder / "filler").unlink(missing_ok=True)
        found = os.statvfs(folder)
        (folder / "filler").write_bytes(bytes(max(0, found.f_bavail * found.f_bsize - free)))

    yield folder, leave
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_leaves_the_former_model(saves, disk):
    small, leave = disk
    target = small / "model"
    for free in (0, 50_000, 200_000, 330_000, 360_000):
        leave(1 << 20)
        shutil.copytree(saves.folder / "former", target)
        leave(free)
        with pytest.raises(OSError, match=r"could not save .*/disk/model.*No space left"):
            saves.save(target)
        assert read(target) == read(saves.folder / "former")
        assert leftovers(target) == []
        shutil.rmtree(target)
    leave(1 << 20)
    saves.save(target)
    assert read(target) == read(saves.folder / "later")


def test_a_full_disk_leaves_the_former_state(disk):
    small, leave = disk
    state = small / "state.safetensors"
    reader = open_text(state)
    next(reader), next(reader)
    leave(0)
    before = state.read_bytes()
    with pytest.raises(OSError, match=r"could not save .*state\.safetensors: .*No space left"):
        next(reader)
    assert state.read_bytes() == before
    assert leftovers(small) == []
    leave(1 << 20)
    (small / "filler").unlink()
    read_text(state)
    read_text(small.parent / "whole")
    assert Scored.from_state_file(state).total == Scored.from_state_file(small.parent / "whole").total


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_a_full_disk_leaves_no_half_export(name, disk):
    small, leave = disk
    leave(20_000)
    (small / name).write_bytes(b"the former one")
    with pytest.raises(OSError, match=f"could not save .*{name}.*(No space left|is the disk full)"):
        export_checkpoint(small_model(0, head_offsets="blocked"), "torchscale", small / name)
    assert (small / name).read_bytes() == b"the former one"
    assert leftovers(small) == []


def test_a_full_disk_leaves_no_half_conversion(foreign, disk):
    source, fields = foreign
    small, leave = disk
    leave(200_000)
    with pytest.raises(OSError, match=r"could not save .*No space left"):
        convert_checkpoint(source, small / "output", **fields)
    assert [path.name for path in small.iterdir()] == ["filler"]


def test_a_read_only_disk_is_refused_before_the_work(foreign, disk):
    """A stream must not find out after an hour."""
    source, fields = foreign
    small, _ = disk
    small_model(0).save_pretrained(small / "model")
    read_text(small / "state.safetensors")
    before = read(small / "model")
    subprocess.run(["mount", "-o", "remount,ro", small], check=True)
    with pytest.raises(ValueError, match="must be a file in a folder that exists and can be written to"):
        read_text(small / "state.safetensors")
    with pytest.raises(OSError, match="Read-only file system"):
        small_model(1).save_pretrained(small / "model")
    with pytest.raises(OSError, match="Read-only file system"):
        convert_checkpoint(source, small / "output", **fields)
    assert read(small / "model") == before
    LongNetForCausalLM.from_pretrained(small / "model")


def starve(function, *arguments) -> None:
    """Run a function with 64 MiB more memory than the process has; it must raise PyTorch's or Python's error."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20),) * 2)
    with pytest.raises((RuntimeError, MemoryError), match="memory"):
        function(*arguments)


@forks
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from Linux's /proc")
def test_too_little_memory_is_an_error_and_leaves_the_state(tmp_path):
    model, tokens = make_reader(), torch.randint(97, (400_000,))
    state = tmp_path / "state.safetensors"
    settings = {"state_file": state, "save_seconds": 0, "progress": False}
    reader = stream(model, tokens, chunk_size=50, **settings)
    next(reader), next(reader), reader.close()
    before = state.read_bytes()
    assert wait(fork(starve, lambda: next(stream(model, tokens, chunk_size=390_000, **settings)))) == 0
    assert state.read_bytes() == before
    assert next(stream(model, tokens, chunk_size=50, **settings)).start == 51


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nan_in_an_input_shows_in_the_loss_but_not_in_other_rows_or_from_padding(implementation):
    model = make_model(LongNetForCausalLM, implementation=implementation)
    ids = torch.randint(0, 29, (2, 37))
    embeds = model.get_input_embeddings()(ids).detach()
    clean = model(inputs_embeds=embeds).logits
    embeds[0, 20] = float("nan")
    model.train()
    loss = model(inputs_embeds=embeds.requires_grad_(), labels=ids).loss
    loss.backward()
    assert loss.isnan()
    assert model.lm_head.weight.grad.isnan().any()
    with torch.no_grad():
        model.eval()
        assert model(inputs_embeds=embeds, labels=ids).loss.isnan()
        logits = model(inputs_embeds=embeds).logits
        assert logits[0, 20].isnan().all()
        torch.testing.assert_close(logits[1], clean[1])
        if implementation == "eager":  # the dense reference multiplies what it masks by 0
            return
        mask = torch.ones_like(ids)
        mask[0, 20:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        assert model(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss.isfinite()


@pytest.mark.parametrize("backend", ["torch", "eager", "triton"])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("length", [1, 7, 15, 16, 43])
def test_nan_in_attention_shows_in_every_token_that_sees_it(length, which, backend):
    """PyTorch's CPU kernel hides it among fewer keys than a vector register holds."""
    if backend != "eager" and (reason := BACKENDS[backend].unavailable(torch.empty(1, 1, 1, 16))):
        pytest.skip(reason)
    for token in {0, length // 2, length - 1}:
        inputs = {name: torch.randn(1, 4 if name == "query" else 2, length, 16) for name in ("query", "key", "value")}
        inputs[which][0, 0, token, 3] = float("nan")
        for segment, branches in ((64, ([64], [1])), (8, ([8, 64], [1, 3]))):
            end = token + 1 if which == "query" else token // segment * segment + segment
            out = dilated_attention(**inputs, segment_lengths=branches[0], dilation_rates=branches[1], backend=backend)
            assert out[0, 0, token:end].isnan().any(-1).all()


NAMES = [name for name, _ in make_model(LongNetForCausalLM).named_parameters()]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nan_in_any_weight_shows_in_the_loss(implementation):
    ids = torch.arange(2, 27)[None]
    for name in NAMES:
        model = make_model(LongNetForCausalLM, implementation=implementation)
        with torch.no_grad():
            weight = model.get_parameter(name)
            (weight[3] if "embed" in name else weight.flatten()[3]).fill_(float("nan"))
            assert model(ids, labels=ids).loss.isnan(), name


def test_nan_in_a_weight_shows_in_a_stream(tmp_path):
    model = make_reader()
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    last = list(stream(model, make_tokens(), state_file=tmp_path / "state", progress=False))[-1]
    assert last.perplexity != last.perplexity
    assert Scored.from_state_file(tmp_path / "state").perplexity != last.perplexity


@pytest.mark.parametrize("cut", ["empty", "in the header", "half", "last byte", "missing"])
@pytest.mark.parametrize("shards", ["50GB", "20KB"], ids=["one file", "shards"])
def test_a_cut_file_of_weights_is_refused(shards, cut, tmp_path):
    small_model(0).save_pretrained(tmp_path, max_shard_size=shards)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    path.write_bytes(content[: {"empty": 0, "in the header": 99, "half": len(content) // 2}.get(cut, -1)])
    if cut == "missing":
        path.unlink()
    with pytest.raises(Exception, match=r"(?i)safetensors|header|incomplete|invalid|not.*(found|appear)"):
        LongNetForCausalLM.from_pretrained(tmp_path)


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """Saves are timed by the monotonic clock; no part of the repository measures seconds by the wall clock."""
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(streaming.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(time, "time", lambda: random.uniform(-1e12, 1e12))
    state = tmp_path / "state"
    reader = open_text(state, 30, save_seconds=25)
    saved = [Scored.from_state_file(state).count if state.exists() else 0 for _ in reader]
    assert saved == [0, 0, 0, 90, 90, 90, 180, 180, 180, 270, 270]
    assert Scored.from_state_file(state).count == 306


def test_nothing_measures_seconds_by_the_wall_clock():
    allowed = {"monotonic", "perf_counter", "process_time", "sleep"}
    folders = (ROOT / "modeling_longnet", ROOT / "examples", ROOT / "benchmarks")
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                assert node.attr in allowed, f"{path}:{node.lineno} uses time.{node.attr}"


@forks
def test_two_processes_that_save_to_one_folder_leave_one_whole_model(tmp_path, monkeypatch):
    """The later one replaces all that the other saved, the model card too; renames take their time here."""
    first, second = small_model(0), small_model(1, **OTHER_BRANCHES)
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second", max_shard_size="20KB")

    replace = os.replace

    def save(model, size):
        rng = random.Random(size)
        monkeypatch.setattr(os, "replace", lambda *paths: (time.sleep(rng.uniform(0, 0.004)), replace(*paths)))
        model.save_pretrained(tmp_path / "both", max_shard_size=size)

    for _ in range(6):
        children = [fork(save, first, "50GB"), fork(save, second, "20KB")]
        assert [wait(child) for child in children] == [0, 0]
        assert read(tmp_path / "both") in [read(tmp_path / "first"), read(tmp_path / "second")]
        assert leftovers(tmp_path / "both") == []


def test_a_save_says_that_another_process_saved_too(tmp_path, caplog):
    small_model(0).save_pretrained(tmp_path / "model")
    assert caplog.text == ""
    with merging(tmp_path / "model") as scratch:
        small_model(1).save_pretrained(tmp_path / "model")
        shutil.copy(tmp_path / "model" / "config.json", scratch)
    assert f"Another process saved to {tmp_path / 'model'} at the same time" in caplog.text


@forks
def test_two_conversions_to_one_folder_leave_a_whole_one(foreign, tmp_path):
    source, fields = foreign
    convert_checkpoint(source, tmp_path / "whole", **fields)

    def convert():
        try:
            convert_checkpoint(source, tmp_path / "output", **fields)
        except (OSError, ValueError) as error:
            clear = r"/output exists and is not an empty folder|could not save .*/output: .*not empty"
            os._exit(7 if re.search(clear, str(error)) else 8)

    for _ in range(4):
        shutil.rmtree(tmp_path / "output", ignore_errors=True)
        children = [fork(convert), fork(convert)]
        assert sorted(wait(child) for child in children) == [0, 7]
        assert read(tmp_path / "output") == read(tmp_path / "whole")
        assert leftovers(tmp_path) == []


def test_a_conversion_that_finds_another_ones_folder_leaves_it(foreign, tmp_path, monkeypatch):
    source, fields = foreign
    real = LongNetForCausalLM.save_pretrained

    def slower(model, folder, *args, **kwargs):
        real(model, folder, *args, **kwargs)
        (tmp_path / "output").mkdir()
        (tmp_path / "output" / "config.json").write_text("another one's")

    monkeypatch.setattr(LongNetForCausalLM, "save_pretrained", slower)
    with pytest.raises(ValueError, match="output exists and is not an empty folder"):
        convert_checkpoint(source, tmp_path / "output", **fields)
    assert read(tmp_path / "output") == {"config.json": b"another one's"}
    assert leftovers(tmp_path) == []


def test_the_second_writer_of_a_state_file_is_told(tmp_path):
    state = tmp_path / "state.safetensors"
    first = open_text(state)
    next(first), next(first)
    second = open_text(state)
    assert next(second).start == 51
    next(second)
    before = state.read_bytes()
    with pytest.raises(ValueError, match=r"state\.safetensors was written by another process"):
        next(first)
    assert state.read_bytes() == before
    assert Scored.from_state_file(state).count == 100
    assert [scored.stop for scored in second][-1] == 307
    read_text(tmp_path / "whole")
    assert Scored.from_state_file(state).total == Scored.from_state_file(tmp_path / "whole").total


@forks
def test_two_streams_with_one_state_file_leave_a_whole_state(tmp_path):
    state = tmp_path / "state.safetensors"
    read_text(tmp_path / "whole", 10)
    children = [fork(read_text, state, 10), fork(read_text, state, 10)]
    assert 1 in (codes := [wait(child) for child in children]) or codes == [0, 0]
    read_text(state, 10)
    assert Scored.from_state_file(state).total == Scored.from_state_file(tmp_path / "whole").total
    assert leftovers(tmp_path) == []


def test_a_state_file_deleted_meanwhile_is_written_anew(tmp_path):
    state = tmp_path / "state"
    reader = open_text(state)
    next(reader), next(reader)
    state.unlink()
    assert [scored.stop for scored in reader][-1] == 307
    assert Scored.from_state_file(state).count == 306


@forks
def test_the_last_whole_checkpoint_is_resumed(tmp_path, capsys):
    arguments = TrainingArguments(str(tmp_path), resume_from_checkpoint="last", use_cpu=True)
    for number, state in ((2, "{}"), (10, '{"half'), (9, None), (1, "{}")):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert finetune.find_checkpoint(arguments) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-10 is skipped" in capsys.readouterr().out


def test_a_save_to_a_file_is_refused(tmp_path):
    """Transformers logs an error and goes on."""
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError):
        small_model(0).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"
