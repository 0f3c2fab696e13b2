"""Cross-entropy of a language model without the logits of the whole sequence.

Letters: T tokens, E features, V vocabulary.
"""

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
    def forward(ctx, hidden, targets, head, size, *params):
        wanted = [p for p, needed in zip(params, ctx.needs_input_grad[4:], strict=True) if needed]
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # In at least float32: thousands of chunks added up in bfloat16 would lose most of their digits.
        grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in wanted]
        for i, (part, target) in enumerate(zip(hidden.split(size), targets.split(size), strict=True)):
            with torch.set_grad_enabled(grad_hidden is not None or bool(wanted)):
                part = part.detach().requires_grad_(grad_hidden is not None)
                logits = head(part)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                loss = nn.functional.cross_entropy(logits, target, reduction="sum")
            total += loss.detach()
            inputs = ([part] if grad_hidden is not None else []) + wanted
            found = list(torch.autograd.grad(loss, inputs)) if inputs else []
            if grad_hidden is not None:
                grad_hidden[i * size : i * size + len(part)] = found.pop(0)
            for grad, new in zip(grads, found, strict=True):
                grad += new
        ctx.grads, ctx.dtypes = (grad_hidden, grads), [p.dtype for p in wanted]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_hidden, grads = ctx.grads
        grads = ((grad * g).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        params = [next(grads) if needed else None for needed in ctx.needs_input_grad[4:]]
        return None if grad_hidden is None else grad * grad_hidden, None, None, None, *params


def _tokens_per_chunk(hidden: Tensor, head: nn.Module) -> int:
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
    forward, size, is_replaced = head.forward, _tokens_per_chunk(hidden, head), "forward" in vars(head)
    # The head's hooks run once, around all chunks: in them FSDP2 gathers, reduces and frees its parameters.
    head.forward = lambda x: _ChunkedCrossEntropy.apply(x, targets, forward, size, *head.parameters())
    try:
        return head(hidden)
    finally:
        del head.forward
        if is_replaced:
            head.forward = forward
