"""LongNet for Transformers: dilated attention whose cost grows linearly with the sequence (arXiv 2307.02486)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_longnet import LongNetCache
from .configuration_longnet import LongNetConfig
from .dilate import DilatedCache, use_dilated_attention
from .dilated_attention import dilated_attention
from .image_encoder import LongNetImageConfig, LongNetImageEncoder
from .modeling_longnet import LongNetForCausalLM, LongNetModel, LongNetPreTrainedModel
from .sharding import SequenceSharding
from .slide_encoder import LongNetSlideConfig, LongNetSlideEncoder
from .streaming import Scored, stream

AutoConfig.register("longnet", LongNetConfig, exist_ok=True)
AutoModel.register(LongNetConfig, LongNetModel, exist_ok=True)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM, exist_ok=True)
for _config, _model in ((LongNetSlideConfig, LongNetSlideEncoder), (LongNetImageConfig, LongNetImageEncoder)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)


def __getattr__(name: str):
    """On demand, so that `python -m modeling_longnet.conversion` does not find itself imported already."""
    if name in ("convert_checkpoint", "export_checkpoint", "to_torchscale"):
        from .conversion import convert_checkpoint, export_checkpoint, to_torchscale

        return {x.__name__: x for x in (convert_checkpoint, export_checkpoint, to_torchscale)}[name]
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
    "stream",
    "to_torchscale",
    "use_dilated_attention",
]
