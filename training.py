"""What the training scripts share: processes and device, seeds, EMA, the step, the run folder, resume.

All randomness of step n comes from (seed, n, rank) alone, and the data order from (seed, epoch). So the state
of a run is its weights, its optimiser and its step, and a run killed at any moment and resumed ends with the
same weights, bit for bit on a CPU, as one that was never killed. A run stopped by Ctrl-C or --minutes also
validates where it stops.
EMA  arXiv:2006.11239  App. B (decay 0.9999); the warm-up min(decay, (1 + n) / (10 + n)) is TensorFlow's
"""

import argparse
import atexit
import contextlib
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
from torch import nn
from tqdm import tqdm

import data
from command import BadInput, at_least_one, best_device
from files import read_json, replacing, save_safetensors, write_json

# Processes


@dataclass
class Distributed:
    """One process a GPU, started by torchrun; a plain start is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def average_gradients(self, params):
        """The mean over the ranks, in one collective."""
        if self.size == 1:
            return
        params = list(params)
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= self.size
        for p, g, part in zip(params, grads, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = g.copy_(part.view_as(p))  # into g, whose strides are p's: fused optimisers need that

    def mean(self, value: float):
        """The mean of a number over the ranks, on every rank; all must call it."""
        if self.size == 1:
            return value
        x = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(x)
        return x.item() / self.size

    def batch(self, n, batch_size, step, seed):
        """This rank's (batch_size,) indices below n of a step: its part of one batch_indices."""
        first = self.rank * batch_size
        return batch_indices(n, batch_size * self.size, step, seed)[first:first + batch_size]

    def barrier(self):
        if self.size > 1:
            dist.barrier()


def start(device="auto"):
    """The Distributed of this process. All ranks build equal weights from one seed: nothing is broadcast."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if size > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    device = best_device(device)
    if size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)  # an exit with an open group may abort other ranks
    return Distributed(rank, size, device)


def autocast(device):
    """bf16 where the GPU has it, float32 elsewhere.

    Casts are not cached: one made in self-conditioning's pass without gradient would be reused in the next.
    """
    enabled = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


# Seeds and order


def step_seed(*key):
    """A 63-bit seed for torch from integers and strings."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def seed_step(*key):
    """Seed torch's global generator (dropout); return a CPU generator for everything else in a step."""
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


# One step


class Batch:
    """Everything random of a step, by name: tensors or lists of one length, or None.

    It is drawn for the whole batch and then cut into parts, so the parts equal the whole.
    """

    def __init__(self, **fields):
        vars(self).update(fields)

    def __len__(self):
        return next(len(v) for v in vars(self).values() if v is not None)

    def __getitem__(self, part):
        return Batch(**{k: None if v is None else v[part] for k, v in vars(self).items()})

    def chunk(self, n):
        """At most n parts of equal length, the last one perhaps shorter."""
        return [self[part] for part in data.batches(len(self), math.ceil(len(self) / n))]


def train_step(loss_fn, batch, accumulate, params, opt, ema, world, factor):
    """One step of the optimiser on the mean of loss_fn(part) over a batch that passes in `accumulate` parts.

    Gradients are averaged over the ranks and clipped to norm 1; learning rates are multiplied by `factor`.
    Returns the loss of the batch (a tensor, without gradient) and the norm before clipping.
    """
    total = 0.0
    for part in batch.chunk(accumulate):
        loss = loss_fn(part) * len(part) / len(batch)
        loss.backward()
        total = total + loss.detach()
    world.average_gradients(params.values())
    norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
    opt.step(factor)
    if ema is not None:
        ema.update()
    return total, norm


def fixed_noise(n, shape, T):
    """(t (n,), eps (n, *shape)) of every validation, fixed so that steps compare; t is spread over [0, T)."""
    g = torch.Generator().manual_seed(0)
    t = (torch.arange(n) * T // n)[torch.randperm(n, generator=g)]
    return t, torch.randn(n, *shape, generator=g)


@torch.no_grad()
def validate(loss_fn, held_out, batch_size):
    """The mean of loss_fn over a held-out batch."""
    parts = [held_out[part] for part in data.batches(len(held_out), batch_size)]
    return sum(loss_fn(part).item() * len(part) for part in parts) / len(held_out)


class EMA:
    """Exponential moving average of named parameters: average <- decay average + (1 - decay) value."""

    def __init__(self, params: dict, decay):
        self.decay, self.params, self.step = decay, params, 0
        self.average = {k: p.detach().clone() for k, p in params.items()}

    @torch.no_grad()
    def update(self):
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        values = [p.detach() for p in self.params.values()]
        torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)
        self.step += 1

    @contextlib.contextmanager
    def applied(self):
        """Inside `with ema.applied():` the network holds the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self):
        for k, p in self.params.items():
            p.data, self.average[k] = self.average[k], p.data


# The run folder


class Run:
    """runs/NAME/: config.json, metrics.jsonl, samples/, last and best checkpoints; state.pt to resume from.

    settings must not change between two starts, except those named in FREE; inputs count by their hash, not
    by their path.
    """

    FREE = ("data", "captions", "vae", "init", "model", "prior", "cache", "text_device", "steps", "epochs",
            "minutes", "device", "log_every", "save_every", "shown", "sample_steps")

    def __init__(self, folder, settings: dict, fingerprint: str, world):
        self.folder, self.world, self.best = Path(folder), world, math.inf
        self.state_file = self.folder / "state.pt"
        settings = json.loads(json.dumps(settings, default=str))
        self.config = {"settings": settings, "data": fingerprint, "versions": versions(),
                       "commit": git_commit()}
        config_file = self.folder / "config.json"
        if config_file.exists():
            old = read_json(config_file)
            if not isinstance(old, dict) or not {"settings", "data"} <= old.keys():
                raise BadInput(f"{self.folder}: holds something else than a training run; give another --out")
            for key in sorted(settings.keys() | old["settings"].keys()):
                was, now = old["settings"].get(key), settings.get(key)
                if was != now and key not in self.FREE:
                    raise BadInput(f"{self.folder}: this run was started with {key}={was!r}, "
                                   f"now {key}={now!r}; give another --out")
            if old["data"] != fingerprint:
                raise BadInput(f"{self.folder}: this run was started on other data "
                               f"({old['data']}, now {fingerprint})")
        if world.is_main:
            (self.folder / "samples").mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob(".*.*.*"):  # left by a kill (files.replacing)
                unfinished.unlink()
            write_json(config_file, self.config)
        world.barrier()

    def restore(self, weights, opt, ema=None):
        """The step of the saved state, whose weights, averages and optimiser are put back; 0 for a new run.

        weights: tensors by name, filled in place. Lines of metrics.jsonl after that step are dropped, because
        the resumed run writes them again.
        """
        state = None
        if self.state_file.exists():
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        step = 0 if state is None else state["step"]
        if self.world.is_main:
            self._cut_log(step)
        if state is not None:
            self.best = state["best"]
            for k, tensor in weights.items():
                tensor.data.copy_(state["weights"][k])
            for k in ema.average if ema else ():
                ema.average[k].copy_(state["ema"][k])
            opt.load_state_dict(state["optimiser"])
        if ema:
            ema.step = step
        return step

    def save_progress(self, step, weights, opt, ema=None):
        """What restore puts back."""
        if not self.world.is_main:
            return
        state = {"step": step, "best": self.best, "optimiser": opt.state_dict(), "ema": ema and ema.average,
                 "weights": {k: tensor.detach() for k, tensor in weights.items()}}
        with replacing(self.state_file) as tmp:
            torch.save(state, tmp)

    def keep(self, step, val_loss, save, **values):
        """Log a validation; save("last"), and save("best") if its loss is the lowest so far. Rank 0 saves."""
        self.log(step=step, val_loss=val_loss, **values)
        is_best = val_loss < self.best
        self.best = min(self.best, val_loss)
        if self.world.is_main:
            for name in ["best"] * is_best + ["last"]:
                save(name)

    def save_checkpoint(self, name, tensors, metadata):
        save_safetensors(self.folder / f"{name}.safetensors", tensors, metadata)

    def save_samples(self, step, images, columns=None):
        """samples/STEP.png, a sheet of uint8 images (n, 3, h, w)."""
        data.write_grid(self.folder / "samples" / f"{step:07d}.png", images, columns)

    def log(self, **values):
        """One line of metrics.jsonl; values are numbers."""
        if self.world.is_main:
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
                break  # the line that a kill left unfinished
        with replacing(path) as tmp:
            tmp.write_text("".join(kept), encoding="utf-8")


class Loop:
    """`for step in Loop(...)`: the steps from start, with a progress bar.

    It ends early, between two steps and on all ranks at once, after SIGINT (Ctrl-C), SIGTERM or `minutes`.
    """

    def __init__(self, name, start, steps, world, minutes=None):
        self.bar = tqdm(total=steps, initial=min(start, steps), desc=name, unit="step", dynamic_ncols=True,
                        disable=not world.is_main, mininterval=1.0 if sys.stderr.isatty() else 30.0)
        self.start, self.steps, self.world = start, steps, world
        self.deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.stopped_by, self.decided, self.ends = None, None, False

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
        """True in the last step of this process: time to save.

        The first call of a step decides for the step, in a collective that every rank must enter.
        """
        if step != self.decided:
            stop = self.stopped_by is not None or time.monotonic() > self.deadline
            self.decided, self.ends = step, self.world.mean(float(stop)) > 0 or step + 1 >= self.steps
        return self.ends

    def log(self, run, step, loss, **values):
        """A line of metrics.jsonl, and the loss next to the progress bar."""
        loss = self.world.mean(loss.item())
        run.log(step=step, loss=loss, **values)
        self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def finish(self):
        """Call it after everything is saved: a run stopped by a signal exits with that signal's status."""
        if self.stopped_by is not None:
            print("stopped and saved; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + self.stopped_by)


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def git_commit():
    try:
        here = Path(__file__).resolve().parent
        out = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True,
                             timeout=10)
        return out.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


# Flags


def add_flags(parser, presets):
    """Add the flags of every training script; returns flag(name, help, ...), which adds one with presets.

    presets: {name: {flag: value}}, the values of flags that are not given (fill_defaults).
    """
    def flag(name, text, **settings):
        values = {preset: settings_of[name] for preset, settings_of in presets.items() if name in settings_of}
        same = len({str(v) for v in values.values()}) == 1
        default = next(iter(values.values())) if same else ", ".join(f"{p} {v}" for p, v in values.items())
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=f"{text} ({default})", **settings)

    parser.add_argument("--data", required=True, help="data folder")
    parser.add_argument("--captions", help="captions file, when it is not the folder's own")
    parser.add_argument("--out", required=True, help="run folder; an existing run is resumed")
    flag("steps", "optimiser steps in all", type=int)
    flag("batch_size", "images a step and process", type=int)
    flag("lr", "learning rate after the warm-up", type=float)
    flag("warmup", "steps in which the learning rate rises to its value", type=int)
    flag("cosine", "let the learning rate fall to zero by half a cosine",
         action=argparse.BooleanOptionalAction)
    parser.add_argument("--accumulate", type=int, default=1,
                        help="parts in which a batch passes through the network")
    parser.add_argument("--minutes", type=float,
                        help="stop cleanly after this many minutes; the same command resumes")
    parser.add_argument("--seed", type=int, default=2204, help="of weights, order, noise")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of metrics.jsonl")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    return flag


def fill_defaults(args, settings: dict):
    """The values of flags that were not given."""
    for name, value in settings.items():
        if name not in args:
            setattr(args, name, value)
    counts = ("batch_size", "accumulate", "log_every", "save_every", "views", "join", "sample_steps")
    at_least_one(args, *(name for name in counts if name in args))


def read_data(args):
    """(records to train on, records to validate on, fingerprint) of --data."""
    records = data.read_folder(args.data, args.captions)
    train, val = data.split(records)
    if not val:
        raise BadInput(f"{args.data}: one image, expected at least 2: one to learn from, one to check")
    return train, val, data.fingerprint(records)
