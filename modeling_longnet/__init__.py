"""LongNet for Transformers: dilated attention whose cost grows linearly with the sequence (arXiv 2307.02486)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .cache_longnet import LongNetCache
from .configuration_longnet import LongNetConfig
from .dilated_attention import dilated_attention
from .modeling_longnet import LongNetForCausalLM, LongNetModel, LongNetPreTrainedModel
from .sharding import SequenceSharding
from .streaming import Scored, stream

AutoConfig.register("longnet", LongNetConfig, exist_ok=True)
AutoModel.register(LongNetConfig, LongNetModel, exist_ok=True)
AutoModelForCausalLM.register(LongNetConfig, LongNetForCausalLM, exist_ok=True)

__version__ = "0.1.0"
__all__ = [
    "LongNetCache",
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetModel",
    "LongNetPreTrainedModel",
    "Scored",
    "SequenceSharding",
    "dilated_attention",
    "stream",
]
