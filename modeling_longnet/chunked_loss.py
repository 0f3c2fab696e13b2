"""Cross-entropy of a language model without the logits of the whole sequence.

Letters: T tokens, E features, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Logits of one chunk: enough tokens that adding up the head's gradient (V x E) is cheap beside computing it, and
# a block that stays in reused memory on a CPU.
_MIN_TOKENS = 512
_CPU_LOGITS = 1 << 22
_CUDA_LOGITS = 1 << 27


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses; gradients are taken chunk by chunk during the forward pass, where the logits are."""

    @staticmethod
    def forward(hidden, targets, head, size, needed, *params):
        """Total, and the gradients of `hidden` and `params`; an empty tensor for each that is not `needed`."""
        wanted = [p for p, is_needed in zip(params, needed[1:], strict=True) if is_needed]
        total = _zero(hidden)
        grad_hidden = torch.empty_like(hidden) if needed[0] else hidden.new_empty(0)
        # In at least float32: thousands of chunks added up in bfloat16 would lose most of their digits.
        grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
        for i, (part, target) in enumerate(zip(hidden.split(size), targets.split(size), strict=True)):
            with torch.enable_grad():
                part = part.detach().requires_grad_(needed[0])
                loss = _loss(head, part, target)
            total += loss.detach()
            found = list(torch.autograd.grad(loss, ([part] if needed[0] else []) + wanted))
            if needed[0]:
                grad_hidden[i * size : i * size + len(part)] = found.pop(0)
            for grad, new in zip(grads, found, strict=True):
                grad += new
        grads = iter(grads)
        return total, grad_hidden, *(next(grads) if is_needed else p.new_empty(0)
                                     for p, is_needed in zip(params, needed[1:], strict=True))  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, _, _, _, ctx.needed, *params = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(hidden, *params, *output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        inputs, grads = ctx.saved_tensors[: len(ctx.needed)], ctx.saved_tensors[len(ctx.needed) :]
        scaled = [
            _Scaled.apply(grad, g, x) if needed else None
            for x, g, needed in zip(inputs, grads, ctx.needed, strict=True)
        ]
        return scaled[0], None, None, None, None, *scaled[1:]


class _Scaled(torch.autograd.Function):
    """The gradients as a function of their own, so that a second derivative is refused by name."""

    @staticmethod
    def forward(grad, kept, x):
        return (grad * kept).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError(
            "the loss of labels has no second derivative: its gradients are taken where the logits are. Leave labels "
            "out and take the cross-entropy of the logits instead."
        )


def _zero(hidden: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)


def _loss(head: Callable, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, targets, reduction="sum")


def _sum(hidden: Tensor, targets: Tensor, head: Callable, size: int, params: tuple[nn.Parameter, ...]) -> Tensor:
    needed = tuple(x.requires_grad and torch.is_grad_enabled() for x in (hidden, *params))
    if any(needed):
        return _ChunkedCrossEntropy.apply(hidden, targets, head, size, needed, *params)[0]
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return sum((_loss(head, part, target) for part, target in parts), _zero(hidden))


def tokens_per_chunk(hidden: Tensor, head: nn.Module) -> int:
    """Tokens whose logits are held at a time: (T, E) `hidden` tells the device, `head` the vocabulary."""
    vocabulary = getattr(head, "out_features", None) or head(hidden[:1]).shape[-1]
    return max(_MIN_TOKENS, (_CPU_LOGITS if hidden.device.type == "cpu" else _CUDA_LOGITS) // vocabulary)


@torch.compiler.disable
def chunked_cross_entropy(hidden: Tensor, targets: Tensor, head: nn.Module, ignore_index: int = -100) -> Tensor:
    """Sum of -log softmax(head(hidden))[target] over the tokens whose target is not `ignore_index`.

    Forward and backward hold the logits of one chunk of tokens at a time; nothing is computed twice.

    Args:
        hidden: (T, E). targets: (T,) int64. head: the output projection, any module (T, E) -> (T, V).

    Returns:
        A scalar in at least float32, differentiable once in `hidden` and the head's parameters.
    """
    keep = targets != ignore_index
    if not keep.all():
        hidden, targets = hidden[keep], targets[keep]
    forward, size, is_replaced = head.forward, tokens_per_chunk(hidden, head), "forward" in vars(head)
    # The head's hooks run once, around all chunks: in them FSDP2 gathers, reduces and frees its parameters.
    head.forward = lambda x: _sum(x, targets, forward, size, tuple(head.parameters()))
    try:
        return head(hidden)
    finally:
        del head.forward
        if is_replaced:
            head.forward = forward
