"""Optimisers and the learning rate: AdamW, Muon for the inner weight matrices, warm-up and cosine.

SGDR  arXiv:1608.03983  half a cosine
Muon  arXiv:2502.16982  Sec. 2.1 Newton-Schulz orthogonalisation (Jordan et al. 2024), Sec. 2.2 update scale
"""

import math

import torch


def lr_factor(step, warmup, steps=None):
    """Multiplier of the base learning rate: linear warm-up, then 1; with steps, half a cosine to 0 (SGDR)."""
    factor = min(1.0, (step + 1) / max(1, warmup))
    return factor if steps is None else factor * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def orthogonalise(x):
    """Matrices (n, rows, columns) with all singular values moved to about 1 by five Newton-Schulz steps.

    A step is x <- q x with q = 3.4445 - 4.7750 x x^T + 2.0315 (x x^T)^2 (Muon, Sec. 2.1). All q and x x^T
    commute, so the steps are taken on the small square matrices and the rectangular ones are multiplied once.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram, product, eye = x @ x.mT, None, torch.eye(x.shape[1], device=x.device)
    for step in range(5):
        q = 3.4445 * eye + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        product = q if product is None else q @ product
        if step < 4:
            gram = q @ (q @ gram)
    return product @ x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update is replaced by its nearest orthogonal matrix.

    All its singular values become about 1. For weights of two or more dimensions, convolutions as
    (out, in * h * w). The update has a root mean square of about 0.2 lr, as AdamW's (Sec. 2.2), so that
    learning rates are alike. Weights of one shape are orthogonalised in one batch.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum, by_shape = group["momentum"], {}
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                matrix = p.grad.lerp(state["momentum"], momentum).flatten(1)
                by_shape.setdefault(matrix.shape, []).append((p, matrix))
            for shape, items in by_shape.items():
                updates = orthogonalise(torch.stack([matrix for _, matrix in items]))
                for (p, _), update in zip(items, updates, strict=True):
                    p.add_(update.view_as(p), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


class Optimizers:
    """AdamW for named parameters; with muon_lr, Muon for the weights of two or more dimensions among them.

    adamw_only: prefixes of names that stay with AdamW nevertheless: first and last layers, a text encoder.
    """

    def __init__(self, params: dict, lr, muon_lr=None, adamw_only=()):
        inner = [k for k, p in params.items()
                 if muon_lr and p.ndim > 1 and not k.startswith(tuple(adamw_only))]
        outer = [k for k in params if k not in set(inner)]
        self.parts = [torch.optim.AdamW([params[k] for k in outer], lr=lr, weight_decay=0.0, fused=True)]
        if inner:
            self.parts.append(Muon([params[k] for k in inner], lr=muon_lr))

    @property
    def param_groups(self):
        """Of all, where torch.amp.GradScaler looks for gradients."""
        return [group for opt in self.parts for group in opt.param_groups]

    def step(self, factor):
        """One step at `factor` times the base learning rates."""
        for opt in self.parts:
            for group in opt.param_groups:
                group["lr"] = factor * opt.defaults["lr"]
            opt.step()

    def zero_grad(self, set_to_none=True):
        for opt in self.parts:
            opt.zero_grad(set_to_none)

    def state_dict(self):
        return [opt.state_dict() for opt in self.parts]

    def load_state_dict(self, states):
        for opt, state in zip(self.parts, states, strict=True):
            opt.load_state_dict(state)
