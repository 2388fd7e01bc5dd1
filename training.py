"""What the training scripts share: ranks and device, seeds, learning rate, EMA, the run folder, resume.

All randomness of step n comes from (seed, n, rank) alone, and the data order from (seed, epoch). So the state of a run is its
weights, its optimiser and its step, and a run killed at any moment ends with the same weights, bit for bit on a CPU, as one
that was never killed. A run that is asked to stop, by Ctrl-C or --minutes, also validates where it stops.
EMA   arXiv:2006.11239  App. B (decay 0.9999); the warm-up min(decay, (1 + n) / (10 + n)) is TensorFlow's
Muon  arXiv:2502.16982  Sec. 2.1 Newton-Schulz orthogonalisation (Jordan et al. 2024), Sec. 2.2 the scale of the update
"""

import argparse
import atexit
import hashlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from weights import BadInput, best_device, read_json, replacing, save_safetensors, write_json

# Ranks


@dataclass
class Ranks:
    """One process a GPU, started by torchrun; a plain start is rank 0 of 1."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0

    def average_gradients(self, params):
        """The mean over the ranks, in one collective."""
        if self.world == 1:
            return
        params = list(params)
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        for p, g, part in zip(params, grads, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = g.copy_(part.view_as(p))  # into g, which lies in memory as p does: fused optimisers count on it

    def mean(self, value: float):
        """The mean of a number over the ranks: every rank calls it, every rank gets it."""
        if self.world == 1:
            return value
        x = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.item() / self.world

    def batch(self, n, batch_size, step, seed):
        """This rank's (batch_size,) indices below n of a step: the ranks share one batch_indices."""
        return batch_indices(n, batch_size * self.world, step, seed)[self.rank * batch_size:(self.rank + 1) * batch_size]

    def wait(self):
        if self.world > 1:
            dist.barrier()


def start_ranks(device="auto"):
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = best_device(device)
    if world > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)  # a rank that ends with the group still open may abort the others
    return Ranks(rank, world, device)


def autocast(device):
    """bf16 where the GPU has it, float32 elsewhere.

    Nothing is cached: a weight cast in the pass without gradient that self-conditioning makes would be used in the next one.
    """
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


# Seeds and order


def step_seed(*key):
    """A 63-bit seed for torch made of whole numbers and words."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def seed_step(*key):
    """Seed torch's global source (dropout) and return a CPU generator for everything else that this step draws."""
    torch.manual_seed(step_seed("global", *key))
    return torch.Generator().manual_seed(step_seed(*key))


def batch_indices(n, batch_size, step, seed):
    """The batch of a step: (batch_size,) indices below n, epoch after epoch, each epoch in its own order."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, dtype=np.int64)
    for epoch in np.unique(positions // n):
        order = np.random.default_rng([seed, int(epoch)]).permutation(n)
        here = positions // n == epoch
        out[here] = order[positions[here] % n]
    return torch.from_numpy(out)


def rate(step, warmup, steps=None):
    """Share of the learning rate: linear warm-up, then 1; with steps, half a cosine down to 0 there (SGDR, arXiv:1608.03983)."""
    share = min(1.0, (step + 1) / max(1, warmup))
    return share if steps is None else share * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def orthogonalise(x):
    """Matrices (n, rows, columns) with every singular value moved to about 1: five Newton-Schulz steps (Muon, Sec. 2.1).

    A step is x <- q x with q = 3.4445 - 4.7750 x x^T + 2.0315 (x x^T)^2. All q and x x^T commute, so the steps are
    taken on the small square matrices alone and the rectangular ones are multiplied once.
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
    """Nesterov momentum, orthogonalised: no direction of a weight matrix learns faster than another.

    For weights of two or more dimensions, convolutions as (out, in * h * w). The update has a root mean square of about
    0.2 lr, as AdamW's (Sec. 2.2), so that learning rates are alike. Weights of one shape go through in one batch.
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


class Optimisers:
    """AdamW for named parameters; with muon_lr, Muon for the weights of two or more dimensions among them.

    ends: prefixes of the names that stay with AdamW all the same: a network's first and last layer, and embeddings.
    """

    def __init__(self, params: dict, lr, muon_lr=None, ends=()):
        inner = [k for k, p in params.items() if muon_lr and p.ndim > 1 and not k.startswith(tuple(ends))]
        outer = [k for k in params if k not in set(inner)]
        self.parts = [torch.optim.AdamW([params[k] for k in outer], lr=lr, weight_decay=0.0, fused=True)]
        if inner:
            self.parts.append(Muon([params[k] for k in inner], lr=muon_lr))

    def step(self, rate):
        """One step at `rate` times the learning rates; the gradients are gone afterwards."""
        for opt in self.parts:
            for group in opt.param_groups:
                group["lr"] = rate * opt.defaults["lr"]
            opt.step()
            opt.zero_grad(set_to_none=True)

    def state_dict(self):
        return [opt.state_dict() for opt in self.parts]

    def load_state_dict(self, states):
        for opt, state in zip(self.parts, states, strict=True):
            opt.load_state_dict(state)


class EMA:
    """Exponential moving average of named parameters: avg <- decay avg + (1 - decay) value."""

    def __init__(self, params: dict, decay):
        self.decay, self.params = decay, params
        self.average = {k: p.detach().clone() for k, p in params.items()}

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.params.values()], 1 - decay)

    def swap(self):
        """Exchange the average and the live weights; a second call undoes it."""
        for k, p in self.params.items():
            p.data, self.average[k] = self.average[k], p.data


# The run folder


class Run:
    """runs/NAME/ with config.json, metrics.jsonl, samples/, last.safetensors, best.safetensors and state.pt (DESIGN.md 5)."""

    # Settings that may differ on a resume; what is read goes by its fingerprint, not by its path.
    FREE = ("data", "captions", "vae", "steps", "minutes", "device", "log_every", "save_every", "shown", "sample_steps")

    def __init__(self, folder, settings: dict, fingerprint: str, ranks):
        self.folder, self.ranks = Path(folder), ranks
        self.state_file = self.folder / "state.pt"
        settings = json.loads(json.dumps(settings, default=str))
        self.config = {"settings": settings, "data": fingerprint, "versions": versions(), "commit": git_commit()}
        config_file = self.folder / "config.json"
        if config_file.exists():
            old = read_json(config_file)
            if not isinstance(old, dict) or not {"settings", "data"} <= old.keys():
                raise BadInput(f"{self.folder}: holds something else than a training run; give another --out")
            for key in sorted(settings.keys() | old["settings"].keys()):
                was, now = old["settings"].get(key), settings.get(key)
                if was != now and key not in self.FREE:
                    raise BadInput(f"{self.folder}: this run was started with {key}={was!r}, now {key}={now!r}; give another --out")
            if old["data"] != fingerprint:
                raise BadInput(f"{self.folder}: this run was started on other data ({old['data']}, now {fingerprint})")
        if ranks.first:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            for half in self.folder.glob(".*.*.*"):  # files that a kill cut short (weights.replacing)
                half.unlink()
            write_json(config_file, self.config)
        ranks.wait()

    def resume(self):
        """The saved state, or None; lines of metrics.jsonl after its step are dropped, for they will be written again."""
        state = None
        if self.state_file.exists():
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        if self.ranks.first:
            self._cut_log(0 if state is None else state["step"])
        return state

    def restore(self, params, ema, opt):
        """(step, best validation loss) of the saved state, whose weights, averages and optimiser are put back; else (0, inf)."""
        state = self.resume()
        if state is None:
            return 0, math.inf
        for k, p in params.items():
            p.data.copy_(state["weights"][k])
            ema.average[k].copy_(state["ema"][k])
        opt.load_state_dict(state["optimiser"])
        return state["step"], state["best"]

    def save_progress(self, step, best, params, ema, opt):
        """What restore puts back."""
        self.save_state({"step": step, "best": best, "optimiser": opt.state_dict(), "ema": ema.average,
                         "weights": {k: p.detach() for k, p in params.items()}})

    def save_state(self, state: dict):
        if self.ranks.first:
            with replacing(self.state_file) as tmp:
                torch.save(state, tmp)

    def save_checkpoint(self, name, tensors, metadata):
        if self.ranks.first:
            save_safetensors(self.folder / f"{name}.safetensors", tensors, metadata)

    def log(self, **values):
        """One line of metrics.jsonl; values are numbers."""
        if self.ranks.first:
            line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")

    def _cut_log(self, step):
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                break  # the line that a kill cut short
        with replacing(path) as tmp:
            tmp.write_text("".join(kept), encoding="utf-8")


class Loop:
    """`for step in Loop(...)`: a progress bar over the steps left; ends early, between two steps, when the budget of minutes is
    spent or Ctrl-C or a termination was asked for, of all ranks at once. `step` counts from the resumed one."""

    def __init__(self, name, start, steps, ranks, minutes=None):
        self.bar = tqdm(total=steps, initial=min(start, steps), desc=name, unit="step", dynamic_ncols=True,
                        disable=not ranks.first, mininterval=1.0 if sys.stderr.isatty() else 30.0)
        self.start, self.steps, self.ranks = start, steps, ranks
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.stopped_by, self.asked, self.ends = None, None, False

    def __iter__(self):
        old = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in range(self.start, self.steps):
                yield step
                self.bar.update()
                if self.last(step):
                    break
        finally:
            self.bar.close()
            for s, handler in old.items():
                signal.signal(s, handler)

    def _stop(self, signum, frame):
        self.stopped_by = signum

    def last(self, step):
        """True in the last step that is made here: time to save. Decided once a step, by all ranks, for all who ask."""
        if step != self.asked:
            stop = self.stopped_by is not None or time.monotonic() > self.deadline
            self.asked, self.ends = step, self.ranks.mean(float(stop)) > 0 or step + 1 >= self.steps
        return self.ends

    def show(self, **values):
        self.bar.set_postfix(values, refresh=False)

    def finish(self):
        """After everything is saved: a run stopped by a signal leaves with that signal's status."""
        if self.stopped_by is not None:
            print("stopped and saved; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + self.stopped_by)


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def git_commit():
    try:
        here = Path(__file__).resolve().parent
        out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        return out.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def chosen_preset(argv, presets):
    """The --preset of a command line, by which the defaults of its other flags go."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--preset", choices=sorted(presets), default="tiny")
    return parser.parse_known_args(argv)[0].preset


def add_flags(parser, steps):
    """The flags that every training script has."""
    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--captions", help="captions file, when it is not the folder's own")
    parser.add_argument("--out", required=True, help="run folder; an existing run goes on")
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps in all")
    parser.add_argument("--minutes", type=float, help="stop cleanly after this many minutes; the same command goes on")
    parser.add_argument("--seed", type=int, default=2204, help="of weights, order, noise")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of metrics.jsonl")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")


def read_data(args):
    """(records to train on, records to validate on, fingerprint) of --data."""
    records = data.read_folder(args.data, args.captions)
    train, val = data.split(records)
    if not val:
        raise BadInput(f"{args.data}: one picture, expected at least 2: one to learn from, one to check")
    return train, val, data.fingerprint(records)


def check_flags(args, *names):
    """Counts of the command line that must be 1 or more, by attribute; log_every and save_every always."""
    for name in (*names, "log_every", "save_every"):
        if getattr(args, name) < 1:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1 or more")
