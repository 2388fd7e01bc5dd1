"""A training step as a CUDA graph."""

import torch


class Recorded:
    """The loss of a batch and its backward pass as a CUDA graph: one launch instead of thousands.

    A training step of the paper's U-Net launches its kernels more slowly than a large GPU runs them. A batch
    of new shapes runs a few times and is recorded, later ones are copied into the first one's place.
    """

    def __init__(self, objective, params, scaler):
        self.objective, self.params, self.scaler, self.graphs = objective, list(params), scaler, {}

    def __call__(self, batch, weight):
        """weight * objective.loss(batch), without gradient; its scaled gradient is added to the params'."""
        fields = vars(batch)
        key = weight, *((k, v.shape if isinstance(v, torch.Tensor) else tuple(v)) for k, v in fields.items())
        if key not in self.graphs:
            self.graphs[key] = self._record(batch, weight)
        graph, own, loss = self.graphs[key]
        for name, tensor in fields.items():
            if isinstance(tensor, torch.Tensor):
                getattr(own, name).copy_(tensor)
        graph.replay()
        return loss.clone()

    def _record(self, batch, weight):
        own = type(batch)(**{k: v.clone() if isinstance(v, torch.Tensor) else v
                             for k, v in vars(batch).items()})
        before = [None if p.grad is None else p.grad.clone() for p in self.params]
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries choose their kernels and take their memory
                for _ in range(3):
                    self.scaler.scale(weight * self.objective.loss(own)).backward()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = weight * self.objective.loss(own)
                self.scaler.scale(loss).backward()  # by a tensor that changes in place, not by a number
        finally:
            for p, grad in zip(self.params, before, strict=True):
                if p.grad is not None:
                    p.grad.zero_() if grad is None else p.grad.copy_(grad)
        return graph, own, loss.detach()
