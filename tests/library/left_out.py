"""What the library's tests import but its source distribution lacks, rewritten for these models on a CPU."""

import torch
import torch.multiprocessing

__all__ = [
    "ExportTesterMixin",
    "GenerationTesterMixin",
    "_get_distributed_backend",
    "_get_distributed_device_type",
    "_get_rank_device",
    "_set_rank_device",
    "_start_rank_processes",
    "config_common_kwargs",
]


class GenerationTesterMixin:
    """Empty: tests/test_transformers_suite.py has what matters of it."""


class ExportTesterMixin:
    """Empty."""


# Fields of every configuration, none at its default.
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["LongNetModel"],
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    pass


def _start_rank_processes(function, args: tuple, nprocs: int) -> None:
    """Run function(rank, *args) on as many processes; raises what one of them raised."""
    torch.multiprocessing.spawn(function, args=args, nprocs=nprocs)
