"""Cross-entropy in chunks of tokens, without all logits at once. Letters: T tokens, E features, V vocabulary."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .attention_autograd import register_operator
from .compat import transforms_are_active
from .dilated_attention import autocast_dtype

# Logits per chunk: enough tokens that adding to the head's gradient is cheap, few enough that a CPU reuses memory.
_MIN_TOKENS = 512
_CPU_LOGITS = 1 << 22
_CUDA_LOGITS = 1 << 27


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses. The forward pass also computes the gradients, while it holds the logits of a chunk."""

    @staticmethod
    def forward(hidden, targets, head, size, needs_hidden, *params):
        """Return the sum and the gradients of `hidden` (empty if not needed) and `params`."""
        total, grad_hidden = 0, torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)
        # At least float32: a sum of thousands of chunks in bfloat16 would lose most of its digits.
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
        for i, (part, target) in enumerate(zip(hidden.split(size), targets.split(size), strict=True)):
            with torch.enable_grad():
                part = part.detach().requires_grad_(needs_hidden)
                loss = _loss(head, part, target)
            total = total + loss.detach()
            grads = list(torch.autograd.grad(loss, [part, *params] if needs_hidden else params))
            if needs_hidden:
                grad_hidden[i * size : i * size + len(part)] = grads.pop(0)
            for running, grad in zip(sums, grads, strict=True):
                running += grad
        return total, grad_hidden, *sums

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, _, _, _, ctx.needs_hidden, *params = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(hidden, *params, *output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        count = len(ctx.saved_tensors) // 2
        pairs = zip(ctx.saved_tensors[count:], ctx.saved_tensors[:count], strict=True)
        hidden, *params = (_Scale.apply(grad, saved, x) for saved, x in pairs)
        return hidden if ctx.needs_hidden else None, None, None, None, None, *params


class _Scale(torch.autograd.Function):
    """The saved gradient times that of the loss, as its own function, so that a second derivative raises."""

    @staticmethod
    def forward(grad, saved, x):
        return (grad * saved).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            "the loss from labels has no second derivative: its gradients are computed in the forward pass. Set "
            "model.logits_with_labels = True, which computes the loss from the logits of every token."
        )


def _loss(head: Callable, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


def _sum(hidden: Tensor, targets: Tensor, head: Callable, size: int, params: Iterable[nn.Parameter]) -> Tensor:
    params = [p for p in params if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or params):
        return _ChunkedCrossEntropy.apply(hidden, targets, head, size, hidden.requires_grad, *params)[0]
    return _plain_sum(hidden, targets, head, size)


def _plain_sum(hidden: Tensor, targets: Tensor, head: Callable, size: int) -> Tensor:
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return sum(_loss(head, part, target) for part, target in parts)


def cross_entropy_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of losses from logits (T, V), cast in chunks; -100 is ignored. Differentiable repeatedly."""
    return _plain_sum(logits, targets, lambda x: x, _tokens_per_chunk(logits, logits.shape[-1]))


def tokens_per_chunk(hidden: Tensor, head: nn.Module) -> int:
    """Return how many tokens' logits to hold at a time, by the device of `hidden` (T, E) and the head's vocabulary."""
    return _tokens_per_chunk(hidden, getattr(head, "out_features", None) or head(hidden[:1]).shape[-1])


def _tokens_per_chunk(x: Tensor, vocabulary: int) -> int:
    return max(_MIN_TOKENS, (_CPU_LOGITS if x.device.type == "cpu" else _CUDA_LOGITS) // vocabulary)


def _linear_forward(hidden, targets, weight, bias, size, needed):
    """Return the sum of a linear head's losses and, where `needed`, the gradients of hidden, weight and bias."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    total, grad_hidden, *sums = _linear_fake(hidden, targets, weight, bias, size, needed)
    for x in (total, grad_hidden, *sums):
        x.zero_()
    weight, bias = (None if x is None else x.to(hidden.dtype) for x in (weight, bias))  # autocast: their dtypes differ
    for rows in (targets != -100).nonzero().flatten().split(size):
        part, target = hidden[rows], targets[rows, None]
        logits = nn.functional.linear(part, weight, bias).to(precise)
        lse = logits.logsumexp(1, keepdim=True)
        total += (lse - logits.gather(1, target)).sum()
        if any(needed):  # softmax - one_hot(target)
            grad = logits.sub_(lse).exp_().scatter_add_(1, target, -torch.ones_like(lse)).to(hidden.dtype)
        if needed[0]:
            grad_hidden[rows] = grad @ weight
        if needed[1]:
            sums[0] += grad.T @ part
        if needed[2]:
            sums[1] += grad.sum(0)
    return total, grad_hidden, *sums


def _linear_fake(hidden, targets, weight, bias, size, needed):
    precise = torch.promote_types(hidden.dtype, torch.float32)
    shapes = [x.shape if is_needed else 0 for x, is_needed in zip((hidden, weight, bias), needed, strict=True)]
    dtypes = hidden.dtype, precise, precise
    grads = (hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
    return hidden.new_empty((), dtype=precise), *grads


_linear_loss = register_operator(
    "linear_cross_entropy(Tensor hidden, Tensor targets, Tensor weight, Tensor? bias, SymInt size, bool[] needed) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _linear_forward,
    _linear_fake,
    reads_values=True,
)


class _LinearCrossEntropy(torch.autograd.Function):
    """`_ChunkedCrossEntropy` of a linear head as one operator: a compiled graph cannot differentiate a module."""

    @staticmethod
    def forward(hidden, targets, weight, bias, size, needed):
        return _linear_loss(hidden, targets, weight, bias, size, needed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.needed = inputs[5]
        hidden, _, *parameters = inputs[:4]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, *parameters)]

    @staticmethod
    def backward(ctx, grad, *_):
        grads = zip(ctx.saved_tensors, ctx.needed, ctx.dtypes, strict=True)
        hidden, weight, bias = ((grad * x).to(dtype) if needed else None for x, needed, dtype in grads)
        return hidden, None, weight, bias, None, None


def chunked_cross_entropy(hidden: Tensor, targets: Tensor, head: nn.Module, ignore_index: int = -100) -> Tensor:
    """Return the sum of -log softmax(head(hidden))[target] over the tokens whose target is not `ignore_index`.

    Forward and backward pass hold the logits of one chunk of tokens at a time. Nothing is computed twice.

    Args:
        hidden: (T, E). targets: (T,) int64. head: the output projection, any module (T, E) -> (T, V).

    Returns:
        A scalar in at least float32, differentiable once in `hidden` and the head's parameters.
    """
    # Hooks and other heads (adapters, quantized weights, FSDP2) cause a graph break instead.
    hooks = head._forward_pre_hooks, head._forward_hooks, head._backward_pre_hooks, head._backward_hooks
    is_plain = type(head) is nn.Linear and not any(hooks) and type(head.weight) is nn.Parameter
    dtype = autocast_dtype(hidden)
    if not torch.compiler.is_compiling() or not is_plain or dtype == hidden.dtype != head.weight.dtype:
        return _chunked_cross_entropy(hidden, targets, head, ignore_index)
    targets, given = targets.masked_fill(targets == ignore_index, -100), [hidden.to(dtype), head.weight, head.bias]
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in given]
    return _LinearCrossEntropy.apply(given[0], targets, *given[1:], tokens_per_chunk(hidden, head), needed)[0]


@torch.compiler.disable
def _chunked_cross_entropy(hidden: Tensor, targets: Tensor, head: nn.Module, ignore_index: int) -> Tensor:
    if transforms_are_active():  # vmap allows no selection of tokens, and differentiates by itself
        return cross_entropy_of_logits(head(hidden), targets.masked_fill(targets == ignore_index, -100))
    keep = targets != ignore_index
    if not keep.is_meta and not keep.all():
        hidden, targets = hidden[keep], targets[keep]
    forward, size, is_replaced = head.forward, tokens_per_chunk(hidden, head), "forward" in vars(head)
    # The head's hooks run once, around all chunks: FSDP2 gathers, reduces and frees its parameters in them.
    head.forward = lambda x: _sum(x, targets, forward, size, head.parameters())
    try:
        return head(hidden)
    finally:
        del head.forward
        if is_replaced:
            head.forward = forward
