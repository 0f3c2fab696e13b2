"""LongNet for Transformers: dilated attention whose cost grows linearly with the sequence (arXiv 2307.02486)."""

from importlib import import_module

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_longnet import LongNetCache
from .configuration_longnet import LongNetConfig
from .dilate import DilatedCache, use_dilated_attention
from .dilated_attention import dilated_attention
from .image_encoder import LongNetImageConfig, LongNetImageEncoder
from .modeling_longnet import LongNetForCausalLM, LongNetModel, LongNetPreTrainedModel
from .pattern import parse_pattern
from .sharding_accelerate import SequenceSharding
from .slide_encoder import LongNetSlideConfig, LongNetSlideEncoder
from .streaming import Scored, stream

for _model in (LongNetModel, LongNetSlideEncoder, LongNetImageEncoder):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModel.register(_model.config_class, _model, exist_ok=True)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM, exist_ok=True)


def __getattr__(name: str):
    """Import the conversion on demand: `python -m modeling_longnet.conversion` warns if it is imported already."""
    if name in ("convert_checkpoint", "export_checkpoint", "to_torchscale"):
        return getattr(import_module(".conversion", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"
__all__ = [
    "DilatedCache",
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetImageConfig",
    "LongNetImageEncoder",
    "LongNetModel",
    "LongNetPreTrainedModel",
    "LongNetSlideConfig",
    "LongNetSlideEncoder",
    "Scored",
    "SequenceSharding",
    "convert_checkpoint",
    "dilated_attention",
    "export_checkpoint",
    "parse_pattern",
    "stream",
    "to_torchscale",
    "use_dilated_attention",
]
