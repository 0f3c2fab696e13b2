"""What the processes of a distributed test run: `launch(NAME, arguments, processes)` starts one function here on each.

A function ends normally when everything held; results are files that rank 0 writes.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from modeling_longnet import LongNetConfig, LongNetForCausalLM, SequenceSharding
from modeling_longnet.attention_autograd import AttentionPlan, attend_chunks
from modeling_longnet.branches import Branch, Chunk
from modeling_longnet.pattern import Pattern, make_branches
from modeling_longnet.sharding import GroupExchange, attend_sharded
from modeling_longnet.sharding_plan import Shard, plan_exchange

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-12  # float64
TIMEOUT = 30  # seconds, of a collective under Trainer


def start(words: list[str], processes: int, folder: str) -> list[subprocess.Popen]:
    """Start the processes as a launcher does, but nobody ends the others when one fails; output goes to `folder`."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    if processes > 1:
        size = str(processes)
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    jobs = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        with open(f"{folder}/{rank}.log", "w") as log:
            command = [sys.executable, __file__, *words]
            jobs.append(subprocess.Popen(command, env=os.environ | shared | ranks, stdout=log, stderr=log))
    return jobs


def launch(name: str, *arguments: object, processes: int, timeout: float = 240) -> None:
    """Run a function of this file on so many gloo processes of one thread each; raises with their output if one fails.

    A `+` among the arguments ends them, and the name of a further function follows.
    """
    words = [name, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        jobs = start(words, processes, folder)
        end = time.monotonic() + timeout
        while any(job.poll() is None for job in jobs) and not any(job.poll() for job in jobs):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        codes = [job.poll() for job in jobs]
        for job in jobs:
            job.kill()
            job.wait()
        if any(codes) or None in codes:
            output = "\n".join(
                f"--- rank {i}\n" + Path(folder, f"{i}.log").read_text()[-6000:] for i in range(processes)
            )
            raise AssertionError(f"{words} on {processes} processes ended with {codes} (None: too late):\n{output}")


def close(name: str, given: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise unless two tensors agree to 1e-12 of the largest entry of the expected one (at least 1)."""
    if given.shape != expected.shape:
        raise AssertionError(f"{name}: shapes {tuple(given.shape)} and {tuple(expected.shape)}")
    error = (given - expected).abs().max().item() if given.numel() else 0.0
    largest = max(1.0, expected.abs().max().item()) if given.numel() else 1.0
    if not error <= TOLERANCE * largest:
        raise AssertionError(f"{name}: off by {error}, largest {largest}")


def _draw_chunks(rng: random.Random, batch: int, length: int) -> tuple[Chunk, ...]:
    """One document per row, or padding and several documents at different places in each row."""
    if rng.random() < 0.3:
        return (Chunk(0, batch, 0, length, 0, length),)
    chunks = []
    for row in range(batch):
        cuts = sorted({rng.randint(0, length) for _ in range(rng.randint(2, 4))})
        chunks += [Chunk(row, row + 1, a, b, 0, b - a) for a, b in pairwise(cuts)]
    return tuple(chunks)


def _draw_branches(rng: random.Random, heads: int, query_heads: int, is_causal: bool) -> tuple[Branch, ...]:
    """The paper's branches, or those of a layer with any of the remedies."""
    w = sorted({rng.randint(1, 50) for _ in range(rng.randint(1, 4))})
    if rng.random() < 0.5:
        r = tuple(rng.randint(1, min(x, 6)) for x in w)
        return make_branches(tuple(w), r, heads, rng.choice(["interleaved", "blocked"]))
    w = [w[0] * 2**i for i in range(len(w))]  # nested, as staggered borders need
    r = [rng.randint(1, min(x, 6)) for x in w]
    rates = tuple(rng.choice([a for a in range(1, x + 1) if x % a == 0]) for x in r)
    window, layer = rng.choice([None, rng.randint(1, w[0])]), rng.randint(0, 5)
    flags = rng.random() < 0.5, rng.random() < 0.5, is_causal and rng.random() < 0.5
    period = rng.randint(1, 2) if window else 1
    pattern = Pattern(tuple(w), tuple(r), "interleaved", window, rng.choice([None, rates]), *flags, period)
    pattern.check(is_causal)
    return pattern.branches(heads, query_heads, layer)


def op(cases: str) -> None:
    """Random shapes, branches, documents and cuts: out and every gradient equal the whole sequence's on one process."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    rng = random.Random(0)
    for case in range(int(cases)):
        torch.manual_seed(case)
        batch, length, heads, repeat = rng.randint(1, 3), rng.randint(1, 70), rng.randint(1, 3), rng.randint(1, 2)
        is_causal = rng.random() < 0.5
        branches = _draw_branches(rng, heads, heads * repeat, is_causal)
        chunks = _draw_chunks(rng, batch, length)
        shard = Shard(None, rank, (0, *sorted(rng.randint(0, length) for _ in range(size - 1)), length))
        inputs = [torch.randn(batch, length, n, 5, dtype=torch.float64) for n in (heads * repeat, heads, heads)]
        grad = torch.randn_like(inputs[0])
        whole = [x.clone().requires_grad_() for x in inputs]
        plan = AttentionPlan(chunks, branches, is_causal, 5**-0.5, "torch")
        expected = attend_chunks(*whole, plan)
        expected.backward(grad)
        parts = [shard.cut(x).clone().requires_grad_() for x in inputs]
        exchange = plan_exchange(shard, chunks, branches, is_causal, batch, torch.device("cpu"))
        plan = plan._replace(chunks=shard.cut_chunks(chunks, rank))
        out = attend_sharded(*parts, plan, GroupExchange(dist.group.WORLD, exchange))
        out.backward(shard.cut(grad))
        what = f"case {case}, rank {rank}: {branches}, causal={is_causal}, borders={shard.borders}, {chunks}: "
        close(what + "out", out, shard.cut(expected))
        for name, part, x in zip("qkv", parts, whole, strict=True):
            close(f"{what}d{name}", part.grad, shard.cut(x.grad))


BEYOND = {
    "segment_lengths": [6, 12, 48], "dilation_rates": [1, 2, 4], "window_size": 5, "query_rates": [1, 1, 4],
    "rotate_offsets": True, "stagger_segments": True,
}  # fmt: skip
MODELS = {
    "causal": {},
    "ragged": {"length": 61},
    "few-tokens": {"length": 3},
    "empty-shards": {"length": 1, "shift": True},
    "grouped-heads": {"num_key_value_heads": 2, "length": 59},
    "bidirectional": {"is_causal": False, "length": 61, "shift": True},
    "bidirectional-zero-padding": {"is_causal": False, "attend_zero_padding": True, "length": 45, "shift": True},
    "checkpointed": {"length": 61, "checkpoint": True},
    "long-shards": {"length": 97, "segment_lengths": [7, 21, 49], "dilation_rates": [1, 2, 3]},
    "xpos": {"length": 53, "position_embedding": "xpos"},
    "padding-right": {"length": 61, "padding": "right"},
    "padding-left": {"length": 61, "padding": "left"},
    "packed": {"length": 61, "packed": True},
    "shift-labels": {"length": 61, "shift": True},
    "beyond-the-paper": {"length": 61, "keys_once": True, **BEYOND},
    "branches-in-some-layers": {"length": 61, "keys_once": True, "branch_layer_period": 2, **BEYOND},
    "beyond-the-paper-bidirectional": {"length": 61, "is_causal": False, "shift": True, **BEYOND},
    "beyond-the-paper-packed": {"length": 61, "packed": True, "keys_once": True, "num_key_value_heads": 2, **BEYOND},
}


def make_model(**fields) -> LongNetForCausalLM:
    """A tiny float64 model in training mode, the same in every process."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 33, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    branches = {"segment_lengths": [8, 20, 64], "dilation_rates": [1, 3, 5]}  # w no multiple of r
    heads = {"num_attention_heads": 4, "position_embedding": "rope"}
    return LongNetForCausalLM(LongNetConfig(**(sizes | branches | heads | fields))).double().train()


def _batch(length: int, padding: str | None, packed: bool, shift: bool) -> dict[str, torch.Tensor]:
    """Two rows with a masked prompt, and the wanted kind of batch."""
    torch.manual_seed(1)
    ids = torch.randint(0, 33, (2, length))
    labels = ids.clone()
    labels[0, : length // 5] = -100
    batch = {"input_ids": ids, "labels": labels}
    if padding:
        mask = torch.ones_like(ids)
        mask[1, slice(length - 9, None) if padding == "right" else slice(0, 9)] = 0
        labels[mask == 0] = -100
        batch["attention_mask"] = mask
    if packed:
        batch["position_ids"] = torch.stack([
            torch.cat([torch.arange(a), torch.arange(length - a)]) for a in (11, 37)
        ])  # fmt: skip
    if shift:
        batch["shift_labels"] = labels.roll(-1, 1)
        batch["shift_labels"][:, -1] = 5
    return batch


def model(*names: str) -> None:
    """Loss and every gradient of the models named equal those of one process, with and without num_items_in_batch."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    size = dist.get_world_size()
    for name in names or MODELS:
        fields = {"length": 64, "padding": None, "packed": False, "shift": False, "checkpoint": False} | MODELS[name]
        batch = _batch(*(fields.pop(key) for key in ("length", "padding", "packed", "shift")))
        checkpoint = fields.pop("checkpoint")
        tiny = make_model(**fields)
        if checkpoint:
            tiny.gradient_checkpointing_enable()
        for items in (None, 17):
            results = []
            for group in (None, dist.group.WORLD):
                tiny.zero_grad()
                tiny.set_sequence_group(group)
                out = tiny(**batch, num_items_in_batch=items, logits_to_keep=0)
                out.loss.backward()
                if group is not None and name == "empty-shards" and (out.logits.shape[1] == 0) != (dist.get_rank() > 0):
                    raise AssertionError(f"one token, and rank {dist.get_rank()} has {out.logits.shape[1]}")
                logits = tiny.gather_sequence(out.logits)
                if group is not None:
                    for parameter in tiny.parameters():
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= size if items is None else 1
                loss = out.loss.detach() * (size if items and group else 1)
                results.append({"loss": loss, "logits": logits.detach()})
                results[-1] |= {n: p.grad.clone() for n, p in tiny.named_parameters()}
            for key, expected in results[0].items():
                close(f"{name}, num_items={items}: {key}", results[1][key], expected)


def _loop(accelerator: Accelerator, steps: int, batch_size: int, accumulation: int):
    """A plain Accelerate loop; returns its prepared model, and losses and gradient norms by step."""
    tiny = make_model()
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=1e-2)
    torch.manual_seed(2)
    rows = [{"input_ids": x, "labels": x} for x in torch.randint(0, 33, (steps * accumulation * 4, 53))]
    tiny, optimizer, loader = accelerator.prepare(tiny, optimizer, DataLoader(rows, batch_size=batch_size))
    losses, norms = [], []
    for batch in loader:
        with accelerator.accumulate(tiny):
            loss = tiny(**batch).loss
            accelerator.backward(loss)
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(tiny.parameters(), 0.5)
                norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            optimizer.step()
            optimizer.zero_grad()
    return tiny, torch.tensor(losses), torch.tensor(norms)


def _whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def _weights(tiny) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): _whole(x) for name, x in tiny.named_parameters()}


def loop(sequence: str, output: str) -> None:
    """Accumulation, clipping and an optimizer by Accelerate; rank 0 saves losses, norms and final weights."""
    sharding = SequenceSharding(cp_size=int(sequence))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, parallelism_config=sharding)
    data = accelerator.num_processes // int(sequence)
    tiny, losses, norms = _loop(accelerator, 3, 4 // data, 2)
    if accelerator.is_main_process:
        torch.save({"losses": losses, "norms": norms} | _weights(tiny), output)


def fsdp2(sequence: str, state: str, folder: str) -> None:
    """The same with FSDP2; a checkpoint of the given kind of state gives the weights and moments back."""
    os.environ["FSDP_VERSION"] = "2"
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type=state, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LongNetBlock"], cpu_ram_efficient_loading=False,
    )  # fmt: skip
    sharding = SequenceSharding(cp_size=int(sequence))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, parallelism_config=sharding)
    # Accelerate chooses FSDP for accelerators only; the code behind it runs on CPUs as well.
    for state_class in (PartialState, AcceleratorState):
        state_class._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    data = accelerator.num_processes // int(sequence)
    tiny, losses, norms = _loop(accelerator, 3, 4 // data, 2)
    weights = _weights(tiny)
    accelerator.save_state(f"{folder}/{state}")
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.zero_()
    accelerator.load_state(f"{folder}/{state}")
    for name, expected in weights.items():
        close(f"{state}: {name}", _weights(tiny)[name], expected)
    if accelerator.is_main_process:
        torch.save({"losses": losses, "norms": norms} | weights, f"{folder}/{state}.pt")


def fsdp_plan(folder: str) -> None:
    """Models saved in `folder`, loaded with FSDP2 by their plan, give the loss and gradients of whole ones."""
    dist.init_process_group("gloo")
    for path in sorted(Path(folder).iterdir()):
        inputs = torch.load(path / "inputs.pt")
        auto = AutoModel if "tiles" in inputs or "pixel_values" in inputs else AutoModelForCausalLM
        results = []
        for size in (1, dist.get_world_size()):
            model = auto.from_pretrained(path, dtype=torch.float64, distributed_config={"fsdp_size": size}).eval()
            loss = model(**inputs)[0].sum()
            loss.backward()
            gradients = {name: _whole(x.grad) for name, x in model.named_parameters() if x.grad is not None}
            results.append({"loss": loss.detach()} | gradients)
        wrapped = {name for name, module in model.named_modules() if type(module).__name__.startswith("FSDP")}
        expected = {rule.replace("*", str(i)) for rule in model.fsdp_plan for i in range(2)} | {""}
        expected -= {"lm_head"} if model.config.tie_word_embeddings else set()
        if wrapped != expected:
            raise AssertionError(f"{path.name}: {sorted(wrapped)} are sharded, expected {sorted(expected)}")
        if results[0].keys() != results[1].keys():
            raise AssertionError(f"{path.name}: gradients of {results[0].keys() ^ results[1].keys()} are missing")
        for name, x in results[0].items():
            close(f"{path.name}: {name}", results[1][name], x)


class _Killed(Trainer):
    """Kills the last rank's process in the middle of a step."""

    at: int | None = None

    def training_step(self, *args, **kwargs):
        if self.state.global_step == self.at and dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)


def trainer(sequence: str, folder: str, steps: str, resume: str = "", kill_at: str = "") -> None:
    """The stock Trainer (a subclass only to kill itself), checkpoints every 2 steps; rank 0 saves the history."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    data = world // int(sequence)
    set_seed(0)
    tiny = make_model()
    rows = [{"input_ids": x, "labels": x} for x in torch.randint(0, 33, (64, 53))]
    sharding, batch_size = SequenceSharding(cp_size=int(sequence)), 4 // data
    arguments = TrainingArguments(
        output_dir=folder, max_steps=int(steps), save_steps=2, logging_steps=1, eval_strategy="steps", eval_steps=2,
        per_device_train_batch_size=batch_size, per_device_eval_batch_size=batch_size, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.5, use_cpu=True, report_to=[],
        disable_tqdm=True, parallelism_config=sharding, ddp_timeout=TIMEOUT,
    )  # fmt: skip
    job = _Killed(model=tiny, args=arguments, train_dataset=rows, eval_dataset=rows[:8])
    job.at = int(kill_at) if kill_at else None
    job.train(resume_from_checkpoint=resume or None)
    parameters = dict(tiny.named_parameters())
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        held = sum(x.to_local().numel() for x in parameters.values())
        if not held <= 0.6 * sum(x.numel() for x in parameters.values()):
            raise AssertionError(f"this process holds {held} parameters")
    weights = {name: _whole(x) for name, x in parameters.items()}
    if job.is_world_process_zero():
        torch.save({"history": job.state.log_history, "weights": weights}, f"{folder}/result.pt")


def launched_fsdp2(folder: str) -> None:
    """`trainer` under the launch configuration of the environment: each process holds half of the parameters."""
    trainer("2", folder, "6")
    state = AcceleratorState()
    if state.distributed_type != DistributedType.FSDP or state.fsdp_plugin.fsdp_version != 2:
        raise AssertionError(f"Accelerate runs {state.distributed_type}")


def _refused(words: str, call) -> None:
    try:
        call()
    except ValueError as error:
        if words not in str(error):
            raise AssertionError(f"expected {words!r} in {error}") from error
    else:
        raise AssertionError(f"not refused: {words}")


def _unlike_batches_are_refused(tiny: LongNetForCausalLM, ids: torch.Tensor, odd: int) -> None:
    """On odd ranks each argument in turn differs or is missing."""
    embeds = tiny.get_input_embeddings()(ids).detach()
    mask, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[1, -9:] = 0
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    whole = {"input_ids": ids, "labels": ids}
    for name, same, other in (
        ("input_ids", ids, ids + 1),
        ("input_ids", ids, ids.flip(0)),
        ("input_ids", ids, ids.flip(1)),
        ("inputs_embeds", embeds, embeds + 1e-12),
        ("inputs_embeds", embeds, embeds.flip(0)),
        ("labels", ids, (ids + 5) % 33),
        ("labels", ids, None),
        ("shift_labels", ids, ids.flip(0)),
        ("shift_labels", ids, None),
        ("attention_mask", mask, padded),
        ("attention_mask", mask, None),
        ("position_ids", positions, positions % 11),
        ("position_ids", positions, positions[:1]),
    ):
        batch = whole | {name: other if odd else same}
        if name == "inputs_embeds":
            del batch["input_ids"]
        _refused(f"different batches: they differ in {name} (", lambda batch=batch: tiny(**batch))
    short = ids[:, : 20 - odd]
    _refused("different batches: they differ in input_ids, labels (", lambda: tiny(short, labels=short))


def _smoothing_trainer(tiny: LongNetForCausalLM, ids: torch.Tensor, folder: str) -> Trainer:
    arguments = TrainingArguments(
        output_dir=folder, label_smoothing_factor=0.1, use_cpu=True, report_to=[], disable_tqdm=True,
        parallelism_config=SequenceSharding(cp_size=2),
    )  # fmt: skip
    return Trainer(model=tiny, args=arguments, eval_dataset=[{"input_ids": x, "labels": x} for x in ids])


def refusals() -> None:
    """Invalid calls raise ValueError on every rank, and the group keeps working afterwards."""
    accelerator = Accelerator(cpu=True, parallelism_config=SequenceSharding(cp_size=2))
    rank = accelerator.process_index
    tiny = make_model()
    ids = torch.arange(40).view(2, 20) % 33
    _unlike_batches_are_refused(tiny, ids, rank % 2)
    _refused("label smoothing", lambda: tiny(ids))
    with tempfile.TemporaryDirectory() as folder:
        _refused("label smoothing", lambda: _smoothing_trainer(tiny, ids, folder).evaluate())
    tiny.train()
    _refused("labels holds 33", lambda: tiny(ids, labels=ids + 14))
    _refused("leave use_cache=False out", lambda: tiny.eval().generate(ids, use_cache=False, max_new_tokens=1))
    _refused("divides them", lambda: SequenceSharding(cp_size=3).build_device_mesh("cpu"))
    _refused("leave the other sizes at 1", lambda: SequenceSharding(cp_size=1, tp_size=2))
    dropping = make_model(drop_path_rate=0.1)
    _refused("drop_path_rate=0.1", lambda: dropping(ids, labels=ids))
    tiny.set_attn_implementation("eager")
    _refused("dense reference", lambda: tiny(ids, labels=ids))
    tiny.set_attn_implementation("sdpa")
    tiny(ids, labels=ids).loss.backward()
    whole = tiny.eval().generate(ids, max_new_tokens=3)
    if whole.shape != (2, 23):
        raise AssertionError(f"generate gave {tuple(whole.shape)}")


if __name__ == "__main__":
    for words in " ".join(sys.argv[1:]).split(" + "):
        function, *rest = words.split(" ")
        globals()[function](*rest)
    if dist.is_initialized():
        dist.destroy_process_group()
