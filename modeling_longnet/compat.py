"""Private and semi-private APIs of other libraries, one section per library.

Each entry notes what replaces it when it is gone. `tests/test_compat.py` fails by name when an upgrade removes one. A
missing name never breaks the import of the package, so saved folders still load.
"""

import os
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.modeling_outputs import CausalLMOutputWithPast

# --- PyTorch: attention kernels that return the log-sum-exp. Checked with 2.11 and 2.13.
# Without them the backend "torch" is unavailable and "auto" falls back to the dense reference.


def _aten(name: str):
    return getattr(torch.ops.aten, name, None)


cpu_flash = _aten("_scaled_dot_product_flash_attention_for_cpu")
cpu_flash_backward = _aten("_scaled_dot_product_flash_attention_for_cpu_backward")
cuda_flash = _aten("_scaled_dot_product_flash_attention")
cuda_flash_backward = _aten("_scaled_dot_product_flash_attention_backward")
cuda_efficient = _aten("_scaled_dot_product_efficient_attention")
cuda_efficient_backward = _aten("_scaled_dot_product_efficient_attention_backward")


# Without it `vmap` over a loss with labels ends in PyTorch's error about control flow.
def transforms_are_active() -> bool:
    """Return True inside `torch.func` transforms, where no Python decision may depend on a tensor's values."""
    return getattr(torch._C, "_are_functorch_transforms_active", bool)()


# --- flash-attn: the functions that return the log-sum-exp. Checked against the source of 2.8; no GPU has run them.
# Without them the backend "flash_attn" is unavailable and its error says why.
flash_attn_missing = None
try:
    from flash_attn.flash_attn_interface import _flash_attn_backward as flash_attn_backward
    from flash_attn.flash_attn_interface import _flash_attn_forward as flash_attn_forward
except ImportError as error:
    flash_attn_backward = flash_attn_forward = None
    flash_attn_missing = str(error)

# --- Triton. Checked with 3.6 and 3.9.
# Without `knobs` the kernels count as compiled, so CPU tensors are refused. Without `gdc_*` launches do not overlap.
try:
    from triton.knobs import runtime as _triton_runtime

    TRITON_IS_INTERPRETED = bool(_triton_runtime.interpret)
except (ImportError, AttributeError):
    TRITON_IS_INTERPRETED = False
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None
HAS_TRITON_GDC = gdc_wait is not None

# --- Accelerate: the state that Accelerator and Trainer share. Checked with 1.15.
# Without `_shared_state` the public constructor returns the same state, slower, and FSDP does not run on CPUs.
# `SequenceSharding` overrides the private hook `_validate_accelerator`, which otherwise refuses sizes above 1 on a CPU.
try:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.state import is_initialized as accelerator_is_initialized
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
except ImportError as error:
    _accelerate_missing = error
    AcceleratorState = None

    class ParallelismConfig:
        """Stands in for Accelerate's class if that package is missing."""

        def __init__(self, *args, **kwargs):
            message = "SequenceSharding needs the accelerate package: pip install accelerate"
            raise ImportError(message) from _accelerate_missing


def accelerator_state() -> dict:
    """Return the shared state of Accelerate; empty if there is no Accelerator."""
    if hasattr(AcceleratorState, "_shared_state"):
        return AcceleratorState._shared_state
    is_initialized = AcceleratorState is not None and accelerator_is_initialized()
    return vars(AcceleratorState()) if is_initialized else {}


def use_fsdp_on_cpu() -> None:
    """Apply the launch configuration's FSDP on CPUs too, where Accelerate would run DDP."""
    is_asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if is_asked and accelerator_state().get("distributed_type") == DistributedType.MULTI_CPU:
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()


def set_parallel_size(config: ParallelismConfig, name: str, size: int) -> None:
    """Set one size of a ParallelismConfig, such as "dp_shard", after its construction."""
    setattr(config, f"{name}_size", size)
    if hasattr(config, "_set_size"):
        config._set_size(name, size)


# --- Transformers: what its own models use. Checked with 5.17 and 5.24.
try:
    from transformers.utils.generic import merge_with_config_defaults as _merge_with_config_defaults
    from transformers.utils.output_capturing import capture_outputs
except ImportError:  # then config defaults are not merged, and hidden states and attention weights are refused

    def _merge_with_config_defaults(forward):
        return forward

    def capture_outputs(forward):
        """Return the method, refusing outputs that nothing records."""

        @wraps(forward)
        def checked(self, *args, output_hidden_states=None, output_attentions=None, **kwargs):
            if output_hidden_states or output_attentions:
                raise ValueError("this Transformers has no capture_outputs: request no hidden states or attentions.")
            return forward(self, *args, **kwargs)

        return checked


def merge_with_config_defaults(forward):
    """Return the method with the config's defaults; refuse `is_causal`, which would change the config for a call."""
    merged = _merge_with_config_defaults(forward)

    @wraps(forward)
    def checked(self, *args, is_causal: bool | None = None, **kwargs):
        if is_causal not in (None, self.config.is_causal):
            raise ValueError(f"is_causal={is_causal!r}: set it in the config, which says {self.config.is_causal!r}.")
        return merged(self, *args, **kwargs)

    return checked


# 5.18 or so renamed the cache: outputs and generate's keyword arguments use each version's own name.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


@contextmanager
def refusing_damage(what: str, reason: str = "cannot be read; it may be damaged"):
    """Raise a ValueError that names `what` for the errors of Transformers and safetensors on damaged files.

    A damaged `config.json`, index or weights file may raise any of these, without the file's name. An OSError about a
    folder also names what a killed save left there.
    """
    try:
        yield
    except OSError as error:
        for former in Path(what).glob(".*.saving/former"):
            hint = f"A save was killed or still runs. Move the files of {former.with_name('new')} to {what} to finish"
            raise OSError(f"{error}\n{hint}, or those of {former} to undo.") from error
        raise
    except (AttributeError, LookupError, OverflowError, RecursionError, SafetensorError, TypeError) as error:
        if "__init__() got an unexpected keyword argument" in str(error):  # the caller's; files give models none
            raise TypeError(f"{what}: {error}.") from error
        raise ValueError(f"{what} {reason} ({type(error).__name__}: {error}).") from error


def attn_implementation(config) -> str:
    """Return the name that `attn_implementation=` or `set_attn_implementation` chose."""
    return getattr(config, "_attn_implementation", None) or "sdpa"
