"""The configuration of LongNet: every field with its unit and equation, and all validation."""

import bisect
import difflib
import inspect
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .backends import backend_names
from .compat import refusing_damage
from .pattern import LONGEST_SEGMENT, Pattern
from .saving import merging

logger = logging.getLogger(__name__)
MOST_LAYERS = 10_000  # more must be a damaged file, and building the model would take hours
MOST_LABELS = 1 << 20
LARGEST_INTEGER = (1 << 63) - 1
POSITION_EMBEDDINGS = ("xpos", "rope", "none")
# Names that TorchScale and other models give to these fields.
_OTHER_NAMES = {
    "segment_lengths": "segment_length",
    "window_size": "window sliding_window",
    "dilation_rates": "dilated_ratio",
    "rotate_offsets": "rotate",
    "stagger_segments": "stagger",
    "keys_once": "once",
    "branch_layer_period": "every",
    "**parse_pattern(...)": "pattern",
    "position_embedding": "xpos_rel_pos",
    "hidden_size": "decoder_embed_dim encoder_embed_dim d_model",
    "intermediate_size": "decoder_ffn_embed_dim encoder_ffn_embed_dim",
    "num_hidden_layers": "decoder_layers encoder_layers num_layers n_layers",
    "num_attention_heads": "decoder_attention_heads encoder_attention_heads num_heads n_heads head_dim",
    "hidden_act": "activation_fn",
    "is_causal": "causal",
    "xpos_scale_base": "scale_base xpos_base",
    "rope_theta": "rope_parameters rope_scaling",
    "dropout": "hidden_dropout_prob",
    "tie_word_embeddings": "tie_embeddings",
    "attention_backend": "backend",
}
OTHER_NAMES = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}
# The largest xPos scale: three quarters of a dtype's exponent range, the rest being for the values it multiplies.
FLOAT32_SCALE = 2.0**96
FLOAT16_SCALE = 2.0**12


def _growing_branches(first: int, length: int, heads: int) -> tuple[list[int], list[int]]:
    """Return nested segments and rates that grow by 4 until a segment holds the sequence; rates stop at `heads`."""
    segments, rates = [first], [1]
    while segments[-1] < length:
        if rates[-1] < heads:  # at the highest rate a longer segment replaces the last one, which would add nothing
            segments.append(segments[-1])
            rates.append(min(4 * rates[-1], heads))
        segments[-1] *= 4
    return segments, rates


def _window_patterns(length: int, is_causal: bool, period: int) -> list[Pattern]:
    """Return dense attention, and a window with branches that every query sees, for each size of the window."""
    longest = 1 << max(4, (length - 1).bit_length())
    patterns = [Pattern((longest,), (1,))]
    for n in range(3, longest.bit_length() - 1):
        window, octaves = 1 << n, longest.bit_length() - 1 - n
        count = -(-octaves // 4)
        # Borders evenly spaced between the window and the length.
        segments = tuple(window << (octaves * (i + 1) // count) for i in range(count))
        for keys in (period * window, period * window // 2):  # of all branches together, in a layer that has them
            rates = tuple(min(w, 1 << max(0, w * count // (2 * keys) - 1).bit_length()) for w in segments)
            # A key stands for the r tokens up to it: the window or segment before must be long enough to see them.
            if all(r <= before for r, before in zip(rates, (window, *segments), strict=False)):
                patterns.append(
                    Pattern(segments, rates, "interleaved", window, (1,) * count, False, False, is_causal, period)
                )
    return patterns


def _check_period(period, layers) -> int:
    """Return the period that `for_context` gives to so many layers, 2 if none was asked for."""
    if period is None and isinstance(layers, int):
        period = min(2, layers)
    if not all(isinstance(x, int) and x >= 1 for x in (layers, period)) or period > layers:
        raise ValueError(
            f"branch_layer_period={period!r} must be a whole number from 1 to num_hidden_layers={layers!r}."
        )
    return period


def _widen_window(pattern: Pattern, length: int, effort: float, layers: int) -> Pattern:
    """Widen the window, in steps of 8 tokens to less than twice its size, as far as `effort` allows."""
    sizes = range(pattern.window_size, min(2 * pattern.window_size, pattern.segment_lengths[0]), 8)
    fits = bisect.bisect_right(sizes, effort, key=lambda n: pattern._replace(window_size=n).count_work(length, layers))
    return pattern._replace(window_size=sizes[fits - 1])


@strict
class LongNetConfig(PreTrainedConfig):
    r"""Configuration of a LongNet. The defaults are the paper's 125M model (arXiv 2307.02486, section 4.1).

    Args:
        vocab_size: token ids, 0 .. vocab_size - 1; by default the 100,277 of cl100k_base, rounded up to a multiple of
            64. None: no embedding table and no language model head; the model takes `inputs_embeds`.
        hidden_size: features of a token, E.
        intermediate_size: features inside a feed-forward block.
        num_hidden_layers: blocks, N.
        num_attention_heads: query heads, H; each has D = hidden_size / H dimensions.
        num_key_value_heads: key/value heads, G, a divisor of H; None means H (as in the paper).
        segment_lengths: w of each branch, in tokens, ascending (Eq. 4).
        dilation_rates: r of each branch, 1 <= r <= w: a head keeps every r-th token of a segment (Eq. 5).
        head_offsets: the first token that key/value head g keeps: "interleaved" is `g mod r` (Eq. 13), "blocked" is
            TorchScale's `g // ceil(G / r)`, which converted checkpoints need.
        window_size: tokens of a sliding window beside the branches, the query's own included; None: no window.
            It goes beyond the paper, as do the next five fields; `LongNetConfig.for_context` chooses among them.
        query_rates: for each branch the rate at which queries are kept, a divisor of its dilation rate; 1 lets every
            query see the branch's keys. None: the dilation rates, as in the paper.
        rotate_offsets: queries and keys of a head are kept at two offsets, which change from layer to layer, so that
            any two tokens of a segment meet in some head or layer of r * ceil(r / heads) layers with branches.
        stagger_segments: odd layers place segment borders half a segment earlier.
        keys_once: a branch leaves out the segment, or window, of the branch before it: no key counts twice. A text
            that fits into the first of them then gets dense attention. Causal models only.
        branch_layer_period: n for branches in every n-th layer; the others have only the window. Offsets and borders
            then change from one layer with branches to the next.
        is_causal: decoder (True) or bidirectional encoder (False).
        position_embedding: "xpos" (arXiv 2212.10554: rotation, and decay zeta_i ** (n / xpos_scale_base)), "rope"
            (rotation alone) or "none". Positions are taken modulo `position_period`.
        xpos_scale_base: tokens over which xPos decays by a factor zeta_i.
        rope_theta: base of the rotation's frequencies, theta_i = rope_theta ** (-2 i / D).
        attention_backend: kernels of `attn_implementation="sdpa"`: "torch", "flash_attn", "triton" or "auto".
        attend_zero_padding: bidirectional only: attend to the zero keys of the released implementation's padding, with
            which Prov-GigaPath's weights were trained.
        hidden_act: activation of the feed-forward block, a name of Transformers' ACT2FN.
        dropout: probability for embeddings and both outputs of a block, in training only.
        activation_dropout: probability inside the feed-forward block, in training only.
        drop_path_rate: probability that a sequence skips a residual of the last block, in training only; it rises
            linearly from 0 in the first block (stochastic depth, arXiv 1603.09382).
        attention_dropout: must be 0; no fused attention kernel here drops attention weights.
        layer_norm_eps: epsilon of every LayerNorm.
        final_layer_norm: a LayerNorm after the last block (LongViT has none).
        embedding_scale: factor of the token embeddings (TorchScale: 1, or sqrt(E) with scaled embeddings).
        initializer_range: initial standard deviation of embeddings and output projection; hidden_size ** -0.5 if None.
            Linear layers follow Magneto (arXiv 2210.06423) in any case.
        use_cache: `forward` returns a `LongNetCache` (never in training with gradient checkpointing).
        tie_word_embeddings: the output projection shares the embedding table.
        max_position_embeddings: context length that other tools read (`generate` without a length stops there, lm-eval
            cuts there); the model ignores it. The default is the reach: the longest segment, or all layers' windows.

    Raises:
        StrictDataclassError or ValueError: names the field, the value and what is allowed.

    Example:
        >>> config = LongNetConfig(segment_lengths=[512, 2048], dilation_rates=[1, 4])
        >>> config.position_period
        2048
    """

    model_type = "longnet"
    # The code of each Auto class. All of them: a folder saved from the language model must load as AutoModel too.
    auto_classes = {
        "AutoConfig": "configuration_longnet.LongNetConfig",
        "AutoModel": "modeling_longnet.LongNetModel",
        "AutoModelForCausalLM": "modeling_longnet.LongNetForCausalLM",
        "AutoModelForMaskedLM": "modeling_longnet.LongNetForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_longnet.LongNetForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_longnet.LongNetForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_longnet.LongNetForQuestionAnswering",
    }

    vocab_size: int | None = 100_288
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    segment_lengths: list[int] | tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: list[int] | tuple[int, ...] = (1, 2, 4, 6, 12)
    head_offsets: str = "interleaved"
    window_size: int | None = None
    query_rates: list[int] | tuple[int, ...] | None = None
    rotate_offsets: bool = False
    stagger_segments: bool = False
    keys_once: bool = False
    branch_layer_period: int = 1
    is_causal: bool = True
    position_embedding: str = "xpos"
    xpos_scale_base: float | int = 512
    rope_theta: float | int = 10000.0
    attention_backend: str = "auto"
    attend_zero_padding: bool = False
    hidden_act: str = "gelu"
    dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    attention_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    final_layer_norm: bool = True
    embedding_scale: float | int = 1.0
    initializer_range: float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        is_saved, size, heads = self.transformers_version is not None, self.hidden_size, self.num_attention_heads
        head_dim, path = kwargs.get("head_dim"), kwargs.pop("_read_from", kwargs.get("name_or_path"))
        if is_saved and isinstance(head_dim, int) and head_dim * heads != size:
            raise ValueError(f"head_dim={head_dim} contradicts hidden_size={size} / num_attention_heads={heads}.")
        self._refuse_near_misses(kwargs, is_saved)
        self.segment_lengths = list(self.segment_lengths)
        self.dilation_rates = list(self.dilation_rates)
        self.query_rates = None if self.query_rates is None else list(self.query_rates)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        labels = kwargs.get("num_labels")
        if isinstance(labels, int) and labels > MOST_LABELS:  # Transformers names each of them
            raise ValueError(f"num_labels={labels} must be at most {MOST_LABELS}.")
        if not type(self).__module__.startswith("transformers_modules."):
            # What names code of the file's folder, which is not running here, must not reach a folder saved from here.
            kwargs = {key: value for key, value in kwargs.items() if key not in ("auto_map", "custom_pipelines")}
        where = [f"the config of {path}"] if path else ["LongNetConfig", "has a value of the wrong kind"]
        with refusing_damage(*where):
            kwargs["auto_map"] = self.auto_classes | (kwargs.get("auto_map") or {})
            super().__post_init__(**kwargs)
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"dtype={self.dtype!r}: give a dtype of PyTorch or its name, such as 'float32'.")

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Read the file as in Transformers; raise ValueError if it holds no JSON object."""
        with refusing_damage(f"the config of {pretrained_model_name_or_path}"):
            found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            return found | {"_read_from": pretrained_model_name_or_path}, unused  # which `__post_init__` takes out

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in Transformers, but check the overrides of `from_pretrained`, which it ignores or sets unchecked."""
        cls._refuse_near_misses(kwargs)
        with refusing_damage("the config"):
            loaded = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).validate()
        return loaded

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """As in Transformers, but an interrupted save leaves the former files in place."""
        # The folder gets its own code, and no longer names that of another repository ("OWNER/NAME--").
        here = {name: code for name, code in (self.auto_map or {}).items() if "--" not in str(code)}
        self.auto_map = self.auto_classes | here
        if pipelines := getattr(self, "custom_pipelines", None):
            self.custom_pipelines = {name: x for name, x in pipelines.items() if "--" not in str(x)}
        if push_to_hub:  # the upload reads the folder itself
            return super().save_pretrained(save_directory, push_to_hub, **kwargs)
        with merging(Path(save_directory)) as scratch:
            super().save_pretrained(scratch, **kwargs)

    @classmethod
    def for_context(cls, length: int, *, effort: int = 1024, num_attention_heads: int = 12, paper=False, **fields):
        """Return a configuration whose pattern suits sequences of `length` tokens; print the pattern and its cost.

        At least half of the effort goes into a window. The rest goes in equal parts into branches of every second
        layer, whose segments grow, by factors of at most 16, until one holds the sequence. Every query sees one key in
        r of a branch, the last of each r tokens, which has read the others; in causal models no key counts twice. Any
        two tokens are then connected by a few layers, and the work grows with L log L. If the effort allows dense
        attention, you get that.

        Args:
            length: tokens of the sequences.
            effort: mean number of keys that a query may see per head and layer; dense attention is `length / 2`, in a
                bidirectional model `length`.
            num_attention_heads, fields: as in the constructor, but positions are "rope" by default (for any length).
                branch_layer_period=1 gives every layer branches; the default is 2.
            paper: branches of the paper's kind instead: the first is dense, then segments and rates grow by 4, each
                adds a quarter of the work of the one before, and any two tokens share a segment. Rates stop at the
                number of key/value heads, so that some head keeps each token.

        Raises:
            ValueError: the effort is too small for this length (and number of heads); the message gives the least one.
        """
        for key in fields:
            if key in Pattern._fields and key != "branch_layer_period":
                raise TypeError(f"for_context chooses {key}; to set it, give LongNetConfig the whole pattern.")
            close = difflib.get_close_matches(key, ("effort", "length", "paper"), n=1, cutoff=0.75)
            if close and not hasattr(cls, key):
                raise TypeError(f"for_context has no argument {key!r}; did you mean {close[0]!r}?")
        heads = fields.get("num_key_value_heads") or num_attention_heads
        fields = {"position_embedding": "rope", "num_attention_heads": num_attention_heads} | fields
        if not (isinstance(length, int) and isinstance(effort, int) and length >= 1 and effort >= 1):
            raise ValueError(f"length={length!r}, effort={effort!r}: both must be whole numbers of at least 1.")
        layers = fields.get("num_hidden_layers", cls.num_hidden_layers)
        period = _check_period(1 if paper else fields.pop("branch_layer_period", None), layers)
        is_causal = fields.get("is_causal", True)
        both = 1 if is_causal else 2  # a bidirectional query sees keys on both sides, twice what is counted
        if paper:
            segments = [1 << n for n in range(4, max(5, (length - 1).bit_length() + 1))]
            patterns = [Pattern(*map(tuple, _growing_branches(first, length, heads))) for first in segments]
        else:
            patterns = _window_patterns(length, is_causal, period)
        effort = effort / both
        work = [pattern.count_work(length, layers) for pattern in patterns]
        if effort < min(work):
            raise ValueError(
                f"effort={effort * both:.0f} is too small for length={length}"
                f"{f' with {heads} key/value heads' if paper else ''}: the least is {math.ceil(min(work) * both)}. "
                f"Give more effort{' or more heads' if paper else ''}."
            )
        able = ((w, p) for w, p in zip(work, patterns, strict=True) if w <= effort)
        _, pattern = max(able, key=lambda x: (not x[1].window_size, x[0]))
        if pattern.window_size:
            pattern = _widen_window(pattern, length, effort, layers)
        keys = pattern.count_work(length, layers)
        print(
            f"'{pattern.write()}': {pattern.describe(is_causal)} On average {keys * both:.0f} keys per head "
            f"(effort {effort * both:.0f}; dense {length / 2 * both:.0f})."
        )
        return cls(**{name: x for name, x in pattern._asdict().items() if x is not None} | fields)

    @classmethod
    def _refuse_near_misses(cls, kwargs: dict, is_saved: bool = False) -> None:
        """Raise ValueError on a misspelt or read-only field: Transformers sets unknown keywords as attributes.

        A saved config, which names its Transformers version, must load whatever other tools added: only warn, and drop
        what cannot be set.
        """
        own = [field.name for field in fields(cls)]
        for key in list(kwargs):
            close = difflib.get_close_matches(key, own, n=1, cutoff=0.85)
            meant = OTHER_NAMES.get(key) or (close[0] if close else None)
            is_read_only = getattr(inspect.getattr_static(cls, key, None), "fset", key) is None
            if key in OTHER_NAMES or is_read_only or (meant and not hasattr(cls, key)):
                hint = f"did you mean {meant!r}?" if meant else "it follows from the others."
                message = f"LongNetConfig has no field {key!r}; {hint}"
                if not is_saved:
                    raise ValueError(message)
                logger.warning("%s The saved value is not used.", message)
                if is_read_only:
                    del kwargs[key]

    def validate_architecture(self):
        """Check sizes, branches and names, after every construction and before saving."""
        sizes = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        self._check_numbers(sizes, lambda size: size >= 1, "must be at least 1")
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} must be at most {MOST_LAYERS}.")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={heads}.")
        if groups < 1 or heads % groups:
            raise ValueError(f"num_key_value_heads={groups} must be a divisor of num_attention_heads={heads}.")
        pad, size = self.pad_token_id, self.vocab_size
        if pad is not None and size is not None and not 0 <= pad < size:
            raise ValueError(f"pad_token_id={pad} must be an id below vocab_size={size}, or None.")
        pattern = Pattern.of(self)
        pattern.check(self.is_causal, self.num_hidden_layers)
        if self.attend_zero_padding and pattern.beyond:
            raise ValueError(
                "attend_zero_padding=True is for checkpoints of the released implementation, which has only the "
                f"paper's pattern: leave out {', '.join(Pattern._fields[3:])}."
            )
        self._check_name("position_embedding", POSITION_EMBEDDINGS)
        self._check_name("attention_backend", [name for name in backend_names() if name != "eager"])
        self._check_name("hidden_act", ACT2FN)
        if self.attend_zero_padding and self.is_causal:
            raise ValueError("attend_zero_padding=True needs is_causal=False: no causal query sees the padding.")

    def validate_numbers(self):
        """Check probabilities and scales."""
        probabilities = "dropout", "activation_dropout", "drop_path_rate"
        self._check_numbers(probabilities, lambda p: 0 <= p < 1, "must be a probability, 0 <= p < 1")
        scales = "xpos_scale_base", "rope_theta", "layer_norm_eps", "embedding_scale", "initializer_range"
        self._check_numbers(scales, lambda scale: 0 < scale < math.inf, "must be above 0 and finite")
        if self.attention_dropout != 0:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} must be 0; use dropout or activation_dropout."
            )

    def validate_positions(self):
        """Check that dimensions pair up to rotate, and that xPos scales fit float32 over one period."""
        if self.position_embedding == "none":
            return
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} / num_attention_heads={self.num_attention_heads} = {self.head_dim} "
                f"dimensions per head must be even, as position_embedding={self.position_embedding!r} rotates pairs."
            )
        if self.position_embedding == "xpos" and self.position_period == LONGEST_SEGMENT:
            raise ValueError(
                'position_embedding="xpos" scales by positions that must repeat, and with window_size or '
                'stagger_segments they never do; use position_embedding="rope".'
            )
        if self.position_embedding == "xpos" and self.smallest_xpos_scale_base() > self.xpos_scale_base:
            raise ValueError(
                f"xpos_scale_base={self.xpos_scale_base} is too small for segments {self.segment_lengths} (positions "
                f"repeat every {self.position_period} tokens): its scales overflow float32. A trained model needs its "
                "own base, so give it shorter segments. A new one may take xpos_scale_base="
                f'{self.smallest_xpos_scale_base()} or more, or position_embedding="rope".'
            )

    def _check_numbers(self, names: Iterable[str], is_allowed: Callable[[float], bool], rule: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not is_allowed(value):
                raise ValueError(f"{name}={value} {rule}.")
            if isinstance(value, int) and value > LARGEST_INTEGER:
                raise ValueError(f"{name}={value} must be at most {LARGEST_INTEGER}, the largest int64.")

    def _check_name(self, field: str, allowed: Iterable[str]) -> None:
        value = getattr(self, field)
        if value not in allowed:
            raise ValueError(f"{field}={value!r}: allowed are {', '.join(map(repr, allowed))}.")

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """Modules that `from_pretrained(distributed_config=DistributedConfig(fsdp_size=...))` shards as units."""
        plan = {"embed_tokens": "free_full_weight", "layers.*": "free_full_weight", "layer_norm": "keep_full_weight"}
        absent = {"embed_tokens"} if self.vocab_size is None else set()
        absent |= set() if self.final_layer_norm else {"layer_norm"}
        return {name: style for name, style in plan.items() if name not in absent}

    @property
    def head_dim(self) -> int:
        """Dimensions per head, D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def position_period(self) -> int:
        """Tokens after which positions may repeat: the least common multiple of the segment lengths.

        A query and its keys share a segment, so the modulo keeps their distance. Nested segments, as in the paper,
        repeat after the longest one. A window, or staggered segments, cross every such border: positions never repeat.
        """
        if self.window_size is not None or self.stagger_segments:
            return LONGEST_SEGMENT
        return math.lcm(*self.segment_lengths)

    @property
    def max_position_embeddings(self) -> int:
        """The number set for other tools, else the longest segment, or without branches the layers' windows in all."""
        # Stored under its own name, so that it is saved only if it was set and else follows the segments.
        tokens = self.__dict__.get("max_position_embeddings")
        if tokens is not None:
            return tokens
        return max(self.segment_lengths, default=0) or self.window_size * self.num_hidden_layers

    @max_position_embeddings.setter
    def max_position_embeddings(self, tokens: int | None) -> None:
        self.__dict__["max_position_embeddings"] = tokens

    def validate_max_position_embeddings(self):
        """Check the number that other tools read."""
        tokens = self.max_position_embeddings
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"max_position_embeddings={tokens!r} must be a number of tokens, at least 1, or None.")

    def smallest_xpos_scale_base(self, largest: float = FLOAT32_SCALE) -> int:
        """Return the least integer base whose scales over half a period stay below `largest`.

        These are zeta_0 ** (-period / 2 / base); zeta_0 = 0.4 / 1.4 is the fastest decay (arXiv 2212.10554, with
        TorchScale's gamma of 0.4).
        """
        tokens_per_base = 2 * math.log(largest) / math.log(1.4 / 0.4)
        return math.ceil(self.position_period / Fraction(tokens_per_base))  # the period may be beyond any float


__all__ = ["LongNetConfig"]
