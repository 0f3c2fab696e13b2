"""Which of Transformers' own tests fail or do not run for these models, and why.

`make test-transformers` fails when a listed test passes, when an unlisted one fails, when a test is skipped for an
unlisted reason, and when nothing is skipped for a listed one.
"""

import transformers

IS_OLDEST = transformers.__version__.startswith("5.17.")

# Tests that fail: "Class::test", the error, why.
FAILS = {
    "TestSlideEncoder::test_retain_grad_hidden_states_attentions": (
        AssertionError, "attention weights are computed beside the layers: no output depends on them"
    ),
    "TestSlideEncoder::test_model_get_set_embeddings": (AssertionError, "expects nn.Embedding; it is a projection"),
    "TestImageEncoder::test_model_get_set_embeddings": (AssertionError, "expects nn.Embedding; it is a projection"),
}  # fmt: skip

# Reasons, as regular expressions, for which the library itself skips tests of these models.
SKIPS = {
    "Model does not have a TP plan.": "sub-LN and head offsets need all features of a token",
    "Model does not have position embeddings": "no table of positions to resize",
    "Model does not support output_attentions": "reads the signature, where it is among **kwargs",
    "Model does not support sliding window mask": "segments, not windows",
    "Model is not a composite model.": "one model",
    "This model is not composite": "one model",
    "LongNet\\w+ does not support SDPA": "what the test of composite models says of one model",
    "LongNet\\w+ does not support grouped_mm": "no experts",
    "No conversion found for <class .*LongNet.*>": "checkpoints have the model's own names",
    "No decoder-only language modeling head to check": "encoders",
    "No model with a differentiable loss was available to verify enable_input_require_grads.*": "encoders: no loss",
    "No sequence-to-sequence language modeling head to check": "a decoder or an encoder, not both",
    "No subconfigs so the test does not make sense": "one configuration",
    "<class .*LongNet.*> has no axial RoPE layer defined.": "positions are of one axis",
    "This model does not support RoPE scaling": "positions repeat after the longest segment: nothing to scale",
    "This model doesn't use `inputs_embeds`": "slides and images",
    "test_resize_embeddings is set to `False`": "slides and images have no vocabulary",
    "No usage of the `capture_outputs` decorator.": "the slide encoder gives hidden states and weights itself",
    "Cannot capture hidden states, or cannot correctly set layer indices .*": "the same",
    "LongNet\\w+ (class )?has no _keep_in_fp32_modules n?or _keep_in_fp32_modules_strict attribute defined": (
        "positions are float32 or better by themselves"
    ),
}
if IS_OLDEST:
    SKIPS |= {"Not a prioritized model for now.": "needs a year of copyright in the configuration's file"}
else:
    SKIPS |= {
        "This model has no `base_model_class` defined in tester.": "the task heads: their backbone has these tests",
        "Do not take a cache as input to forward": "encoders",
        "Not returning cache or non standard Cache": "the bounded cache; tests/test_cache.py has both of its names",
        "No `_keep_in_fp32_modules_strict` defined": "positions are float32 or better by themselves",
        "This model does not have RoPE": "no `rope_parameters`: positions repeat after the longest segment",
        "This model has no sparse experts.": "no experts",
        "This model has no `output_router_logits` in its config.": "no experts",
        "Model does not have an expert parallel plan \\(base_model_ep_plan\\)": "no experts",
        "Model does not have a token-dispatch expert parallel plan": "no experts",
    }

# Likewise, for what the machine lacks; nothing need be skipped for these.
MACHINE = {
    "test requires (multiple )?accelerators?": "a GPU",
    "test requires Flash Attention( \\d)?": "the package, and a GPU",
    "test requires MPS": "a Mac",
    "test requires deepspeed": "the package, and a GPU",
    "test requires the kernels library": "kernels downloaded from the Hub",
    "test is slow": "hours of them; the one here needs a GPU too",
}

# Tests that request attention weights of every model: they run with the dense reference, which has them.
EAGER = ("test_capture_outputs_decorator", "test_model_outputs_equivalence")

# Settings of the library's test classes: value, why.
SETTINGS = {
    "test_can_init_all_missing_weights_before_2023": (True, "runs it without a year of copyright in our files"),
}


def set_config_for_less_flaky_test(config) -> None:
    """Stands in for the library's, which sets other models' fields too: LongNetConfig refuses to load those."""
    config.layer_norm_eps = 1.0
