"""Muon for the matrices inside the blocks, AdamW for all other parameters, as one optimizer."""

import torch
from torch import nn


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) beside AdamW.

    Muon steps along the orthogonal matrix nearest to a matrix's momentum. A model trained from scratch needs fewer
    tokens with it than with AdamW. AdamW trains embeddings, output projection, norms and biases, without weight decay.

    Args:
        model: to train. Muon trains its matrices outside of embeddings and output projection.
        learning_rate, betas: of AdamW.
        muon_learning_rate: of Muon. An update has the root mean square 1 / sqrt(columns), whatever the size of the
            gradient.
        weight_decay: of Muon.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        learning_rate: float,
        muon_learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.1,
    ):
        outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        if model.get_output_embeddings() is not None:
            outer |= {id(p) for p in model.get_output_embeddings().parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        inner = [p for p in trained if p.dim() == 2 and id(p) not in outer]
        chosen = {id(p) for p in inner}
        rest = [p for p in trained if id(p) not in chosen]
        self.parts = [
            torch.optim.Muon(inner, lr=muon_learning_rate, weight_decay=weight_decay),
            torch.optim.AdamW(rest, lr=learning_rate, betas=betas, weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both parts use this optimizer's groups and state, which a checkpoint saves and restores."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._share()

    def step(self, closure=None):
        """Step both parts; `closure` computes the loss again, as in PyTorch's optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
