"""Sequence sharding through Accelerate and Trainer: `SequenceSharding` for them, `SequenceSharded` for the models."""

import torch.distributed as dist
from torch import Tensor

from .compat import ParallelismConfig, accelerator_state, set_parallel_size, use_fsdp_on_cpu
from .sharding import gather_sequence
from .sharding_plan import Shard, shard_borders


class SequenceSharding(ParallelismConfig):
    """Let Accelerate shard each sequence over `cp_size` devices.

    Pass it to `Accelerator(parallelism_config=...)` or the stock `TrainingArguments(parallelism_config=...)`; the model
    finds it there. Omitted sizes come from the launch configuration. Processes beyond `cp_size` are data parallel
    (`dp_shard_size`, for DDP too).

    Accelerate's own context parallelism must not run: it cuts batches head-tail, drops masks and patches SDPA. So
    `cp_enabled` is False, while the mesh, the dataloader and FSDP2 still have the dimension "cp".

    Raises:
        ValueError: tensor or Ulysses parallelism in addition, or sizes that do not multiply to the number of processes.

    Example:
        >>> accelerator = Accelerator(parallelism_config=SequenceSharding(cp_size=8))
    """

    def __post_init__(self):
        super().__post_init__()
        if self.tp_size > 1 or self.sp_size > 1:
            raise ValueError(
                f"SequenceSharding(tp_size={self.tp_size}, sp_size={self.sp_size}): LongNet shards sequences (cp_size) "
                "and batches (dp_shard_size, dp_replicate_size); leave the other sizes at 1."
            )

    @property
    def cp_enabled(self) -> bool:
        """False: torch's context parallelism stays off."""
        return False

    def _with_cp(self, names: list[str]) -> list[str]:
        return [*names, "cp"] if self.cp_size > 1 else names

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Mesh dimensions along which the batch is the same."""
        return self._with_cp(super().non_dp_dim_names)

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Mesh dimensions over which FSDP2 shards the parameters."""
        return self._with_cp(super().dp_shard_cp_dim_names)

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Mesh dimensions over which gradients are averaged."""
        return self._with_cp(super().dp_cp_dim_names)

    def build_device_mesh(self, device_type: str):
        """Return the mesh of all processes, cp innermost."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if self.data_parallel_size == 1 and world % self.cp_size == 0:
            set_parallel_size(self, "dp_shard", world // self.cp_size)
        if self.total_size != world:
            raise ValueError(
                f"SequenceSharding(cp_size={self.cp_size}, dp_shard_size={self.dp_shard_size}, "
                f"dp_replicate_size={self.dp_replicate_size}) needs {self.total_size} processes, there are {world}. "
                "Launch as many, or choose a cp_size that divides them and leave the dp sizes out."
            )
        return super().build_device_mesh(device_type)

    def _validate_accelerator(self, accelerator) -> None:
        """Allow a CPU, which Accelerate refuses; `build_device_mesh` has checked the sizes."""
        use_fsdp_on_cpu()


def _sequence_parallelism() -> "ParallelismConfig | None":
    """Return the configuration by which Accelerate shards sequences, None if it does not."""
    parallelism = accelerator_state().get("parallelism_config")
    if parallelism is None or max(parallelism.cp_size, parallelism.sp_size) == 1:
        return None
    return parallelism


def check_whole_sequences(what: str) -> None:
    """Raise ValueError if Accelerate shards sequences, in its own way or by `SequenceSharding`."""
    parallelism = _sequence_parallelism()
    if parallelism is not None:
        raise ValueError(
            f"{what} needs whole sequences on each process, but Accelerate runs a {type(parallelism).__name__} with "
            f"cp_size={parallelism.cp_size}, sp_size={parallelism.sp_size}: each shard would be a sequence of its own. "
            "Leave these sizes at 1; LongNetModel shards sequences with SequenceSharding."
        )


def _accelerate_group() -> "dist.ProcessGroup | None":
    """Return the group that Accelerate's state holds for sequences, None if there is none."""
    parallelism = _sequence_parallelism()
    if parallelism is None:
        return None
    # Compared by name: with remote code, a second class of this name may be loaded.
    if type(parallelism).__name__ != "SequenceSharding":
        raise ValueError(
            f"a {type(parallelism).__name__} with cp_size={parallelism.cp_size}, sp_size={parallelism.sp_size} cuts "
            "sequences in a way that LongNet's segments cannot use; pass parallelism_config=SequenceSharding() "
            "(`from modeling_longnet import SequenceSharding`) to Accelerator or TrainingArguments; it takes its "
            "sizes from the launch configuration."
        )
    return accelerator_state()["device_mesh"]["cp"].get_group()


class SequenceSharded:
    """Methods of a LongNet model whose sequences may be sharded over a process group."""

    _sequence_group = None

    def __getstate__(self) -> dict:
        # Module leaves out what it compiled: a copy would run the original's forward.
        return {name: x for name, x in super().__getstate__().items() if name != "_sequence_group"}

    def set_sequence_group(self, group: "dist.ProcessGroup | None") -> None:
        """Shard each sequence over the processes of `group`, without Accelerate; None turns it off.

        Every process of the group then passes the same whole batch to `forward`, and gets the outputs of its part
        (`gather_sequence` concatenates them) and the whole loss. Gradients must be averaged over the group, as
        DistributedDataParallel does. A copied or pickled model has no group.

        Raises:
            ValueError: this process is not in the group.
        """
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError("this process is not in the sequence group given; give each process the group it is in.")
        for module in self.modules():
            if isinstance(module, SequenceSharded):
                module._sequence_group = group

    def sequence_group(self) -> "dist.ProcessGroup | None":
        """Return the group that shards each sequence: the one set here, else that of `SequenceSharding`."""
        return self._sequence_group if self._sequence_group is not None else _accelerate_group()

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Concatenate sharded outputs: (B, n, ...) of each rank -> (B, L, ...) on every rank, detached."""
        group = self.sequence_group()
        return x if group is None else gather_sequence(x, group)

    def shard(self, batch: Tensor | None) -> Shard | None:
        """Return this process's part of a (B, L, ...) batch; None if sequences are not sharded or there is no batch."""
        group = self.sequence_group()
        if group is None or batch is None or batch.dim() < 2:
            return None
        shortest = min(self.config.segment_lengths, default=1)
        borders = shard_borders(batch.shape[1], dist.get_world_size(group), shortest)
        return Shard(group, dist.get_rank(group), borders)
